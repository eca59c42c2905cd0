"""Solvers against flows and laws known in closed form, their orders fitted, and exact moments of linear steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.noise import VE, VP, Cosine, Karras, Rectified, SubVP, UniformLogSNR
from numpyro_diffusion.solve import (
    Ancestral,
    EulerMaruyama,
    ExponentialEuler,
    Heun,
    Solver,
    StochasticHeun,
    sample,
    solve,
    terminal_moments,
    terminal_point,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

LOWEST, HIGHEST = 0.02, 20.0
LADDER = VE(sigma_min=LOWEST, sigma_max=HIGHEST)
MEAN, VARIANCES = np.array([1.0, -2.0]), np.array([0.25, 4.0])
WEIGHTS, MEANS, SPREADS = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.1, 0.3])


def gaussian(schedule=LADDER):
    return Gaussian(MEAN, VARIANCES, schedule)


def mixture(schedule=LADDER):
    return GaussianMixture(WEIGHTS, MEANS[:, None], SPREADS, schedule)


def on_ladder(schedule):
    """The schedule cut to noise levels from LOWEST to HIGHEST, the ends of LADDER."""
    ends = {"t_min": LOWEST, "t_max": HIGHEST}
    return dataclasses.replace(schedule, **{k: float(schedule.inverse_noise_level(v)) for k, v in ends.items()})


SCHEDULES = {"VE": VE(), "VP": VP(), "SubVP": SubVP(), "Cosine": Cosine(), "Rectified": Rectified()}
SOLVERS = {
    "Ancestral": Ancestral(9),
    "Ancestral eta 0.5": Ancestral(9, eta=0.5),
    "Ancestral eta 0": Ancestral(9, eta=0.0),
    "EulerMaruyama": EulerMaruyama(9),
    "ExponentialEuler eta 0.5": ExponentialEuler(9, eta=0.5),
    "Heun": Heun(9),
    "Heun log-SNR": Heun(9, grid=UniformLogSNR()),
    "StochasticHeun": StochasticHeun(9),
    "StochasticHeun churn 0.3": StochasticHeun(9, churn=0.3),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@jax.jit
def run(solver, denoiser, x, key=None):
    return jax.vmap(lambda x: solve(solver, denoiser, x, key))(x)


def flow_of_gaussian(x):
    """Along the flow every axis is scaled as its standard deviation is; then the posterior mean at the last level."""
    u = MEAN + (x - MEAN) * np.sqrt((VARIANCES + LOWEST**2) / (VARIANCES + HIGHEST**2))
    return MEAN + VARIANCES / (VARIANCES + LOWEST**2) * (u - MEAN)


def flow_of_mixture(x):
    """In one dimension the flow keeps quantiles; then the posterior mean at the last level."""

    def cdf(u, level):
        return WEIGHTS @ norm.cdf((u - MEANS) / np.sqrt(SPREADS + level**2))

    def one(x):
        u = brentq(lambda u: cdf(u, LOWEST) - cdf(x, HIGHEST), -50, 50, xtol=1e-13)
        share = WEIGHTS * norm.pdf(u, MEANS, np.sqrt(SPREADS + LOWEST**2))
        return share @ (MEANS + SPREADS / (SPREADS + LOWEST**2) * (u - MEANS)) / share.sum()

    return np.array([[one(v) for v in x[:, 0]]]).T


def order(steps, errors):
    """Least-squares slope of -log(error) on log(steps)."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@jax.jit
def one_step(solver, denoiser, x_t, t, s):
    return jax.vmap(lambda x_t: solver.step(denoiser, x_t, t, s))(x_t)


def walk(solver, denoiser, x):
    """What `solve` does, by hand: one compiled step serves every number of steps."""
    stepper, times = dataclasses.replace(solver, num_steps=2), np.asarray(solver.times(denoiser))
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = one_step(stepper, denoiser, x, t, s)
    return jax.vmap(lambda x: denoiser(x, times[-1]).x0)(x)


NUM_STEPS = (33, 65, 129)
FLOWS = {"Gaussian": (gaussian, flow_of_gaussian, 2), "mixture": (mixture, flow_of_mixture, 1)}
ORDERS = {"Heun": (Heun, 2), "Ancestral eta 0": (partial(Ancestral, eta=0.0), 1)}


@pytest.mark.parametrize("make, expected", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("law, truth, dimension", FLOWS.values(), ids=FLOWS)
def test_order_of_convergence_of_the_flow(law, truth, dimension, make, expected, x64):
    """The fitted order is within 0.1 of the stated one."""
    quantiles = norm.ppf([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    x = HIGHEST * np.stack([quantiles, quantiles[::-1]], 1)[:, :dimension]
    errors = [np.abs(walk(make(n), law(), x) - truth(x)).max() for n in NUM_STEPS]
    assert abs(order(np.array(NUM_STEPS) - 1, errors) - expected) < 0.1, errors
    assert errors[-1] < (3e-4 if expected == 2 else 5e-2)
    if dimension == 1:
        np.testing.assert_allclose(run(make(33), law(), x), walk(make(33), law(), x), rtol=1e-9)


def test_heun_is_exact_for_an_isotropic_gaussian(x64):
    """Its coordinates are at rest there: three times are as good as infinitely many."""
    mean, variance = np.array([1.0, -2.0]), 0.7
    x = np.array([[30.0, -10.0], [0.0, 5.0], [-20.0, 3.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    for schedule in (LADDER, on_ladder(VP())):
        alpha = schedule.alpha(schedule.t_max)
        u = (x - mean) * np.sqrt((variance + LOWEST**2) / (variance + HIGHEST**2))
        expected = mean + variance / (variance + LOWEST**2) * u
        np.testing.assert_allclose(run(Heun(3), Gaussian(mean, variance, schedule), alpha * x), expected, rtol=1e-9)


@jax.jit
def affine(solver, denoiser, t, s):
    """Slope, offset and noise coefficient per dimension of a step that is affine in the point and in its noise."""
    keys, shape = jax.random.split(jax.random.key(0), 3), denoiser.event_shape
    z = [jax.random.normal(k, shape) for k in keys]  # what a step draws
    zero = jnp.zeros(shape)
    at_zero = [solver.step(denoiser, zero, t, s, k) for k in keys]
    slope = solver.step(denoiser, zero + 1.0, t, s, keys[0]) - at_zero[0]
    noise = (at_zero[0] - at_zero[1]) / (z[0] - z[1])
    offset = at_zero[0] - noise * z[0]
    return slope, offset, noise, offset + noise * z[2] - at_zero[2]


def propagate(solver, denoiser, mean, variance):
    """Mean and variance of a Gaussian at the first time walked to the last, and the slope of all steps: no draws."""
    stepper, times, total = dataclasses.replace(solver, num_steps=2), solver.times(denoiser), np.ones(2)
    for t, s in zip(np.asarray(times[:-1]), np.asarray(times[1:]), strict=True):
        slope, offset, noise, residual = affine(stepper, denoiser, t, s)
        np.testing.assert_allclose(residual, 0.0, atol=1e-10)
        mean, variance, total = slope * mean + offset, slope**2 * variance + noise**2, slope * total
    return mean, variance, total


WEAK = {
    "Ancestral": (Ancestral, 1),
    "Ancestral eta 0.5": (partial(Ancestral, eta=0.5), 1),
    "EulerMaruyama": (EulerMaruyama, 1),
    "ExponentialEuler eta 0.5": (partial(ExponentialEuler, eta=0.5), 1),
    "StochasticHeun": (StochasticHeun, 2),
}


@pytest.mark.parametrize("make, expected", WEAK.values(), ids=WEAK)
def test_weak_order_in_the_variance(make, expected, x64):
    """The noisy law walked down: the mean is exact, the variance errs by the stated order, within 0.15."""
    errors = []
    for n in NUM_STEPS:
        mean, variance, _ = propagate(make(n), gaussian(), MEAN, VARIANCES + HIGHEST**2)
        np.testing.assert_allclose(mean, MEAN, rtol=1e-8)
        errors.append(np.abs(variance / (VARIANCES + LOWEST**2) - 1).max())
    assert abs(order(np.array(NUM_STEPS) - 1, errors) - expected) < 0.15, errors
    assert errors[-1] < (2e-3 if expected == 2 else 0.1)


@pytest.mark.parametrize("make", [Ancestral, EulerMaruyama, StochasticHeun])
def test_the_reverse_process_and_not_another_with_its_marginals(make, x64):
    """From a point x_t at level 2, slope and variance of x | x_t are Bayes', up to first order in the step.

    Any share of noise keeps the marginals; only the full one is the reverse of the noising, which DiffusionPCN needs.
    For `StochasticHeun` too this joint law is of order one (it starts with a step without noise), its marginals of two.
    """
    schedule, high = VE(LOWEST, 2.0), 2.0
    slope = (VARIANCES + LOWEST**2) / (VARIANCES + high**2)
    variance = slope * (high**2 - LOWEST**2)
    errors = []
    for n in NUM_STEPS:
        _, got, total = propagate(make(n), gaussian(schedule), np.zeros(2), np.zeros(2))
        errors.append(max(np.abs(got / variance - 1).max(), np.abs(total / slope - 1).max()))
    assert errors[-1] < 0.05 and order(np.array(NUM_STEPS) - 1, errors) > 0.75, errors


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_draws_have_the_moments_of_the_law(schedule):
    """Mean and variance over 4,000 draws within 4.5 standard errors, plus what 32 steps cost: 1 % of the variance."""
    check_draws(Heun(32), schedule, 0.01)


@pytest.mark.parametrize("solver, bias", [(Ancestral(257), 0.03), (StochasticHeun(33), 0.024)], ids=["DDPM", "Karras"])
def test_draws_of_the_stochastic_solvers(solver, bias):
    """As above; the bias is the exact one of `test_weak_order_in_the_variance`."""
    check_draws(solver, LADDER, bias)


def check_draws(solver, schedule, bias):
    n = 4_000
    x = jax.jit(sample, static_argnums=3)(solver, gaussian(schedule), jax.random.key(1), (n,))
    assert x.shape == (n, 2)
    assert (abs(x.mean(0) - MEAN) < 4.5 * np.sqrt(VARIANCES / n)).all()
    assert (abs(x.var(0) / VARIANCES - 1) < 4.5 * np.sqrt(2 / n) + bias).all()
    assert abs(np.corrcoef(x.T)[0, 1]) < 4.5 / n**0.5


CLOCKS = [
    ("Ancestral", "VP"),
    ("Ancestral", "SubVP"),
    ("Heun", "Cosine"),
    ("StochasticHeun", "Rectified"),
]


@pytest.mark.parametrize("name, schedule", CLOCKS)
def test_all_schedules_are_one_process(name, schedule, x64):
    """At the same noise levels and with the same noise, every schedule lands where variance exploding does."""
    schedule, key, solver = on_ladder(SCHEDULES[schedule]), jax.random.key(2), SOLVERS[name]
    key = key if solver.stochastic else None
    x = HIGHEST * np.linspace(-2, 2, 12).reshape(6, 2)
    expected = run(solver, gaussian(), x, key)
    got = run(solver, gaussian(schedule), schedule.alpha(schedule.t_max) * x, key)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["Ancestral", "Heun", "StochasticHeun"])
def test_start_continues_a_walk(name, x64):
    """Walking k times by hand and the rest from start=k is the whole walk, with static and with traced start."""
    solver, denoiser, key, k = SOLVERS[name], gaussian(), jax.random.key(3), 4
    key = key if solver.stochastic else None
    x_t = x = jnp.array([15.0, -4.0])
    times = solver.times(denoiser)

    @jax.jit
    def step(x_t, t, s, key):
        return solver.step(denoiser, x_t, t, s, key)

    for i in range(k):
        x_t = step(x_t, times[i], times[i + 1], None if key is None else jax.random.fold_in(key, i))

    whole = jax.jit(partial(solve, solver, denoiser))(x, key)
    walk_from = partial(solve, solver, denoiser)
    np.testing.assert_allclose(jax.jit(lambda x: walk_from(x, key, k))(x_t), whole, rtol=1e-9)
    traced = jax.jit(walk_from)
    np.testing.assert_allclose(traced(x_t, key, jnp.asarray(k)), whole, rtol=1e-9)
    np.testing.assert_allclose(traced(x, key, jnp.asarray(0)), whole, rtol=1e-9)
    last = denoiser(x_t, times[-1]).x0  # from the last time there is only the posterior mean to take
    np.testing.assert_allclose(traced(x_t, key, jnp.asarray(solver.num_steps - 1)), last, rtol=1e-9)


@each_solver
def test_evaluations_are_counted_right(solver):
    calls = []

    class Counting(Gaussian):
        def __call__(self, x_t, t, cond=None):
            calls.append(t)
            return super().__call__(x_t, t, cond)

    denoiser = Counting(MEAN, VARIANCES, LADDER)
    jax.eval_shape(lambda x, key: solver.step(denoiser, x, 0.5, 0.4, key), jnp.zeros(2), jax.random.key(0))
    assert len(calls) == solver.evaluations_per_step
    assert solver.evaluations() == (solver.num_steps - 1) * solver.evaluations_per_step + 1
    assert solver.evaluations(solver.num_steps - 1) == 1
    assert solver.times(denoiser).shape == (solver.num_steps,)


def test_noise_along_the_way():
    """The same key gives the same walk and another key another; a solver says whether it needs one."""
    x = np.zeros((6, 2))
    for solver in (SOLVERS["Ancestral"], SOLVERS["StochasticHeun"]):
        first, again, other = (run(solver, gaussian(), x, jax.random.key(i)) for i in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (first != other).all()
    deterministic = [name for name, solver in SOLVERS.items() if not solver.stochastic]
    assert deterministic == ["Ancestral eta 0", "Heun", "Heun log-SNR"]


def test_gradient_through_the_flow(x64):
    """In the noise and in the law's means: the closed form of the flow, and central differences."""
    x = jnp.array([15.0, -4.0])
    jacobian = jax.jit(jax.jacrev(lambda x: solve(Heun(65), gaussian(), x)))(x)
    exact = np.diag(flow_of_gaussian(MEAN + 1.0) - flow_of_gaussian(MEAN))
    np.testing.assert_allclose(jacobian, exact, rtol=2e-3, atol=1e-9)

    @jax.jit
    def total(x, means):
        denoiser = GaussianMixture(WEIGHTS, means, SPREADS, LADDER)
        return solve(Ancestral(9), denoiser, x, jax.random.key(0)).sum()

    x, means, h = jnp.array([3.0]), jnp.asarray(MEANS)[:, None], 1e-5
    by_x, by_means = jax.jit(jax.grad(total, (0, 1)))(x, means)
    np.testing.assert_allclose(by_x[0], (total(x + h, means) - total(x - h, means)) / (2 * h), rtol=1e-6)
    for i in range(2):
        step = jnp.zeros((2, 1)).at[i].set(h)
        expected = (total(x, means + step) - total(x, means - step)) / (2 * h)
        np.testing.assert_allclose(by_means[i, 0], expected, rtol=1e-6)
    assert (abs(by_means) > 1e-3).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_terminal_law_has_the_moments_of_the_noisy_law(schedule):
    """Mean alpha m and variance alpha^2 s^2 + sigma^2, with s^2 the mean variance of the dimensions."""
    denoiser = gaussian(schedule)
    alpha, sigma = schedule.alpha(schedule.t_max), schedule.sigma(schedule.t_max)
    mean, deviation = terminal_moments(denoiser)
    np.testing.assert_allclose(mean, alpha * MEAN, rtol=1e-5)
    np.testing.assert_allclose(deviation**2, alpha**2 * VARIANCES.mean() + sigma**2, rtol=1e-5)
    np.testing.assert_allclose(terminal_point(denoiser, jnp.array([2.0, -1.0])), mean + deviation * np.array([2.0, -1]))


def test_sample_shapes_and_types():
    denoiser = gaussian()
    for shape in ((), (3,), (2, 3)):
        drawn = jax.eval_shape(lambda key, shape=shape: sample(Ancestral(4), denoiser, key, shape), jax.random.key(0))
        assert drawn.shape == (*shape, 2)
    low = jax.eval_shape(lambda x: solve(Heun(4), denoiser, x), jnp.zeros(2, jnp.bfloat16))
    assert low.shape == (2,)


def test_solvers_are_static():
    for solver in SOLVERS.values():
        twin = dataclasses.replace(solver)
        assert jax.tree.leaves(solver) == [] and twin == solver and hash(twin) == hash(solver)
    assert Heun(9) != Heun(10) and Heun(9) != StochasticHeun(9)


BAD = {
    "one step": (lambda: Heun(1), ValueError, "num_steps must be at least 2; got 1"),
    "no steps": (lambda: StochasticHeun(0), ValueError, "num_steps must be at least 2; got 0"),
    "half a step": (lambda: Ancestral(2.5), TypeError, "num_steps must be a whole number; got 2.5"),
    "a truth": (lambda: Ancestral(True), TypeError, "num_steps must be a whole number; got True"),
    "eta": (lambda: Ancestral(eta=1.5), ValueError, r"eta must lie in \[0, 1\]; got 1.5"),
    "churn": (lambda: StochasticHeun(churn=0.0), ValueError, "churn must be positive and finite; got 0.0"),
    "grid": (lambda: Heun(grid="karras"), TypeError, r"grid must be a TimeGrid such as noise.Karras\(\); got 'karras'"),
    "grid class": (lambda: Ancestral(grid=Karras), TypeError, "grid must be a TimeGrid"),
    "abstract": (lambda: Solver(), TypeError, "abstract"),
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
