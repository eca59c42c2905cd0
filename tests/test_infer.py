"""Kernels through warm-up, against posteriors in closed form; hierarchies, starts of Gibbs, and refusals.

That a step leaves a law in place is shown in `test_kernel_laws`; here chains adapt and have to get there.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import SAMPLER, SCHEDULE, Y, known_noise, quadrature, run, standard, unknown_noise
from moments import assert_moments
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, DiffusionGibbs, DiffusionPCN, NoiseSpace
from numpyro_diffusion.infer.kernel.adapt import Tally
from numpyro_diffusion.noise import VP
from numpyro_diffusion.solve import Adams, AdaptiveFlow, DPMSolverPP, Heun

SLOW = pytest.mark.slow
STANDARD, SCORE_ONLY = standard(), standard(density="none")


def given_noise(y, noise):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", STANDARD), noise).to_event(1), obs=y)


GIBBS = {
    "pcn": DiffusionGibbs,
    "noise_space": partial(DiffusionGibbs, x_kernel=NoiseSpace),
    "joint_noise_space": NoiseSpace,
}


@SLOW
@pytest.mark.parametrize("make", GIBBS.values(), ids=GIBBS)
def test_unknown_noise(make):
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    mcmc = run(make(unknown_noise), Y, num_warmup=400, num_samples=1000)
    samples = mcmc.get_samples(group_by_chain=True)
    assert set(samples) == {"x", "noise", "twice"}
    assert_moments(samples["x"], x_mean, x_variance)
    assert_moments(samples["noise"], noise_mean, noise_variance)
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)


def test_levels_that_never_succeed_become_rare():
    """Moves from .01, .08, .6 and 5 up hit data of that precision once in 1 to 1e7; without data all are accepted."""
    kernel = DiffusionPCN(given_noise, solver=Adams(8))
    for noise, share in ((0.01, 0.2), (100.0, 1.0)):
        mcmc = run(kernel, Y, jnp.asarray(noise), num_warmup=800, num_samples=2, chains=4)
        found = np.asarray(mcmc.last_state.tally.weights())[0]
        np.testing.assert_allclose(found, [1.0, 1.0, share, share], rtol=1e-6)
        assert mcmc.last_state.tally.tried[0].sum() == pytest.approx(4 * 200, rel=0.2)


def test_a_level_is_drawn_as_the_tally_says():
    """From each part by its weight, evenly within; what a higher part has accepted opens the lower ones."""
    tally = Tally(jnp.array([90.0, 0.0, 5.0, 0.0]), jnp.array([100.0, 900.0, 500.0, 500.0]))
    np.testing.assert_allclose(tally.weights(), [1.0, 1.0, 1.0, 0.2], rtol=1e-6)
    heights = np.sort(jax.vmap(tally.draw)(jax.random.split(jax.random.key(0), 10_000)))
    shares = np.histogram(heights, np.linspace(0.0, 1.0, 9))[0] / 10_000
    truth = np.repeat([1.0, 1.0, 1.0, 0.2], 2) / 6.4
    np.testing.assert_allclose(shares, truth, atol=4 * np.sqrt(0.16 * 0.84 / 10_000))


def test_numpyros_kernels_need_a_density():
    """A kernel of NumPyro's on a prior without a density is told which kernels would do."""
    with pytest.raises(NotImplementedError, match="NoiseSpace.*DiffusionPCN or infer.DiffusionGibbs"):
        run(NUTS(known_noise), Y, SCORE_ONLY, num_warmup=2, num_samples=2, chains=1)


def test_gibbs_refreshes_both_blocks():
    """What a composite kernel changes around a `DiffusionGibbs` reaches the block that sweeps first."""
    kernel = DiffusionGibbs(unknown_noise)
    state = kernel.init(jax.random.key(0), 0, None, (Y,), {})
    values = kernel.get_constrain_fn((Y,), {})(state.z)
    refreshed = kernel.refresh(state, (Y + 1.0,), {})
    x_state, rest_state = refreshed.x_state, refreshed.rest_state
    truth = dist.Normal(values["x"], values["noise"]).log_prob(Y + 1.0).sum()
    assert float(x_state.log_likelihood) == pytest.approx(
        float(truth + dist.LogNormal(0.0, 0.5).log_prob(values["noise"])), rel=1e-4
    )
    assert float(rest_state.potential_energy) != float(state.rest_state.potential_energy)


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
    "different_samplers": (
        partial(DiffusionPCN, solver=None),
        different_samplers,
        r"different samplers; give one .* DiffusionPCN\(solver",
    ),
    "few_steps": (partial(DiffusionPCN, solver=None), few_steps, "num_times >= 6; got 5"),
    "adaptive": (partial(DiffusionPCN, solver=AdaptiveFlow()), known_noise, "a solver with a fixed number of steps"),
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
    "solver": (lambda: DiffusionPCN(known_noise, solver=Heun), TypeError, "must be a solver such as solve.Adams"),
    "model": (lambda: NoiseSpace(3), TypeError, "must be a NumPyro model"),
    "inner": (lambda: NoiseSpace(known_noise, inner=lambda model: model), TypeError, "must make an MCMCKernel"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
