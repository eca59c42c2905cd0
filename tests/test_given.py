"""The law of x given a noisy x_t: its denoiser against closed forms, and draws by its flow against exact quantiles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import softmax
from scipy.stats import norm

from numpyro_diffusion.denoise import Denoiser, Gaussian, GaussianMixture, Given, Repeated, density_kind
from numpyro_diffusion.noise import VE, VP, Rectified, UniformLogSNR
from numpyro_diffusion.solve import (
    Adams,
    DPMSolverPP,
    Heun,
    StochasticHeun,
    draw_given,
    evaluations_given,
    flow_given,
    noise_given,
    solve,
)

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([[-2.0, 0.5], [1.0, 1.0]]), np.array([0.3, 0.1])
SEEN = np.array([-0.4, 0.9])
SCHEDULES = [VE(0.01, 80.0), VP(), Rectified()]


def conditional(u, level, weights=WEIGHTS, means=MEANS, variances=VARIANCES):
    """Weights, means and variances of the mixture given its point with noise of a level."""
    spread = variances + level**2
    log_joint = np.log(weights) - 0.5 * ((u - means) ** 2).sum(-1) / spread - 0.5 * len(u) * np.log(spread)
    return softmax(log_joint), means + (variances / spread)[:, None] * (u - means), variances * level**2 / spread


@jax.jit
def views(denoiser, x_s, s):
    prediction = denoiser(x_s, s)
    return prediction.x0, prediction.eps, denoiser.log_density(x_s, s)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_denoiser_of_the_law_given_a_point(schedule, x64):
    """Posterior mean, noise and log-density are those of the conditional mixture, second looks better and worse."""
    base = GaussianMixture(WEIGHTS, MEANS, VARIANCES, schedule)
    for level in (0.2, 1.5, 30.0):
        t = schedule.inverse_noise_level(level)
        given = Given(base, schedule.alpha(t) * SEEN, t)
        truth = GaussianMixture(*conditional(SEEN, level), schedule)
        assert isinstance(given, Denoiser) and density_kind(given) == "normalized"
        for other in (0.03, 0.2, 1.0, 75.0):
            s = schedule.inverse_noise_level(other)
            x_s = schedule.alpha(s) * (SEEN + other * np.array([0.7, -1.3]))
            for got, expected in zip(views(given, x_s, s), views(truth, x_s, s), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)


def test_two_looks_below_the_lowest_level(x64):
    """Both at the lowest level, .01: the score there stands for the one at .01 / sqrt(2)."""
    schedule = SCHEDULES[0]
    given = Given(GaussianMixture(WEIGHTS, MEANS, VARIANCES, schedule), SEEN, 0.0)
    x_s = SEEN + 0.01 * np.array([0.7, -1.3])
    weights, means, variances = conditional(SEEN, 0.01)
    share = (weights @ (variances / (variances + 0.01**2)), weights @ means)  # far from the other mode
    expected = share[1] + share[0] * (x_s - share[1])
    x0, eps, _ = views(given, x_s, 0.0)
    np.testing.assert_allclose(x0, expected, atol=3e-6)  # the base's own posterior mean at .01 is off by 1e-4
    np.testing.assert_allclose(eps, (x_s - expected) / 0.01, atol=3e-4)
    highest = views(Given(given.base, SEEN, 1.0), np.array([90.0, -70.0]), 1.0)  # never above: 80 / sqrt(2)
    truth = views(GaussianMixture(*conditional(SEEN, 80.0), schedule), np.array([90.0, -70.0]), 1.0)
    np.testing.assert_allclose(highest[0], truth[0], rtol=1e-9)


def test_the_noise_keeps_its_digits():
    """In single precision, around 1000: from the same numbers, the noise is that of double precision within 1e-4."""
    schedule = VE(0.002, 100.0)
    u, y, level = np.float32([1000.25]), np.float32([1000.3125]), 0.05
    s = schedule.inverse_noise_level(level)
    got = jax.jit(lambda given: given(y, s).eps)(Given(Gaussian([1000.0], 1.0, schedule), u, s))
    mean, variance = 1000.0 + (float(u[0]) - 1000.0) / (1 + level**2), level**2 / (1 + level**2)
    np.testing.assert_allclose(got, [level * (float(y[0]) - mean) / (variance + level**2)], rtol=1e-4)


def test_location_scale_and_plates():
    """Both are those of the law of a Gaussian base; independent points are given together as each by itself."""
    base = Gaussian([1.0, -1.0], 4.0, VE(0.01, 100.0))
    given = Given(base, jnp.array([3.0, 3.0]), 0.5)  # at level 1
    np.testing.assert_allclose(given.location, [2.6, 2.2], rtol=1e-5)
    np.testing.assert_allclose(given.scale, np.sqrt(0.8), rtol=1e-5)
    seen, x_s = jnp.array([[3.0, 3.0], [0.0, 1.0]]), jnp.array([[2.0, 0.0], [1.0, 1.0]])
    plate = Given(Repeated(base, (2,)), seen, 0.5)(x_s, 0.4)
    each = [Given(base, u, 0.5)(x, 0.4) for u, x in zip(seen, x_s, strict=True)]
    np.testing.assert_allclose(plate.x0, [p.x0 for p in each], rtol=1e-6)
    np.testing.assert_allclose(plate.eps, [p.eps for p in each], rtol=1e-5)


LINE = np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.array([0.01, 0.09])
Q = (np.arange(200) + 0.5) / 200
Z = norm.ppf(Q)


@partial(jax.jit, static_argnums=0)
def pushed(solver, denoiser, x_t, t, z):
    return jax.vmap(lambda z: flow_given(solver, denoiser, x_t, t, z))(z)


def quantiles(weights, means, variances):
    cdf = lambda x: weights @ norm.cdf((x - means[:, 0]) / np.sqrt(variances))  # noqa: E731
    return np.array([brentq(lambda x, q: cdf(x) - q, -9, 9, (q,), xtol=1e-12) for q in Q])


@pytest.mark.parametrize("evaluations, variance, distance", [(32, 0.005, 0.008), (64, 0.0005, 0.0005)])
def test_the_flow_draws_the_law_given_a_point(evaluations, variance, distance, x64):
    """Two narrow modes, seen from between them at four levels: in one dimension the flow keeps quantiles.

    Bounds on the relative error of the variance and on the Wasserstein distance in standard deviations are those of the
    method. The reverse process by `DPMSolverPP(eta=1)` is off by some per cent in 32.
    """
    denoiser, solver = GaussianMixture(*LINE, VE(2e-4, 80.0)), Adams(evaluations - 2)
    assert evaluations_given(solver) == evaluations
    for level, u in ((0.1, -1.1), (0.5, 0.1), (1.0, -0.5), (10.0, 3.0)):
        t = denoiser.schedule.inverse_noise_level(level)
        truth = quantiles(*conditional(np.array([u]), level, *LINE))
        got = np.asarray(pushed(solver, denoiser, jnp.array([u]), t, Z[:, None]))[:, 0]
        assert (np.diff(got) > 0).all()
        assert abs(got.var() / truth.var() - 1) < variance, (level, got.var() / truth.var())
        assert abs(got - truth).mean() < distance * truth.std(), (level, abs(got - truth).mean() / truth.std())


@pytest.mark.parametrize("level", [0.01, 0.3, 3.0])
def test_a_gaussian_of_a_steep_spectrum(level, x64):
    """The map is linear in noise and in the point: its slopes give Bayes' covariance and slope, at any level.

    Variances .01, 1 and 9 in rotated axes, 24 times: within .2 %, which is the error at the lowest level.
    """
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    prior = rotation * np.array([0.01, 1.0, 9.0]) @ rotation.T
    denoiser = Gaussian(np.zeros(3), prior, VE(0.01, 100.0))
    t, x_t = denoiser.schedule.inverse_noise_level(level), jnp.array([1.0, -2.0, 0.5])
    slopes = jax.jit(jax.jacfwd(partial(flow_given, Adams(24), denoiser), (0, 2)))(x_t, t, jnp.array([0.3, 1.0, -1.0]))
    slope = prior @ np.linalg.inv(prior + level**2 * np.eye(3))
    root = np.linalg.inv(np.linalg.cholesky(level**2 * slope))
    by_point, by_noise = (np.asarray(s) for s in slopes)
    np.testing.assert_allclose(root @ by_noise @ by_noise.T @ root.T, np.eye(3), atol=0.002)
    np.testing.assert_allclose(by_point, slope, atol=0.002)


def test_the_noise_behind_a_draw(x64):
    """Up by the same solver and down again: the point comes back, and for a narrow Gaussian the noise is Bayes'."""
    denoiser, solver = GaussianMixture(WEIGHTS, MEANS, VARIANCES, VE(0.01, 80.0)), Adams(40)
    back = jax.jit(jax.vmap(partial(noise_given, solver, denoiser), (None, None, 0)))
    z = jax.random.normal(jax.random.key(0), (50, 2))
    for level, atol in ((0.03, 1e-3), (0.5, 0.01), (4.0, 0.02), (60.0, 0.02)):
        t = denoiser.schedule.inverse_noise_level(level)
        x = pushed(solver, denoiser, jnp.array(SEEN), t, z)
        found = back(jnp.array(SEEN), t, x)
        assert np.median(np.abs(found - z)) < atol, (level, np.median(np.abs(found - z)))
        again = pushed(solver, denoiser, jnp.array(SEEN), t, found)
        assert np.abs(again - x).max() < 0.01 * x.std()
    narrow = Gaussian([0.0, 0.0], 0.04, VE(0.01, 80.0))
    t, x = narrow.schedule.inverse_noise_level(1.0), jnp.array([0.1, -0.3])
    got = jax.jit(partial(noise_given, solver))(narrow, jnp.array([1.0, 2.0]), t, x)
    truth = (x - jnp.array([1.0, 2.0]) * 0.04 / 1.04) / np.sqrt(0.04 / 1.04)
    np.testing.assert_allclose(got, truth, rtol=0.01)


def test_solvers_of_either_law():
    """One of the reverse process walks down from the point, by all of its times; one of the marginals is refused."""
    denoiser, key, x_t, t = Gaussian([0.0], 1.0, VE(0.01, 40.0)), jax.random.key(1), jnp.ones(1), 0.6
    solver = DPMSolverPP(6, eta=1.0)
    levels = np.geomspace(float(denoiser.schedule.noise_level(t)), 0.01, 6)
    assert solver.grid == UniformLogSNR() and evaluations_given(solver) == 6
    times = denoiser.schedule.inverse_noise_level(levels)
    expected = jax.jit(partial(solve, solver, denoiser))(x_t, key, times=times)
    np.testing.assert_allclose(draw_given(solver, denoiser, x_t, t, key), expected, rtol=1e-4)
    z = jax.random.normal(key, (1,))
    np.testing.assert_allclose(
        draw_given(Heun(4), denoiser, x_t, t, key), flow_given(Heun(4), denoiser, x_t, t, z), rtol=1e-6
    )
    with pytest.raises(ValueError, match="must be of law 'flow' or 'reverse'; .* has law='marginals'"):
        draw_given(StochasticHeun(4), denoiser, x_t, t, key)
