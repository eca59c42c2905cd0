"""The claims of the example of missing hours, and the closed forms that it is scored beside."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm

from numpyro_diffusion.infer import PopulationHMC

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
time_series = importlib.import_module("time_series")

pytestmark = pytest.mark.optimised


def test_hidden_hours_of_a_mixture_are_those_of_bayes_rule():
    """Two normals: mean and deviation of the draws against weights and posteriors in the form of precisions.

    Of 40,000 draws the standard errors are .005 of a deviation in the mean and .4 % in the deviation, or somewhat more
    for two modes; tolerances are five of these.
    """
    rng = np.random.default_rng(3)
    means, roots = 0.3 * rng.normal(size=(2, 24)), rng.normal(size=(2, 24, 24)) / 5.0
    covariances = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(24)
    law = SimpleNamespace(weights_=[0.3, 0.7], means_=means, covariances_=covariances)
    seen = np.eye(24)[time_series.SEEN]
    y = means.mean(0)[time_series.SEEN]
    log_weights, parts = [], []
    for weight, mean, covariance in zip(law.weights_, means, covariances, strict=True):
        prior, precision = np.linalg.inv(covariance), np.linalg.inv(covariance) + seen.T @ seen / time_series.NOISE**2
        posterior = np.linalg.solve(precision, prior @ mean + seen.T @ y / time_series.NOISE**2)
        # the evidence at the posterior's mean: p(x) p(y | x) / p(x | y), up to a constant
        misfit = np.sum((y - seen @ posterior) ** 2) / time_series.NOISE**2
        at = (posterior - mean) @ prior @ (posterior - mean) + misfit
        log_dets = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(precision)[1]
        log_weights.append(np.log(weight) - 0.5 * at + 0.5 * log_dets)
        parts.append((posterior[time_series.HIDDEN], np.diag(np.linalg.inv(precision))[time_series.HIDDEN]))
    weights = np.exp(log_weights - np.max(log_weights))
    weights /= weights.sum()
    assert 0.05 < weights[0] < 0.95  # both matter
    expected = weights @ [mean for mean, _ in parts]
    variance = weights @ [spread + (mean - expected) ** 2 for mean, spread in parts]
    draws = time_series.conditional(y, law, rng, 40_000)
    np.testing.assert_allclose((draws.mean(0) - expected) / np.sqrt(variance), 0.0, atol=0.025)
    np.testing.assert_allclose(draws.std(0) / np.sqrt(variance), 1.0, atol=0.025)


def test_the_score_is_that_of_a_normal_law():
    """CRPS of N(1, 2) at 2.5 in closed form; the standard error of 20,000 draws is below .01."""
    at, draws = 0.75, np.random.default_rng(4).normal(1.0, 2.0, (20_000, 1))
    expected = 2.0 * (at * (2.0 * norm.cdf(at) - 1.0) + 2.0 * norm.pdf(at) - 1.0 / np.sqrt(np.pi))
    np.testing.assert_allclose(time_series.crps(draws, np.array([2.5])), expected, atol=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what keeps one round from counting as converged
def test_a_learned_prior_is_closer_to_hidden_hours_than_a_normal_law():
    """The page's prior on 12 of its 60 days, by half its walkers, against the exact conditional of a normal law.

    On the page the normal law's score is .061 above, with a deviation of .07 between days: .020 is the standard error
    of the mean of 12, and the bound is three of these below. Of the shares inside 90 % it is .04 with .88 on the page.
    """
    curves, held_out = time_series.days(1)
    truths = held_out[:12, time_series.HIDDEN]
    rng = np.random.default_rng(1)
    y = (held_out[:, time_series.SEEN] + time_series.NOISE * rng.normal(size=(200, 15)))[:12]
    population = PopulationHMC(time_series.model, 32, 12, max_gradients=1, progress_bar=False)
    draws = {"learned": time_series.sample(1, y, time_series.learned(1, curves, 2000), population)}
    law = time_series.mixture(curves, most=1)
    draws["normal"] = [time_series.conditional(each, law, rng, 2000) for each in y]
    scores = time_series.summary(draws, truths)
    assert (scores["normal"] - scores["learned"]).mean() > 0.0
    assert time_series.inside(draws["learned"], truths, 0.9).mean() > 0.75
