"""The probability-flow density against mixtures whose density, score and derivatives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.density import log_prob
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import Density
from numpyro_diffusion.noise import VE, VP
from numpyro_diffusion.solve import AdaptiveFlow, Heun

# A 2-D mixture of zero mean and unit variance per dimension: two tight components, one correlated, one wide.
WEIGHTS = np.array([0.3, 0.3, 0.2, 0.2])
CENTRES = np.array([[-1.4, 0.3], [1.2, 1.2], [0.3, -1.4], [0.2, -0.6]])
SHAPES = np.array([0.1 * np.eye(2), 0.1 * np.eye(2), [[0.4, 0.2], [0.2, 0.3]], np.eye(2)])


def standardised():
    mean = WEIGHTS @ CENTRES
    spread = WEIGHTS @ ((CENTRES - mean) ** 2 + np.diagonal(SHAPES, axis1=1, axis2=2))
    return (CENTRES - mean) / np.sqrt(spread), SHAPES / np.sqrt(spread[:, None] * spread)


MEANS, COVARIANCES = standardised()


def mixture(schedule=None):
    return GaussianMixture(WEIGHTS, MEANS, COVARIANCES, schedule)


def true_log_density(x):
    parts = [w * multivariate_normal(m, c).pdf(x) for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)]
    return np.log(np.sum(parts, 0))


@jax.jit
def log_probs(solver, denoiser, x):
    return jax.vmap(lambda x: log_prob(denoiser, x, solver).value)(x)


def draws(n=200):
    return jax.jit(lambda law: law.sample(jax.random.key(0), (n,)))(mixture())


def order(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def gaussian_flow_density(x, mean, variances, low, high):
    """What the flow's density is for a Gaussian with infinitely many steps: only the terminal law is approximate."""
    scale = np.sqrt(np.mean(variances))
    stretch = np.sqrt((variances + high**2) / (variances + low**2))
    end = multivariate_normal(np.zeros(len(variances)), scale**2 + high**2)
    return end.logpdf((x - mean) * stretch) + np.log(stretch).sum()


def test_mixture_density_within_a_hundredth_of_a_nat():
    """At 200 draws of the standardised mixture, 64 Heun steps, single precision, the default schedule."""
    np.testing.assert_allclose(WEIGHTS @ MEANS, 0.0, atol=1e-12)
    x = draws()
    error = log_probs(Heun(64), mixture(), x) - true_log_density(x)
    assert np.abs(error).max() < 1e-2 and np.abs(error).mean() < 2e-3, np.abs(error).max()


def test_mixture_density_on_another_schedule():
    """The ladder of VP ends at noise level 152, not 80: the same steps are spread a little wider."""
    x = draws()
    error = log_probs(Heun(64), mixture(VP()), x) - true_log_density(x)
    assert np.abs(error).max() < 1e-2 and np.abs(error).mean() < 2e-3, np.abs(error).max()


def test_order_two(x64):
    """For a Gaussian against the closed form of the flow, for the mixture against 1025 steps; within 0.15."""
    schedule, num_steps = VE(0.02, 20.0), (65, 129)
    mean, variances, x = np.array([1.0, -2.0]), np.array([0.25, 4.0]), np.asarray(draws())
    same = [np.broadcast_to(a, (4, *a.shape)) for a in (mean, np.diag(variances))]  # as a mixture: one program
    cases = [
        (GaussianMixture(WEIGHTS, *same, schedule), gaussian_flow_density(x, mean, variances, 0.02, 20.0)),
        (mixture(schedule), log_probs(Heun(1025), mixture(schedule), x)),
    ]
    for denoiser, truth in cases:
        errors = [np.abs(log_probs(Heun(n), denoiser, x) - truth).mean() for n in num_steps]
        assert abs(order(np.array(num_steps) - 1, errors) - 2) < 0.15, errors


def test_normalised(x64):
    """The density of a 1-D mixture integrates to one; the solver's and the terminal law's error is 1e-3."""
    law = GaussianMixture([0.3, 0.7], [[-1.5], [1.0]], [0.1, 0.3])
    x = np.linspace(-8, 8, 1601)
    density = np.exp(log_probs(Heun(64), law, x[:, None]))
    np.testing.assert_allclose(density.sum() * (x[1] - x[0]), 1.0, atol=1e-3)


def test_cost_of_the_terminal_law(x64):
    """Exactly N(0, I) for an isotropic Gaussian; else its cost in nats falls as the largest noise level squared."""
    mean, variances, x = np.array([1.0, -2.0]), np.array([0.25, 4.0]), np.array([[1.5, 0.0], [0.0, -5.0], [1.0, 0.0]])
    exact = multivariate_normal(mean, np.diag(variances + 0.02**2)).logpdf(x)
    costs = {}
    for high in (5.0, 20.0):
        got = log_probs(Heun(257), Gaussian(mean, variances, VE(0.02, high)), x)
        np.testing.assert_allclose(got, gaussian_flow_density(x, mean, variances, 0.02, high), atol=2e-4)
        costs[high] = np.abs(got - exact).max()
    assert 13 < costs[5.0] / costs[20.0] < 18, costs
    assert costs[20.0] < 10 * np.mean(variances) / 20.0**2
    isotropic = log_probs(Heun(257), Gaussian(mean, 0.7, VE(0.02, 5.0)), x)
    np.testing.assert_allclose(isotropic, multivariate_normal(mean, 0.7 + 0.02**2).logpdf(x), atol=1e-9)


@pytest.mark.parametrize("d", [8, 32])
def test_many_dimensions(d, x64):
    """Two components with their own diagonal covariances, at draws: the errors of the dimensions add up."""
    rng = np.random.default_rng(d)
    means, variances = rng.normal(size=(2, d)), rng.uniform(0.2, 1.0, (2, d))
    law = GaussianMixture([0.4, 0.6], means, variances)
    x = np.concatenate(means + np.sqrt(variances) * rng.normal(size=(20, 2, d)))
    parts = [
        w * multivariate_normal(m, np.diag(v)).pdf(x) for w, m, v in zip([0.4, 0.6], means, variances, strict=True)
    ]
    error = np.abs(log_probs(Heun(64), law, x) - np.log(np.sum(parts, 0)))
    assert error.max() < 1.5e-2 * d / 8 and error.mean() < 5e-3 * d / 8, error


def scores(denoiser, x):
    """The gradient of the exact log-density of the least noisy law, which is the score there."""
    alpha, t = denoiser.schedule.alpha(denoiser.schedule.t_min), denoiser.schedule.t_min
    return jax.jit(jax.vmap(jax.grad(lambda x: denoiser.log_density(alpha * x, t))))(x)


MODES = {"reverse": lambda f: jax.grad(jax.jit(f)), "forward": jax.jacfwd}


@pytest.mark.parametrize("derivative", MODES.values(), ids=MODES)
def test_gradient_is_the_score(derivative, x64):
    """Under vmap and jit, in both modes; with a solve so coarse that its own derivative is far from the score."""
    denoiser, x = mixture(VP()), np.asarray(draws())[:8]
    gradient = jax.jit(jax.vmap(derivative(lambda x: log_prob(denoiser, x, Heun(2)).value)))(x)
    np.testing.assert_allclose(gradient, scores(denoiser, x), rtol=1e-8)


def test_gradient_of_the_solve_is_that_of_the_value(x64):
    """Against central differences, with a solve so coarse that its derivative is far from the score."""
    denoiser, x, step = mixture(VP()), np.asarray(draws(8)), 1e-4

    def value(x):
        return log_prob(denoiser, x, Heun(4), gradient="solve").value

    beside = x[:, None] + step * np.concatenate([np.eye(2), -np.eye(2)])
    values = jax.jit(jax.vmap(jax.vmap(value)))(beside)
    gradient = jax.jit(jax.vmap(jax.grad(value)))(x)
    np.testing.assert_allclose(gradient, (values[:, :2] - values[:, 2:]) / (2 * step), rtol=1e-6, atol=1e-6)
    assert np.abs(gradient - scores(denoiser, x)).max() > 0.1
    np.testing.assert_allclose(values[:, 0], log_probs(Heun(4), denoiser, beside[:, 0]), rtol=1e-12)

    options = {"density": "flow", "density_solver": Heun(4)}
    for prior, expected in (
        (DiffusionPrior(denoiser, **options, density_gradient="solve"), gradient),
        (DiffusionPrior(denoiser, **options), scores(denoiser, x)),
    ):
        for log_density in (prior.log_prob, lambda x, prior=prior: Density("flow").value(prior, x)):
            np.testing.assert_allclose(jax.vmap(jax.grad(log_density))(x), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("error", "message", "solver", "gradient"),
    [
        (ValueError, "gradient must be one of", Heun(4), "flow"),
        (
            TypeError,
            r'gradient="solve" needs a solver with a fixed grid, Heun; got AdaptiveFlow',
            AdaptiveFlow(),
            "solve",
        ),
    ],
)
def test_gradients_that_there_are_not(error, message, solver, gradient):
    with pytest.raises(error, match=message):
        log_prob(mixture(), jnp.zeros(2), solver, gradient=gradient)


def test_gradient_of_points_never_enters_the_solve():
    """A reverse pass adds one denoiser evaluation and no loop to the forward one."""

    def loops(function):
        return str(jax.make_jaxpr(function)(jnp.zeros(2))).count(" = scan[")

    law = mixture()

    def value(x):
        return log_prob(law, x).value

    assert loops(value) == 1
    assert loops(jax.value_and_grad(value)) == 1


@pytest.mark.slow
def test_gradient_in_the_arrays_is_the_solves(x64):
    """In means, weights, variances and the point at once: as the exact log-density says, to a hundredth, never zero."""

    def exact(weights, means, variances, x):
        return GaussianMixture(weights, means, variances).log_density(x, 0.0)

    def by_flow(weights, means, variances, x):
        return log_prob(GaussianMixture(weights, means, variances), x).value

    arrays = WEIGHTS, MEANS, np.diagonal(COVARIANCES, axis1=1, axis2=2), np.array([0.3, -0.5])
    expected = jax.jit(jax.grad(exact, (0, 1, 2, 3)))(*arrays)
    got = jax.jit(jax.grad(by_flow, (0, 1, 2, 3)))(*arrays)
    for g, e in zip(got, expected, strict=True):
        assert np.abs(e).max() > 0.1
        np.testing.assert_allclose(g, e, atol=0.01 * np.abs(e).max())


def test_a_point_that_depends_on_the_arrays(x64):
    """In forward mode: both parts of the derivative are there."""

    def through(m):
        return log_prob(Gaussian(m[None], 0.5), 3.0 * m[None], Heun(3)).value

    np.testing.assert_allclose(jax.jit(jax.jacfwd(through))(0.7), -(3 * 0.7 - 0.7) * (3 - 1) / 0.5, rtol=1e-4)


def test_denoiser_as_an_argument_of_jit():
    """New arrays, same program."""
    x, traces = np.zeros(2, np.float32), []

    @jax.jit
    def density(denoiser, x):
        traces.append(x)
        return log_prob(denoiser, x, Heun(3)).value

    for mean in (np.zeros(2), np.array([1.0, -2.0])):
        expected = multivariate_normal(mean, 1.0).logpdf(x)
        np.testing.assert_allclose(density(Gaussian(mean), x), expected, atol=1e-3)
    assert len(traces) == 1


def test_whole_numbers_are_points():
    density = log_prob(Gaussian([0.0, 0.0]), np.array([1, 0]), Heun(3)).value
    np.testing.assert_allclose(density, -np.log(2 * np.pi) - 0.5, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)], ids=str)
def test_shape_of_a_point(shape):
    with pytest.raises(ValueError, match=r"x must be one point of shape \(2,\); got .*Use jax.vmap"):
        log_prob(mixture(), jnp.zeros(shape))
