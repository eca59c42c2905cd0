"""Trajectories from noise to data: their laws against the recursions that theory predicts, and their refusals.

On a Gaussian prior with a Gaussian likelihood every step is affine with Gaussian noise, so mean and variance of a whole
trajectory are known, bias and all: a kernel must meet these, not the posterior.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from moments import assert_moments
from numpyro.distributions import transforms
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import AnnealedLangevin, DiffusionGibbs, GuidedReverse, at_clean_point
from numpyro_diffusion.infer.anneal import langevin as level_walk
from numpyro_diffusion.infer.anneal.posterior import noisy_posterior
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE, VP, UniformLogSNR
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, StochasticHeun

SLOW = pytest.mark.slow
CHAINS, DRAWS = 200, 100
EXP = transforms.ExpTransform()
MEAN, VARIANCE, NOISE = np.array([1.0, -1.0]), np.array([1.0, 2.0]), 0.7
Y = jnp.array([3.0, -1.0])
SAMPLER = DPMSolverPP(48, eta=1.0)
VE_PRIOR, VP_PRIOR = (
    DiffusionPrior(Gaussian(MEAN, VARIANCE, schedule), sampler=SAMPLER, density="none")
    for schedule in (VE(0.02, 40.0), VP())
)


def model(y, prior=VE_PRIOR):
    x = numpyro.sample("x", prior)
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def flat(y, prior=VE_PRIOR):
    numpyro.sample("x", prior)


def unknown_noise(y, prior=VE_PRIOR):
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def run(kernel, *args, num_warmup=0, num_samples=DRAWS, chains=CHAINS, method="vectorized", seed=0, **options):
    options = {"num_chains": chains, "chain_method": method, "progress_bar": False, **options}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, **options)
    mcmc.run(jax.random.key(seed), *args)
    return mcmc


def one_draw(kernel, *args, chains):
    """The state after one draw, without the machinery of a run."""
    state = kernel.init(jax.random.split(jax.random.key(0), chains), 0, None, args, {})
    return jax.jit(lambda state: kernel.sample(state, args, {}))(state)


class Law:
    """Mean and variance per dimension of a noisy point, and how they move; the truth of these tests."""

    def __init__(self, schedule, y=Y, mean=MEAN, variance=VARIANCE, noise=NOISE, guidance_variance=0.0):
        self.prior_mean, self.prior_variance = np.asarray(mean, float), np.asarray(variance, float)
        self.y, self.noise, self.extra, self.schedule = np.asarray(y, float), noise, guidance_variance, schedule
        self.centre, self.spread = np.zeros_like(self.prior_mean), np.ones_like(self.prior_mean)

    def at(self, t):
        self.alpha, self.sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        total = self.alpha**2 * self.prior_variance + self.sigma**2
        self.gain = self.alpha * self.prior_variance / total  # of the posterior mean in x_t
        clean_variance = self.prior_variance * self.sigma**2 / total
        likelihood = self.noise**2 + self.extra * clean_variance
        self.slope = -1.0 / total - self.gain**2 / likelihood  # of the guided score, and its value at zero
        at_zero = self.prior_mean - self.gain * self.alpha * self.prior_mean
        self.value = self.alpha * self.prior_mean / total + self.gain * (self.y - at_zero) / likelihood
        return self

    def affine(self, factor, shift, noise=0.0):
        self.centre = factor * self.centre + shift
        self.spread = factor**2 * self.spread + noise

    def from_noise(self):
        scale = np.sqrt(self.prior_variance.mean())
        self.centre, self.spread = self.alpha * self.prior_mean, (self.alpha * scale) ** 2 + self.sigma**2
        self.spread = np.full_like(self.prior_mean, self.spread)

    def langevin(self, h, steps):
        for _ in range(steps):
            self.affine(1.0 + h * self.slope, h * self.value, 2.0 * h)

    def clean(self):
        """To the guided posterior mean (x_t + sigma^2 score) / alpha."""
        self.affine((1.0 + self.sigma**2 * self.slope) / self.alpha, self.sigma**2 * self.value / self.alpha)

    def ancestral(self, s):
        """To an earlier time, from the guided posterior mean x0 and eps = -sigma score."""
        alpha, sigma = float(self.schedule.alpha(s)), float(self.schedule.sigma(s))
        ratio = (sigma / alpha) / (self.sigma / self.alpha)
        noise = sigma * np.sqrt(1.0 - ratio**2)
        rest = np.sqrt(sigma**2 - noise**2)
        x0 = (1.0 + self.sigma**2 * self.slope) / self.alpha, self.sigma**2 * self.value / self.alpha
        self.affine(
            alpha * x0[0] - rest * self.sigma * self.slope, alpha * x0[1] - rest * self.sigma * self.value, noise**2
        )
        self.at(s)

    def anneal(self, times, steps, step_size):
        for t in times:
            self.at(t)
            self.langevin(step_size * self.sigma**2, steps)
        self.clean()


def widened(log_likelihood, predictions):
    """The exact guidance of `model` under VE: the likelihood's variance and that of the clean point."""
    (prediction,) = predictions.values()
    variance = jnp.asarray(VARIANCE, prediction.x0.dtype)
    sigma2 = prediction.schedule.sigma(prediction.t) ** 2
    clean = variance * sigma2 / (variance + sigma2)
    return dist.Normal(prediction.x0, jnp.sqrt(NOISE**2 + clean)).log_prob(Y).sum()


ANNEALS = {
    "snr": ({"num_levels": 12, "steps_per_level": 3, "step_size": 0.3}, VE_PRIOR, 2 * 0.3**2),
    "sigma": (
        {"levels": [20.0, 5.0, 1.5, 0.5], "steps_per_level": 5, "step_rule": "sigma", "step_size": 0.05},
        VP_PRIOR,
        None,
    ),
    "exact_guidance": (
        {"num_levels": 12, "steps_per_level": 3, "step_size": 0.3, "guidance": widened},
        VE_PRIOR,
        2 * 0.3**2,
    ),
}


@pytest.mark.slow
def test_a_moment_is_a_guidance():
    """The full covariance is the exact guidance of a Gaussian: the same draws as by the formula, for both kernels."""
    anneal = {"num_levels": 6, "steps_per_level": 2, "step_size": 0.3}
    for make, options in ((AnnealedLangevin, anneal), (GuidedReverse, {})):
        by_name, by_formula = (
            one_draw(make(model, guidance=guidance, **options), Y, chains=60).z["x"] for guidance in ("mmps", widened)
        )
        np.testing.assert_allclose(by_name, by_formula, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "prior", "c"), ANNEALS.values(), ids=ANNEALS)
def test_annealed_law_is_the_recursion(options, prior, c):
    """The bias that theory predicts, through the whole walk, for both rules, both kinds of ladder and any guidance."""
    schedule = prior.denoiser.schedule
    law = Law(schedule, guidance_variance=float("guidance" in options))
    if "levels" in options:
        times = np.asarray(schedule.inverse_noise_level(jnp.array(options["levels"])))
        c = options["step_size"] / float(schedule.sigma(times[-1])) ** 2
    else:
        times = np.asarray(UniformLogSNR()(schedule, options["num_levels"]))
    law.at(times[0]).from_noise()
    law.anneal(times, options["steps_per_level"], c)
    mcmc = run(AnnealedLangevin(model, **options), Y, prior)
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], law.centre, law.spread)
    extra = mcmc.get_extra_fields(group_by_chain=True)
    assert "accept_prob" not in extra and not extra["diverging"].any()
    levels = len(times)
    assert extra["level_step_size"].shape == extra["level_score_norm"].shape == (CHAINS, DRAWS, levels)
    np.testing.assert_allclose(extra["level_step_size"][0, 0], c * np.asarray(schedule.sigma(times)) ** 2, rtol=1e-3)
    assert (extra["num_score_evals"] == levels * options["steps_per_level"] + 1).all()


@SLOW
def test_restart_is_a_chain_with_the_law_of_its_recursion():
    """Each draw begins at the last one, noised: the fixed point of noising, walking and denoising."""
    levels = [8.0, 2.0, 0.9, 0.3]
    kernel = AnnealedLangevin(model, levels=levels, steps_per_level=4, step_size=0.3, restart_level=1.0)
    mcmc = run(kernel, Y, num_warmup=50)
    schedule = VE_PRIOR.denoiser.schedule
    times = np.asarray(schedule.inverse_noise_level(jnp.array(levels[2:])))  # 0.9 is the highest level at or below 1
    law = Law(schedule)
    for _ in range(200):
        law.affine(1.0, 0.0, 0.9**2)
        law.anneal(times, 4, 2 * 0.3**2)
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert_moments(x, law.centre, law.spread)
    norms = np.asarray(mcmc.get_extra_fields()["level_score_norm"])
    assert np.isnan(norms[:, :2]).all() and np.isfinite(norms[:, 2:]).all()
    assert (mcmc.get_extra_fields()["num_score_evals"] == 2 * 4 + 1).all()
    assert np.corrcoef(x[:, :-1, 0].ravel(), x[:, 1:, 0].ravel())[0, 1] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("metropolis", [False, True])
def test_bias_of_the_step_and_its_cure(metropolis):
    """Long walks: 1 / (kappa (1 - h kappa / 2)) at the last level without a test, and 1 / kappa with one."""
    prior = DiffusionPrior(Gaussian(MEAN, VARIANCE, VE(0.02, 40.0)), sampler=SAMPLER)
    options = {"levels": [4.0, 1.0, 0.6], "steps_per_level": 60, "step_size": 0.6}
    mcmc = run(AnnealedLangevin(model, metropolis=metropolis, **options), Y, prior, num_samples=50)
    schedule = prior.denoiser.schedule
    law = Law(schedule).at(schedule.inverse_noise_level(0.6))
    kappa, h = -law.slope, 2 * 0.6**2 * 0.6**2
    assert (h * kappa > 0.4).all()  # the two variances differ by a quarter and more
    law.centre = law.value / kappa
    law.spread = 1.0 / kappa if metropolis else 1.0 / (kappa * (1.0 - 0.5 * h * kappa))
    law.clean()
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], law.centre, law.spread)
    extra = mcmc.get_extra_fields()
    if metropolis:
        assert extra["level_accept_prob"].shape == (CHAINS * 50, 3)
        assert ((extra["accept_prob"] > 0.3) & (extra["accept_prob"] < 0.99)).all()
        np.testing.assert_allclose(extra["accept_prob"], extra["level_accept_prob"].mean(1), rtol=1e-5)


@SLOW
def test_adjusted_walk_leaves_its_level_in_place():
    """Exact draws of a bimodal target at one level, by inverting its distribution function, walk and keep their law."""
    count, t = 20_000, 0.5
    mixture = GaussianMixture([0.3, 0.7], [[-2.0], [1.5]], 0.2, VE(0.05, 5.0))

    def one_dimension(y):
        x = numpyro.sample("x", DiffusionPrior(mixture))
        numpyro.sample("y", dist.Normal(x[0], 0.8), obs=y)

    posterior = noisy_posterior(Record(one_dimension).at((0.4,), {}))
    grid = jnp.linspace(-6.0, 6.0, 8001)
    log_density = jax.vmap(lambda x: posterior.log_density({"x": x[None]}, {"x": t}))(grid)
    cumulative = np.cumsum(np.exp(np.asarray(log_density - log_density.max(), float)))
    cumulative /= cumulative[-1]
    start = jnp.interp(jax.random.uniform(jax.random.key(0), (count,)), cumulative, grid)

    @jax.jit
    @jax.vmap
    def walk(x, key):
        keys = jax.random.split(key, 5)
        return level_walk.adjusted(keys, posterior, {"x": x[None]}, {"x": t}, {"x": jnp.asarray(0.4)})

    x_t, statistics, diverging = walk(start, jax.random.split(jax.random.key(1), count))
    moved = np.sort(np.asarray(x_t["x"][:, 0]))
    assert not diverging.any() and 0.5 < float(statistics.accept_prob.mean()) < 0.9
    assert float(jnp.mean(jnp.abs(x_t["x"][:, 0] - start) > 0.1)) > 0.5
    distance = np.abs(np.interp(moved, grid, cumulative) - (np.arange(count) + 0.5) / count).max()
    assert distance < 1.95 / np.sqrt(count)  # the 0.1 % point of the Kolmogorov-Smirnov statistic


@SLOW
def test_sites_plates_and_transforms():
    """Two sites of different schedules, one positive and in a plate: each has the law of its own recursion."""
    positive = DiffusionPrior(VP_PRIOR.denoiser, transform=EXP, sampler=SAMPLER)
    data = jnp.array([[3.0, -1.0], [0.0, 2.0], [1.0, 1.0]])

    def both(y, y_plate):
        model(y)
        with numpyro.plate("points", 3):
            v = numpyro.sample("v", positive)
            numpyro.sample("y_plate", dist.Normal(jnp.log(v), NOISE).to_event(1), obs=y_plate)

    options = {"num_levels": 10, "steps_per_level": 3, "step_size": 0.25}
    samples = run(AnnealedLangevin(both, **options), Y, data).get_samples(group_by_chain=True)
    assert samples["v"].shape == (CHAINS, DRAWS, 3, 2) and (samples["v"] > 0).all()
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)
    for site, prior, y in [("x", VE_PRIOR, Y), ("v", VP_PRIOR, data)]:
        schedule = prior.denoiser.schedule
        times = np.asarray(UniformLogSNR()(schedule, 10))
        law = Law(schedule, y, np.broadcast_to(MEAN, y.shape), np.broadcast_to(VARIANCE, y.shape))
        law.at(times[0]).from_noise()
        law.anneal(times, 3, 2 * 0.25**2)
        draws = samples[site] if site == "x" else jnp.log(samples["v"])
        assert_moments(draws, law.centre, law.spread)


@pytest.mark.parametrize(("num_corrections", "prior"), [(2, VE_PRIOR), (0, VP_PRIOR)], ids=["corrected", "bare"])
def test_predictor_corrector_law_is_the_recursion(num_corrections, prior):
    solver = Ancestral(12)
    kernel = GuidedReverse(model, predictor=solver, num_corrections=num_corrections, snr=0.3)
    mcmc = run(kernel, Y, prior)
    times = np.asarray(solver.times(prior.denoiser))
    law = Law(prior.denoiser.schedule).at(times[0])
    law.from_noise()
    for s in times[1:]:
        law.ancestral(s)
        law.langevin(2 * 0.3**2 * law.sigma**2, num_corrections)
    law.clean()
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], law.centre, law.spread)
    assert (mcmc.get_extra_fields()["num_score_evals"] == 12 + 11 * num_corrections).all()


@SLOW
def test_without_data_the_prior_comes_back():
    """Weights and moments of a mixture, by solvers of two evaluations and with a memory; the corrector does no harm."""
    mixture = GaussianMixture([0.3, 0.7], [[-4.0], [4.0]], 1.0, VE(0.02, 80.0))
    for solver in (StochasticHeun(40), DPMSolverPP(60, eta=1.0)):
        kernel = GuidedReverse(flat, predictor=solver, snr=0.1)
        x = run(kernel, None, DiffusionPrior(mixture)).get_samples(group_by_chain=True)["x"][..., 0]
        assert_moments((x > 0).astype(float), 0.7, 0.21)
        right = x[x > 0][None]
        assert_moments(right, 4.0, 1.0)


KERNELS = {
    "annealed": partial(AnnealedLangevin, num_levels=10, step_size=0.3),
    "annealed_restart": partial(AnnealedLangevin, num_levels=10, step_size=0.3, restart_level=1.0),
    "guided_reverse": partial(GuidedReverse, predictor=Ancestral(10)),
}


@SLOW
@pytest.mark.parametrize("make", [KERNELS["annealed"], KERNELS["guided_reverse"]])
def test_in_gibbs(make):
    """Other sites by NUTS: with a tight prior of the noise, the law of the draws is that of a known noise."""

    def nearly_known_noise(y):
        x = numpyro.sample("x", VE_PRIOR)
        noise = numpyro.sample("noise", dist.LogNormal(jnp.log(NOISE), 1e-3))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    kernel = DiffusionGibbs(nearly_known_noise, x_kernel=make)
    ours = run(kernel, Y, num_warmup=30, num_samples=200, chains=16).get_samples(group_by_chain=True)["x"]
    alone = run(make(model), Y, num_warmup=30).get_samples(group_by_chain=True)["x"]
    assert_moments(ours, np.asarray(alone.mean((0, 1))), np.asarray(alone.var((0, 1))), errors=4.5)


@pytest.mark.slow
def test_what_is_not_finite_is_counted():
    """A likelihood that is NaN moves nothing and says so; a step driven by far more than its noise says so too."""

    def no_number(y):
        numpyro.factor("nan", jnp.nan * numpyro.sample("x", VE_PRIOR).sum())

    def far_too_precise(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", VE_PRIOR)[0], 1e-3), obs=1e4)

    for make in (AnnealedLangevin, partial(AnnealedLangevin, restart_level=1.0), GuidedReverse):
        state = one_draw(make(no_number), Y, chains=2)
        assert state.diverging.all() and jnp.isfinite(state.z["x"]).all()
    exact = DiffusionPrior(Gaussian(MEAN, VARIANCE, VE(0.02, 40.0)), sampler=SAMPLER)
    state = one_draw(AnnealedLangevin(no_number_exact(exact), metropolis=True), chains=2)
    assert state.diverging.all() and (state.accept_prob == 0).all()
    assert one_draw(AnnealedLangevin(far_too_precise), Y, chains=2).diverging.all()


def no_number_exact(prior):
    def no_number():
        numpyro.factor("nan", jnp.nan * numpyro.sample("x", prior).sum())

    return no_number


def test_status_and_the_default_guidance():
    for kernel in (AnnealedLangevin, GuidedReverse):
        assert isinstance(kernel.status, Status) and not kernel.status.exact and kernel.status.needs == "score"
    posterior = noisy_posterior(Record(model).at((Y,), {}))
    x_t, t = {"x": jnp.array([0.3, 0.4])}, {"x": 0.2}
    value, predictions = posterior.noisy_log_likelihood(x_t, t)
    assert value == at_clean_point(posterior.log_likelihood, predictions)
    np.testing.assert_allclose(value, dist.Normal(predictions["x"].x0, NOISE).log_prob(Y).sum(), rtol=1e-6)


def no_prior(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def chained_priors(y):
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
    numpyro.sample("z", DiffusionPrior(Gaussian(x)))


def different_samplers(y):
    numpyro.sample("x", VE_PRIOR)
    numpyro.sample("z", DiffusionPrior(Gaussian([0.0])))


def network_model(y):
    numpyro.sample("x", DiffusionPrior(NetworkDenoiser(MLP((2,), rngs=nnx.Rngs(0)), schedule=VE()), density="none"))


ADJUSTED = partial(AnnealedLangevin, metropolis=True)
REFUSED = {
    "other_sites": (
        AnnealedLangevin,
        unknown_noise,
        r"latent sites \['noise'\]. Use DiffusionGibbs\(model, x_kernel=A",
    ),
    "other_sites_pc": (GuidedReverse, unknown_noise, "x_kernel=GuidedReverse"),
    "no_site": (AnnealedLangevin, no_prior, "it has no DiffusionPrior site"),
    "chained": (AnnealedLangevin, chained_priors, r"\['z'\] depend on other diffusion sites"),
    "samplers": (GuidedReverse, different_samplers, r"different samplers; give one .* GuidedReverse\(pred"),
    "no_density": (ADJUSTED, network_model, 'needs a density at every noise level.*target="energy"'),
    "outside": (partial(AnnealedLangevin, levels=[100.0, 1.0]), model, "levels must lie within .* 0.02 to 40; got 100"),
    "restart": (partial(AnnealedLangevin, restart_level=50.0), model, "restart_level must lie within .*; got 50"),
}


@pytest.mark.parametrize(("make", "bad_model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(make, bad_model, message):
    with pytest.raises(ValueError, match=message):
        run(make(bad_model), Y, num_samples=1, chains=1)


BAD_ARGUMENTS = {
    "moment": ({"guidance": "ddrm"}, ValueError, "guidance must be one of 'dps'"),
    "tested_moment": ({"guidance": "mmps", "metropolis": True}, ValueError, "'mmps' has a score only"),
    "rising": ({"levels": [1.0, 2.0]}, ValueError, "levels must be strictly decreasing; got 1 and then 2"),
    "negative": ({"levels": [1.0, -2.0]}, ValueError, "levels must be positive and finite"),
    "table": ({"levels": [[1.0]]}, ValueError, "levels must be a list of noise levels"),
    "restart": ({"levels": [4.0, 1.0], "restart_level": 5.0}, ValueError, "on the ladder, between 1 and 4; got 5"),
    "restart_sign": ({"restart_level": -1.0}, ValueError, "restart_level must be positive"),
    "steps": ({"steps_per_level": 0}, ValueError, "steps_per_level must be at least 1; got 0"),
    "num_levels": ({"num_levels": 1}, ValueError, "num_levels must be at least 2; got 1"),
    "rule": ({"step_rule": "adam"}, ValueError, "step_rule must be one of 'snr', 'sigma'; got 'adam'"),
    "step_size": ({"step_size": 0.0}, ValueError, "step_size must be positive"),
    "guidance": ({"guidance": 3}, TypeError, "guidance must be callable.*got int"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        AnnealedLangevin(model, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"predictor": 3}, TypeError, "predictor must be a Solver"),
        ({"num_corrections": -1}, ValueError, "num_corrections must be at least 0"),
        ({"snr": 0.0}, ValueError, "snr must be positive"),
    ],
)
def test_bad_arguments_of_the_predictor_corrector(options, error, message):
    with pytest.raises(error, match=message):
        GuidedReverse(model, **options)
