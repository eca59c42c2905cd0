"""Closed-form denoisers against independent truth: scipy's densities, automatic differentiation, quadrature, draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from numpyro_diffusion.denoise import Denoiser, Gaussian, GaussianMixture, Prediction
from numpyro_diffusion.noise import VE, VP, Cosine, Rectified, SubVP

D = 3  # in two dimensions eigenvectors may form a symmetric matrix, and a transposed rotation goes unseen
MEAN = np.array([0.5, -1.0, 0.2])
FULL = np.array([[1.0, 0.6, -0.3], [0.6, 2.0, 0.5], [-0.3, 0.5, 0.7]])
WEIGHTS = np.array([0.2, 0.5, 0.3])
MEANS = np.array([[-2.0, 0.0, 1.0], [1.0, 1.5, 0.0], [2.0, -2.0, -1.0]])
FULLS = np.array([FULL, np.diag([0.3, 0.7, 1.2]), 0.5 * FULL[::-1, ::-1]])
DIAGONAL = np.array([0.5, 2.0, 1.0])
DIAGONALS = np.array([[0.2, 0.4, 0.3], [0.5, 0.5, 1.5], [1.0, 0.1, 0.8]])
VE_WIDE = VE(sigma_min=0.05, sigma_max=8.0)  # at t = 0.5 its noise is as large as the spread of the data

# name: (denoiser, weights, means, full covariances), made where they are used: in double precision.
LAWS = {
    "Gaussian isotropic": lambda s: (Gaussian(MEAN, 0.7, s), [1.0], [MEAN], [0.7 * np.eye(D)]),
    "Gaussian diagonal": lambda s: (Gaussian(MEAN, DIAGONAL, s), [1.0], [MEAN], [np.diag(DIAGONAL)]),
    "Gaussian full": lambda s: (Gaussian(MEAN, FULL, s), [1.0], [MEAN], [FULL]),
    "mixture scalar": lambda s: (GaussianMixture(WEIGHTS, MEANS, 0.4, s), WEIGHTS, MEANS, [0.4 * np.eye(D)] * 3),
    "mixture isotropic": lambda s: (
        GaussianMixture(WEIGHTS, MEANS, [0.2, 0.5, 1.0], s),
        WEIGHTS,
        MEANS,
        [v * np.eye(D) for v in (0.2, 0.5, 1.0)],
    ),
    "mixture diagonal": lambda s: (
        GaussianMixture(10 * WEIGHTS, MEANS, DIAGONALS, s),  # weights are normalised
        WEIGHTS,
        MEANS,
        [np.diag(v) for v in DIAGONALS],
    ),
    "mixture full": lambda s: (GaussianMixture(WEIGHTS, MEANS, FULLS, s), WEIGHTS, MEANS, FULLS),
}
SCHEDULES = {"VP": VP(), "SubVP": SubVP(), "VE": VE_WIDE, "Cosine": Cosine(), "Rectified": Rectified()}
TIMES = (0.05, 0.3, 0.7)

each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def points():
    return 2.0 * jax.random.normal(jax.random.key(0), (7, D))


@jax.jit
def views(denoiser, x_t, t):
    """All views, the log-density and its gradient at many points."""

    def one(x_t):
        p = denoiser(x_t, t)
        log_density, score = jax.value_and_grad(denoiser.log_density)(x_t, t)
        return {
            **{name: getattr(p, name) for name in ("x0", "eps", "score", "v", "velocity")},
            "log_density": log_density,
            "gradient": score,
        }

    return jax.vmap(one)(x_t)


CASES = [(name, "VP") for name in LAWS] + [("mixture full", name) for name in SCHEDULES if name != "VP"]


@pytest.mark.parametrize("law, schedule", CASES)
def test_diffused_density_score_and_posterior_mean(law, schedule, x64):
    """Density against scipy, score against its gradient, x0 against Bayes' rule, component by component."""
    schedule = SCHEDULES[schedule]
    denoiser, weights, means, covariances = LAWS[law](schedule)
    x_t = points()
    for t in TIMES:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        log_joint, posterior_means = [], []
        for w, m, c in zip(weights, means, covariances, strict=True):
            noisy = alpha**2 * c + sigma**2 * np.eye(D)
            log_joint.append(np.log(w) + multivariate_normal(alpha * m, noisy).logpdf(x_t))
            posterior_means.append(m + (x_t - alpha * m) @ (alpha * c @ np.linalg.inv(noisy)).T)
        evidence = logsumexp(log_joint, axis=0)
        x0 = np.einsum("kn,kni->ni", np.exp(log_joint - evidence), posterior_means)

        got = views(denoiser, x_t, t)
        np.testing.assert_allclose(got["log_density"], evidence, rtol=1e-9)
        np.testing.assert_allclose(got["score"], got["gradient"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(got["x0"], x0, rtol=1e-7, atol=1e-9)
        tweedie = (x_t + sigma**2 * got["gradient"]) / alpha
        np.testing.assert_allclose(got["x0"], tweedie, rtol=1e-6, atol=1e-8)


@each_schedule
def test_views_of_one_prediction(schedule, x64):
    """x_t is put back together from (x0, eps), from (v, x_t), and the velocity is the probability-flow drift."""
    denoiser, *_ = LAWS["mixture full"](schedule)
    x_t = points()
    for t in TIMES:
        a, s = schedule.alpha(t), schedule.sigma(t)
        p = views(denoiser, x_t, t)
        np.testing.assert_allclose(a * p["x0"] + s * p["eps"], x_t, rtol=1e-10)
        np.testing.assert_allclose(p["score"], -p["eps"] / s, rtol=1e-10)
        np.testing.assert_allclose(p["v"], a * p["eps"] - s * p["x0"], rtol=1e-10)
        np.testing.assert_allclose((a * x_t - s * p["v"]) / (a**2 + s**2), p["x0"], rtol=1e-9, atol=1e-10)
        drift = schedule.drift(t) * x_t - 0.5 * schedule.diffusion(t) ** 2 * p["gradient"]
        np.testing.assert_allclose(p["velocity"], drift, rtol=1e-7, atol=1e-9)


def test_definitions_by_quadrature(x64):
    """One dimension, VP: p_t integrates to one, and E[x | x_t] is an integral over x, with no Gaussian posterior."""
    law = GaussianMixture([0.3, 0.7], [[-1.0], [1.5]], [0.2, 0.5], VP())
    grid = np.linspace(-12, 12, 4001)
    prior = 0.3 * multivariate_normal(-1, 0.2).pdf(grid) + 0.7 * multivariate_normal(1.5, 0.5).pdf(grid)
    for t in TIMES:
        alpha, sigma = float(law.schedule.alpha(t)), float(law.schedule.sigma(t))
        got = views(law, grid[:, None], t)
        np.testing.assert_allclose(np.exp(got["log_density"]).sum() * (grid[1] - grid[0]), 1.0, rtol=1e-8)
        some = np.array([1800, 2050, 2400])
        joint = prior * np.exp(-0.5 * ((grid[some, None] - alpha * grid) / sigma) ** 2)
        np.testing.assert_allclose(got["x0"][some, 0], joint @ grid / joint.sum(1), rtol=1e-7)


@partial(jax.jit, static_argnums=0)
def draw(n, denoiser):
    return denoiser.sample(jax.random.key(3), (n,))


@each_law
def test_draws_have_the_moments_of_the_mixture(law):
    """Mean and covariance of 50,000 exact draws, each entry within 4.5 standard errors."""
    denoiser, weights, means, covariances = law(VP())
    n = 50_000
    x = np.asarray(draw(n, denoiser), np.float64)
    mean = np.einsum("k,ki->i", weights, means)
    centred = np.asarray(means) - mean
    covariance = np.einsum("k,kij->ij", weights, np.asarray(covariances) + centred[:, :, None] * centred[:, None, :])
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert (abs(x.mean(0) - mean) < 4.5 * x.std(0) / n**0.5).all()
    assert (abs(products.mean(0) - covariance) < 4.5 * products.std(0) / n**0.5).all()
    np.testing.assert_allclose(denoiser.location, mean, atol=1e-5)
    np.testing.assert_allclose(denoiser.scale, np.sqrt(np.trace(covariance) / D), rtol=1e-5)


def test_sample_shapes():
    denoiser, *_ = LAWS["mixture full"](VP())
    for sample_shape in ((), (3, 4)):
        x = jax.eval_shape(lambda key, shape=sample_shape: denoiser.sample(key, shape), jax.random.key(0))
        assert x.shape == (*sample_shape, D)


def test_all_forms_of_a_covariance_agree(x64):
    """One law written with a scalar, (K,), (K, d) and (K, d, d) covariances."""
    forms = [0.4, np.full(3, 0.4), np.full((3, D), 0.4), np.broadcast_to(0.4 * np.eye(D), (3, D, D))]
    first, *others = [views(GaussianMixture(WEIGHTS, MEANS, c, VP()), points(), 0.4) for c in forms]
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), first, other)


def test_is_a_denoiser_and_a_pytree():
    denoiser, *_ = LAWS["mixture full"](VP())
    assert isinstance(denoiser, Denoiser)
    assert denoiser.event_shape == (D,)
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(denoiser)))
    assert type(again) is GaussianMixture and again.schedule == VP()
    prediction = jax.jit(lambda d, x: d(x, 0.5))(denoiser, jnp.ones(D))
    assert isinstance(prediction, Prediction)
    np.testing.assert_allclose(prediction.x0, denoiser(jnp.ones(D), 0.5).x0, rtol=1e-5)
    assert not isinstance(lambda x_t, t: x_t, Denoiser)


def test_gradient_in_the_arrays(x64):
    """Under jit, through construction: d log p_t / d mean = alpha S^-1 (x_t - alpha m), and weights by hand."""
    t, x_t = 0.3, jnp.array([0.3, -0.7, 0.1])
    alpha, sigma = VP().alpha(t), VP().sigma(t)

    @jax.jit
    @jax.grad
    def gradient(mean):
        return Gaussian(mean, FULL, VP()).log_density(x_t, t)

    noisy = alpha**2 * FULL + sigma**2 * np.eye(D)
    np.testing.assert_allclose(gradient(MEAN), alpha * np.linalg.solve(noisy, x_t - alpha * MEAN), rtol=1e-9)

    def log_density(weights, means):
        return GaussianMixture(weights, means, FULLS, VP()).log_density(x_t, t)

    by_weights, by_means = jax.jit(jax.grad(log_density, (0, 1)))(WEIGHTS, MEANS)
    laws = [views(Gaussian(m, c, VP()), x_t[None], t) for m, c in zip(MEANS, FULLS, strict=True)]
    parts = np.array([np.exp(law["log_density"][0]) for law in laws])
    total = WEIGHTS @ parts
    np.testing.assert_allclose(by_weights, parts / total - 1.0, rtol=1e-8)  # weights are normalised: minus one
    scores = np.array([law["score"][0] for law in laws])
    np.testing.assert_allclose(by_means, -alpha * (WEIGHTS * parts / total)[:, None] * scores, rtol=1e-8)


def test_a_batch_of_laws_by_vmap():
    """The means of the law are mapped, the point is not."""
    means = jnp.array([[0.0, 0.0], [1.0, -1.0], [3.0, 2.0]])
    x0 = jax.jit(jax.vmap(lambda m: Gaussian(m, 2.0, VP())(jnp.ones(2), 0.3).x0))(means)
    for m, got in zip(means, x0, strict=True):
        np.testing.assert_allclose(views(Gaussian(m, 2.0, VP()), jnp.ones((1, 2)), 0.3)["x0"][0], got, rtol=1e-5)


def test_made_inside_jit_from_known_arrays():
    """Checks of the arguments that are known hold inside jit, and do not trace them."""

    def x0(mean, covariance):
        return Gaussian(mean, covariance, VP())(jnp.ones(2), 0.3).x0

    for covariance in (2.0, jnp.full(2, 2.0), 2.0 * jnp.eye(2)):
        expected = x0(jnp.zeros(2), covariance)
        np.testing.assert_allclose(jax.jit(x0)(jnp.zeros(2), covariance), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(lambda m, c=covariance: x0(m, c))(jnp.zeros(2)), expected, rtol=1e-5)


def test_zero_weight_is_no_component():
    """A component of weight zero changes nothing, and gives no NaN."""
    with_zero = GaussianMixture([0.0, 1.0], [[5.0, 5.0], [0.0, 0.0]], 1.0, VP())
    without = Gaussian([0.0, 0.0], 1.0, VP())
    got, expected = (views(law, jnp.array([[4.0, 4.0]]), 0.1) for law in (with_zero, without))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


TWO = [[-1.0, 0.0], [1.0, 0.0]]
BAD = {
    "means shape": (lambda: GaussianMixture([1.0], [0.0, 1.0]), r"means must have shape \(components, dimensions\)"),
    "weights shape": (lambda: GaussianMixture([1.0], TWO), r"weights must have shape \(2,\).*got \(1,\)"),
    "weights batch": (lambda: GaussianMixture(np.ones((3, 2)), TWO), r"weights must have shape \(2,\).*got \(3, 2\)"),
    "weights negative": (lambda: GaussianMixture([-0.5, 1.5], TWO), "weights must be non-negative"),
    "weights zero": (lambda: GaussianMixture([0.0, 0.0], TWO), "weights must be non-negative with a positive sum"),
    "weights NaN": (lambda: GaussianMixture([np.nan, 1.0], TWO), r"weights must be finite; got 1 .* index \(0,\)"),
    "means infinite": (
        lambda: GaussianMixture([0.5, 0.5], [[0.0, 0.0], [np.inf, 0.0]]),
        r"means must be finite; got 1 non-finite values, the first at index \(1, 0\)",
    ),
    "covariances (3,)": (lambda: GaussianMixture([0.5, 0.5], TWO, np.ones(3)), r"covariances must be a scalar or"),
    "covariances (3, 2)": (
        lambda: GaussianMixture([0.5, 0.5], TWO, np.ones((3, 2))),
        r"covariances must end with shape \(2, 2\).* a full covariance is \(components, d, d\)",
    ),
    "covariances (2, 3, 3)": (lambda: GaussianMixture([0.5, 0.5], TWO, np.ones((2, 3, 3))), "covariances must end"),
    "variance zero": (lambda: GaussianMixture([0.5, 0.5], TWO, 0.0), "covariances must be positive definite"),
    "indefinite": (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "covariances must be positive definite"),
    "asymmetric": (lambda: Gaussian([0.0, 0.0], [[1.0, 0.0], [0.9, 1.0]]), "covariances must be symmetric"),
    "variance NaN": (lambda: Gaussian([0.0], np.nan), "covariances must be finite"),
    "scalar mean": (lambda: Gaussian(0.0), r"mean must have shape \(dimensions,\); got \(\)"),
    "x_t short": (lambda: GaussianMixture([0.5, 0.5], TWO)(np.zeros(1), 0.5), r"x_t must be one point of shape \(2,\)"),
    "x_t batch": (lambda: GaussianMixture([0.5, 0.5], TWO)(np.zeros((2, 2)), 0.5), "x_t must be .*Use jax.vmap"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
