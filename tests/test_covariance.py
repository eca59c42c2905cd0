"""Tweedie's covariance against the conditional laws of Gaussians and mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser, covariance
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE, VP, Rectified


def laws(d, schedule):
    rng = np.random.default_rng(d)
    factors = rng.normal(size=(3, d, d)) / np.sqrt(d)
    covariances = 0.2 * np.eye(d) + factors @ factors.transpose(0, 2, 1)
    means, weights = 2 * rng.normal(size=(3, d)), np.array([0.2, 0.3, 0.5])
    yield Gaussian(means[0], covariances[0], schedule), [1.0], means[:1], covariances[:1]
    yield GaussianMixture(weights, means, covariances, schedule), weights, means, covariances


def conditional_covariance(weights, means, covariances, x_t, alpha, sigma):
    """Cov[x | x_t] of a mixture: the mean of the covariances plus the covariance of the means."""
    shares, centres, spreads = [], [], []
    for w, m, c in zip(weights, means, covariances, strict=True):
        marginal = alpha**2 * c + sigma**2 * np.eye(len(m))
        gain = alpha * c @ np.linalg.inv(marginal)
        residual = x_t - alpha * m
        log_density = -0.5 * residual @ np.linalg.solve(marginal, residual) - 0.5 * np.linalg.slogdet(marginal)[1]
        shares.append(np.log(w) + log_density)
        centres.append(m + gain @ residual)
        spreads.append(c - alpha * gain @ c)
    shares = np.exp(np.array(shares) - max(shares))
    shares, centres = shares / shares.sum(), np.array(centres)
    offsets = centres - shares @ centres
    return np.tensordot(shares, np.array(spreads), 1) + (shares[:, None] * offsets).T @ offsets


@pytest.mark.parametrize("d, schedule", [(2, VP()), (8, VE()), (8, Rectified()), (32, VP())])
def test_exact_denoisers_have_exact_covariances(d, schedule, x64):
    dense = jax.jit(lambda law, x_t, t: covariance(law, x_t, t).dense())
    x_t = np.random.default_rng(1).normal(size=d)
    for law, *parts in laws(d, schedule):
        for t in (0.2, 0.6):
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            expected = conditional_covariance(*parts, x_t, alpha, sigma)
            np.testing.assert_allclose(dense(law, x_t, t), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@jax.jit
def products(posterior, v):
    with jax.default_matmul_precision("highest"):  # a GPU rounds to ten bits otherwise, forward and back differently
        return posterior.dense(), posterior @ v, posterior.rmatvec(v), posterior.symmetric(v)


def test_products_are_those_of_the_matrix():
    """For an unsymmetric network too: the product, that of the transpose, and their mean."""
    backbone = MLP((2, 2), features=16, rngs=nnx.Rngs(0))
    backbone.output_layer.kernel[...] = jax.random.normal(jax.random.key(0), backbone.output_layer.kernel.shape)
    denoiser = NetworkDenoiser(backbone, scale=2.0)
    v = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    matrix, *got = products(covariance(denoiser, jnp.arange(4.0).reshape(2, 2), 0.6), v)
    matrix, flat = np.asarray(matrix, float), np.asarray(v, float).ravel()
    largest = np.abs(matrix).max()
    assert np.abs(matrix - matrix.T).max() > 1e-3 * largest
    for one, expected in zip(got, (matrix, matrix.T, 0.5 * (matrix + matrix.T)), strict=True):
        np.testing.assert_allclose(one.ravel(), expected @ flat, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.slow
def test_diagonal_is_unbiased_and_its_error_covers(x64):
    """Entry by entry over 2,000 keys, within 4 standard errors; t-intervals of 32 probes cover 95 %."""
    *_, (law, *_) = laws(8, VE())
    posterior = covariance(law, np.random.default_rng(1).normal(size=8), 0.6)
    truth = np.diag(posterior.dense())
    drawn = jax.jit(jax.vmap(lambda key: posterior.diagonal(key, 32)))(jax.random.split(jax.random.key(0), 2_000))
    error = np.asarray(drawn.value - truth)
    assert (np.abs(error.mean(0)) < 4 * error.std(0) / 2_000**0.5).all()
    assert error.std() > 1e-3
    covered = np.mean(np.abs(error) < 2.0395 * drawn.standard_error)
    assert abs(covered - 0.95) < 0.02, covered
    assert np.isnan(posterior.diagonal(jax.random.key(0), 1).standard_error).all()


def test_bad_arguments():
    law = Gaussian([0.0, 0.0])
    with pytest.raises(ValueError, match="num_probes must be at least 1; got 0"):
        covariance(law, jnp.zeros(2), 0.5).diagonal(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="Use jax.vmap"):
        covariance(law, jnp.zeros((3, 2)), 0.5)
