"""The estimated trace and the adaptive solve, against the exact trace and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import Conditioned, Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.density import LogProb, log_prob
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import AdaptiveFlow, Heun, StochasticHeun

LADDER, GRID = VE(0.02, 20.0), Heun(17)


def mixture(d):
    """Three unequal components; correlated, so that a probe's error does not vanish."""
    rng = np.random.default_rng(d)
    factors = rng.normal(size=(3, d, d)) / np.sqrt(2 * d)
    covariances = 0.1 * np.eye(d) + factors @ factors.transpose(0, 2, 1)
    return GaussianMixture([0.2, 0.3, 0.5], rng.normal(size=(3, d)), covariances, LADDER)


@partial(jax.jit, static_argnames=("num_probes", "probes"))
def estimates(denoiser, x, keys, num_probes, probes="rademacher"):
    one = lambda key: log_prob(denoiser, x, GRID, num_probes=num_probes, key=key, probes=probes)  # noqa: E731
    return jax.vmap(one)(keys)


@pytest.mark.slow
@pytest.mark.parametrize("d, probes", [(2, "rademacher"), (16, "normal")])
def test_probes_are_unbiased_and_their_error_covers(d, probes):
    """Over 2,000 keys: the mean is the exact trace's within 4 s.e., and 95 % t-intervals of 32 probes cover it.

    The integrals are quadratic in the probes and so skew: t-intervals of 8 normal probes cover 91 %. What both sums owe
    to rounding is common to them but for a few units in the last place, on any device.
    """
    denoiser, n, k = mixture(d), 2_000, 32
    x = denoiser.sample(jax.random.key(0))
    exact = jax.jit(lambda x: log_prob(denoiser, x, GRID))(x)
    assert exact.standard_error == 0.0 and exact.num_evals == 2 * 16
    drawn = estimates(denoiser, x, jax.random.split(jax.random.key(1), n), k, probes)
    error = np.asarray(drawn.value - exact.value)
    assert error.std() > 1e-4  # there is an error to cover
    rounding = 50 * np.finfo(exact.value.dtype).eps * abs(exact.value)
    assert abs(error.mean()) < 4 * error.std() / n**0.5 + rounding
    t_quantile = 2.0395  # of Student's law with 31 degrees of freedom
    covered = np.mean(np.abs(error) < t_quantile * drawn.standard_error)
    assert abs(np.mean(drawn.standard_error**2) / error.var() - 1) < 0.2
    assert abs(covered - 0.95) < 0.025, covered


def test_normal_probes_are_worse_than_rademacher():
    """For one probe the variance of z'Az is 2 |A|^2 against 2 (|A|^2 - |diag A|^2)."""
    denoiser, keys = mixture(8), jax.random.split(jax.random.key(1), 500)
    x = denoiser.sample(jax.random.key(0))
    spread = [np.std(estimates(denoiser, x, keys, 1, law).value) for law in ("rademacher", "normal")]
    assert spread[0] < 0.9 * spread[1]


def test_a_single_probe_knows_no_error():
    drawn = estimates(mixture(2), jnp.zeros(2), jax.random.split(jax.random.key(1), 2), 1)
    assert np.isfinite(drawn.value).all() and np.isnan(drawn.standard_error).all()


def test_estimates_differentiate_to_the_score(x64):
    """Whatever the trace, the gradient of the value in x is the score; that of the standard error is zero."""
    denoiser, x, key = mixture(2), jnp.array([0.3, -0.2]), jax.random.key(0)
    score = denoiser(x, 0.0).score
    for options in ({}, {"num_probes": 2, "key": key}):
        for derivative in (jax.jacrev, jax.jacfwd):
            got = jax.jit(derivative(lambda x, options=options: log_prob(denoiser, x, GRID, **options)[:2]))(x)
            np.testing.assert_allclose(got[0], score, rtol=1e-9)
            assert (got[1] == 0).all()


@pytest.mark.slow
def test_adaptive_solve_meets_its_tolerance(x64):
    """Against the closed form on a wide ladder: the error falls with the tolerance, and the count says what it cost."""
    denoiser = GaussianMixture([0.3, 0.7], [[-1.5, 0.0], [1.0, 0.5]], [0.1, 0.3], VE(1e-4, 1e4))
    x = jnp.array([[0.2, -0.1], [1.0, 0.4]])
    truth = jax.vmap(lambda x: denoiser.log_density(x, 0.0))(x)
    results = [
        jax.jit(lambda x, tol=tol: jax.vmap(lambda x: log_prob(denoiser, x, AdaptiveFlow(tol, tol)))(x))(x)
        for tol in (1e-4, 1e-7)
    ]
    errors = [np.abs(result.value - truth).max() for result in results]
    assert errors[0] < 2e-2 and errors[1] < 2e-5, errors
    assert (results[1].num_evals > results[0].num_evals).all()
    probed = jax.jit(lambda x: log_prob(denoiser, x, AdaptiveFlow(), num_probes=64, key=jax.random.key(0)))(x[0])
    assert abs(probed.value - truth[0]) < 4 * probed.standard_error + 2e-3


class Shifted(nnx.Module):
    """The exact network for N(cond, 1) under VE in standardised units: x0 = cond + (x_t - cond) / (1 + sigma^2)."""

    event_shape = (1,)

    def __init__(self):
        self.unused = nnx.Param(jnp.zeros(()))

    def __call__(self, x, c_noise, cond=None):
        sigma = jnp.exp(4.0 * c_noise)
        x_t = x * jnp.sqrt(1.0 + sigma**2)
        return cond + (x_t - cond) / (1.0 + sigma**2)


def test_a_condition_is_seen_and_differentiated(x64):
    """Log N(x; c, 1) and its derivatives: in c by the solve, in x by the score; a frozen network stops neither."""
    denoiser = NetworkDenoiser(Shifted(), schedule=VE(1e-3, 1e3), target="x0")
    x, c = jnp.array([0.7]), jnp.array([1.5])
    density = jax.jit(lambda x, c: log_prob(Conditioned(denoiser, c), x, Heun(257)).value)
    # the terminal law is centred on zero and not on c: an error of order c / sigma_max
    np.testing.assert_allclose(density(x, c), -0.5 * 0.8**2 - 0.5 * np.log(2 * np.pi), atol=2e-3)
    by_x, by_c = jax.jit(jax.grad(density, (0, 1)))(x, c)
    np.testing.assert_allclose(by_x, 0.8, atol=1e-5)
    np.testing.assert_allclose(by_c, -0.8, atol=5e-3)
    h = 1e-5
    np.testing.assert_allclose(by_c[0], (density(x, c + h) - density(x, c - h)) / (2 * h), rtol=1e-6)


LAW = Gaussian([0.0, 0.0])
BAD = {
    "no probes": ({"num_probes": 0, "key": jax.random.key(0)}, ValueError, "num_probes must be at least 1; got 0"),
    "no key": ({"num_probes": 2}, ValueError, "num_probes=2 needs a key="),
    "idle key": ({"key": jax.random.key(0)}, ValueError, "key is for probes"),
    "law": ({"num_probes": 2, "key": jax.random.key(0), "probes": "cauchy"}, ValueError, "probes must be one of"),
    "solver": ({"solver": StochasticHeun()}, TypeError, "solver must be Heun or AdaptiveFlow; got StochasticHeun"),
}


@pytest.mark.parametrize("options, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        log_prob(LAW, jnp.zeros(2), **options)


def test_what_comes_back():
    assert LogProb._fields == ("value", "standard_error", "num_evals")
