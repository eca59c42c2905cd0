"""Guided denoisers against conditional laws in closed form, and the order of their errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.guidance import ClassifierFree, Guided, Likelihood, Observation, Reconstructed, linear
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE, VP, Cosine
from numpyro_diffusion.solve import Heun, sample

SCHEDULES = {"VE": VE(), "VP": VP(), "Cosine": Cosine()}
MEAN, COVARIANCE = [1.0, -0.5, 0.3], [[2.0, 0.8, 0.1], [0.8, 1.0, -0.3], [0.1, -0.3, 0.5]]
A, Y, SCALE = [[1.0, 0.5, -1.0], [0.0, 2.0, 1.0]], [2.0, -1.0], [0.4, 0.7]


def conditional_mean(x_t, alpha, sigma):
    """E[x | x_t, y] of the Gaussian: both observations at once, in NumPy."""
    both = np.vstack([np.asarray(A), alpha * np.eye(3)])
    noise = np.diag(np.concatenate([np.square(SCALE), np.full(3, sigma**2)]))
    seen = np.concatenate([Y, x_t])
    covariance = np.asarray(COVARIANCE)
    gain = covariance @ both.T @ np.linalg.inv(both @ covariance @ both.T + noise)
    return np.asarray(MEAN) + gain @ (seen - both @ np.asarray(MEAN))


@partial(jax.jit, static_argnames=("guidance",))
def guided_means(prior, guidance, points, t):
    guided = Guided(prior, linear(A, jnp.array(Y), jnp.array(SCALE)), guidance)
    return jax.vmap(lambda x_t: guided(x_t, t).x0)(points)


def error(schedule, guidance, t=0.45):
    """Distance of a method's predictions from the truth, as a mean over noisy points."""
    prior = Gaussian(jnp.array(MEAN), jnp.array(COVARIANCE), schedule)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    points = np.random.default_rng(0).normal(size=(20, 3)) * np.hypot(alpha, sigma) + alpha * np.asarray(MEAN)
    truth = np.stack([conditional_mean(x_t, alpha, sigma) for x_t in points])
    return float(np.linalg.norm(guided_means(prior, guidance, jnp.asarray(points), t) - truth, axis=1).mean())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_full_covariance_is_exact_for_a_gaussian(schedule):
    """To single precision."""
    assert error(schedule, "mmps") < 2e-5


def test_other_covariances_are_near_it():
    """And without one it is far off."""
    dps = error(VP(), "dps")
    assert max(error(VP(), "tmpd"), error(VP(), "pigdm")) < 0.3 * dps


def test_solvers_walk_a_guided_denoiser_to_the_posterior():
    """Gaussian prior, full covariance: draws have the moments of the posterior, within 4.5 standard errors."""
    prior = Gaussian(jnp.array(MEAN), jnp.array(COVARIANCE), VE(0.01, 40.0))
    guided = Guided(prior, linear(A, jnp.array(Y), jnp.array(SCALE)))
    draws = np.asarray(jax.jit(lambda key: sample(Heun(40), guided, key, (4000,)))(jax.random.key(0)))
    precision = np.linalg.inv(COVARIANCE) + np.asarray(A).T @ np.diag(1.0 / np.square(SCALE)) @ np.asarray(A)
    covariance = np.linalg.inv(precision)
    mean = covariance @ (np.linalg.inv(COVARIANCE) @ np.asarray(MEAN) + np.asarray(A).T @ (Y / np.square(SCALE)))
    sd = np.sqrt(np.diag(covariance))
    assert (abs(draws.mean(0) - mean) < 4.5 * sd / np.sqrt(4000) + 0.01 * sd).all()
    assert (abs(draws.var(0) / sd**2 - 1.0) < 4.5 * np.sqrt(2.0 / 4000) + 0.02).all()


@pytest.mark.slow
def test_a_nonlinear_observation_is_linearised():
    """At a point where the map is linear to first order the two agree; the gradient form is dps."""
    prior = GaussianMixture([0.5, 0.5], jnp.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), 0.5, VP())
    x_t, t = jnp.array([0.3, -0.2, 0.5]), 0.4
    x0 = prior(x_t, t).x0
    squares = Observation(jnp.array([0.7]), jnp.array(0.3), lambda x, _: jnp.sum(x**2)[None])
    tangent = linear(2.0 * x0[None], jnp.array([0.7]) + jnp.sum(x0**2), 0.3)
    for guidance in ("dps", "pigdm", "tmpd", "mmps"):
        found, expected = (Guided(prior, seen, guidance)(x_t, t).x0 for seen in (squares, tangent))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    likelihood = Likelihood(lambda x, y: -0.5 * ((y - jnp.sum(x**2)) / 0.3) ** 2, jnp.array(0.7))
    found, expected = (Guided(prior, seen, "dps")(x_t, t).x0 for seen in (likelihood, squares))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_guided_score_of_an_informative_mixture_is_near_the_truth():
    """A mixture, where no method is exact: at small noise all but dps are near, and the full covariance nearest."""
    means = jnp.array([[-2.0, 0.0], [2.0, 1.0]])
    prior, t = GaussianMixture([0.4, 0.6], means, 0.5, VE()), 0.55
    sigma = float(VE().sigma(t))
    observation = linear(jnp.ones((1, 2)), jnp.array([1.0]), 0.5)

    def log_posterior(x_t):  # log p_t(x_t | y) but for a constant: the mixture of x_t and y together
        gap = sigma**2
        joint = jnp.array([[0.5 + gap, 0.0, 0.5], [0.0, 0.5 + gap, 0.5], [0.5, 0.5, 1.25]])
        points = jnp.concatenate([x_t, jnp.array([1.0])]) - jnp.concatenate([means, means.sum(1)[:, None]], 1)
        quadratic = jnp.einsum("ki,ij,kj->k", points, jnp.linalg.inv(joint), points)
        return jax.nn.logsumexp(jnp.log(jnp.array([0.4, 0.6])) - 0.5 * quadratic)

    points = jax.random.normal(jax.random.key(0), (30, 2)) + means[1]
    truth = jax.vmap(jax.grad(log_posterior))(points)
    off = {}
    for guidance in ("dps", "pigdm", "mmps"):
        scores = jax.vmap(lambda x, g=guidance: Guided(prior, observation, g)(x, t).score)(points)
        off[guidance] = float(jnp.linalg.norm(scores - truth, axis=1).mean() / jnp.linalg.norm(truth, axis=1).mean())
    assert off["mmps"] < 0.2 * off["dps"] and off["mmps"] < off["pigdm"]


@pytest.mark.slow
def test_classifier_free_guidance_interpolates_and_extrapolates():
    network = NetworkDenoiser(MLP((2,), features=8, num_blocks=1, cond_shape=(1,), rngs=nnx.Rngs(0)), target="x0")
    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(1), w.shape), network.params)
    network, cond, x_t = network.with_params(weights), jnp.ones(1), jnp.array([0.3, -1.0])
    without, given = network(x_t, 0.4).x0, network(x_t, 0.4, cond).x0
    assert float(jnp.abs(given - without).max()) > 1e-3
    for weight in (0.0, 1.0, 2.5):
        found = ClassifierFree(network, cond, weight)(x_t, 0.4).x0
        np.testing.assert_allclose(found, without + weight * (given - without), rtol=1e-5, atol=1e-6)


def test_reconstruction_puts_known_entries_in_place():
    known, y = jnp.array([True, False, False]), jnp.array([0.5, jnp.nan, jnp.nan])
    guided = Reconstructed(Gaussian(jnp.array(MEAN), jnp.array(COVARIANCE), VE(0.01, 40.0)), known, y)
    draws = np.asarray(jax.jit(lambda key: sample(Heun(20), guided, key, (200,)))(jax.random.key(0)))
    np.testing.assert_allclose(draws[:, 0], 0.5, rtol=1e-6)
    assert np.isfinite(draws).all() and draws[:, 1].std() > 0.3


REFUSED = {
    "guidance": (lambda: Guided(Gaussian([0.0]), linear([[1.0]], [1.0], 1.0), "ddrm"), "guidance must be one of"),
    "likelihood": (lambda: Guided(Gaussian([0.0]), Likelihood(lambda x, _: 0.0), "mmps"), 'must be "dps" for a Like'),
    "iterations": (lambda: Guided(Gaussian([0.0]), linear([[1.0]], [1.0], 1.0), num_iterations=0), "at least 1"),
    "shapes": (lambda: linear([[1.0, 0.0]], [1.0, 2.0], 1.0), r"matrix must be \(m, d\)"),
    "scale_shape": (lambda: linear([[1.0]], [1.0], [1.0, 1.0]), "scale must be a scalar or of shape"),
    "scale": (lambda: linear([[1.0]], [1.0], 0.0), "scale must be positive. For a hard constraint"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
