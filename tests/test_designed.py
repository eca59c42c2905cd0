"""Denoisers without training, and the walk by them, against laws and evidences in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import gammaln
from jax.scipy.stats import norm
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import FromSamples, FromTarget, Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DesignedDiffusion, DiffusiveGibbs
from numpyro_diffusion.noise import VE, VP
from numpyro_diffusion.solve import DPMSolverPP, sample

KEY = jax.random.key
SLOW = pytest.mark.slow
QUIET = {"progress_bar": False}
MIXTURE = GaussianMixture([0.3, 0.7], [[-3.0, 0.0], [2.0, 1.0]], [[0.5, 0.3], [1.0, 0.2]], VE(0.002, 200.0))
ROUND = Gaussian([1.0, -1.0], 2.0, VE(0.002, 200.0))
VARIANTS = {
    "plain": {"num_particles": 1000, "num_shared": 0, "gradient": False},
    "gradient": {"num_particles": 1000, "num_shared": 0},
    "shared": {"num_particles": 64, "num_shared": 2000},
    "steps": {"num_particles": 500, "num_steps": 6},
}


def clean(x, law):
    return law.log_density(x, 0.0)


def at_level(law, level):
    """A point that is about as far from the law as noise of this level takes it, and its time."""
    return law.location + level * jnp.array([0.7, -1.1]), law.schedule.inverse_noise_level(level)


def target(law, **options):
    return FromTarget(clean, (2,), KEY(0), law.location, law.scale, schedule=law.schedule, parameters=law, **options)


@partial(jax.jit, static_argnames="count")
def repeated(denoiser, x_t, t, count):
    """Estimates with fresh random numbers, and the truth, at one point."""
    law, keys = denoiser.parameters, jax.random.split(KEY(1), count)
    found = jax.vmap(lambda key: denoiser.estimate(x_t, t, key))(keys)
    return found, law(x_t, t).x0, law.log_density(x_t, t)


def share(flags):
    return float(np.mean(np.asarray(flags)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[SLOW] * (n in ("gradient", "steps"))) for n in VARIANTS])
def test_the_error_of_a_target_is_calibrated_and_its_density_unbiased(name):
    """At noise levels where tens of particles are effective: 95 % within two errors, up to a binomial error of 1.1 %.

    The bias, of order 1 / n, is far below the error; that of the mean of 400 estimates is not asked for. What the
    gradient leaves comes from rare particles: three of four are within two, and the mean square is right at high noise.
    """
    steep = name in ("gradient", "steps")
    for level in (0.3, 1.0, 4.0):
        found, x0, log_density = repeated(target(MIXTURE, **VARIANTS[name]), *at_level(MIXTURE, level), 400)
        assert np.median(found.effective_size) > 25
        off = np.abs(found.prediction.x0 - x0) / found.standard_error
        assert (0.7 if steep else 0.88) < share(off < 2.0) < 0.985, (level, share(off < 2.0))
        told, seen = np.sqrt(np.mean(found.standard_error**2, 0)), np.std(found.prediction.x0, 0)
        assert level < 1.0 or ((0.8 < told / seen) & (told / seen < 1.25)).all(), (level, told / seen)
        ratio = np.exp(np.asarray(found.log_density - log_density, float))
        assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / 20.0
        np.testing.assert_allclose(found.prediction.eps, -(found.prediction.x0 - at_level(MIXTURE, level)[0]) / level,
                                   atol=2e-3)  # fmt: skip


def test_the_bias_of_a_target_vanishes_with_more_particles():
    """At high noise 32 particles are biased by tenths, 40 standard errors; 1024 by at most an eighth of that."""
    few, x0, _ = repeated(target(MIXTURE, num_particles=32, num_shared=0), *at_level(MIXTURE, 40.0), 4000)
    many, _, _ = repeated(target(MIXTURE, num_particles=1024, num_shared=0), *at_level(MIXTURE, 40.0), 400)
    bias, error = abs(few.prediction.x0 - x0).mean(0), few.prediction.x0.std(0) / np.sqrt(4000)
    bias = abs(few.prediction.x0.mean(0) - x0)
    assert (bias > 4.0 * error).all()
    error = many.prediction.x0.std(0) / 20.0
    assert (abs(many.prediction.x0.mean(0) - x0) < bias / 8.0 + 3.0 * error).all()


def test_a_round_gaussian_leaves_no_error_to_the_gradient():
    """Of its denoiser; without the gradient the error is forty times as large."""
    found, x0, _ = repeated(target(ROUND, num_particles=1000, num_shared=0), *at_level(ROUND, 2.0), 50)
    np.testing.assert_allclose(found.prediction.x0, np.broadcast_to(x0, (50, 2)), atol=2e-3)
    plain, _, _ = repeated(target(ROUND, **VARIANTS["plain"]), *at_level(ROUND, 2.0), 50)
    assert (plain.standard_error.mean(0) > 40.0 * found.standard_error.mean(0)).all()


def box(x, parameters):
    return jnp.where((x > 0.0) & (x < 1.0), 0.0, jnp.where(x > 3.0, jnp.nan, -jnp.inf)).sum()


@SLOW
def test_a_density_with_walls_and_holes():
    """Uniform on (0, 1), NaN beyond 3: a truncated normal, without the gradient; nothing is left far away."""
    denoiser = FromTarget(box, (1,), KEY(0), 0.5, 0.3, num_particles=4000, num_shared=0, gradient=False)
    t = denoiser.schedule.inverse_noise_level(0.5)
    u = np.array([1.4])
    a, b = -u / 0.5, (1.0 - u) / 0.5
    truth = u + 0.5 * (norm.pdf(a) - norm.pdf(b)) / (norm.cdf(b) - norm.cdf(a))
    found = denoiser.estimate(jnp.array(u), t)
    assert (abs(found.prediction.x0 - truth) < 4.0 * found.standard_error).all()
    lost = FromTarget(box, (1,), KEY(0), 0.5, 0.3, num_shared=0).estimate(
        jnp.array([40.0]), denoiser.schedule.inverse_noise_level(1e-3)
    )
    assert np.isinf(lost.standard_error) and lost.effective_size == 0.0 and np.isfinite(lost.prediction.x0)


POINTS = np.random.default_rng(0).normal(size=(50, 2)) * [1.0, 3.0] + [100.0, 0.0]
WEIGHTS = np.r_[np.zeros(5), np.random.default_rng(1).uniform(size=45)]


@pytest.mark.parametrize("schedule", [VE(0.01, 80.0), VP(t_min=0.01)], ids=["VE", "VP"])
def test_samples_are_the_mixture_that_they_make(schedule):
    """Block by block, the last one not full, with weights: predictions, density and, by its gradient, the score."""
    samples = FromSamples(POINTS, 0.4, WEIGHTS, schedule, block_size=20)
    mixture = GaussianMixture(WEIGHTS, POINTS, 0.4**2, schedule)
    np.testing.assert_allclose(samples.location, mixture.location, rtol=1e-5)
    for t in np.linspace(schedule.t_min, schedule.t_max, 4):
        x_t = schedule.alpha(t) * jnp.array([100.5, 1.0]) + schedule.sigma(t) * jnp.array([0.7, -0.4])
        found, truth = samples(x_t, t), mixture(x_t, t)
        np.testing.assert_allclose(found.x0, truth.x0, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.eps, truth.eps, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(samples.log_density(x_t, t), mixture.log_density(x_t, t), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jax.grad(samples.log_density)(x_t, t), found.score, rtol=1e-2, atol=1e-5)
    draws = samples.sample(KEY(0), (2000,))
    assert (abs(draws.mean(0) - samples.location) < 4.0 * draws.std(0) / np.sqrt(2000)).all()


@jax.jit
def estimated(samples, x_t, t):
    return samples.estimate(x_t, t)


def test_the_error_of_samples_is_that_of_their_law():
    """Of the law that they are drawn from, or are importance draws of: 95 % within two errors, by 300 sets."""
    t, x_t = MIXTURE.schedule.inverse_noise_level(2.0), jnp.array([0.5, 0.3])
    x0 = MIXTURE(x_t, t).x0
    draws = np.asarray(MIXTURE.sample(KEY(2), (150, 400)))
    wide = np.asarray(MIXTURE.location + 4.0 * jax.random.normal(KEY(3), (150, 400, 2)))
    density = jax.jit(jax.vmap(jax.vmap(partial(MIXTURE.log_density, t=0.0))))(wide)
    weights = np.exp(density + 0.5 * (((wide - MIXTURE.location) / 4.0) ** 2).sum(-1))
    off = []
    for points, weight in [*zip(draws, np.ones((150, 400)), strict=True), *zip(wide, weights, strict=True)]:
        found = estimated(FromSamples(points, 0.0, weight, MIXTURE.schedule, block_size=400), x_t, t)
        off.append(np.abs(found.prediction.x0 - x0) / found.standard_error)
    assert 0.9 < share(np.array(off[:150]) < 2.0) < 0.985
    assert 0.85 < share(np.array(off[150:]) < 2.0) < 0.985


@SLOW
def test_solvers_and_kernels_take_a_target():
    """By a solver the weights of its modes; in a model DiffusiveGibbs tests by its density: N(1.5, .5) for y = 3."""
    denoiser = target(MIXTURE, num_particles=64)
    x = jax.jit(partial(sample, DPMSolverPP(40, eta=1.0), sample_shape=(2000,)))(denoiser, KEY(3))
    assert abs(share(x[:, 0] > -0.5) - 0.7) < 4.0 * np.sqrt(0.21 / 2000) + 0.02  # its own error comes on top
    normal = FromTarget(clean, (2,), KEY(0), 0.0, 1.0, num_particles=16, num_shared=0, parameters=Gaussian([0.0, 0.0]))

    def model():
        x = numpyro.sample("x", DiffusionPrior(normal, density="denoiser"))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.array([3.0, 3.0]))

    mcmc = MCMC(DiffusiveGibbs(model, density="denoiser"), num_warmup=100, num_samples=500, **QUIET)
    mcmc.run(KEY(0))
    x = mcmc.get_samples()["x"]
    assert (abs(x.mean(0) - 1.5) < 0.2).all() and (abs(x.std(0) - np.sqrt(0.5)) < 0.15).all()


def signs(y, count):
    """Two modes of equal weight, x = ±2.88 about, and a rate: Gamma(3 + count, 2 + 1)."""
    x = numpyro.sample("x", dist.Normal(0.0, 3.0))
    numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.2, 0.8])),
                                               dist.Normal(jnp.stack([-x, x]), 0.5)), obs=y)  # fmt: skip
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.deterministic("double", 2.0 * rate)
    numpyro.sample("count", dist.Poisson(rate), obs=count)


DATA = jnp.array(3.0), jnp.array(2)
EVIDENCE = float(
    norm.logpdf(3.0, 0.0, np.sqrt(9.25))  # either sign
    + gammaln(5.0) - gammaln(3.0) - gammaln(3.0) + 3.0 * np.log(2.0) - 5.0 * np.log(3.0)
)  # fmt: skip


@pytest.fixture(scope="module")
def designed():
    return DesignedDiffusion(signs, 1600, num_islands=16, num_inner=8, num_shared=300, num_levels=10, **QUIET)


@SLOW
def test_draws_and_evidence(designed):
    """Weights of modes and moments of a constrained site, with the error of the effective size; the evidence, in 4."""
    designed.run(KEY(0), *DATA)
    value, error, islands = designed.log_evidence
    assert not designed.problems and error < 0.05 and abs(value - EVIDENCE) < 4.0 * error
    size = designed.levels.effective_size.min()
    draws = designed.get_samples()
    assert abs(share(draws["x"] > 0) - 0.8) < 4.0 * np.sqrt(0.16 / size)
    np.testing.assert_allclose(draws["double"], 2.0 * draws["rate"], rtol=1e-6)
    assert abs(draws["rate"].mean() - 5.0 / 3.0) < 4.0 * np.sqrt(5.0 / 9.0 / size)
    assert abs(draws["rate"].var() / (5.0 / 9.0) - 1.0) < 4.0 * np.sqrt(3.2 / size)  # the kurtosis is 4.2
    each = 1600 * (8 * 10 + 20 + 1) + 300
    assert 1600 * 81 < designed.num_evaluations <= each
    designed.print_summary()


def test_the_evidence_is_unbiased_in_any_number_of_walks():
    """Four walks, four levels and two particles: useless alone, and right in the mean of 1500.

    With shared particles, which steer the levels in between.
    """
    options = {"num_islands": 1500, "num_inner": 2, "num_levels": 4, "noise_levels": (5.0, 0.1), "num_moves": 0}
    few = DesignedDiffusion(signs, 6000, num_shared=20, **options, **QUIET).run(KEY(1), *DATA)
    ratio = np.exp(np.asarray(few.log_evidence.islands, float) - EVIDENCE)
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / np.sqrt(1500) < 0.35


@SLOW
def test_langevin_steps_leave_the_evidence_unbiased():
    """Four walks again, with more particles: by two of them the weights have so heavy tails that 1500 say little."""
    options = {"num_islands": 500, "num_inner": 64, "num_levels": 12, "noise_levels": (5.0, 0.1), "num_moves": 0}
    few = DesignedDiffusion(signs, 2000, num_steps=4, **options, **QUIET).run(KEY(2), *DATA)
    ratio = np.exp(np.asarray(few.log_evidence.islands, float) - EVIDENCE)
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / np.sqrt(500) < 0.1


def test_the_denoiser_of_a_model():
    """In units of the prior, whose moments are exact up to those of a thousand draws; back to the sites."""

    def normal():
        numpyro.sample("x", dist.Normal(1.0, 2.0).expand([2]).to_event(1))

    made = DesignedDiffusion(normal, num_inner=64, num_shared=300, location={"x": 1.0}, scale={"x": 2.0})
    denoiser = made.denoiser(KEY(0))
    x_t = jnp.array([1.0, -1.0])
    np.testing.assert_allclose(denoiser(x_t, denoiser.schedule.inverse_noise_level(1.0)).x0, x_t / 2.0, atol=0.02)
    np.testing.assert_allclose(made.constrain(x_t[None])["x"], [[3.0, -1.0]], rtol=1e-6)


def narrow():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.01).to_event(1), obs=jnp.full(8, 2.0))


@SLOW
def test_degenerate_weights_are_reported():
    small = {"num_inner": 2, "num_shared": 10, "num_levels": 3, "num_moves": 0}
    with pytest.warns(UserWarning, match="the weights degenerate|at high noise only"):
        lost = DesignedDiffusion(narrow, 80, **small, **QUIET).run(KEY(0))
    assert lost.problems and np.isinf(lost.log_evidence.standard_error)


def run(model, **options):
    DesignedDiffusion(model, 80, num_inner=2, num_shared=10, num_levels=2, **options, **QUIET).run(KEY(0))


REFUSED = {
    "nothing": (lambda: run(laws.nothing), "needs a latent site"),
    "discrete": (lambda: run(laws.discrete), r"sites \['k'\] are discrete"),
    "improper": (lambda: run(laws.improper), "Give location= and scale="),
    "nan": (lambda: run(laws.not_a_number), "zero or NaN at all of them"),
    "one of two": (lambda: run(narrow, location={"x": 0.0}), "must be given together"),
    "sites": (lambda: run(narrow, location={"x": 0.0}, scale={"z": 1.0}), r"scale must have the latent sites \['x'\]"),
    "flat": (lambda: run(narrow, location={"x": 0.0}, scale={"x": 0.0}), "those given are not"),
    "odd": (lambda: DesignedDiffusion(narrow, num_inner=3), "num_inner must be even"),
    "levels": (lambda: DesignedDiffusion(narrow, noise_levels=(0.1, 1.0)), r"noise_levels\[0\] must exceed"),
    "target": (lambda: FromTarget(lambda x, _: jnp.nan, (1,), KEY(0), 0.0, 1.0), "it is at none"),
    "vector": (lambda: FromTarget(lambda x, _: x, (1,), KEY(0), 0.0, 1.0), "must return a scalar"),
    "scale": (lambda: FromTarget(box, (1,), KEY(0), 0.0, -1.0), "scale must be positive"),
    "one sample": (lambda: FromSamples(np.zeros((1, 2))), "N of at least 2"),
    "same": (lambda: FromSamples(np.zeros((9, 2))), "must not all be the same point"),
    "not finite": (lambda: FromSamples(np.full((9, 2), np.nan)), "samples must be finite"),
    "bandwidth": (lambda: FromSamples(POINTS, -1.0), "bandwidth must be at least 0"),
    "weights": (lambda: FromSamples(POINTS, weights=np.ones(3)), r"weights must have shape \(50,\)"),
    "no weight": (lambda: FromSamples(POINTS, weights=np.zeros(50)), "with a positive sum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()
