"""Twisted SMC, particle Gibbs and guided moves against posteriors and evidences in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import gammaln, logsumexp
from moments import assert_moments
from numpyro.distributions import transforms
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.guidance import GUIDANCES, linear
from numpyro_diffusion.infer import DiffusionGibbs, GuidedPCN, ParticleGibbs, TwistedSMC
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, Heun, StochasticHeun, sample

SLOW = pytest.mark.slow
QUIET = {"progress_bar": False}
SCHEDULE, SAMPLER = VE(0.01, 40.0), DPMSolverPP(48, eta=1.0)
Y = jnp.array([3.0, -1.0])
PRIOR = DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, density="none")


def known_noise(y, prior=PRIOR):
    """Posterior N(y / 2, 1/2) in each dimension; the evidence is N(y; 0, 2)."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def unknown_noise(y):
    x = numpyro.sample("x", PRIOR)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def positive(y):
    x = numpyro.sample("x", DiffusionPrior(PRIOR.denoiser, sampler=SAMPLER, transform=transforms.ExpTransform()))
    numpyro.sample("y", dist.Normal(jnp.log(x), 1.0).to_event(1), obs=y)


def plates(y):
    with numpyro.plate("points", 2):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def run(kernel, *args, num_warmup=100, num_samples=500, chains=8):
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": chains}
    mcmc = MCMC(kernel, **options, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), *args)
    return mcmc


MAKERS = {"guided_pcn": GuidedPCN, "particle_gibbs": partial(ParticleGibbs, num_particles=4)}
each_kernel = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def precise(y):
    """The data leave a hundredth of the prior's variance, three prior deviations from its mean."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)


@pytest.mark.slow
@each_kernel
def test_chains_leave_where_the_data_rule_them_out(make):
    """Within ten steps from draws of the prior, whose walks the guidance would hardly take: none holds a chain."""
    x = run(make(precise), Y, num_warmup=10, num_samples=40, chains=64).get_samples(group_by_chain=True)["x"]
    assert_moments(x, Y / 1.01, 0.01 / 1.01)


@SLOW
def test_sweeps_leave_where_the_data_rule_them_out():
    """The other site would fit the data to any start, and hold it there."""

    def offset(y):
        x, b = numpyro.sample("x", PRIOR), numpyro.sample("b", dist.Normal())
        numpyro.sample("y", dist.Normal(x + b, 0.05).to_event(1), obs=y)

    kernel = DiffusionGibbs(offset, x_kernel=MAKERS["particle_gibbs"])
    samples = run(kernel, Y, num_warmup=20, num_samples=1, chains=32).get_samples()
    assert (abs(samples["x"] + samples["b"][:, None] - Y) < 5.0 * 0.05).all()


@SLOW
@each_kernel
def test_transform_and_plates(make):
    x = run(make(positive), Y).get_samples(group_by_chain=True)["x"]
    assert_moments(jnp.log(x), Y / 2, 0.5)
    data = jnp.array([[3.0, -1.0], [0.0, 2.0]])
    assert_moments(run(make(plates), data).get_samples(group_by_chain=True)["x"], data / 2, 0.5)


@pytest.mark.parametrize("moment", ["mmps", pytest.param("pigdm", marks=SLOW), pytest.param("tmpd", marks=SLOW)])
def test_evidence_and_posterior_of_a_gaussian(moment):
    """Within 4 standard errors over 16 islands, and a hundredth for the walk's 48 steps."""
    smc = TwistedSMC(known_noise, 6400, guidance=moment, num_islands=16, **QUIET).run(jax.random.key(0), Y)
    evidence, truth = smc.log_evidence, dist.Normal(0.0, jnp.sqrt(2.0)).log_prob(Y).sum()
    assert abs(evidence.value - truth) < 4.0 * evidence.standard_error + 0.01
    x = smc.get_samples()["x"]
    assert x.shape == (6400, 2)
    assert (abs(x.mean(0) - Y / 2) < 4.0 * np.sqrt(0.5 / 6400)).all()  # weights are even: nothing was resampled before


@SLOW
def test_evidence_of_a_mixture_is_unbiased_for_the_walk():
    """4,000 runs of four particles, on the natural scale: a walk of 12 steps, whose own evidence is by plain sampling.

    Were no walk unguided, the weights of "flat" would have such tails that the mean falls 6.5 errors short.
    """
    denoiser = GaussianMixture([0.4, 0.6], jnp.array([[-2.0], [1.5]]), 0.5, VE(0.1, 10.0))
    prior = DiffusionPrior(denoiser, sampler=DPMSolverPP(12, eta=1.0), density="none")

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior)[0], 0.7), obs=y)

    x = sample(prior.sampler, denoiser, jax.random.key(1), (1_000_000,))[:, 0]
    likelihood = np.exp(np.asarray(dist.Normal(x, 0.7).log_prob(0.5), np.float64))
    truth, error = likelihood.mean(), likelihood.std() / 1000.0
    for moment in GUIDANCES:
        smc = TwistedSMC(model, 16_000, guidance=moment, num_islands=4000, ess_threshold=0.7, **QUIET)
        smc.run(jax.random.key(2), 0.5)
        found = np.exp(np.asarray(smc.log_evidence.islands, np.float64))
        assert 0.0 < smc.levels.resampled.max() and found.std() > 0.0
        assert abs(found.mean() - truth) < 4.0 * np.hypot(found.std() / np.sqrt(4000), error), moment


def test_second_run_compiles_nothing_and_summary(capsys, compiling):
    smc = TwistedSMC(known_noise, 40, num_islands=2, **QUIET)
    smc.run(jax.random.key(0), Y, PRIOR)
    other = DiffusionPrior(Gaussian([1.0, 0.0], 1.0, SCHEDULE), sampler=SAMPLER, density="none")
    key, y = jax.random.key(1), Y + 1.0
    with compiling() as programs:
        smc.run(key, y, other)
    assert programs == []
    smc.print_summary()
    text = capsys.readouterr().out
    assert "log evidence" in text and "(2 islands)" in text and "smallest effective size" in text
    assert smc.levels.noise_level.shape == (48,) and smc.num_score_evals == 48


MATRIX = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
GRID = jnp.stack(jnp.meshgrid(*[jnp.linspace(-5.0, 5.0, 2001)] * 2), -1).reshape(-1, 2)


def counts(y, rate):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Poisson(rate * jnp.exp(x @ MATRIX.T)).to_event(1), obs=y)


@jax.jit
def evidence_by_quadrature(y, rate, grid):  # an argument: the compiler works out constants, four million of them
    log_rate = jnp.log(rate) + grid @ MATRIX.T
    log_joint = dist.Normal().log_prob(grid).sum(-1) + (y * log_rate - jnp.exp(log_rate) - gammaln(y + 1.0)).sum(-1)
    return logsumexp(log_joint) + 2.0 * jnp.log(10.0 / 2000)


@pytest.fixture(scope="module")
def of_counts():
    return TwistedSMC(counts, 1000, **QUIET)


COUNTS = {
    "few": (1.0, (0.3, 2.0)),
    "many": (10.0, (1.0, -0.5)),
    "none": (10.0, (-2.0, -2.0)),
    "thousands": (1000.0, (-1.5, 1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "x"), COUNTS.values(), ids=COUNTS)
def test_counts(of_counts, rate, x):
    """Four errors, and a twentieth for the walk's 48 steps.

    By the gradient at the predicted point alone, 10 was 14 nats too low, by islands that agreed on it, and 1000 was
    refused for log-likelihoods below -1e5.
    """
    y = jnp.round(rate * jnp.exp(MATRIX @ jnp.array(x)))
    value, error, _ = of_counts.run(jax.random.key(0), y, rate).log_evidence
    assert of_counts.problems == () and error < 0.1
    assert abs(value - evidence_by_quadrature(y, rate, GRID)) < 4.0 * error + 0.05


@pytest.mark.slow
def test_weights_that_degenerate_are_told_and_leave_no_error():
    smc = TwistedSMC(precise, 400, guidance="dps", **QUIET)
    with pytest.warns(UserWarning, match=r"weights degenerate at .* of the 100 particles of an island only \d\.\d are"):
        error = smc.run(jax.random.key(0), Y).log_evidence.standard_error
    assert jnp.isinf(error) and len(smc.problems) == 1


def vanishing(y):
    numpyro.sample("x", PRIOR)
    numpyro.factor("never", -jnp.inf)


def not_a_number(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.factor("half", jnp.where(x[0] > 0.0, jnp.nan, 0.0))


def counted(y):
    numpyro.sample("y", dist.Poisson(jnp.exp(numpyro.sample("x", PRIOR))).to_event(1), obs=jnp.array([3, 0]))


@SLOW
def test_what_is_not_a_number_has_no_weight():
    """Half of the prior, with a look-ahead that knows nothing of it: an observation with much noise."""
    smc = TwistedSMC(not_a_number, 4000, observation=linear(jnp.eye(2), jnp.zeros(2), 10.0), **QUIET)
    smc.run(jax.random.key(0), Y)
    assert (smc.get_samples()["x"][:, 0] <= 0.0).all()
    assert abs(smc.log_evidence.value - jnp.log(0.5)) < 4.0 * smc.log_evidence.standard_error
    mcmc = run(ParticleGibbs(not_a_number), Y, num_samples=20, chains=2)
    assert mcmc.get_extra_fields()["diverging"].any() and (mcmc.get_samples()["x"][:, 0] <= 0.0).all()


REFUSED = {
    "twisted_others": (
        lambda: TwistedSMC(unknown_noise, **QUIET).run(jax.random.key(0), Y),
        r"also has latent sites \['noise'\]",
    ),
    "vanish": (lambda: TwistedSMC(vanishing, 40, **QUIET).run(jax.random.key(0), Y), "must be positive at some part"),
    "constraint": (
        lambda: TwistedSMC(not_a_number, 40, **QUIET).run(jax.random.key(0), Y),
        "cannot tell which of them will meet",
    ),
    "likelihood": (
        lambda: TwistedSMC(counted, 40, guidance="mmps", **QUIET).run(jax.random.key(0), Y),
        "needs a Gaussian obs",
    ),
    "particles": (lambda: TwistedSMC(known_noise, 1), "num_particles must be at least 2"),
    "islands": (lambda: TwistedSMC(known_noise, 10, num_islands=4), "multiple of num_islands=4"),
    "threshold": (lambda: TwistedSMC(known_noise, ess_threshold=0.0), r"ess_threshold must lie in \(0, 1\]"),
    "moment": (lambda: TwistedSMC(known_noise, guidance="ddrm"), "guidance must be one of"),
    "pcn_moment": (lambda: GuidedPCN(known_noise, guidance="ddrm"), "guidance must be one of"),
    "pcn_likelihood": (lambda: run(GuidedPCN(counted, guidance="mmps"), Y), "needs a Gaussian observation"),
    "gibbs_moment": (lambda: ParticleGibbs(known_noise, guidance="ddrm"), "guidance must be one of"),
    "gibbs_particles": (lambda: ParticleGibbs(known_noise, num_particles=1), "num_particles must be at least 2"),
    "gibbs_others": (lambda: run(ParticleGibbs(unknown_noise), Y), r"DiffusionGibbs\(model, x_kernel=ParticleGibbs"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("solver", [Heun(), StochasticHeun(), DPMSolverPP(eta=0.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("make", [TwistedSMC, GuidedPCN, ParticleGibbs])
def test_solvers_whose_steps_have_no_density_are_refused(make, solver):
    with pytest.raises(TypeError, match="steps whose density is known"):
        make(known_noise, solver=solver)


def test_not_run_yet():
    with pytest.raises(RuntimeError, match=r"run\(\) must come first"):
        TwistedSMC(known_noise).get_samples()
    with pytest.raises(TypeError, match="must be a NumPyro model"):
        TwistedSMC(3)
