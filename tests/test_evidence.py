"""The evidence: unbiased on the natural scale, and within its own error of constants that are known."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, DiffusionPCN, TemperedSMC
from numpyro_diffusion.infer.particles.evidence import evidence_of, pool_islands
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Adams

SLOW, OPTIMISED = pytest.mark.slow, pytest.mark.optimised
QUIET = {"progress_bar": False}
MEANS = np.array([[-3.0, 0.0], [3.0, 1.0]])
WEIGHTS = np.array([0.7, 0.3])
Y = jnp.array([2.0, 0.5])
TEMPERATURES = (0.1, 0.4, 1.0)


def gaussian(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def mixture(y):
    law = GaussianMixture(WEIGHTS, MEANS, 1.0, VE(0.01, 40.0))
    x = numpyro.sample("x", DiffusionPrior(law, density="none"))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def truth(model):
    if model is gaussian:
        return float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(Y).sum())
    log_terms = dist.Normal(MEANS, np.sqrt(1.25)).log_prob(Y).sum(-1) + np.log(WEIGHTS)
    return float(jax.nn.logsumexp(log_terms))


FIXED = {
    "gaussian": (gaussian, partial(MALA, step_size=0.3, target_accept_prob=None, adapt_mass_matrix=False)),
    "mixture": (mixture, partial(DiffusionPCN, global_fraction=1.0, solver=Adams(14))),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:at .* temperatures the moves ended")
@pytest.mark.parametrize(("model", "kernel"), FIXED.values(), ids=FIXED)
def test_unbiased_at_given_temperatures(model, kernel):
    """200 runs at once, as islands that share nothing random but levels: the mean of Z / truth is 1 within 4 errors.

    Nothing adapts: temperatures, kernel and number of moves are given, two at each.
    """
    options = {"num_islands": 200, "temperatures": TEMPERATURES, "correlation": 1e-6, "max_moves": 2, **QUIET}
    smc = TemperedSMC(model, 200 * 20, kernel=kernel, **options).run(jax.random.key(0), Y)
    ratios = np.exp(np.asarray(smc.log_evidence.islands, np.float64) - truth(model))
    assert abs(ratios.mean() - 1.0) < 4.0 * ratios.std(ddof=1) / np.sqrt(200)
    assert ratios.std() > 0.1  # the average of the logarithms would be seen to be too small
    assert np.log(ratios).mean() < -2.0 * np.log(ratios).std() / np.sqrt(200)
    assert [step.num_moves for step in smc.temperatures] == [2, 2, 2]
    np.testing.assert_allclose([step.temperature for step in smc.temperatures], TEMPERATURES, rtol=1e-6)


@SLOW
@pytest.mark.parametrize("model", [gaussian, pytest.param(mixture, marks=OPTIMISED)])
def test_unbiased_when_everything_adapts(model):
    """200 runs of 100 particles with the defaults, to 4 standard errors."""
    smc = TemperedSMC(model, 100, num_islands=1, **QUIET)
    found = [smc.run(jax.random.key(i), Y).log_evidence.value for i in range(200)]
    ratios = np.exp(np.asarray(found, np.float64) - truth(model))
    assert abs(ratios.mean() - 1.0) < 4.0 * ratios.std(ddof=1) / np.sqrt(200)


@pytest.mark.slow
def test_scale_parameters_are_sites_like_others():
    """A scale with a wide prior, by quadrature: 20 islands, 4 standard errors."""
    y = np.array([0.1, -0.2, 0.05, 0.3, -0.1])

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 2.0))
        numpyro.sample("y", dist.Normal(0.0, scale).expand([5]).to_event(1), obs=y)

    log_scale = np.linspace(-10.0, 10.0, 4001)
    log_joint = -0.5 * (y[:, None] ** 2 * np.exp(-2 * log_scale)).sum(0) - 5 * (log_scale + 0.5 * np.log(2 * np.pi))
    log_joint += -0.125 * log_scale**2 - 0.5 * np.log(8 * np.pi)
    known = np.log(np.exp(log_joint).sum() * (log_scale[1] - log_scale[0]))
    evidence = TemperedSMC(model, 4000, num_islands=20, **QUIET).run(jax.random.key(0), jnp.array(y)).log_evidence
    assert float(evidence.standard_error) < 0.05
    assert abs(float(evidence.value) - known) < 4.0 * float(evidence.standard_error)


def test_islands_count_by_their_evidence():
    """Draws of each in proportion, to one; the error is that of a mean; islands that found nothing count as zero."""
    islands = jnp.log(jnp.array([1.0, 3.0, 4.0, 0.0]))
    value, error, _ = evidence_of(islands)
    assert float(value) == pytest.approx(np.log(2.0))
    assert float(error) == pytest.approx(np.std([0.5, 1.5, 2.0, 0.0], ddof=1) / 2.0, rel=1e-5)
    counts = np.bincount(np.asarray(pool_islands(jax.random.key(0), islands, 100)) // 100, minlength=4)
    assert (abs(counts - 400 * np.array([1, 3, 4, 0]) / 8) <= 1).all()
    assert np.isnan(evidence_of(islands[:1]).standard_error)


# Known normalising constants of ordinary models


def benchmark():
    """The problems of benchmarks/evidence.py."""
    path = Path(__file__).parents[1] / "benchmarks/evidence.py"
    spec = importlib.util.spec_from_file_location("benchmark_evidence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@SLOW
@pytest.mark.parametrize(
    ("name", "error"), [("funnel", 0.1), pytest.param("many_well", 0.4, marks=OPTIMISED), ("brownian", 0.16)]
)
def test_known_constants(name, error):
    """Within 4 of its own standard errors, and those as small as the published samplers' are not."""
    module = benchmark()
    problem, smc = module.PROBLEMS[name], module.sampler(name, 1000)  # a quarter of the benchmark's particles
    evidence = smc.run(jax.random.key(1), *problem.args).log_evidence
    assert float(evidence.standard_error) < error
    assert abs(float(evidence.value) - problem.truth) < 4.0 * float(evidence.standard_error)
    if name == "many_well":  # resampling leaves draws and wells correlated, so the error is that over runs
        shares = [float((smc.run(jax.random.key(i)).get_samples()["x"] > 0).mean()) for i in range(8)]
        assert abs(np.mean(shares) - 0.844307) < 4.0 * np.std(shares, ddof=1) / np.sqrt(8)
    if name == "funnel":
        x0 = np.asarray(smc.get_samples()["x0"], np.float64)
        assert abs(x0.mean()) < 0.3 and abs(x0.std() - 3.0) < 0.3  # a tenth: those that miss the neck have 1.4 and 1.8
