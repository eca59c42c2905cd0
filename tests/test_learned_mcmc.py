"""`LearnedMCMC`: global moves are exact for any learned law, chains have the right law, and nothing learned is said."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.infer import HMC, BarkerMH
from scipy.stats import norm

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.diagnostics import to_arviz, verdict
from numpyro_diffusion.infer import LearnedMCMC, LineIntegral
from numpyro_diffusion.infer.particles.learned import modes
from numpyro_diffusion.infer.particles.learned.chains import Programs, jump
from numpyro_diffusion.infer.particles.learned.fitted import Fitted
from numpyro_diffusion.infer.particles.learned.law import Law, Modes
from numpyro_diffusion.infer.particles.learned.network import SCHEDULE, Corrected, corrected
from numpyro_diffusion.learned.units import Units
from numpyro_diffusion.nn import MLP

CHAINS = 20_000
WEIGHTS, MEANS, DEVIATIONS = np.array([0.3, 0.7]), np.array([-6.0, 6.0]), np.array([1.0, 0.5])
SHORT = {"num_warmup": 60, "num_draws": 40, "num_refits": 2, "refit_steps": 12, "progress_bar": False}


# The move


def modes_off():
    """Two normal laws that are not the posterior."""
    turn = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    return Modes(
        jnp.log(jnp.array([0.4, 0.6])),
        jnp.array([[-0.8, 0.0], [0.6, 0.3]]),
        jnp.array([[0.9, 1.4], [1.2, 0.5]]),
        jnp.stack([turn, jnp.eye(2)]),
    )


def law_off(network):
    """A law that is not the posterior, with a network whose output is far from zero, or without one."""
    units = Units(jnp.array([1.0, 2.0]), jnp.diag(jnp.array([0.9, 0.8])))
    if not network:
        return Law(modes_off(), units, None, jnp.zeros(0))
    backbone = MLP((2,), 8, 1, 8, rngs=nnx.Rngs(0))
    backbone.output_layer.kernel[...] = 0.3 * jax.random.normal(jax.random.key(5), (8, 2))
    denoiser = NetworkDenoiser(Corrected(modes_off(), backbone), schedule=SCHEDULE)
    return Law(modes_off(), units, denoiser, jnp.array([0.3, 0.8, 2.0]))


def log_pair(q):
    """Of `laws.pair` at y = 3, in the order of its vector."""
    s, x = q
    return -0.5 * (s**2 + (x - s) ** 2 + (3.0 - x) ** 2)


@partial(jax.jit, static_argnums=3)
def jumps(keys, q, law, num_proposals):
    moved = jax.vmap(partial(jump, law=law, log_target=log_pair, num_proposals=num_proposals))(keys, q)
    return moved.q, moved.accept_prob, moved.log_mean_weight


def moved(law, num_proposals=1):
    start = laws.pair_posterior().draw(np.random.default_rng(0), CHAINS)
    q = jnp.asarray(np.c_[start["s"], start["x"]], jnp.float32)
    return jumps(jax.random.split(jax.random.key(1), CHAINS), q, law, num_proposals)


@pytest.mark.parametrize(("network", "num_proposals"), [(False, 1), (True, 3)])
def test_moves_leave_the_law_in_place_whatever_was_learned(network, num_proposals):
    """And their mean weight is the evidence: of two normal integrals, 2 pi / sqrt(3), times exp(-3/2)."""
    q, accept_prob, log_weight = moved(law_off(network), num_proposals)
    s, x = np.asarray(q).T
    laws.assert_ranks(laws.pair_posterior().ranks({"s": s, "x": x}))
    assert 0.2 < float(accept_prob.mean()) < 0.95
    weight = np.exp(np.asarray(log_weight, float))
    truth = 2.0 * np.pi / np.sqrt(3.0) * np.exp(-1.5)
    assert abs(weight.mean() - truth) < 4.0 * weight.std() / np.sqrt(CHAINS)


@pytest.mark.parametrize("network", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_ranks_see_a_ratio_without_the_proposals_density(network, monkeypatch):
    monkeypatch.setattr(Law, "log_density", lambda self, walk: jnp.zeros(()))
    jumps.clear_cache()
    s, x = np.asarray(moved(law_off(network))[0]).T
    jumps.clear_cache()
    with pytest.raises(AssertionError, match="rank"):
        laws.assert_ranks(laws.pair_posterior().ranks({"s": s, "x": x}))


def test_noise_of_a_walk_is_that_of_its_density():
    """The variance at each level is its square, the covariance of two levels the lower one's."""
    levels = jnp.array([0.2, 0.6, 1.5])
    law = law_off(False)._replace(levels=levels)
    w = jnp.array([0.5, -1.0])
    noise = jax.jit(jax.vmap(lambda key: law.noised(key, w) - w))(jax.random.split(jax.random.key(3), CHAINS))
    assert not noise[:, 0].any()
    standard = noise[:, 1:] / levels[:, None]
    correlation = np.minimum(levels[:, None], levels) / np.maximum(levels[:, None], levels)
    found = np.einsum("nki,nli->kl", standard, standard) / (2 * CHAINS)
    np.testing.assert_allclose(found, correlation, atol=4.0 * np.sqrt(2.0 / (2 * CHAINS)))


def test_without_a_network_levels_change_nothing():
    """Steps between levels are exact for normal laws: a walk's density over that of its noise is the law's own."""
    single = Modes(jnp.zeros(1), jnp.zeros((1, 2)), jnp.array([[0.7, 1.3]]), jnp.eye(2)[None])
    law = law_off(False)._replace(modes=single, levels=jnp.array([0.2, 0.6, 1.5]))
    w = jax.random.normal(jax.random.key(0), (50, 2))

    @jax.jit
    @jax.default_matmul_precision("highest")  # as samplers have it
    def compute(law):
        walks = jax.vmap(law.noised)(jax.random.split(jax.random.key(1), 50), w)
        exact = jax.vmap(law._replace(levels=jnp.zeros(0)).log_density)(w[:, None])
        drawn = jax.vmap(law.draw)(jax.random.split(jax.random.key(2), CHAINS))[:, 0]
        return jax.vmap(law.log_density)(walks), exact, drawn

    found, exact, drawn = compute(law)
    np.testing.assert_allclose(found, exact, atol=2e-5)
    np.testing.assert_allclose(drawn.var(0), [0.7, 1.3], rtol=4.0 * np.sqrt(2.0 / CHAINS))


# What is fitted


def test_modes_of_chains_are_found_with_few_draws_in_many_dimensions():
    """Eight modes in 20 dimensions, 8 chains of 25 draws in each: their log-density, within what is left to chance."""
    rng = np.random.default_rng(0)
    centres, deviations = rng.uniform(-30.0, 30.0, (8, 20)), rng.uniform(0.5, 2.0, (8, 20))
    in_mode = np.repeat(np.arange(8), 8)
    draws = centres[in_mode][:, None] + deviations[in_mode][:, None] * rng.normal(size=(64, 25, 20))
    assert sorted(map(len, modes.groups(draws))) == [8] * 8
    parts = modes.find(draws, rng)
    assert len(parts[0]) == 8
    label = rng.integers(0, 8, 2000)
    fresh = centres[label] + deviations[label] * rng.normal(size=(2000, 20))
    exact = np.log(1 / 8) + norm.logpdf(fresh, centres[label], deviations[label]).sum(1).mean()
    # a mean and a variance of each of 20 entries, from 160 draws, cost 40 / (2 * 160) nats, and all 190 correlations
    # without their damping .6 more
    assert -0.35 < modes.score(fresh, parts) - exact < 0.0


@pytest.mark.slow
def test_a_network_is_kept_where_it_is_better():
    """A ring is no mixture of two normal laws; a normal law needs no network."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0.0, 2.0 * np.pi, 6000)
    ring = np.sqrt(2.0) * np.c_[np.cos(angle), np.sin(angle)] + 0.1 * rng.normal(size=(6000, 2))
    wide = Modes(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.eye(2)[None])
    law = Law(wide, Units(jnp.zeros(2), jnp.eye(2)), None, jnp.zeros(0))
    trained = corrected(jax.random.key(0), law, ring, None, 16, num_steps=600)
    assert trained.denoiser is not None and len(trained.levels) == 16
    radius = np.linalg.norm(jax.vmap(trained.draw)(jax.random.split(jax.random.key(1), 2000))[:, 0], axis=1)
    assert abs(radius.mean() - np.sqrt(2.0)) < 0.1 and radius.std() < 0.25  # of the normal law 1.25 and .66
    assert corrected(jax.random.key(0), law, rng.normal(size=(6000, 2)), None, 16, num_steps=100) is law


# The sampler


def two_modes(y):
    x = numpyro.sample(
        "x", dist.MixtureSameFamily(dist.Categorical(jnp.asarray(WEIGHTS)), dist.Normal(MEANS, DEVIATIONS))
    )
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2.0 * scale)
    numpyro.sample("y", dist.Normal(x, 8.0), obs=y)


@pytest.fixture(scope="module")
def ran():
    return LearnedMCMC(two_modes, num_chains=100, **SHORT).run(jax.random.key(0), -4.0)


def test_law_of_the_draws_evidence_and_counts(ran):
    parts = WEIGHTS * norm.pdf(-4.0, MEANS, np.hypot(DEVIATIONS, 8.0))
    samples = ran.get_samples(group_by_chain=True)
    assert samples["x"].shape == (100, 40) and (samples["scale"] > 0.0).all()
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["scale"], rtol=1e-6)
    share = float((samples["x"] < 0.0).mean())
    assert abs(share - parts[0] / parts.sum()) < 4.0 * np.sqrt(0.25 / 4000 * 2.0)
    log_scale = np.log(samples["scale"]).reshape(-1)
    assert abs(log_scale.mean()) < 4.0 * 0.5 * np.sqrt(2.0 / 4000) and abs(log_scale.std() / 0.5 - 1.0) < 0.1
    value, error, islands = ran.log_evidence
    assert abs(float(value) - np.log(parts.sum())) < 4.0 * float(error) < 0.1 and islands.shape == (100,)
    # two evaluations at the start, one a local move; with a global one two more, and one for its proposal
    assert ran.num_target_evals == 100 * (2 + 60 + 4 * (2 * 12 + 40))
    assert ran.global_moves.pay and ran.global_moves.accept_prob > 0.7
    assert [stage.name for stage in ran.stages] == ["local", "refit", "refit", "frozen"]
    assert ran.problems == () and verdict(ran).r_hat < 1.02


def test_arviz_pickle_and_summary(ran, capsys):
    data = to_arviz(ran)
    assert {"acceptance_rate", "diverging", "num_target_evals"} <= set(data["sample_stats"].data_vars)
    assert data["posterior"].attrs["num_target_evals"] == ran.num_target_evals
    again = pickle.loads(pickle.dumps(ran))
    np.testing.assert_array_equal(again.get_samples()["x"], ran.get_samples()["x"])
    ran.print_summary()
    assert "global moves pay" in capsys.readouterr().out
    assert ran.get_extra_fields()["accept_prob"].shape == (4000,) and ran.init_params(3)["x"].shape == (3,)
    with pytest.raises(TypeError, match="sampler by itself"):
        numpyro.infer.MCMC(ran, num_warmup=1, num_samples=1)


def test_nothing_changes_after_the_freeze_and_a_second_run_compiles_nothing(ran, monkeypatch, compiling):
    """All draws that are kept are made by one program with one law, the last that was fitted."""
    used, both = [], Programs.both

    def spied(self, key, count, state, law):
        used.append((count, law))
        return both(self, key, count, state, law)

    monkeypatch.setattr(Programs, "both", spied)
    with compiling() as programs:
        ran.run(jax.random.key(0), -4.0)
    assert programs == []
    assert [count for count, _ in used] == [12, 12, 40]
    frozen = jax.tree.leaves(used[-1][1])
    assert all(map(np.array_equal, frozen, jax.tree.leaves(ran.law)))
    assert not all(map(np.array_equal, frozen, jax.tree.leaves(used[0][1])))


class Diverging(nnx.Module):
    """A backbone that ends in NaN."""

    def __init__(self):
        self.event_shape, self.weight = (2,), nnx.Param(jnp.full((2, 2), jnp.nan))

    def __call__(self, x, c_noise, cond=None):
        return self.weight[...] @ x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_chains": 1, "num_warmup": 200}, "a single chain"),
        ({"num_chains": 7, "num_warmup": 4}, "fewer than 100"),
        ({"num_chains": 100, "network": Diverging()}, "not finite|diverge"),
    ],
    ids=["one chain", "few draws", "NaN"],
)
def test_falls_back_to_the_local_kernel_and_says_so(options, reason):
    sampler = LearnedMCMC(two_modes, **{**SHORT, **options})
    with pytest.warns(UserWarning, match=f"all moves were local.*({reason})"):
        sampler.run(jax.random.key(0), -4.0)
    assert sampler.law is None and sampler.global_moves is None and not verdict(sampler).converged
    assert sampler.get_samples()["x"].shape == (options["num_chains"] * 40,)
    assert np.isnan(sampler.log_evidence.value) and np.isnan(sampler.get_extra_fields()["accept_prob"]).all()


@pytest.mark.slow
def test_a_fault_while_it_learns_is_not_taken_for_a_lack_of_draws(monkeypatch):
    def fault(self):
        raise ValueError("a fault")

    monkeypatch.setattr(Fitted, "law", fault)
    with pytest.raises(ValueError, match="^a fault$"):
        LearnedMCMC(two_modes, **SHORT).run(jax.random.key(0), -4.0)


@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [7, 601])
def test_odd_numbers_of_chains_and_an_inner_kernel_of_numpyro(num_chains):
    local = partial(HMC, num_steps=4, trajectory_length=None)
    sampler = LearnedMCMC(two_modes, local, num_chains, **SHORT, thinning=2).run(jax.random.key(1), -4.0)
    assert sampler.get_samples()["x"].shape == (num_chains * 40,)
    assert sampler.global_moves.accept_prob > 0.4
    assert sampler.num_target_evals == num_chains * (2 + 60 * 4 + (4 + 3) * (2 * 12 + 2 * 40))


@pytest.mark.slow
def test_a_wall_and_nan_are_rejected_and_counted():
    """Of `laws.half_line`: no draw below .5, and NaN is diverging."""
    sampler = LearnedMCMC(laws.half_line, num_chains=100, **SHORT, network=None).run(jax.random.key(0), 0.0)
    samples, fields = sampler.get_samples()["x"], sampler.get_extra_fields()
    assert samples.min() > 0.5 and fields["diverging"].any()
    grid = np.linspace(0.5, 8.0, 10_001)
    density = norm.pdf(grid)
    assert abs(samples.mean() - (grid * density).sum() / density.sum()) < 4.0 * 0.4 * np.sqrt(2.0 / 4000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1; got 0"),
        ({"num_draws": 1}, "num_draws must be at least 2; got 1"),
        ({"num_refits": -1}, "num_refits must be at least 0; got -1"),
        ({"density": LineIntegral()}, "tests its moves by a density"),
        ({"local_kernel": BarkerMH}, "cannot be handed a point"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedMCMC(two_modes, **options)


def test_bad_models():
    def nothing():
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)

    with pytest.raises(ValueError, match="needs a latent site"):
        LearnedMCMC(nothing, progress_bar=False).run(jax.random.key(0))
    with pytest.raises(TypeError, match='network must be "auto"'):
        LearnedMCMC(two_modes, network="mlp")
    with pytest.raises(RuntimeError, match="must come first"):
        LearnedMCMC(two_modes).num_target_evals  # noqa: B018
