"""The claims of the example of a learned likelihood: its simulator, its truth, and how far its posterior is off."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, levy_stable, norm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
learned_likelihood = importlib.import_module("learned_likelihood")

pytestmark = pytest.mark.optimised


@pytest.fixture
def stable(monkeypatch):
    """SciPy's law in the parameters of the example (Nolan's S0)."""
    monkeypatch.setattr(levy_stable, "parameterization", "S0")
    return levy_stable


@pytest.mark.parametrize("theta", [(1.2, 0.6), (1.7, -0.4)])
def test_simulator_and_truth_are_of_one_law(stable, theta):
    """Both against SciPy's: the density to single precision, 20,000 draws by Kolmogorov and Smirnov."""
    x = np.array([-30.0, -4.0, -0.5, 1.0, 6.0, 30.0])
    found = jax.jit(lambda theta, x: learned_likelihood.Stable(theta).log_prob(x))(jnp.array(theta), x)
    # densities are sums of 400 terms of order .1 with relative errors of 1e-7, some below 1e-5
    np.testing.assert_allclose(np.exp(found), stable.pdf(x, *theta), rtol=1e-4, atol=3e-7)
    draws = learned_likelihood.simulate(np.random.default_rng(0), *np.tile(theta, (20_000, 1)).T)
    grid = np.sinh(np.linspace(-8.0, 8.0, 401))  # SciPy takes 2 ms for each
    distribution = np.array([stable.cdf(each, *theta) for each in grid])
    assert kstest(draws, lambda x: np.interp(np.arcsinh(x), np.arcsinh(grid), distribution)).pvalue > 1e-3


@pytest.mark.slow
def test_posterior_of_the_learned_likelihood():
    """Forty months and a third of the page's training, against the posterior by the exact density.

    Monte Carlo errors of means are about .1 posterior standard deviations, and those of log ratios .07; the rest is the
    network's. Found were .08, .16 and 89 % effective weights.
    """
    data = learned_likelihood.returns(num_months=40)
    denoiser = learned_likelihood.learned(0, 4000, 300_000)
    runs = [learned_likelihood.sample(0, data, law, 60, num) for law, num in ((denoiser, 150), (None, 500))]
    draws, exact = ({k: np.asarray(v) for k, v in run.get_samples().items()} for run in runs)
    weights = learned_likelihood.weights(draws, data, denoiser, None)
    found = learned_likelihood.compare(draws, exact, weights)
    assert np.abs(found["off"]).max() < 0.4
    assert np.abs(found["log_ratio"]).max() < 0.25
    assert np.abs(found["reweighted"]).max() < 0.4  # of the weights' Monte Carlo error
    assert 1.0 / np.sum(weights**2) > 0.7 * len(weights)


@pytest.mark.slow
def test_tails_are_heavier_than_those_of_a_normal_law():
    """By the exact density: falls beyond 30 % are ten times as likely as under a normal law, and one month has one."""
    y, market = learned_likelihood.returns()
    exact = learned_likelihood.sample(0, (y, market), None, 60, 400).get_samples()
    exact = {name: np.asarray(each) for name, each in exact.items()}
    assert (exact["tail"] < 1.95).mean() > 0.9
    line = np.polyval(np.polyfit(market, y, 1), market)
    normal = norm.sf(30.0, scale=np.std(y - line))
    assert learned_likelihood.beyond(0, exact, np.array([30.0])).mean() > 10.0 * normal
    assert np.sum(exact["drift"].mean() + exact["slope"].mean() * market - y > 30.0) == 1
