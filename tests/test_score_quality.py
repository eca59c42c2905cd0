"""Score quality without truth: exact denoisers pass, planted errors are measured, in closed form where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffusion.denoise import FromFunction, Gaussian, GaussianMixture
from numpyro_diffusion.diagnostics import (
    circulation,
    denoising_losses,
    fisher_divergence,
    mass,
    tweedie_consistency,
)
from numpyro_diffusion.noise import VE, Cosine

KEY = jax.random.key(0)
SCHEDULE = VE(0.01, 40.0)
LEVELS = np.array([0.1, 1.0, 5.0])
LAW = GaussianMixture([0.4, 0.6], [[-2.0, 0.5], [1.5, -1.0]], 0.25, SCHEDULE)
DATA, HELD_OUT = LAW.sample(jax.random.key(1), (400,)), LAW.sample(jax.random.key(2), (200,))
NORMAL = Gaussian([0.0, 0.0], 1.0, SCHEDULE)


def turned(x_t, t, turn):
    """The exact posterior mean of N(0, I) under VE, and `turn` times it at a right angle."""
    sigma2 = SCHEDULE.sigma(t) ** 2
    x0 = x_t / (1.0 + sigma2)
    return x0 + turn * jnp.array([-x0[1], x0[0]])


def of_x0(function, parameters=None):
    return FromFunction(function, (2,), "x0", SCHEDULE, parameters=parameters)


def with_turn(turn):
    return of_x0(turned, turn)


def test_losses_of_exact_denoisers():
    """N(0, I): the loss is s^2 / (1 + s^2), that of the constant one; a mixture is better than its Gaussian."""
    x, data = NORMAL.sample(jax.random.key(3), (2000,)), NORMAL.sample(jax.random.key(4), (2000,))
    found = denoising_losses(NORMAL, KEY, x, data, LEVELS, num_noises=1)
    truth = LEVELS**2 / (1.0 + LEVELS**2)
    assert np.all(np.abs(found.denoiser - truth) < 4.0 * found.error), (found.denoiser, truth)
    assert np.all(np.abs(found.gaussian - found.denoiser) < 4.0 * found.difference_error + 0.01 * truth)
    assert np.all(np.abs(found.constant - 1.0) < 4.0 / np.sqrt(2000)) and found.problems == ()
    found = denoising_losses(LAW, KEY, HELD_OUT, DATA, LEVELS)
    assert found.problems == () and found.denoiser[1] < found.gaussian[1] - 4.0 * found.difference_error[1]


def test_losses_find_a_bad_denoiser():
    """One of another law is worse than the Gaussian of the data, and at the highest level worse than a constant."""
    other = Gaussian([3.0, 3.0], 1.0, SCHEDULE)
    problems = denoising_losses(other, KEY, HELD_OUT, DATA, LEVELS).problems
    assert problems[0] == "the denoiser is worse than the Gaussian at noise levels 0.1, 1, 5"
    assert problems[1].startswith("the denoiser is worse than a constant at noise levels") and "5" in problems[1]


@pytest.mark.slow
def test_fisher_divergence_of_gaussians():
    """Within 4 errors of the closed form at each level, and its integral is the Kullback-Leibler divergence.

    That has the error of the points and of the levels left out: below .01 it is .57 * .01^2 / 2.
    """
    first, second = NORMAL, Gaussian([0.5, 0.0], 2.0, Cosine())
    x = first.sample(jax.random.key(5), (4000,))
    found = fisher_divergence(first, second, KEY, x, np.geomspace(0.02, 30.0, 24))
    p, q = 1.0 + found.noise_level**2, 2.0 + found.noise_level**2
    truth = 2.0 * p * (1.0 / p - 1.0 / q) ** 2 + 0.25 / q**2  # of x (1/p - 1/q) + m / q, x of variance p
    assert np.all(np.abs(found.value - truth) < 4.0 * found.error)
    kl = 0.5 * (0.25 / 2.0 + 2.0 * (0.5 - 1.0 + np.log(2.0)))
    assert abs(found.kl - kl) < 0.02, (found.kl, kl)
    same = fisher_divergence(LAW, LAW, KEY, HELD_OUT)
    assert same.kl == 0.0 and len(same.value) == 16


def test_circulation_is_zero_for_a_gradient_only():
    """Score s(x) plus a rotation c: the integral is c times twice the area, of root mean square sqrt(6) c sigma^2."""
    x = NORMAL.sample(jax.random.key(6), (1000,))
    found = circulation(LAW, KEY, HELD_OUT[:40], LEVELS)
    assert np.all(found.value < 1e-3) and np.all(found.work > 0.1) and found.problems == ()
    found = circulation(with_turn(1.0), KEY, x, LEVELS, num_points=2)
    # the score is (x0 - x_t) / sigma^2, and its rotation c = 1 / (1 + sigma^2) / sigma^2
    truth = np.sqrt(6.0) / (1.0 + LEVELS**2)
    kurtosis = 7.0  # of twice the area of a Gaussian triangle, at most: (E A^4 - (E A^2)^2) / (E A^2)^2
    assert np.all(np.abs(found.value / truth - 1.0) < 4.0 * np.sqrt(kurtosis / 1000) / 2.0), (found.value, truth)
    assert found.problems == ("the score is not a gradient at noise levels 0.1, 1",)
    far = GaussianMixture([0.5, 0.5], [[-9.0, 0.0], [9.0, 0.0]], 1e-4, SCHEDULE)
    rough = circulation(far, KEY, far.sample(KEY, (50,)), [5.0], num_points=2)
    assert "the quadrature is too rough (raise num_points) at noise levels 5" in rough.problems


def test_tweedie_holds_for_exact_denoisers_only():
    """Symmetric, positive, and of the right trace; a turned one has the asymmetry c / sqrt(1 + c^2)."""
    found = tweedie_consistency(LAW, KEY, HELD_OUT, LEVELS)
    assert found.problems == () and np.all(found.asymmetry < 1e-4) and np.all(found.lowest > 0.0)
    assert np.all(np.abs(found.variance - found.squared_error) < 4.0 * found.error)
    x = NORMAL.sample(jax.random.key(7), (500,))
    found = tweedie_consistency(NORMAL, KEY, x, LEVELS)
    np.testing.assert_allclose(found.lowest, 1.0 / (1.0 + LEVELS**2), rtol=1e-4)
    assert np.all(np.abs(found.variance / (LEVELS**2 / (1.0 + LEVELS**2)) - 1.0) < 4.0 * np.sqrt(2.0 / 8000))
    found = tweedie_consistency(with_turn(0.5), KEY, x, LEVELS)
    np.testing.assert_allclose(found.asymmetry, 0.5 / np.sqrt(1.25), rtol=0.1)
    assert found.problems[0] == "the Jacobian is not symmetric at noise levels 0.1, 1, 5"
    away = of_x0(lambda x_t, t, _: -x_t / (1.0 + SCHEDULE.sigma(t) ** 2))
    found = tweedie_consistency(away, KEY, x, LEVELS)
    assert np.all(found.negative == 1.0) and found.problems[0].startswith("the Jacobian has negative directions")
    assert "not the squared error of held-out data at noise levels 0.1, 1, 5" in found.problems[1]


def test_mass():
    """One for a density, e for e times it, 1/2 for half of it, and no answer where draws do not suffice."""

    def log_prob(x):
        return jax.vmap(lambda x: LAW.log_density(x, SCHEDULE.t_min))(x)

    found = mass(log_prob, DATA, KEY)
    assert abs(found.value - 1.0) < 4.0 * found.error < 0.2 and found.effective_size > 500 and found.problems == ()
    scaled = mass(lambda x: log_prob(x) + 1.0, DATA, KEY)
    np.testing.assert_allclose(scaled.value, np.e * found.value, rtol=1e-5)
    assert scaled.problems[0].startswith("the density integrates to 2.7")
    half = mass(lambda x: jnp.where(x[:, 0] > 0, -jnp.inf, log_prob(x)), DATA, KEY)
    assert abs(half.value - 0.4) < 4.0 * half.error + 1e-3  # the left mode; .6 * P(N(1.5, .25) < 0) = 8e-4
    lost = mass(lambda x: jnp.where(x[:, 0] > 0, jnp.nan, log_prob(x)), DATA, KEY)
    assert "values of log_prob are NaN or +inf" in lost.problems[0] and lost.value == half.value
    narrow = mass(lambda x: log_prob(1000.0 * x) + 2.0 * np.log(1000.0), DATA, KEY)
    assert "the effective size is" in narrow.problems[0]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "denoiser must be a Denoiser", lambda x: circulation(jnp.sin, KEY, x)),
        (ValueError, r"held_out must be at least 2 points, shape \(n, \*\(2,\)\); got \(200,\)",
         lambda x: denoising_losses(LAW, KEY, x[:, 0], x)),
        (ValueError, r"data must end with shape \(2,\)", lambda x: denoising_losses(LAW, KEY, x, x[:, :1])),
        (ValueError, "x must be finite; got 1", lambda x: circulation(LAW, KEY, x.at[3, 0].set(jnp.nan))),
        (ValueError, r"noise_levels must lie in \[0.01, 40\], the schedule's of denoiser; got \[50.0\]",
         lambda x: tweedie_consistency(LAW, KEY, x, [50.0])),
        (ValueError, "num_points must be even", lambda x: circulation(LAW, KEY, x, num_points=3)),
        (ValueError, r"both must have one event_shape; got \(2,\) and \(1,\)",
         lambda x: fisher_divergence(LAW, Gaussian([0.0]), KEY, x)),
        (ValueError, "data must not all be equal", lambda x: mass(lambda x: x[:, 0], 0 * x, KEY)),
        (ValueError, "log_prob must return one number for each", lambda x: mass(lambda x: x, x, KEY)),
        (ValueError, "num_probes must be at least 1", lambda x: tweedie_consistency(LAW, KEY, x, num_probes=0)),
    ],
)  # fmt: skip
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call(HELD_OUT)


def test_a_denoiser_that_is_not_finite_is_named():
    broken = of_x0(lambda x_t, t, _: jnp.where(SCHEDULE.sigma(t) > 2.0, jnp.nan, turned(x_t, t, 0.0)))
    problems = denoising_losses(broken, KEY, HELD_OUT, DATA, LEVELS).problems
    assert problems[-1] == "the denoiser is not finite at noise levels 5"
