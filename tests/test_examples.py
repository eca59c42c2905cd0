"""The claims of examples: what their pages say, held against truths in closed form or by quadrature."""

import importlib
import sys
from pathlib import Path

import numpy as np
import numpyro
import pytest
from numpyro.distributions.transforms import ReshapeTransform

from numpyro_diffusion import DiffusionPrior
from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.solve import DPMSolverPP

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
hierarchical = importlib.import_module("hierarchical")
multimodal = importlib.import_module("multimodal")
separation = importlib.import_module("separation")


def test_probabilities_of_sets_are_those_of_quadrature():
    """Two measurements: the sum over sets and noise levels against a grid of both slopes and the noise level."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    y = 0.15 * x[:, 0] + 0.7 * rng.normal(size=60)
    slope = np.linspace(-1.0, 1.0, 401)  # steps of the spike's standard deviation
    log_prior = np.logaddexp(*(-0.5 * (slope / s) ** 2 - np.log(s) for s in (multimodal.SPIKE, multimodal.SLAB)))
    first, second = np.meshgrid(slope, slope, indexing="ij")
    squares = np.sum((y[:, None, None] - x[:, 0, None, None] * first - x[:, 1, None, None] * second) ** 2, 0)
    log_weights = [-0.5 * squares / s**2 - 60 * np.log(s) - 0.5 * s**2 for s in multimodal.NOISES]
    weights = np.logaddexp.reduce(log_weights, 0) + log_prior[:, None] + log_prior
    weights = np.exp(weights - weights.max())
    inside = multimodal.matters(slope)
    expected = [(weights.sum(1 - axis) * inside).sum() / weights.sum() for axis in range(2)]
    np.testing.assert_allclose(multimodal.truth(x, y), expected, rtol=1e-5)  # of the grid: 3e-6
    assert 0.05 < min(expected) and max(expected) < 0.95  # neither is a matter of course


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what keeps one round from counting as converged
def test_a_population_weighs_modes_where_chains_stay():
    """Four chains of NUTS disagree whether a measurement matters; one round of half the page's walkers meets the truth.

    The standard error over four islands is .04 for the worst of ten; the tolerance is four of these.
    """
    exact = multimodal.truth(*multimodal.patients())
    runs = multimodal.sample(0, multimodal.told_by(*multimodal.patients()), num=150, num_walkers=256, budget=1)
    shares = {
        name: multimodal.matters(np.asarray(run.get_samples(group_by_chain=True)["slope"])).mean(1)
        for name, run in runs.items()
    }
    assert verdict(runs["NUTS"]).r_hat > 1.1
    assert np.ptp(shares["NUTS"], 0).max() > 0.4  # chains differ in whether a measurement matters
    off = shares["PopulationHMC"].mean(0) - exact
    error = shares["PopulationHMC"].reshape(4, -1, len(exact)).mean(1).std(0, ddof=1) / 2.0
    assert error.max() < 0.08
    assert np.abs(off).max() < 0.16


def test_the_linear_separation_is_the_mean_of_the_joint_normal_law():
    """Digit, texture and picture are jointly normal: the mean given the picture, by the law of all 192 numbers."""
    rng = np.random.default_rng(1)
    examples, y = rng.normal(3.0, 2.0, (200, 8, 8)), rng.normal(size=(8, 8))
    a, b = separation.GAINS.values()
    of_digit, of_texture = np.cov(examples.reshape(-1, 64).T), separation.waves()
    seen = np.hstack([a * np.eye(64), b * np.eye(64)])
    prior = np.block([[of_digit, np.zeros((64, 64))], [np.zeros((64, 64)), of_texture]])
    mean = np.concatenate([examples.mean(0).ravel(), np.zeros(64)])
    precision = np.linalg.inv(prior) + seen.T @ seen / separation.NOISE**2
    expected = mean + np.linalg.solve(precision, seen.T @ (y.ravel() - seen @ mean)) / separation.NOISE**2
    np.testing.assert_allclose(np.ravel(separation.linear(y, examples)), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what keeps one round from counting as converged
def test_two_sources_are_separated_as_in_closed_form(monkeypatch):
    """With a normal prior for the digits and gains held at the truth, a round meets the linear separation.

    Of the 128 means the largest error is some three standard errors, four at most; a posterior standard deviation is at
    most that of the prior, 2 and 1, and there are 400 effective draws or more: .4 and .2.
    """
    held = numpyro.handlers.condition(separation.model, separation.GAINS)
    monkeypatch.setattr(separation, "model", held)
    rng = np.random.default_rng(2)
    examples = rng.normal(3.0, 2.0, (1000, 8, 8))
    flat = examples.reshape(-1, 64)
    laws = Gaussian(flat.mean(0), np.cov(flat.T)), Gaussian(np.zeros(64), separation.waves())
    y = rng.normal(2.0, 4.0, (8, 8)).astype(np.float32)
    priors = [DiffusionPrior(law, flow_solver=DPMSolverPP(10)) for law in laws]
    population = separation.sample(0, y, *priors, max_gradients=1)
    draws = population.get_samples()
    assert population.rounds[0].ess > 400
    digit, texture = separation.linear(y, examples)
    np.testing.assert_allclose(draws["digit"].mean(0), digit.ravel(), atol=0.4)
    np.testing.assert_allclose(draws["texture"].mean(0), texture.ravel(), atol=0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # what keeps one round from counting as converged
@pytest.mark.optimised
def test_images_that_share_a_noise_level_tell_it_as_in_closed_form():
    """With a normal prior the level's posterior is by quadrature.

    One round of 128 walkers and 8 draws has 300 effective draws or more: four standard errors of a mean are .23
    standard deviations, and of a standard deviation 16 %.
    """
    rng = np.random.default_rng(3)
    mean, covariance = np.full(64, 3.0), 3.6 + 0.4 * np.eye(64)
    to_images = ReshapeTransform((8, 8), (64,))
    prior = DiffusionPrior(Gaussian(mean, covariance), flow_solver=DPMSolverPP(10), transform=to_images)
    truth = rng.multivariate_normal(mean, covariance, hierarchical.NUM_IMAGES)[:, :32]
    y = truth + hierarchical.NOISE * rng.normal(size=truth.shape)
    noise = np.linspace(0.5, 6.0, 2000)
    values, vectors = np.linalg.eigh(covariance[:32, :32])
    squares, variances = ((y - 3.0) @ vectors) ** 2, values + noise[:, None] ** 2
    of_data = -0.5 * (squares.sum(0) / variances + len(y) * np.log(variances)).sum(1)
    log_weights = of_data - 0.5 * (noise / 4.0) ** 2
    weights = np.exp(log_weights - log_weights.max())
    expected = np.average(noise, weights=weights)
    spread = np.average((noise - expected) ** 2, weights=weights) ** 0.5
    images = y.reshape(-1, hierarchical.ROWS, 8).astype(np.float32)
    population = hierarchical.sample(0, images, prior, num_walkers=128, num_draws=8, max_gradients=1)
    draws = population.get_samples()["noise"]
    assert population.rounds[0].ess > 300
    assert abs(draws.mean() - expected) < 0.23 * spread
    assert abs(np.log(draws.std() / spread)) < 0.16
