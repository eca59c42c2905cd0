"""A flow distilled into few evaluations: closed forms, the prior that it makes, files, and what is refused."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC

from numpyro_diffusion import checkpoint
from numpyro_diffusion.denoise import Conditioned, FromFunction, Gaussian, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import NoiseSpace
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, FlowMap, StochasticHeun, solve, terminal_point
from numpyro_diffusion.train import distill, fit, map_quality

MEAN, VARIANCE = jnp.array([1.0, -2.0]), 4.0
TEACHER = Gaussian(MEAN, VARIANCE, VE(0.02, 40.0))
SOLVER = DPMSolverPP(12)
QUICK = {"num_pairs": 2000, "num_steps": 600, "batch_size": 128, "num_test_draws": 500, "progress_bar": False}


def network(seed=0, **options):
    backbone = MLP((2,), features=16, num_blocks=1, rngs=nnx.Rngs(seed), **options)
    return NetworkDenoiser(backbone, location=MEAN, scale=2.0)


def perturbed(net, size=0.1):
    """A network whose output is not zero."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return net.with_params(jax.tree.map(lambda w: w + size * jax.random.normal(next(keys), w.shape), net.params))


@pytest.fixture(scope="module")
def distilled():
    return distill(jax.random.key(0), TEACHER, SOLVER, student=MLP((2,), features=32, rngs=nnx.Rngs(1)), **QUICK)


@pytest.mark.slow
def test_one_evaluation_learns_the_flow_of_a_gaussian(distilled):
    """The flow of N(m, s^2) is m + s z up to the solver's error: value, Jacobian, and what the report says."""
    z = jax.random.normal(jax.random.key(1), (400, 2))
    x = jax.vmap(distilled.flow_map)(z)
    error = np.sqrt(np.mean((x - MEAN - 2.0 * z) ** 2)) / 2.0
    assert error < 0.08
    assert distilled.flow_map.evaluations() == 1 and distilled.losses.shape == (600,) and not distilled.interrupted
    near = jax.random.normal(jax.random.key(2), (50, 2)) * 0.5
    slope = jax.vmap(jax.jacobian(distilled.flow_map))(near)
    np.testing.assert_allclose(slope.mean(0), 2.0 * np.eye(2), atol=0.15)
    quality = distilled.quality
    assert abs(quality.rms - error) < 0.03 and quality.rms <= quality.worst_rms < 0.1
    assert quality.sliced_w1 < 2.0 * quality.sliced_w1_floor and quality.energy < 5.0 * quality.energy_floor
    assert "floor" in str(quality)


def test_quality_sees_a_map_that_is_off():
    """An untrained network maps all noise to the mean: the rms error is one, the sliced distance E |s z| = 1.596."""
    quality = map_quality(jax.random.key(3), FlowMap(network()), TEACHER, SOLVER, 500)
    np.testing.assert_allclose([quality.rms, quality.worst_rms], 1.0, atol=0.02)
    np.testing.assert_allclose(
        quality.sliced_w1, 2.0 * np.sqrt(2.0 / np.pi), rtol=0.06
    )  # 500 draws, and the lowest level
    assert quality.energy > 100.0 * quality.energy_floor


def test_several_evaluations_are_a_walk_of_ddim():
    """Levels after the first are those of Euler's method, so a solver on the same grid gives the same points."""
    net, z = perturbed(network()), jax.random.normal(jax.random.key(4), (2,))
    levels = (3.0, 0.7)
    schedule = net.schedule
    times = jnp.array([schedule.t_max, *(schedule.inverse_noise_level(2.0 * level) for level in levels)])
    walked = solve(Ancestral(3, eta=0.0), net, terminal_point(net, z), times=times)
    flow_map = FlowMap(net, levels)
    np.testing.assert_allclose(flow_map(z), walked, rtol=2e-5)
    assert flow_map.evaluations() == 3 and not np.allclose(FlowMap(net)(z), walked)


@pytest.mark.slow
def test_more_evaluations_from_the_teachers_weights_are_closer():
    """Two modes: the flow is steep between them. Each further evaluation brings the map nearer to its teacher."""
    modes = jnp.array([-3.0, 3.0])[jax.random.randint(jax.random.key(0), (4000, 1), 0, 2)]
    data = modes + 0.5 * jax.random.normal(jax.random.key(1), (4000, 1))
    backbone = MLP((1,), features=32, rngs=nnx.Rngs(0))
    teacher = fit(jax.random.key(2), backbone, data, num_steps=2000, progress_bar=False).denoiser
    options = {**QUICK, "num_pairs": 10_000, "num_steps": 1500}
    rms = [distill(jax.random.key(3), teacher, num_evaluations=k, **options).quality.rms for k in (1, 3)]
    assert rms[1] < 0.8 * rms[0] < 0.12


@pytest.mark.slow
def test_the_prior_of_a_map_is_exact_in_noise_space():
    """Posterior of the map's own law by quadrature over the noise; `sample` and `log_prob` stay the teacher's."""
    backbone = MLP((1,), features=8, num_blocks=1, rngs=nnx.Rngs(0))
    bent = NetworkDenoiser(backbone, location=[0.5], scale=1.5)
    bent = perturbed(bent, 0.4)
    flow_map = FlowMap(bent, (1.0,))
    prior = DiffusionPrior(Gaussian([0.5], 2.25, VE(0.02, 40.0)), flow_solver=flow_map)

    def model(y, prior):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[0], 0.5), obs=y)

    grid = np.linspace(-6.0, 6.0, 4001)
    image = np.asarray(jax.vmap(flow_map)(jnp.asarray(grid[:, None], jnp.float32)))[:, 0]
    weight = np.exp(-0.5 * grid**2 - 0.5 * ((1.0 - image) / 0.5) ** 2)
    weight /= weight.sum()
    mean, deviation = weight @ image, np.sqrt(weight @ image**2 - (weight @ image) ** 2)
    mcmc = MCMC(
        NoiseSpace(model, max_tree_depth=4),
        num_warmup=200,
        num_samples=400,
        num_chains=16,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(6), 1.0, prior)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[..., 0]
    error = x.mean(1).std(ddof=1) / 4.0
    assert error < 0.05 * deviation and abs(x.mean() - mean) < 4.0 * error
    error = x.std(1).std(ddof=1) / 4.0
    assert abs(x.std(1).mean() - deviation) < 4.0 * error + 0.01 * deviation
    fields = mcmc.get_extra_fields()
    np.testing.assert_array_equal(fields["num_score_evals"], 2 * (fields["num_steps"] + 1))
    exact = dist.Normal(0.5, 1.5).log_prob(1.2)
    np.testing.assert_allclose(prior.log_prob(jnp.array([1.2])), exact, atol=1e-3)


def test_a_prior_with_a_map_is_a_pytree_with_the_maps_weights(distilled):
    """New weights compile nothing, a copy by pickle is the same, and the reparameterised site is the map's image."""
    prior = DiffusionPrior(TEACHER, flow_solver=distilled.flow_map)
    z = jax.random.normal(jax.random.key(7), (3, 2))
    x = prior.flow(z)
    np.testing.assert_allclose(x, jax.vmap(distilled.flow_map)(z), rtol=1e-5)
    in_other_units = distilled.flow_map.network.with_units(0.0, 1.0)
    other = prior.with_flow(distilled.flow_map.with_network(in_other_units))
    flow = jax.jit(lambda prior, z: prior.flow(z))
    before = flow(prior, z)
    assert flow._cache_size() == 1
    np.testing.assert_allclose(flow(other, z), (before - MEAN) / 2.0, atol=1e-5)
    assert flow._cache_size() == 1
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(prior)).flow(z), x)

    def model():
        numpyro.sample("x", prior)

    in_noise = numpyro.handlers.reparam(model, config={"x": NoiseReparam()})
    sites = numpyro.handlers.trace(numpyro.handlers.seed(in_noise, 0)).get_trace()
    np.testing.assert_allclose(sites["x"]["value"], distilled.flow_map(sites["x_noise"]["value"]), rtol=1e-5)


@pytest.mark.parametrize("levels", [(), (2.0, 0.5)])
def test_a_map_loads_as_it_was_saved(tmp_path, levels):
    flow_map, path = FlowMap(perturbed(network()), levels), tmp_path / "map.safetensors"
    checkpoint.save(path, flow_map)
    loaded = checkpoint.load(path)
    assert isinstance(loaded, FlowMap) and loaded.noise_levels == levels and loaded.network.frozen
    z = jnp.array([0.3, -0.8])
    np.testing.assert_array_equal(loaded(z), flow_map(z))
    first = path.read_bytes()
    checkpoint.save(path, loaded)
    assert path.read_bytes() == first
    checkpoint.save(path, flow_map.network)
    assert isinstance(checkpoint.load(path), NetworkDenoiser)


STUDENT = MLP((2,), features=16, num_blocks=1, rngs=nnx.Rngs(0))
CONDITIONAL = network(cond_shape=(1,))
EPS = NetworkDenoiser(STUDENT, target="eps")
BROKEN = FromFunction(lambda x_t, t, _: jnp.nan * x_t, (2,), "x0", VE(0.02, 40.0))
OTHER_SHAPE = FlowMap(NetworkDenoiser(MLP((3,), rngs=nnx.Rngs(0))))


def run(teacher=TEACHER, solver=SOLVER, **options):
    return distill(jax.random.key(0), teacher, solver, **{**QUICK, "student": STUDENT, **options})


REFUSED = [
    (lambda: run(teacher=3), TypeError, "denoiser must be a Denoiser"),
    (lambda: run(solver=StochasticHeun()), TypeError, "flow_solver must be a deterministic solver"),
    (lambda: run(num_evaluations=0), ValueError, "num_evaluations must be at least 1"),
    (lambda: run(num_evaluations=9), ValueError, "num_evaluations must be at most 8"),
    (lambda: run(ema_decay=1.0), ValueError, r"ema_decay must lie in \[0, 1\)"),
    (lambda: run(num_steps=0), ValueError, "num_steps must be at least 1"),
    (lambda: run(student=None), ValueError, "student must be given"),
    (lambda: run(teacher=EPS, student=None), ValueError, "student must be given"),
    (lambda: run(student=OTHER_SHAPE.network), ValueError, r"student must map points of shape \(2,\)"),
    (lambda: run(teacher=Conditioned(CONDITIONAL, jnp.ones(1)), student=CONDITIONAL), ValueError, "unconditional"),
    (lambda: run(teacher=BROKEN), ValueError, "the image of noise under flow_solver must be finite"),
    (lambda: FlowMap(TEACHER), TypeError, "network must be a NetworkDenoiser"),
    (lambda: FlowMap(network(), (1.0, 2.0)), ValueError, "noise_levels must decrease"),
    (lambda: FlowMap(network(), (1e5,)), ValueError, "noise_levels must decrease from below"),
    (lambda: FlowMap(network(), (1.0, 0.0)), ValueError, "must be positive"),
    (lambda: DiffusionPrior(TEACHER, flow_solver=OTHER_SHAPE), ValueError, "flow_solver must map noise to points"),
    (
        lambda: DiffusionPrior(CONDITIONAL, cond=jnp.ones(1), flow_solver=FlowMap(network())),
        ValueError,
        "flow_solver must be a solver for a prior with a condition",
    ),
    (lambda: DiffusionPrior(TEACHER, sampler=FlowMap(network())), TypeError, "sampler must be a stochastic solver"),
    (lambda: checkpoint.save("x", TEACHER), TypeError, "NetworkDenoiser, FlowMap"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_poor_map_is_said_to_be_one_and_a_diverging_one_is_an_error():
    with pytest.warns(UserWarning, match="far from its teacher"):
        run(num_steps=1)
    with pytest.raises(FloatingPointError, match="not finite"):
        run(optimizer=optax.sgd(1e30), num_steps=20)
