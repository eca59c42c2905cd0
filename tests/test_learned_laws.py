"""What a learned prior is worth: weights, bounds, modes, poor laws that say so, and studies in sequence."""

import importlib.util
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from numpyro.distributions import constraints

from numpyro_diffusion import prior_from_samples
from numpyro_diffusion.diagnostics import classifier_test

NUM = 4000
CENTRES = np.array([[-2.0, 1.0], [2.0, 0.0]])


def modes(rng, num):
    """A mixture in two dimensions: a third of the draws about the first centre, curved."""
    first = rng.random(num) < 1 / 3
    z = rng.normal(size=(num, 2))
    z[:, 1] += 0.4 * z[:, 0] ** 2
    return (np.where(first[:, None], CENTRES[0] + 0.4 * z, CENTRES[1] + 0.7 * z)).astype(np.float32)


def wide(rng, num):
    """Draws of a wide normal law, and weights that make them draws of `modes`."""
    x = 2.5 * rng.normal(size=(num, 2)) + [0.0, 0.5]
    log_wide = -0.5 * np.sum(((x - [0.0, 0.5]) / 2.5) ** 2, 1) - 2.0 * np.log(2.5)
    parts = []
    for centre, scale, share in ((CENTRES[0], 0.4, 1 / 3), (CENTRES[1], 0.7, 2 / 3)):
        z = (x - centre) / scale
        z[:, 1] -= 0.4 * z[:, 0] ** 2
        parts.append(np.log(share) - 0.5 * np.sum(z**2, 1) - 2.0 * np.log(scale))
    log_weights = np.logaddexp(*parts) - log_wide
    return x.astype(np.float32), np.exp(log_weights - log_weights.max())


@pytest.mark.slow
def test_weighted_draws_are_honoured():
    """A classifier cannot tell draws of the law from draws of what the weights stand for; without weights it can."""
    x, weights = wide(np.random.default_rng(0), 6 * NUM)
    exact = modes(np.random.default_rng(1), 2000)
    prior = prior_from_samples({"x": x}, weights=weights)
    assert prior.report.faithful, prior.report
    drawn = prior.flow(jax.random.normal(jax.random.key(2), (2000, 2)))["x"]
    assert classifier_test(drawn, exact, jax.random.key(3)).value <= 0.55
    assert classifier_test(x[:2000], exact, jax.random.key(3)).value > 0.7


@pytest.mark.slow
def test_bounds_modes_and_dependence():
    """Sites of three supports that depend on each other: no draw is outside, and the report finds nothing."""
    rng = np.random.default_rng(4)
    x = modes(rng, NUM)
    share = rng.beta(1.0 + np.exp(x[:, 0] / 2.0), 2.0)
    parts = np.stack([rng.dirichlet([1.0, 2.0, 3.0]) for _ in range(NUM)])
    draws = {"x": x, "share": share, "parts": parts, "rate": np.exp(0.5 * rng.normal(size=NUM) + x[:, 1])}
    supports = {"share": constraints.unit_interval, "parts": constraints.simplex, "rate": constraints.positive}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = prior_from_samples({n: v.astype(np.float32) for n, v in draws.items()}, supports, key=jax.random.key(5))
    drawn = {n: np.asarray(v) for n, v in prior.flow(jax.random.normal(jax.random.key(6), (20_000, 6))).items()}
    for name, support in supports.items():
        assert np.isfinite(drawn[name]).all() and np.asarray(support(drawn[name])).all(), name
    first = [(values["x"][:, 0] < 0.2).mean() for values in (draws, drawn)]
    assert abs(first[1] - first[0]) < 4 * np.sqrt(first[0] * (1 - first[0]) / NUM) + 0.01  # of draws and of training
    logit = [np.log(v["share"] / (1 - v["share"])) for v in (draws, drawn)]
    told = [np.corrcoef(v["x"][:, 0], y)[0, 1] for v, y in zip((draws, drawn), logit, strict=True)]
    assert abs(told[1] - told[0]) < 0.05 and told[0] > 0.3


@pytest.mark.slow
def test_a_poor_law_says_so():
    """Two modes after a few steps: the normal law is kept, and report and warning say that it is poor."""
    x = modes(np.random.default_rng(7), 1000)
    with pytest.warns(UserWarning, match="the learned prior is not that of the draws: a classifier is right in"):
        prior = prior_from_samples({"x": x}, num_steps=5)
    report = prior.report
    assert not report.faithful and report.joint.value > 0.6 and report.marginal.value > report.marginal.floor
    assert "poor" in str(report) and type(report).read(report.describe()) == report


@pytest.mark.slow
def test_normal_draws_stay_normal_and_forgotten_supports_are_named():
    """Few draws of a normal law are not made worse; a positive site without its support is called by name."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(300, 2)) @ np.array([[1.0, 0.9], [0.0, 0.1]])
    prior = prior_from_samples({"x": x}, num_steps=300, report=False)
    z = jax.random.normal(jax.random.key(0), (20_000, 2))
    u = prior.flow(z)["x"]
    np.testing.assert_allclose(np.cov(np.asarray(u).T), np.cov(x.T), rtol=0.05)
    with pytest.warns(UserWarning, match=r"all draws of rate are positive.*supports=\{'rate': constraints.positive\}"):
        prior_from_samples({"rate": rng.gamma(1.0, 1.0, (300, 2))}, num_steps=300)


@pytest.mark.slow
@pytest.mark.optimised
def test_studies_in_sequence():
    """The example: first posterior and second data give that of all; a normal law fails where there are two modes.

    With two modes the learned law is not within .1 (means .22, .41 in two runs), but nearer than the normal one (2.3).
    """
    path = Path(__file__).parents[1] / "examples" / "sequential.py"
    spec = importlib.util.spec_from_file_location("sequential", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = {"num": example.NUM_DRAWS, "num_steps": example.NUM_STEPS}
    _, one_mode = example.look("regression", seed=0, **sizes)
    assert max(one_mode["learned prior"]) < 0.1
    _, two_modes = example.look("factor", seed=0, **sizes)
    assert 2.0 * max(two_modes["learned prior"]) < max(two_modes["normal prior"])
    assert min(two_modes["normal prior"]) > 0.5
