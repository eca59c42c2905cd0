"""Every kernel against posteriors in closed form, under every chain method, and its refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import transforms
from numpyro.infer import HMC, MCMC, NUTS

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, DiffusionGibbs, DiffusionPCN, NoiseSpace
from numpyro_diffusion.noise import VE, VP
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, Heun

SLOW = pytest.mark.slow
CHAINS = 8
Y = jnp.array([3.0, -1.0])
SCHEDULE = VE(0.01, 40.0)
SAMPLER = DPMSolverPP(48, eta=1.0)
STANDARD = DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER)
SCORE_ONLY = DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, density="none")


def known_noise(y, prior=STANDARD):
    """Posterior N(y / 2, 1/2) in each dimension: 1.5 where y is 3."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def unknown_noise(y, prior=STANDARD):
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def positive(y):
    """The exponential of a standard normal u, observed with unit noise: u has the posterior of `known_noise`."""
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, transform=EXP))
    numpyro.sample("y", dist.Normal(jnp.log(x), 1.0).to_event(1), obs=y)


def softplus(y):
    """Like `positive`, through a transform that is not NumPyro's own for the support."""
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, transform=SOFTPLUS))
    numpyro.sample("y", dist.Normal(SOFTPLUS.inv(x), 1.0).to_event(1), obs=y)


EXP, SOFTPLUS = transforms.ExpTransform(), transforms.SoftplusTransform()


def run(
    kernel, *args, num_warmup=300, num_samples=600, chains=CHAINS, method="vectorized", fields=(), seed=0, **kwargs
):
    options = {"num_chains": chains, "chain_method": method, "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, **options, **kwargs)
    mcmc.run(jax.random.key(seed), *args)
    return mcmc


def assert_moments(draws, mean, variance, errors=4.0):
    """Mean and variance of (chains, draws, ...) within Monte Carlo standard errors, by effective sample size."""
    draws = np.asarray(draws, np.float64)
    mean, variance = np.broadcast_to(mean, draws.shape[2:]), np.broadcast_to(variance, draws.shape[2:])
    squares = (draws - mean) ** 2
    for values, truth, name in [(draws, mean, "mean"), (squares, variance, "variance")]:
        size = values.shape[0] * values.shape[1]  # anticorrelated draws have a larger or negative effective size
        effective = effective_sample_size(values)
        effective = np.where((effective > 0) & (effective < size), effective, size)
        error = values.std((0, 1)) / np.sqrt(effective)
        off = np.abs(values.mean((0, 1)) - truth) / error
        assert (off < errors).all(), f"{name}: {values.mean((0, 1))} against {truth}, {off} standard errors"


def quadrature():
    """Posterior moments of `unknown_noise`, the noise on a grid and x in closed form given it."""
    log_noise = np.linspace(-4.0, 4.0, 4001)
    s2 = np.exp(2.0 * log_noise)
    y = np.asarray(Y)[:, None]
    log_weight = -0.5 * (log_noise / 0.5) ** 2 - 0.5 * (y**2 / (1 + s2) + np.log(1 + s2)).sum(0)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean, variance = y / (1 + s2), s2 / (1 + s2)
    x_mean = (weight * mean).sum(1)
    x_variance = (weight * (variance + mean**2)).sum(1) - x_mean**2
    noise_mean = (weight * np.exp(log_noise)).sum()
    return x_mean, x_variance, noise_mean, (weight * s2).sum() - noise_mean**2


KERNELS = {
    "pcn": DiffusionPCN,
    "pcn_4_proposals": partial(DiffusionPCN, num_proposals=4),
    "pcn_only_adapted": partial(DiffusionPCN, global_fraction=0.0),
    "noise_space_nuts": NoiseSpace,
    "noise_space_hmc": partial(NoiseSpace, inner=HMC, num_steps=3, trajectory_length=None),
}


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_known_noise(make):
    """With y = 3 the posterior mean is 1.5; a kernel that loses the prior returns 3."""
    mcmc = run(make(known_noise), Y)
    assert set(mcmc.get_samples()) == {"x"}
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], Y / 2, 0.5)


@pytest.mark.parametrize("kernel", [NUTS(known_noise)], ids=["nuts_on_the_flow_density"])
def test_plain_numpyro_kernels(kernel):
    mcmc = run(kernel, Y, num_warmup=150, num_samples=200, chains=2, method="sequential")
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], Y / 2, 0.5)


@pytest.mark.parametrize("model", [positive, softplus])
@pytest.mark.parametrize("make", [DiffusionPCN, NoiseSpace])
def test_transform(make, model):
    """The Jacobian belongs to the prior and enters once or not at all, never in the acceptance."""
    x = run(make(model), Y).get_samples(group_by_chain=True)["x"]
    assert (x > 0).all()
    assert_moments(jnp.log(x) if model is positive else SOFTPLUS.inv(x), Y / 2, 0.5)


def positive_unknown_noise(y):
    """The exponential of `unknown_noise`'s x."""
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, transform=EXP))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(jnp.log(x), noise).to_event(1), obs=y)


@SLOW
def test_transform_in_gibbs():
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    samples = run(DiffusionGibbs(positive_unknown_noise), Y, num_samples=1000).get_samples(group_by_chain=True)
    assert_moments(jnp.log(samples["x"]), x_mean, x_variance)
    assert_moments(samples["noise"], noise_mean, noise_variance)


GIBBS = {
    "pcn": DiffusionGibbs,
    "pcn_4_proposals": partial(DiffusionGibbs, x_kernel=partial(DiffusionPCN, num_proposals=4)),
    "noise_space": partial(DiffusionGibbs, x_kernel=NoiseSpace),
    "joint_noise_space": NoiseSpace,
}


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=SLOW if "_" in name else ()) for name, make in GIBBS.items()]
)
def test_unknown_noise(make):
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    mcmc = run(make(unknown_noise), Y, num_warmup=400, num_samples=1000)
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(samples) == {"x", "noise", "twice"}
    assert_moments(samples["x"], x_mean, x_variance)
    assert_moments(samples["noise"], noise_mean, noise_variance)
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)


def test_score_only_prior_needs_no_density():
    """The rest-block never evaluates the prior: log_prob would raise."""
    run(DiffusionGibbs(unknown_noise), Y, SCORE_ONLY, num_warmup=2, num_samples=2, chains=1)
    with pytest.raises(NotImplementedError, match="NoiseSpace.*DiffusionPCN or infer.DiffusionGibbs"):
        run(NUTS(known_noise), Y, SCORE_ONLY, num_warmup=2, num_samples=2, chains=1)


def test_multimodal_weights():
    """Separated modes: the weights of a mixture posterior, which depend on moves between modes."""
    means = jnp.array([[-6.0, 0.0], [6.0, 0.0]])
    prior = DiffusionPrior(GaussianMixture([0.3, 0.7], means, 1.0, VE(0.01, 80.0)), sampler=DPMSolverPP(48, eta=1.0))

    def model(y):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[0], 8.0), obs=y)

    evidence = np.array([0.3, 0.7]) * np.exp(-0.5 * (np.array([-6.0, 6.0]) + 4.0) ** 2 / 65.0)
    right = evidence[1] / evidence.sum()
    x = run(DiffusionPCN(model), -4.0, num_samples=1000).get_samples(group_by_chain=True)["x"]
    assert_moments((x[..., 0] > 0).astype(float), right, right * (1 - right))


def test_gibbs_refreshes_both_blocks():
    """What a composite kernel changes around a `DiffusionGibbs` reaches the block that sweeps first."""
    kernel = DiffusionGibbs(unknown_noise)
    state = kernel.init(jax.random.key(0), 0, None, (Y,), {})
    values = kernel.get_constrain_fn((Y,), {})(state.z)
    x_state, rest_state = kernel.refresh(state, (Y + 1.0,), {}).gibbs_state.block_states
    truth = dist.Normal(values["x"], values["noise"]).log_prob(Y + 1.0).sum()
    assert float(x_state.log_likelihood) == pytest.approx(
        float(truth + dist.LogNormal(0.0, 0.5).log_prob(values["noise"])), rel=1e-4
    )
    assert float(rest_state.potential_energy) != float(state.gibbs_state.block_states[1].potential_energy)


def test_gibbs_starts_where_it_is_told():
    """Unconstrained values as for any kernel of MCMC, whichever of the blocks would want them otherwise."""
    given = {"x": jnp.array([0.3, -0.4]), "noise": jnp.log(0.7)}
    for rest_kernel in (NUTS, MALA):
        kernel = DiffusionGibbs(unknown_noise, rest_kernel=rest_kernel)
        state = kernel.init(jax.random.key(0), 5, given, (Y,), {})
        values = kernel.get_constrain_fn((Y,), {})(state.z)
        np.testing.assert_allclose(values["noise"], 0.7, rtol=1e-5)
        np.testing.assert_allclose(values["x"], given["x"], rtol=1e-5)


@SLOW
def test_two_sites():
    """The sum of two sources is observed: their posterior is Gaussian with correlation -1/2 (kernels move both)."""
    a = DiffusionPrior(Gaussian([0.0], 1.0, SCHEDULE), sampler=SAMPLER)
    b = DiffusionPrior(Gaussian([1.0], 1.0, VP()), sampler=SAMPLER)

    def model(y):
        total = numpyro.sample("a", a) + numpyro.sample("b", b)
        numpyro.sample("y", dist.Normal(total[0], 1.0), obs=y)

    for make in (DiffusionPCN, NoiseSpace):
        samples = run(make(model), 4.0).get_samples(group_by_chain=True)
        assert_moments(samples["a"][..., 0], 1.0, 2.0 / 3.0)
        assert_moments(samples["b"][..., 0], 2.0, 2.0 / 3.0)
        assert_moments((samples["a"] + samples["b"])[..., 0], 3.0, 2.0 / 3.0)


@pytest.mark.parametrize(
    "make", [DiffusionPCN, pytest.param(NoiseSpace, marks=SLOW), pytest.param(DiffusionGibbs, marks=SLOW)]
)
def test_plates(make):
    """Several points in a plate, with a shared site for Gibbs."""
    data = jnp.array([[3.0, -1.0], [0.0, 2.0], [1.0, 1.0]])

    def model(y):
        shift = numpyro.sample("shift", dist.Normal(0.0, 0.001)) if make is DiffusionGibbs else 0.0
        with numpyro.plate("points", 3):
            x = numpyro.sample("x", STANDARD)
            numpyro.sample("y", dist.Normal(x + shift, 1.0).to_event(1), obs=y)

    x = run(make(model), data, num_warmup=300, num_samples=1200).get_samples(group_by_chain=True)["x"]
    assert x.shape == (CHAINS, 1200, 3, 2)
    assert_moments(x, data / 2, 0.5)


@SLOW
def test_prior_that_depends_on_a_latent_site():
    """A hierarchy: the rest-block must keep the prior's density, and noise-space blocks must refuse."""

    def model(y):
        centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
        prior = DiffusionPrior(Gaussian(jnp.full(1, centre), 1.0, SCHEDULE), sampler=SAMPLER, density_solver=Heun(24))
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)

    for make, draws in [(DiffusionGibbs, 400), (NoiseSpace, 600)]:
        samples = run(make(model), 3.0, num_warmup=200, num_samples=draws, chains=4).get_samples(group_by_chain=True)
        assert_moments(samples["centre"], 1.0, 2.0 / 3.0)
        assert_moments(samples["x"][..., 0], 2.0, 2.0 / 3.0)
    with pytest.raises(ValueError, match="depend on other latent sites"):
        run(DiffusionGibbs(model, x_kernel=NoiseSpace), 3.0, num_warmup=1, num_samples=1)


def test_hard_constraint_and_nan_likelihood():
    """Minus infinity outside a half-space is sampled; NaN is rejected and counted."""

    def truncated(nan_below):
        x = numpyro.sample("x", STANDARD)
        numpyro.factor("above", jnp.where(x[0] > 0.5, 0.0, jnp.where(x[0] < nan_below, jnp.nan, -jnp.inf)))

    for nan_below in (-jnp.inf, 0.0):
        mcmc = run(DiffusionPCN(truncated), nan_below, num_samples=800)
        x = mcmc.get_samples(group_by_chain=True)["x"][..., 0]
        assert (x > 0.5).all()
        tail = dist.Normal(0.0, 1.0)
        hazard = float(jnp.exp(tail.log_prob(0.5)) / (1.0 - tail.cdf(0.5)))
        assert_moments(x, hazard, 1.0 + 0.5 * hazard - hazard**2)
        assert bool(mcmc.get_extra_fields()["diverging"].any()) == (nan_below == 0.0)


def no_prior(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def observed_prior(y):
    numpyro.sample("x", STANDARD, obs=y)


def masked_prior(y):
    with numpyro.handlers.mask(mask=False):
        numpyro.sample("x", STANDARD)


def scaled_prior(y):
    with numpyro.handlers.scale(scale=0.5):
        numpyro.sample("x", STANDARD)


def impossible(y):
    numpyro.sample("x", STANDARD)
    numpyro.factor("never", -jnp.inf)


def chained_priors(y):
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
    numpyro.sample("z", DiffusionPrior(Gaussian(x)))


def different_samplers(y):
    numpyro.sample("x", STANDARD)
    numpyro.sample("z", DiffusionPrior(Gaussian([0.0]), sampler=DPMSolverPP(16, eta=1.0)))


def few_steps(y):
    numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), sampler=DPMSolverPP(5, eta=1.0)))


REFUSED = {
    "different_samplers": (DiffusionPCN, different_samplers, r"different samplers; give one .* DiffusionPCN\(solver"),
    "few_steps": (DiffusionPCN, few_steps, "num_times >= 6; got 5"),
    "no_site": (DiffusionPCN, no_prior, "it has no DiffusionPrior site"),
    "no_site_noise_space": (NoiseSpace, no_prior, "it has no DiffusionPrior site"),
    "no_site_gibbs": (DiffusionGibbs, no_prior, "it has no DiffusionPrior site"),
    "observed": (NoiseSpace, observed_prior, r"sites \['x'\] are observed"),
    "masked": (DiffusionPCN, masked_prior, "unmasked and unscaled"),
    "scaled": (NoiseSpace, scaled_prior, "unmasked and unscaled"),
    "other_sites": (DiffusionPCN, unknown_noise, r"latent sites \['noise'\]. Use DiffusionGibbs"),
    "nothing_else": (DiffusionGibbs, known_noise, "no latent sites besides"),
    "impossible": (DiffusionPCN, impossible, "not finite at 100 draws of the prior, in 2 of 2 chains"),
    "chained": (DiffusionPCN, chained_priors, r"\['z'\] depend on other diffusion sites"),
}


@pytest.mark.parametrize(("make", "model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(make, model, message):
    with pytest.raises(ValueError, match=message):
        run(make(model), Y, num_warmup=1, num_samples=1, chains=2)


BAD_ARGUMENTS = {
    "num_proposals": (
        lambda: DiffusionPCN(known_noise, num_proposals=0),
        ValueError,
        "num_proposals must be at least 1",
    ),
    "num_proposals_float": (lambda: DiffusionPCN(known_noise, num_proposals=1.5), TypeError, "whole number"),
    "fraction": (
        lambda: DiffusionPCN(known_noise, global_fraction=1.5),
        ValueError,
        r"global_fraction must lie in \[0",
    ),
    "solver": (lambda: DiffusionPCN(known_noise, solver=Heun()), TypeError, "stochastic solver"),
    "ddim": (lambda: DiffusionPCN(known_noise, solver=Ancestral(eta=0.0)), TypeError, "stochastic solver"),
    "model": (lambda: NoiseSpace(3), TypeError, "must be a NumPyro model"),
    "inner": (lambda: NoiseSpace(known_noise, inner=lambda model: model), TypeError, "must make an MCMCKernel"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
