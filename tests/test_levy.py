"""The Lévy benchmark against closed forms: its denoisers, and its Gibbs sampler, which knows nothing of them."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _levy_truth import INCREMENTS, OPERATORS, SIZE, exact_denoiser, gibbs, law_of, log_density, operator, pose

LAWS = {
    "gauss": stats.norm(0, 0.5),
    "laplace": stats.laplace,
    "student_3": stats.t(3),
    "student_2": stats.t(2),
    "student_1": stats.t(1),
}
CHAINS = 12


def noised(increments: str, x: float, sigma: float) -> float:
    """Density of an increment under noise, by quadrature of the law itself."""
    if increments == "bernoulli_laplace":
        return 0.9 * stats.norm.pdf(x, 0, sigma) + 0.1 * noised("laplace", x, sigma)
    law = LAWS[increments]
    value, _ = integrate.quad(
        lambda e: law.pdf(x - sigma * e) * stats.norm.pdf(e), -12, 12, points=[x / sigma], limit=200
    )
    return value


@pytest.mark.parametrize("increments", INCREMENTS)
def test_the_density_under_noise_is_that_of_quadrature(increments):
    """The rule in log v, with a spacing h of at most 1, has an error of about exp(-pi^2 / h)."""
    for x, sigma in ((0.0, 0.3), (0.7, 0.3), (2.0, 1.0), (6.0, 1.0)):
        found = float(log_density(np.array([x]), law_of(increments), sigma))
        np.testing.assert_allclose(found, np.log(noised(increments, x, sigma)), atol=2e-3)


def test_derivatives_given_by_hand_are_those_of_the_density():
    denoiser = exact_denoiser("laplace")
    x, t = jnp.linspace(-4.0, 4.0, SIZE), denoiser.schedule.inverse_noise_level(0.5)
    step = 1e-2
    at = np.asarray(x, float)[:, None]
    ends = [log_density(at + shift, law_of("laplace"), 0.5) for shift in (step, -step)]

    @jax.jit
    def derivatives(x):
        tangent = jax.jvp(lambda x: denoiser(x, t).x0, (x,), (jnp.ones(SIZE),))[1]
        return denoiser(x, t).score, tangent, (denoiser(x + step, t).x0 - denoiser(x - step, t).x0) / (2 * step)

    score, tangent, by_difference = derivatives(x)
    np.testing.assert_allclose(score, (ends[0] - ends[1]) / (2 * step), atol=2e-4)
    np.testing.assert_allclose(tangent, by_difference, atol=2e-3)


@pytest.mark.parametrize(
    "increments",
    ["laplace", *(pytest.param(name, marks=pytest.mark.slow) for name in ("student_3", "bernoulli_laplace"))],
)
def test_gibbs_means_of_increments_seen_directly_are_those_of_the_denoiser(increments, x64):
    """Twelve chains: their means, in units of their spread, are t-distributed (|t| > 7 once in 700 such tests)."""
    sigma, y = 0.6, jnp.linspace(-3.0, 3.0, SIZE)
    alpha = jnp.tile(y / sigma, (CHAINS, 1))
    phi = jnp.eye(SIZE) / sigma
    draws = gibbs(jax.random.key(0), phi, alpha, increments=increments, num_draws=45, thin=3)
    means = np.asarray(draws.mean(1))
    denoiser = exact_denoiser(increments)
    exact = denoiser(y, denoiser.schedule.inverse_noise_level(sigma)).x0
    t = (means.mean(0) - exact) / (means.std(0, ddof=1) / np.sqrt(CHAINS))
    assert np.abs(t).max() < 7.0
    assert (t**2).mean() < 1.22 + 4.0 * 0.3  # its mean is 11 / 9, and its standard deviation .3


def test_gibbs_draws_have_the_covariance_of_a_gaussian_posterior(x64):
    """All draws of Gaussian increments are independent: 540 of them."""
    problem = pose("gauss", "sampling", CHAINS)
    phi, alpha = (jnp.asarray(v) for v in (problem.matrix / problem.sigma[:, None], problem.y / problem.sigma))
    draws = gibbs(jax.random.key(1), phi, alpha, increments="gauss", num_draws=45, thin=3)
    covariance = np.linalg.inv(np.asarray(phi.T @ phi) + 4.0 * np.eye(SIZE))
    mean = np.asarray(alpha @ phi) @ covariance
    white = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(draws) - mean[:, None]).reshape(-1, SIZE).T)
    number = white.shape[1]
    np.testing.assert_allclose(white.mean(1), 0.0, atol=4.5 / np.sqrt(number))
    np.testing.assert_allclose(white @ white.T / number, np.eye(SIZE), atol=5.0 * np.sqrt(2.0 / number))


@pytest.mark.parametrize("name", OPERATORS)
def test_data_are_those_of_the_operator_at_25_decibels(name):
    problem, A = pose("gauss", name, 100), operator(name)
    assert A.shape[1] == SIZE and np.linalg.matrix_rank(A) == len(A)
    residual = (problem.y - problem.u @ problem.matrix.T) / problem.sigma
    assert abs((residual**2).sum() / (100 * len(A)) - 1.0) < 4.5 * np.sqrt(2.0 / (100 * len(A)))
    power = np.median(((np.cumsum(problem.u, 1) @ A.T) ** 2).mean(1))
    left = np.linalg.svd(problem.matrix / problem.sigma[:, None])[1][: len(A)]
    right = np.linalg.svd(A @ np.tri(SIZE))[1] / np.sqrt(power / 10**2.5)
    np.testing.assert_allclose(left, right, rtol=1e-6)
