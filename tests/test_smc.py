"""Tempering: resampling by its law, posteriors and evidence in closed form, and what happens when weights vanish."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import reparam
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, Cycle, DiffusionPCN, TemperedSMC, Vectorize
from numpyro_diffusion.infer.kernel.choose import conditional_systematic, effective_size, next_temperature, systematic
from numpyro_diffusion.infer.particles.evidence import evidence_of
from numpyro_diffusion.noise import VE
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import DPMSolverPP

SLOW = pytest.mark.slow
SCHEDULE = VE(0.01, 40.0)
Y = jnp.array([3.0, -1.0])
QUIET = {"progress_bar": False}


def prior(**options):
    sampler = DPMSolverPP(32, eta=1.0)
    return DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), density="none", sampler=sampler, **options)


def known_noise(y, scale=1.0):
    x = numpyro.sample("x", prior())
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def unknown_noise(y):
    x = numpyro.sample("x", prior())
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def evidence_of_unknown_noise():
    log_noise = np.linspace(-4.0, 4.0, 4001)
    variance = 1.0 + np.exp(2.0 * log_noise)
    y = np.asarray(Y)[:, None]
    log_joint = -0.5 * (y**2 / variance + np.log(2 * np.pi * variance)).sum(0) - 0.5 * (log_noise / 0.5) ** 2
    return np.log(np.exp(log_joint).sum() * (log_noise[1] - log_noise[0]) / (0.5 * np.sqrt(2 * np.pi)))


# Resampling


def test_systematic_resampling_has_the_right_counts():
    """N w on average, and never off by one or more; a weight of zero has no copies."""
    weights = jnp.array([0.05, 0.0, 0.4, 0.15, 0.4])
    keys = jax.random.split(jax.random.key(0), 20_000)
    ancestors = jax.vmap(lambda key: systematic(key, jnp.log(weights)))(keys)
    counts = np.stack([(ancestors == i).sum(1) for i in range(5)], 1)
    assert (abs(counts - 5 * np.asarray(weights)) < 1.0).all() and (counts[:, 1] == 0).all()
    np.testing.assert_allclose(counts.mean(0), 5 * np.asarray(weights), atol=4 * 0.5 / np.sqrt(20_000))


def test_conditional_resampling_has_the_conditional_law():
    """It is the law of a systematic sample, turned by a random number of places, given that the first copy is 0."""
    log_weights = jnp.log(jnp.array([0.3, 0.1, 0.45, 0.15]))
    keys = jax.random.split(jax.random.key(0), 60_000)

    def turned(key):
        key_comb, key_turn = jax.random.split(key)
        return jnp.roll(systematic(key_comb, log_weights), jax.random.randint(key_turn, (), 0, 4))

    wanted, found = jax.vmap(turned)(keys), jax.vmap(lambda key: conditional_systematic(key, log_weights))(keys)
    wanted = np.asarray(wanted)[np.asarray(wanted)[:, 0] == 0]
    assert (found[:, 0] == 0).all()
    code = lambda a: np.asarray(a) @ 4 ** np.arange(4)  # noqa: E731
    kinds = np.union1d(code(wanted), code(found))
    p, q = (np.array([(code(a) == k).mean() for k in kinds]) for a in (wanted, found))
    assert (abs(p - q) < 4.5 * np.sqrt(p.clip(1e-4) * (1 / len(wanted) + 1 / len(found)))).all()


def test_effective_size_and_next_temperature():
    assert float(effective_size(jnp.zeros(7))) == pytest.approx(7.0)
    assert float(effective_size(jnp.array([0.0, -jnp.inf, -jnp.inf]))) == pytest.approx(1.0)
    assert float(effective_size(jnp.full(3, -jnp.inf))) == 0.0
    log_likelihood = 30.0 * jax.random.normal(jax.random.key(0), (500,))
    beta = float(next_temperature(log_likelihood, 0.0, 0.5))
    assert 0.0 < beta < 1.0 and float(effective_size(beta * log_likelihood)) == pytest.approx(250.0, rel=1e-3)
    assert float(next_temperature(jnp.zeros(5), 0.3, 0.5)) == 1.0
    hard = jnp.where(jnp.arange(100) < 3, 0.0, -jnp.inf)  # what is left is all alike: nothing to wait for
    assert float(next_temperature(hard, 0.0, 0.5)) == 1.0


# Posteriors and evidence


def assert_near(draws, mean, variance, count, extra=1.5):
    """Within 4 standard errors of independent draws, widened for what resampling costs."""
    draws = np.asarray(draws, np.float64)
    assert (abs(draws.mean(0) - mean) < 4 * extra * np.sqrt(variance / count)).all()
    assert (abs(draws.var(0) / variance - 1.0) < 4 * extra * np.sqrt(2.0 / count)).all()


def test_gaussian_posterior_and_evidence():
    smc = TemperedSMC(known_noise, 2000, num_islands=20, **QUIET).run(jax.random.key(0), Y, 0.3)
    variance = 1.0 / (1.0 + 1.0 / 0.09)
    assert_near(smc.get_samples()["x"], Y * variance / 0.09, variance, 2000)
    truth = float(dist.Normal(0.0, np.sqrt(1.09)).log_prob(Y).sum())
    evidence = smc.log_evidence
    assert abs(float(evidence.value) - truth) < 4.0 * float(evidence.standard_error) < 4.0 * 0.1
    assert evidence.islands.shape == (20,) and len(smc.temperatures) > 1 and smc.num_score_evals > 0
    assert all(step.correlation <= 0.1 or step.num_moves == 100 for step in smc.temperatures)
    assert smc.problems == () and not any(step.lag for step in smc.temperatures)


@SLOW
def test_step_sizes_go_on_each_by_itself():
    """One that adapts goes on from temperature to temperature; one that is given stays as it is."""

    def make(model):
        return Cycle([MALA, partial(MALA, step_size=0.3, target_accept_prob=None)], model=model)

    def plain(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 0.05), obs=y)

    steps = TemperedSMC(plain, 200, kernel=make, **QUIET).run(jax.random.key(0), 1.0).temperatures
    growth = np.array([step.log_growth for step in steps])
    assert len(steps) > 2 and (growth[:, 1] == 0.0).all() and np.isnan(growth[:, 2:]).all()
    assert growth[-1, 0] < growth[0, 0] - 0.5  # the posterior is twenty times narrower than the prior


@pytest.mark.slow
def test_levels_adapt_at_each_temperature():
    """To an acceptance of 0.4, wherever that is: levels follow the posterior's width, from 1 down to 0.03.

    Each temperature goes on from the one before: left to begin in the middle again, the last moves accept 0.16.
    """
    local = partial(DiffusionPCN, global_fraction=0.0)
    steps = TemperedSMC(known_noise, 400, kernel=local, **QUIET).run(jax.random.key(0), Y, 0.03).temperatures
    levels = np.array([step.noise_level for step in steps])
    assert levels[0] > 10.0 * levels[-1] and (np.diff(levels) < 0).all()
    acceptances = np.array([step.accept_prob for step in steps])
    assert (acceptances > 0.22).all() and (acceptances < 0.7).all()


@SLOW
def test_second_run_compiles_nothing(compiling):
    smc = TemperedSMC(known_noise, 40, max_moves=3, **QUIET)
    smc.run(jax.random.key(0), Y, jnp.asarray(0.3))
    arguments = jax.random.key(1), Y + 0.1, jnp.asarray(0.4)
    with compiling() as programs:
        smc.run(*arguments)
    assert programs == []


@SLOW
@pytest.mark.parametrize("kernel", ["default", "noise_space"])
def test_other_latent_sites_are_particles_too(kernel):
    """Noise level unknown, against quadrature; moves by the default, and by NUTS in noise space."""
    from laws import quadrature

    model, make = unknown_noise, None
    if kernel == "noise_space":
        model = reparam(unknown_noise, config={"x": NoiseReparam()})
        make = lambda m: Vectorize(NUTS(m, max_tree_depth=3))  # noqa: E731
    smc = TemperedSMC(model, 1000, kernel=make, max_moves=60, **QUIET).run(jax.random.key(2), Y)
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    samples = smc.get_samples()
    assert_near(samples["x"], x_mean, x_variance, 1000)
    assert_near(samples["noise"], noise_mean, noise_variance, 1000, extra=2.0)  # a skewed law
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)
    evidence = smc.log_evidence
    assert abs(float(evidence.value) - evidence_of_unknown_noise()) < 4.0 * max(float(evidence.standard_error), 0.03)


@SLOW
def test_mode_weights_and_bayes_factor():
    """Two priors for the same data: the evidence of each mixture is known, and so is their ratio."""
    means = jnp.array([[-6.0, 0.0], [6.0, 0.0]])

    def model(y, weights):
        law = GaussianMixture(weights, means, 1.0, VE(0.01, 80.0))
        x = numpyro.sample("x", DiffusionPrior(law, density="none"))
        numpyro.sample("y", dist.Normal(x[0], 2.0), obs=y)

    smc = TemperedSMC(model, 2000, **QUIET)
    likelihoods, found = np.exp(dist.Normal(jnp.array([-6.0, 6.0]), np.sqrt(5.0)).log_prob(1.0)), []
    for weights in (np.array([0.8, 0.2]), np.array([0.1, 0.9])):
        smc.run(jax.random.key(0), 1.0, jnp.asarray(weights))
        share = weights[1] * likelihoods[1] / (weights * likelihoods).sum()
        right = float((smc.get_samples()["x"][:, 0] > 0).mean())
        assert abs(right - share) < 4 * 1.5 * np.sqrt(share * (1 - share) / 2000)
        found.append((smc.log_evidence, np.log((weights * likelihoods).sum())))
    factor = float(found[1][0].value - found[0][0].value)
    error = np.hypot(*[float(evidence.standard_error) for evidence, _ in found])
    assert abs(factor - (found[1][1] - found[0][1])) < 4.0 * max(error, 0.05)


@SLOW
def test_ordinary_models_by_mala():
    """No diffusion site at all: the kernel is MALA, and the evidence that of a Gaussian."""

    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    smc = TemperedSMC(model, 2000, num_islands=20, **QUIET).run(jax.random.key(0), 1.5)
    assert_near(smc.get_samples()["x"], 1.2, 0.2, 2000)
    truth = float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(1.5))
    assert abs(float(smc.log_evidence.value) - truth) < 4.0 * float(smc.log_evidence.standard_error)


# Robustness


def above(threshold):
    x = numpyro.sample("x", prior())
    numpyro.factor("above", jnp.where(x[0] > threshold, 0.0, -jnp.inf))


@pytest.fixture(scope="module")
def constrained():
    return TemperedSMC(above, 2000, **QUIET)


@pytest.mark.slow
def test_a_hard_constraint_is_met_or_said_to_be_out_of_reach(constrained):
    """P(x > 2) = 0.023: found, with its probability as the evidence. P(x > 4.753) = 1e-6: an error that says so."""
    smc = constrained.run(jax.random.key(0), 2.0)
    assert (smc.get_samples()["x"][:, 0] > 2.0).all()
    assert abs(float(smc.log_evidence.value) - np.log(0.02275)) < 4.0 * float(smc.log_evidence.standard_error) + 0.05
    with pytest.raises(ValueError, match="some draw of the prior; of 2000 it is zero at 2000, .* take more particles"):
        smc.run(jax.random.key(0), 4.753)


@SLOW
@pytest.mark.optimised
def test_a_soft_constraint_reaches_what_a_hard_one_does_not():
    """1e-6 of the prior by a distance with a temperature: x above 4.753 but for 0.02, and log 1e-6 as evidence."""

    def model(threshold):
        x = numpyro.sample("x", prior())
        numpyro.factor("near", -jnp.maximum(threshold - x[0], 0.0) / 0.02)

    smc = TemperedSMC(model, 2000, num_islands=20, **QUIET).run(jax.random.key(0), 4.753)
    grid = np.linspace(-8.0, 12.0, 200_001)
    density = np.exp(-0.5 * grid**2 - np.maximum(4.753 - grid, 0.0) / 0.02) / np.sqrt(2 * np.pi)
    truth = np.log(density.sum() * (grid[1] - grid[0]))
    evidence = smc.log_evidence
    assert abs(truth - np.log(1e-6)) < 0.15 and float(evidence.standard_error) < 0.2
    assert abs(float(evidence.value) - truth) < 4.0 * float(evidence.standard_error)
    x = np.asarray(smc.get_samples()["x"][:, 0], np.float64)
    mean = (grid * density).sum() / density.sum()
    assert abs(x.mean() - mean) < 4.0 * 3.0 * x.std() / np.sqrt(2000)  # resampled thirteen times: three times the error


@SLOW
def test_a_single_particle_left_and_a_nan_likelihood():
    """One particle of 40 meets the constraint: the others become its copies and move; NaN counts as zero."""

    def rare(threshold):
        x = numpyro.sample("x", prior())
        numpyro.factor("rare", jnp.where(x[0] > threshold, 0.0, jnp.nan))

    start = jax.random.split(jax.random.key(5), 3)[0]
    first = np.sort(np.asarray(TemperedSMC(rare, 40, **QUIET)._start(start, (0.0,), {}).z["x"][:, 0]))
    threshold = float(first[-2] + first[-1]) / 2.0
    with pytest.warns(UserWarning) as warned:
        smc = TemperedSMC(rare, 40, **QUIET).run(jax.random.key(5), threshold)
    assert "NaN at 39" in str(warned[0].message)
    assert "only 1 of 40 draws of the prior have a likelihood above zero" in str(warned[1].message)
    x = smc.get_samples()["x"][:, 0]
    assert (x > threshold).all() and len(np.unique(x)) > 5
    assert float(smc.temperatures[0].effective_size) == pytest.approx(1.0)
    assert smc.temperatures[0].num_diverging > 0
    islands = np.sort(np.asarray(smc.log_evidence.islands))
    np.testing.assert_allclose(islands, [-np.inf] * 3 + [np.log(0.1)], rtol=1e-5)


@pytest.mark.slow
def test_an_infinite_likelihood_counts_as_zero_and_is_told():
    """Infinite above 1, where no posterior is: what is left is the prior below, with its probability as evidence."""

    def spike(top):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("spike", jnp.where(x > 1.0, top, 0.0))

    smc = TemperedSMC(spike, 2000, num_islands=20, **QUIET)
    with pytest.warns(UserWarning, match=r"of 2000 draws .* infinite at \d{3}; NaN and infinity count as zero"):
        smc.run(jax.random.key(0), jnp.inf)
    assert (smc.get_samples()["x"] <= 1.0).all() and np.isfinite(smc.log_evidence.value)
    assert abs(float(smc.log_evidence.value) - np.log(0.84134)) < 4.0 * float(smc.log_evidence.standard_error)

    def all_infinite(_):
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("spike", jnp.inf)

    with pytest.raises(ValueError, match="zero at 0, NaN at 0, infinite at 40"):
        TemperedSMC(all_infinite, 40, **QUIET).run(jax.random.key(0), 0.0)


@pytest.mark.slow
def test_weights_that_vanish_on_the_way_are_an_error():
    """A kernel without a test walks out of the likelihood's support."""

    def shell(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("shell", jnp.where(abs(x) < 0.1, 0.0, -jnp.inf))

    kernel = partial(ULA, step_size=1e8, adapt_mass_matrix=False)
    with pytest.raises(ValueError, match="temperature 1 the moves have taken all .* Metropolis test"):
        TemperedSMC(shell, 200, kernel=kernel, correlation=0.5, **QUIET).run(jax.random.key(0), 0.0)


@pytest.mark.slow
def test_moves_that_end_too_early_are_told_and_in_the_error():
    """Steps of a hundredth of the posterior's width, three at a temperature: 12 to 34 nats too low.

    Islands say one, as a single one of 20 carries the mean. With what the moves left undone, it is within two errors.
    """

    def narrow(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)

    kernel = partial(MALA, step_size=1e-3, target_accept_prob=None, adapt_mass_matrix=False)
    y = jnp.repeat(jnp.array([2.0, -1.0]), 5)
    smc = TemperedSMC(narrow, 1000, kernel=kernel, num_islands=20, max_moves=3, **QUIET)
    with pytest.warns(UserWarning, match=r"max_moves=3 .* correlation of (0\.9\d|1\.00) is left at .* Raise max_moves"):
        smc.run(jax.random.key(0), y)
    value, error, islands = smc.log_evidence
    off = abs(float(value) - float(dist.Normal(0.0, np.sqrt(1.01)).log_prob(y).sum()))
    assert off > 5.0 * float(evidence_of(islands).standard_error)
    assert off < 2.0 * float(error) and len(smc.problems) == 1


BAD = {
    "model": (lambda: TemperedSMC(3), TypeError, "model must be a NumPyro model"),
    "kernel": (lambda: TemperedSMC(known_noise, kernel=3), TypeError, "kernel must make a kernel"),
    "one": (lambda: TemperedSMC(known_noise, 1), ValueError, "num_particles must be at least 2; got 1"),
    "islands": (lambda: TemperedSMC(known_noise, 10), ValueError, "multiple of num_islands=4, at least two each"),
    "ess": (lambda: TemperedSMC(known_noise, ess_threshold=0.0), ValueError, r"ess_threshold must lie in \(0, 1\]"),
    "ess_above": (lambda: TemperedSMC(known_noise, ess_threshold=1.5), ValueError, "ess_threshold must lie"),
    "ess_one": (lambda: TemperedSMC(known_noise, ess_threshold=1.0), ValueError, "ess_threshold must be at most 0.999"),
    "correlation": (lambda: TemperedSMC(known_noise, correlation=1.0), ValueError, "correlation must lie"),
    "moves": (lambda: TemperedSMC(known_noise, max_moves=0), ValueError, "max_moves must be at least 1"),
    "falling": (lambda: TemperedSMC(known_noise, temperatures=[0.5, 0.2]), ValueError, "must rise from above 0 to 1"),
    "no end": (lambda: TemperedSMC(known_noise, temperatures=[0.5]), ValueError, "temperatures must rise"),
    "no ladder": (lambda: TemperedSMC(known_noise, temperatures=[]), ValueError, "temperatures must rise"),
    "early": (lambda: TemperedSMC(known_noise).get_samples(), RuntimeError, r"run\(\) must come first"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_refused_models():
    def improper(y):
        numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(ValueError, match="prior of site 'x' cannot be drawn"):
        TemperedSMC(improper, **QUIET).run(jax.random.key(0), Y)

    def discrete(y):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("count", dist.Poisson(rate))

    with pytest.raises(ValueError, match=r"moves continuous sites; sites \['count'\] are discrete. Marginalise them"):
        TemperedSMC(discrete, **QUIET).run(jax.random.key(0), Y)
    with pytest.raises(ValueError, match="needs a latent site; it has none"):
        TemperedSMC(lambda y: None, **QUIET).run(jax.random.key(0), Y)


@SLOW
def test_summary_and_other_kernels(capsys):
    smc = TemperedSMC(known_noise, 80, kernel=partial(DiffusionPCN, num_proposals=2), max_moves=5, **QUIET)
    smc.run(jax.random.key(0), Y).print_summary()
    printed = capsys.readouterr().out
    assert "log evidence" in printed and "x[0]" in printed and "moves" in printed
