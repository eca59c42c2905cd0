"""A draw of x given x_t in two evaluations: closed forms, its kernels, files, and what is refused."""

import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx

from numpyro_diffusion import checkpoint
from numpyro_diffusion.denoise import FromFunction, Gaussian, GaussianMixture, NetworkDenoiser, reschedule
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionPCN, SplitGibbs
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE, VP
from numpyro_diffusion.solve import (
    Adams,
    Ancestral,
    FlowMap,
    GivenMap,
    draw_given,
    evaluations_given,
    flow_given,
)
from numpyro_diffusion.train import distill_given, given_quality

MEAN = jnp.array([1.0, -2.0])
ROUND = Gaussian(MEAN, 4.0, VE(0.02, 40.0))
SOLVER = Adams(24)
STUDENT = MLP((6,), features=16, num_blocks=1, rngs=nnx.Rngs(0))
UNTRAINED = GivenMap(NetworkDenoiser(STUDENT, target="x0"), (2,))
QUICK = {"num_pairs": 1000, "num_steps": 200, "batch_size": 128, "num_test_draws": 300, "progress_bar": False}


def perturbed(size=0.3):
    """A map whose network's output is not zero."""
    keys, network = iter(jax.random.split(jax.random.key(5), 100)), UNTRAINED.network
    params = jax.tree.map(lambda w: w + size * jax.random.normal(next(keys), w.shape), network.params)
    return UNTRAINED.with_network(network.with_params(params))


@jax.jit
def mapped(given_map, denoiser, x_t, t, z):
    return jax.vmap(lambda z: flow_given(given_map, denoiser, x_t, t, z))(z)


@pytest.mark.parametrize("denoiser", [ROUND, reschedule(ROUND, VP())], ids=["VE", "VP"])
def test_before_training_it_is_bayes_for_an_isotropic_gaussian(denoiser):
    """Mean and deviation of N(m, s^2) given u at level L, at any level and under any schedule."""
    z, u = jax.random.normal(jax.random.key(0), (5, 2)), np.array([2.5, 0.3])
    for level in (0.05, 1.0, 20.0):
        t = denoiser.schedule.inverse_noise_level(level)
        mean = MEAN + 4.0 / (4.0 + level**2) * (u - MEAN)
        expected = mean + np.sqrt(4.0 * level**2 / (4.0 + level**2)) * z
        np.testing.assert_allclose(
            mapped(UNTRAINED, denoiser, denoiser.schedule.alpha(t) * u, t, z), expected, atol=1e-3
        )


def test_a_second_look_leaves_the_law_as_it_is():
    """The untrained map is right for an isotropic Gaussian, and so are draws that look again, at any two levels."""
    u, keys = np.array([2.5, 0.3]), jax.random.split(jax.random.key(9), 20_000)
    draw = jax.jit(lambda m, x_t, t: jax.vmap(lambda key: draw_given(m, ROUND, x_t, t, key))(keys))
    for again, level in ((0.2, 3.0), (0.2, 0.1), (2.0, 1.0)):
        x = draw(UNTRAINED.with_second_look(again), jnp.array(u), ROUND.schedule.inverse_noise_level(level))
        variance = 4.0 * level**2 / (4.0 + level**2)
        error = np.sqrt(variance / len(keys))
        np.testing.assert_allclose(x.mean(0), MEAN + 4.0 / (4.0 + level**2) * (u - MEAN), atol=4.0 * error)
        np.testing.assert_allclose(x.var(0) / variance, 1.0, atol=4.0 * np.sqrt(2.0 / len(keys)))
        first = draw(UNTRAINED, jnp.array(u), ROUND.schedule.inverse_noise_level(level))
        kept = np.corrcoef(first[:, 0], x[:, 0])[0, 1]  # of the first draw, that the look at it has left
        np.testing.assert_allclose(kept, variance / (variance + 4.0 * again**2), atol=4.0 / np.sqrt(len(keys)))


def test_at_a_small_level_the_network_counts_for_little():
    """Its part is of the second order in the level: a tenth of the level, a hundredth of the difference."""
    z, u, far = jax.random.normal(jax.random.key(1), (20, 2)), jnp.array([2.5, 0.3]), []
    for level in (0.4, 0.04):
        t = ROUND.schedule.inverse_noise_level(level)
        with_network, without = (mapped(m, ROUND, u, t, z) for m in (perturbed(), UNTRAINED))
        far.append(float(jnp.sqrt(jnp.mean((with_network - without) ** 2))))
    assert far[0] > 1e-3 and 0.003 < far[1] / far[0] < 0.03


def test_quality_in_closed_form():
    """Variances 1 and 9, the map that of their mean: rms error and variance at every level; where it is right."""
    variances = np.array([1.0, 9.0])
    denoiser = Gaussian(MEAN, np.diag(variances), VE(0.02, 40.0))
    quality = given_quality(jax.random.key(2), UNTRAINED, denoiser, SOLVER, 1000)
    level = quality.levels[:, None] * float(denoiser.scale)
    np.testing.assert_allclose(level[[0, -1], 0], [0.02, 40.0], rtol=1e-4)
    deviation = np.sqrt(variances * level**2 / (variances + level**2))
    mine = np.sqrt(5.0 * level**2 / (5.0 + level**2))
    np.testing.assert_allclose(quality.variance, 2.0 * mine[:, 0] ** 2 / (deviation**2).sum(1), rtol=0.12)
    rms = np.sqrt(((deviation - mine) ** 2).sum(1) / (deviation**2).sum(1))
    np.testing.assert_allclose(quality.rms, rms, atol=0.03)
    over = quality.sliced_w1 / quality.sliced_w1_floor
    assert over[:3].max() < 1.4 and over[-2:].min() > 2.0
    assert re.match(r"at worst: rms 0\.4\d+ of the deviation .* variance .* of its floor", str(quality))


@pytest.mark.slow
def test_quality_of_a_solver_of_fewer_steps():
    """A solver takes the place of the map; the teacher against itself has no error."""
    qualities = [given_quality(jax.random.key(3), s, ROUND, SOLVER, 50) for s in (SOLVER, Adams(4))]
    assert qualities[0].rms.max() == 0.0 and 0.0 < qualities[1].rms.max() < 0.5


MODES = GaussianMixture([0.4, 0.6], [[-2.0, 0.5], [1.5, -1.0]], 0.25, VE(0.01, 40.0))


@pytest.mark.slow
def test_a_distilled_map_draws_from_the_law_given_a_point():
    """Two modes in two dimensions. Bounds are what is measured, and a half; untrained it is far off both."""
    student = MLP((6,), features=64, num_blocks=2, rngs=nnx.Rngs(1))
    options = {"num_pairs": 10_000, "num_steps": 2000, "num_test_draws": 1000, "progress_bar": False}
    result = distill_given(jax.random.key(4), MODES, SOLVER, student=student, **options)
    quality = result.quality
    assert quality.rms.max() < 0.15 and np.abs(quality.variance - 1.0).max() < 0.04 and quality.over_floor.max() < 1.2
    level, u = 1.5, np.array([0.2, -0.1])
    spread = 0.25 + level**2
    weights = np.exp(MODES.log_weights) * np.exp(-0.5 * ((u - MODES.means) ** 2).sum(1) / spread)
    weights /= weights.sum()
    means = MODES.means + 0.25 / spread * (u - MODES.means)
    mean, within = weights @ means, 0.25 * level**2 / spread
    variance = weights @ (means - mean) ** 2 + within
    z = jax.random.normal(jax.random.key(6), (20_000, 2))
    x = np.asarray(mapped(result.given_map, MODES, jnp.array(u), MODES.schedule.inverse_noise_level(level), z))
    np.testing.assert_allclose(x.mean(0), mean, atol=0.06 * np.sqrt(variance).max())
    np.testing.assert_allclose(x.var(0), variance, rtol=0.08)
    assert abs(np.mean(x[:, 0] > 0) - np.mean(weights[1])) < 0.03


def seen(prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.array([3.0, -1.0]))


def test_kernels_take_it_in_the_place_of_a_solver():
    """Two evaluations for a draw, one for each candidate more; the kernel says that its law is its own."""
    prior = DiffusionPrior(ROUND, density="none")
    for make, evaluations in (
        (partial(DiffusionPCN, solver=UNTRAINED, num_proposals=3), 4),
        (partial(SplitGibbs, solver=UNTRAINED.with_second_look(0.1), rho=0.5), 4),
    ):
        kernel = make(seen)
        state = kernel.init(jax.random.key(0), 0, None, (prior,), {})
        state = jax.jit(kernel.sample, static_argnums=2)(state, (prior,), None)
        assert int(state.num_score_evals) == evaluations
    assert "learned map" in DiffusionPCN(seen, solver=UNTRAINED).status.statement
    assert "learned map" not in DiffusionPCN(seen, screen=UNTRAINED).status.statement
    statements = [SplitGibbs(seen, rho=0.5, solver=solver).status.statement for solver in (UNTRAINED, Adams(30))]
    assert ["learned map" in statement for statement in statements] == [True, False]
    assert not DiffusionPCN(seen, screen=UNTRAINED).status.exact and evaluations_given(UNTRAINED) == 2


def test_it_loads_as_it_was_saved(tmp_path):
    given_map, path = perturbed().with_second_look(0.3), tmp_path / "map.safetensors"
    checkpoint.save(path, given_map)
    loaded = checkpoint.load(path)
    assert isinstance(loaded, GivenMap) and loaded.event_shape == (2,) and loaded.second_look == 0.3
    key, x_t = jax.random.key(7), jnp.array([0.3, -0.8])
    expected = draw_given(given_map, ROUND, x_t, 0.5, key)
    for other in (loaded, pickle.loads(pickle.dumps(given_map))):
        np.testing.assert_array_equal(draw_given(other, ROUND, x_t, 0.5, key), expected)
    first = path.read_bytes()
    checkpoint.save(path, loaded)
    assert path.read_bytes() == first


@pytest.mark.parametrize("shape, joined", [((), (3,)), ((3,), (9,)), ((2, 4), (2, 12))])
def test_points_of_any_shape(shape, joined):
    network = NetworkDenoiser(MLP(joined, features=8, num_blocks=1, rngs=nnx.Rngs(0)), target="x0")
    denoiser = FromFunction(lambda x_t, t, _: 0.5 * x_t, shape, "x0", VE(0.02, 40.0))
    assert GivenMap(network, shape)(denoiser, jnp.ones(shape), 0.5, jnp.ones(shape)).shape == shape


BROKEN = FromFunction(lambda x_t, t, _: jnp.nan * x_t, (2,), "x0", VE(0.02, 40.0))
FLAT = NetworkDenoiser(MLP((2,), rngs=nnx.Rngs(0)))
OTHER = GivenMap(NetworkDenoiser(MLP((3,), rngs=nnx.Rngs(0)), target="x0"), (1,))


def run(teacher=ROUND, solver=SOLVER, **options):
    return distill_given(jax.random.key(0), teacher, solver, **{**QUICK, "student": STUDENT, **options})


def start(**options):
    DiffusionPCN(seen, **options).init(jax.random.key(0), 0, None, (DiffusionPrior(ROUND, density="none"),), {})


REFUSED = [
    (lambda: run(teacher=3), TypeError, "denoiser must be a Denoiser"),
    (lambda: run(solver=Ancestral()), TypeError, "solver must be a deterministic solver"),
    (lambda: run(solver=UNTRAINED), TypeError, "not a map that was distilled already"),
    (lambda: run(solver=FlowMap(FLAT)), TypeError, "not a map that was distilled already"),
    (lambda: run(num_pairs=0), ValueError, "num_pairs must be at least 1"),
    (lambda: run(batch_size=0), ValueError, "batch_size must be at least 1"),
    (lambda: run(ema_decay=1.0), ValueError, r"ema_decay must lie in \[0, 1\)"),
    (lambda: run(num_steps=0), ValueError, "num_steps must be at least 1"),
    (lambda: run(student=MLP((2,), rngs=nnx.Rngs(0))), ValueError, r"for points of shape \(6,\): noise"),
    (lambda: run(student=3), TypeError, "backbone must be a flax.nnx.Module"),
    (lambda: run(teacher=BROKEN), ValueError, "must be finite"),
    (lambda: given_quality(jax.random.key(0), UNTRAINED, ROUND, SOLVER, 1), ValueError, "num_draws must be at least 2"),
    (lambda: GivenMap(ROUND, (2,)), TypeError, "network must be a NetworkDenoiser"),
    (lambda: GivenMap(NetworkDenoiser(STUDENT), (2,)), ValueError, 'must be of target "x0"'),
    (lambda: UNTRAINED.with_second_look(0.0), ValueError, "second_look must be positive"),
    (lambda: OTHER(ROUND, MEAN, 0.5, MEAN), ValueError, "this GivenMap is for points of shape"),
    (lambda: start(solver=OTHER), ValueError, "needs a GivenMap of the law of site 'x'"),
    (lambda: start(screen=OTHER), ValueError, "needs a GivenMap of the law of site 'x'"),
    (lambda: start(screen=3), TypeError, "screen must be a deterministic solver"),
    (lambda: start(screen=UNTRAINED, solver=None), TypeError, "solver, under a screen, must be a deterministic solver"),
    (lambda: start(screen=SOLVER, solver=UNTRAINED), TypeError, "solver, under a screen, must be a deterministic"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.slow
def test_a_poor_map_is_said_to_be_one_and_a_diverging_one_is_an_error():
    with pytest.warns(UserWarning, match="far from its teacher"):
        run(teacher=MODES, num_steps=1, num_test_draws=1000)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(optimizer=optax.sgd(1e30), num_steps=20)
