"""Solvers against flows and laws known in closed form, their orders fitted, and exact moments of linear steps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import brentq
from scipy.stats import norm

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.noise import VE, VP, Cosine, Karras, Rectified, SubVP, UniformLogSNR
from numpyro_diffusion.solve import (
    Adams,
    Ancestral,
    DPMSolverPP,
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
    "Adams": Adams(9),
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
    """Slope of -log(error) on log(steps)."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@jax.jit
def one_step(solver, denoiser, x_t, memory, t, s):
    return jax.vmap(lambda x_t, memory: solver.step(denoiser, x_t, memory, t, s))(x_t, memory)


@jax.jit
def at_the_start(solver, denoiser, x):
    return solver.times(denoiser), jax.vmap(partial(solver.init, denoiser))(x)


@jax.jit
def at_the_end(denoiser, x, t):
    return jax.vmap(lambda x: denoiser(x, t).x0)(x)


def walk(solver, denoiser, x):
    """What `solve` does, by hand: one compiled step serves every number of times."""
    stepper, (times, memory) = dataclasses.replace(solver, num_times=2), at_the_start(solver, denoiser, x)
    times = np.asarray(times)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x, memory = one_step(stepper, denoiser, x, memory, t, s)
    return at_the_end(denoiser, x, times[-1])


NUM_TIMES = (33, 129)
FLOWS = {"Gaussian": (gaussian, flow_of_gaussian, 2), "mixture": (mixture, flow_of_mixture, 1)}
ORDERS = {
    "Heun": (Heun, 0.1),
    "Adams": (Adams, 0.8),
    "DPMSolverPP": (DPMSolverPP, 0.2),
    "DDIM": (partial(Ancestral, eta=0.0), 0.1),
}


@pytest.mark.parametrize("make, tolerance", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("law, truth, dimension", FLOWS.values(), ids=FLOWS)
def test_order_of_convergence_of_the_flow(law, truth, dimension, make, tolerance, x64):
    """The fitted order is the stated one, within a tolerance; the DPM solver's first step, of order one, costs it some.

    Adams still gains more than its order at these numbers of steps.

    What is walked by hand is what `solve` walks.
    """
    quantiles = norm.ppf([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    x, stated = HIGHEST * np.stack([quantiles, quantiles[::-1]], 1)[:, :dimension], make(33).order
    num_times = 2 * np.array(NUM_TIMES) - 1 if make is DPMSolverPP else NUM_TIMES
    errors = [np.abs(walk(make(int(n)), law(), x) - truth(x)).max() for n in num_times]
    assert make(33).law == "flow"
    assert abs(order(np.array(num_times) - 1, errors) - stated) < tolerance, errors
    assert errors[-1] < (2e-3 if make is DPMSolverPP else {1: 5e-2, 2: 3e-4, 3: 1e-5}[stated])
    if dimension == 1:
        np.testing.assert_allclose(run(make(33), law(), x), walk(make(33), law(), x), rtol=1e-9)


def test_heun_is_exact_for_an_isotropic_gaussian(x64):
    """Its coordinates are at rest there: three times are as good as infinitely many."""
    mean, variance = np.array([1.0, -2.0]), 0.7
    x = np.array([[30.0, -10.0], [0.0, 5.0], [-20.0, 3.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    schedule = on_ladder(VP())
    u = (x - mean) * np.sqrt((variance + LOWEST**2) / (variance + HIGHEST**2))
    expected = mean + variance / (variance + LOWEST**2) * u
    start = schedule.alpha(schedule.t_max) * x
    np.testing.assert_allclose(run(Heun(3), Gaussian(mean, variance, schedule), start), expected, rtol=1e-9)


@jax.jit
def moments_after(solver, denoiser, moments, memory, t, s):
    """Mean, covariance and slope of a step that is affine in the point, in what is remembered and in its noise."""
    mean, covariance, slope = moments
    keys, split = jax.random.split(jax.random.key(0), 3), ravel_pytree((jnp.zeros(2), memory))[1]
    z = [jax.random.normal(key, (2,)) for key in keys]  # what a step draws

    def step(state, key):
        point, memory = split(state)
        return ravel_pytree(solver.step(denoiser, point, memory, t, s, key))[0]

    steps = [step(mean, key) for key in keys]
    noise = (steps[0] - steps[1])[:2] / (z[0] - z[1])
    by_noise = jnp.zeros((len(mean), 2)).at[:2].set(jnp.diag(noise))
    by_state = jax.jacfwd(step)(mean, keys[0])
    without = steps[0] - by_noise @ z[0]
    covariance = by_state @ covariance @ by_state.T + by_noise @ by_noise.T
    return (without, covariance, by_state @ slope), without + by_noise @ z[2] - steps[2]


def propagate(solver, denoiser, mean, variance):
    """Mean and variance of a Gaussian at the first time walked to the last, and the slope of all steps: no draws."""
    stepper, times = dataclasses.replace(solver, num_times=2), np.asarray(solver.times(denoiser))
    memory = solver.init(denoiser, jnp.asarray(mean))
    state = ravel_pytree((jnp.asarray(mean), memory))[0]
    start = np.eye(len(state), 2)
    moments = state, start * variance @ start.T, start
    for t, s in zip(times[:-1], times[1:], strict=True):
        moments, residual = moments_after(stepper, denoiser, moments, memory, t, s)
        np.testing.assert_allclose(residual, 0.0, atol=1e-10)
    mean, covariance, slope = (np.asarray(moment) for moment in moments)
    return mean[:2], np.diag(covariance)[:2], np.diag(slope[:2])


LAWS = {
    "Ancestral": (Ancestral, "reverse", 1),
    "Ancestral eta 0.5": (partial(Ancestral, eta=0.5), "marginals", 1),
    "EulerMaruyama": (EulerMaruyama, "reverse", 1),
    "ExponentialEuler eta 0.5": (partial(ExponentialEuler, eta=0.5), "marginals", 1),
    "DPMSolverPP eta 1": (partial(DPMSolverPP, eta=1.0), "reverse", 2),
    "DPMSolverPP eta 0.5": (partial(DPMSolverPP, eta=0.5), "marginals", 2),
    "StochasticHeun": (StochasticHeun, "marginals", 2),
}


@pytest.mark.parametrize("make, law, stated", LAWS.values(), ids=LAWS)
def test_law_and_order_of_the_stochastic_solvers(make, law, stated, x64):
    """On a Gaussian the errors of the law that a solver states are of the order that it states, within 0.15.

    All keep the marginals: the noisy law walked down has the right mean, and a variance off by that order. The law of
    x given a point at level 2, Bayes' slope and variance, is that of "reverse" alone: what only keeps the marginals
    has another, or reaches it by a lower order, as `StochasticHeun` does.
    """
    schedule, high = VE(LOWEST, 2.0), 2.0
    slope = (VARIANCES + LOWEST**2) / (VARIANCES + high**2)
    variance = slope * (high**2 - LOWEST**2)
    marginal, given = [], []
    for n in NUM_TIMES:
        mean, got, _ = propagate(make(n), gaussian(), MEAN, VARIANCES + HIGHEST**2)
        np.testing.assert_allclose(mean, MEAN, rtol=1e-8)
        marginal.append(np.abs(got / (VARIANCES + LOWEST**2) - 1).max())
        _, got, total = propagate(make(n), gaussian(schedule), np.zeros(2), np.zeros(2))
        given.append(max(np.abs(got / variance - 1).max(), np.abs(total / slope - 1).max()))
    steps = np.array(NUM_TIMES) - 1
    assert (make(33).law, make(33).order) == (law, stated)
    assert abs(order(steps, marginal) - stated) < 0.15, marginal
    assert marginal[-1] < (2e-3 if stated == 2 else 0.1)
    if law == "reverse":
        assert abs(order(steps, given) - stated) < 0.15 and given[-1] < (1e-3 if stated == 2 else 0.05), given
    else:
        assert order(steps, given) < stated - 0.5, given


@pytest.mark.parametrize("schedule", [VP(), Rectified()], ids=["VP", "Rectified"])
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


@pytest.mark.parametrize("name", ["Heun", "StochasticHeun"])
def test_start_continues_a_walk(name, x64):
    """Walking k times by hand and the rest from start=k is the whole walk, with static and with traced start."""
    solver, denoiser, key, k = SOLVERS[name], gaussian(), jax.random.key(3), 4
    key = key if solver.stochastic else None
    x_t = x = jnp.array([15.0, -4.0])
    times = solver.times(denoiser)

    @jax.jit
    def step(x_t, t, s, key):
        return solver.step(denoiser, x_t, (), t, s, key)[0]

    for i in range(k):
        x_t = step(x_t, times[i], times[i + 1], None if key is None else jax.random.fold_in(key, i))

    whole = jax.jit(partial(solve, solver, denoiser))(x, key)
    walk_from = partial(solve, solver, denoiser)
    np.testing.assert_allclose(jax.jit(lambda x: walk_from(x, key, k))(x_t), whole, rtol=1e-9)
    traced = jax.jit(walk_from)
    np.testing.assert_allclose(traced(x_t, key, jnp.asarray(k)), whole, rtol=1e-9)
    np.testing.assert_allclose(traced(x, key, jnp.asarray(0)), whole, rtol=1e-9)
    last = denoiser(x_t, times[-1]).x0  # from the last time there is only the posterior mean to take
    np.testing.assert_allclose(traced(x_t, key, jnp.asarray(solver.num_times - 1)), last, rtol=1e-9)


@each_solver
def test_evaluations_are_counted_right(solver):
    calls = []

    class Counting(Gaussian):
        def __call__(self, x_t, t):
            calls.append(t)
            return super().__call__(x_t, t)

    denoiser = Counting(MEAN, VARIANCES, LADDER)
    memory = solver.init(denoiser, jnp.zeros(2))
    jax.eval_shape(lambda x, key: solver.step(denoiser, x, memory, 0.5, 0.4, key), jnp.zeros(2), jax.random.key(0))
    assert len(calls) == solver.evaluations_per_step
    assert solver.evaluations() == (solver.num_times - 1) * solver.evaluations_per_step + 1
    assert solver.evaluations(solver.num_times - 1) == 1
    assert solver.times(denoiser).shape == (solver.num_times,)


def test_noise_along_the_way():
    """The same key gives the same walk and another key another; a solver says whether it needs one."""
    x = np.zeros((6, 2))
    for solver in (SOLVERS["Ancestral"], SOLVERS["StochasticHeun"]):
        first, again, other = (run(solver, gaussian(), x, jax.random.key(i)) for i in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (first != other).all()
    deterministic = [name for name, solver in SOLVERS.items() if not solver.stochastic]
    assert deterministic == ["Ancestral eta 0", "Heun", "Adams", "Heun log-SNR"]


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
    "one step": (lambda: Heun(1), ValueError, "num_times must be at least 2; got 1"),
    "no steps": (lambda: StochasticHeun(0), ValueError, "num_times must be at least 2; got 0"),
    "half a step": (lambda: Ancestral(2.5), TypeError, "num_times must be a whole number; got 2.5"),
    "a truth": (lambda: Ancestral(True), TypeError, "num_times must be a whole number; got True"),
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
