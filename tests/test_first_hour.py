"""The first hour: a deconvolution as a new user writes it, with what README.md and docs/start.md show and no more."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

# Curves of eight numbers: a peak at one of two places, upon a smooth normal curve. The law is a mixture of two normals
PLACE = np.arange(8)
NEAR = np.abs(PLACE[:, None] - PLACE)
PEAKS = 2.0 * np.exp(-0.5 * (PLACE - np.array([[2.0], [5.0]])) ** 2)
COVARIANCE = 0.3 * np.exp(-0.5 * (NEAR / 2.0) ** 2) + 0.05 * np.eye(8)
BLUR = np.exp(-0.5 * NEAR**2) / np.exp(-0.5 * NEAR**2).sum(1, keepdims=True)
NOISE = 0.2


def draws_of_the_law(seed, count):
    rng = np.random.default_rng(seed)
    smooth = rng.normal(size=(count, 8)) @ np.linalg.cholesky(COVARIANCE).T
    return (PEAKS[rng.integers(2, size=count)] + smooth).astype(np.float32)


def first_hour(curves, y, blur):
    """What a user writes: a prior of `curves`, which were blurred and seen with noise of unknown size as `y`."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    from flax import nnx

    from numpyro_diffusion import DiffusionPrior, fit
    from numpyro_diffusion.diagnostics import verdict
    from numpyro_diffusion.infer import PopulationHMC
    from numpyro_diffusion.nn import MLP
    from numpyro_diffusion.solve import DPMSolverPP

    key_fit, key_run = jax.random.split(jax.random.key(0))
    network = MLP((8,), features=32, rngs=nnx.Rngs(0))
    denoiser = fit(key_fit, network, curves, num_steps=600, progress_bar=False).denoiser
    prior = DiffusionPrior(denoiser, flow_solver=DPMSolverPP(12))

    def model(y, prior):
        x = numpyro.sample("x", prior)
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
        numpyro.sample("y", dist.Normal(blur @ x, noise).to_event(1), obs=y)

    population = PopulationHMC(model, 128, progress_bar=False)
    population.run(key_run, y, prior)
    print(verdict(population))
    return population.get_samples(), verdict(population).converged


def exact_posterior(y):
    """Mean and standard deviation of the curve, and mean of the noise: a mixture for each noise level on a grid."""
    total, first, second, level = 0.0, 0.0, 0.0, 0.0
    for noise in np.exp(np.linspace(-4.0, 1.0, 200)):
        of_data = BLUR @ COVARIANCE @ BLUR.T + noise**2 * np.eye(8)
        gain = COVARIANCE @ BLUR.T @ np.linalg.inv(of_data)
        variance = np.diag(COVARIANCE - gain @ BLUR @ COVARIANCE)
        off = y - PEAKS @ BLUR.T
        log_prior = -0.5 * ((np.log(noise) + 1.0) / 0.5) ** 2  # of the logarithm, in which the grid is even
        log_data = -0.5 * (off * np.linalg.solve(of_data, off.T).T).sum(1) - 0.5 * np.linalg.slogdet(of_data)[1]
        for weight, mean in zip(np.exp(log_prior + log_data), PEAKS + off @ gain.T, strict=True):
            total, level = total + weight, level + weight * noise
            first, second = first + weight * mean, second + weight * (mean**2 + variance)
    return first / total, np.sqrt(second / total - (first / total) ** 2), level / total


@pytest.mark.slow
def test_a_deconvolution_with_a_prior_of_the_users_own_data():
    """Converged, and the posterior of the exact law, but for what the network has not learned.

    With 400 effective draws or more the error of a mean is .05 posterior standard deviations, and .15 in the largest of
    eight; the rest of the tolerance is the network's, which has seen 4000 curves.
    """
    x = draws_of_the_law(1, 1)[0]
    y = (BLUR @ x + NOISE * np.random.default_rng(2).normal(size=8)).astype(np.float32)
    draws, converged = first_hour(draws_of_the_law(0, 4000), y, BLUR)
    mean, deviation, noise = exact_posterior(y)
    found = np.asarray(draws["x"])
    print((found.mean(0) - mean) / deviation, found.std(0) / deviation, draws["noise"].mean(), noise)
    assert converged
    np.testing.assert_array_less(np.abs(found.mean(0) - mean) / deviation, 0.3)
    np.testing.assert_allclose(found.std(0), deviation, rtol=0.2)
    np.testing.assert_allclose(draws["noise"].mean(), noise, rtol=0.1)


def shown():
    """The words in the code of README.md and docs/start.md, blocks and what stands between backticks."""
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/start.md"))
    return set(re.findall(r"\w+", " ".join(re.findall(r"```python\n.*?```|`[^`\n]+`", text, re.DOTALL))))


def test_the_first_hour_uses_nothing_that_the_two_pages_do_not_show():
    """Every name imported, every argument by name and every attribute is in their code."""
    used = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(first_hour)))):
        match node:
            case ast.ImportFrom():
                used |= {*node.module.split("."), *(alias.name for alias in node.names)}
            case ast.Attribute():
                used.add(node.attr)
            case ast.keyword():
                used.add(node.arg)
    assert len(used) > 20
    assert used <= shown(), f"shown on neither page: {sorted(used - shown())}"
