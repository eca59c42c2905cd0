"""Laws of the noise level: density and draws agree, the weighted loss keeps its value, and the adaptive one learns."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.train import Objective, weighting
from numpyro_diffusion.train.levels import (
    Adaptive,
    AdaptiveState,
    LogitNormal,
    LogNormal,
    LowDiscrepancy,
    Uniform,
    check_noise_law,
    log_snr_range,
    suited_to,
)

SCHEDULE, COUNT = noise.VP(), 20_000
LOW, HIGH = (float(end) for end in log_snr_range(SCHEDULE))
EDM = weighting.EDM()


def bumpy(log_snr):
    """An integrand of varied size, positive."""
    return EDM(log_snr) * jax.nn.sigmoid(log_snr) * (0.2 + jnp.sin(log_snr) ** 2)


def taught(law, steps=200):
    """The state of a law after batches of the bumpy integrand, and the levels of the last one."""
    state = law.start(SCHEDULE, EDM)

    def step(state, key):
        log_snr = law.sample(key, 256, SCHEDULE, state)
        return law.update(state, log_snr, bumpy(log_snr), SCHEDULE), None

    return jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(3), steps))[0])(state)


WEIGHTED = jax.jit(lambda log_snr, log_density: bumpy(log_snr) * jnp.exp(-log_density))
GRID = np.linspace(LOW, HIGH, 4001)
INTEGRAL = np.trapezoid(np.asarray(jax.jit(bumpy)(GRID), np.float64), GRID)

LAWS = {
    "LogNormal": (LogNormal(), ()),
    "LogitNormal": (LogitNormal(), ()),
    "Uniform": (Uniform(), ()),
    "LowDiscrepancy": (LowDiscrepancy(), ()),
    "Adaptive": (Adaptive(follows="loss", floor=0.05), taught(Adaptive(follows="loss", floor=0.05))),
    "even LogNormal": (LowDiscrepancy(LogNormal()), ()),
}
each_law = pytest.mark.parametrize("name", LAWS)


@functools.partial(jax.jit, static_argnums=(0, 2))
def draw(law, key, num, schedule, state=()):
    """Levels and the log-density there."""
    log_snr = law.sample(key, num, schedule, state)
    return log_snr, law.log_density(log_snr, schedule, state)


QUANTILE = jax.jit(lambda law, u, schedule, state: law.quantile(u, schedule, state), static_argnums=0)


# a schedule that leaves out 2 % of the default law at its noisy end and 5 % at its clean end, and half of others
NARROW = noise.VE(0.05, 20.0)
PLACED = {name: (law, SCHEDULE, state) for name, (law, state) in LAWS.items()} | {
    "narrow LogNormal": (LogNormal(), NARROW, ()),
    "narrow LogitNormal": (LogitNormal(-2.5, 1.0), NARROW, ()),
    "narrow Uniform": (Uniform(), NARROW, ()),
    "narrow even LogNormal": (LowDiscrepancy(LogNormal(0.0, 3.0)), NARROW, ()),
    "lower tail": (LogNormal(9.0, 1.5), NARROW, ()),
    "upper tail": (LogNormal(-9.0, 1.5), NARROW, ()),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def shares(law, schedule, state):
    """The share of a law below each of 25 quantiles by its density, in the order of the log-SNR, and its range."""
    low, high = log_snr_range(schedule)
    u = jnp.linspace(0.0, 1.0, 25)
    ends = jnp.sort(law.quantile(u, schedule, state))
    grid = ends[:-1, None] + jnp.diff(ends)[:, None] * jnp.linspace(0.0, 1.0, 2001)
    masses = jnp.trapezoid(jnp.exp(law.log_density(grid, schedule, state)), grid)
    return jnp.cumsum(masses), u[1:], ends[jnp.array([0, -1])], jnp.stack([low, high])


@pytest.mark.parametrize("name", PLACED)
def test_density_is_that_of_the_quantiles_and_normalised_over_the_range(name):
    found, expected, ends, whole = (np.asarray(values, np.float64) for values in shares(*PLACED[name]))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # the grid at the edges of bins, and float32
    np.testing.assert_allclose(ends, whole, atol=2e-3)


@each_law
def test_draws_stay_in_the_range_and_have_their_quantiles(name):
    law, state = LAWS[name]
    draws = np.asarray(draw(law, jax.random.key(0), COUNT, SCHEDULE, state)[0])
    assert draws.shape == (COUNT,) and draws.min() >= LOW and draws.max() <= HIGH
    shares_below = (0.1, 0.5, 0.8)
    for u, below in zip(shares_below, QUANTILE(law, jnp.array(shares_below), SCHEDULE, state), strict=True):
        share = (draws < below).mean()
        share = min(share, 1.0 - share, key=lambda value: abs(value - u))  # some quantiles run from noise to clean
        assert abs(share - u) < 4.0 * math.sqrt(u * (1.0 - u) / COUNT) + 1e-6


@each_law
def test_importance_weights_keep_the_value_of_the_integral(name):
    law, state = LAWS[name]
    values = np.asarray(WEIGHTED(*draw(law, jax.random.key(1), COUNT, SCHEDULE, state)))
    assert abs(values.mean() - INTEGRAL) < 4.0 * values.std() / math.sqrt(COUNT)


def test_log_normal_levels_in_units_of_the_data():
    schedule, scale = noise.Scaled(noise.VP(), 3.0), 3.0
    standardised = noise.Scaled(schedule, 1.0 / scale)
    log_snr, _ = draw(LogNormal(-0.7, 0.9), jax.random.key(0), COUNT, standardised)
    log_level = np.log(np.asarray(schedule.noise_level(standardised.inverse_log_snr(log_snr))) / scale)
    assert abs(log_level.mean() + 0.7) < 4.0 * 0.9 / math.sqrt(COUNT)
    assert abs(log_level.std() - 0.9) < 4.0 * 0.9 / math.sqrt(2 * COUNT)


def test_log_normal_levels_are_the_normal_ones_in_the_range():
    """Kolmogorov-Smirnov against draws from the whole normal law of which those outside the range are left out."""
    z = -0.5 + 1.5 * np.random.default_rng(0).normal(size=2 * COUNT)
    kept = np.sort(z[(z > math.log(NARROW.sigma_min)) & (z < math.log(NARROW.sigma_max))])
    draws = np.sort(-0.5 * np.asarray(draw(LogNormal(), jax.random.key(0), COUNT, NARROW)[0], np.float64))
    points = np.concatenate([kept, draws])
    below = [np.searchsorted(values, points, side="right") / len(values) for values in (kept, draws)]
    assert np.abs(below[0] - below[1]).max() < 1.95 * math.sqrt(1 / COUNT + 1 / len(kept))  # one in a thousand


@pytest.mark.parametrize(
    ("weight", "law"),
    [
        (weighting.EDM(), LogNormal()),
        (weighting.EDM(-1.2 - math.log(0.5), 1.2), LogNormal(-1.2 - math.log(0.5), 1.2)),
        (weighting.LogitNormal(0.3, 0.8), LogitNormal(0.3, 0.8)),
        (weighting.Sigmoid(), LogNormal()),
    ],
)
def test_a_weighting_without_levels_gets_those_that_belong_to_it(weight, law):
    assert Objective(weighting=weight).noise_levels == law
    assert Objective(weighting=weight, noise_levels=Uniform()).noise_levels == Uniform()


def test_edm_examples_count_alike_at_its_own_levels():
    """The weight over the density is 1 + 1 / SNR times the mass in the range, for any numbers."""
    weight, log_snr = weighting.EDM(-1.0, 0.7), jnp.linspace(LOW, HIGH, 50)
    ratio = weight.log_weight(log_snr) - suited_to(weight).log_density(log_snr, SCHEDULE)
    np.testing.assert_allclose(ratio - jax.nn.softplus(-log_snr), 0.0, atol=1e-4)


def test_logit_normal_levels_are_logit_normal_times_of_the_straight_path():
    draws, _ = draw(LogitNormal(0.4, 0.7), jax.random.key(0), COUNT, noise.Rectified())
    t = np.asarray(noise.Rectified().inverse_log_snr(draws))
    logit = np.log(t / (1.0 - t))
    assert abs(logit.mean() - 0.4) < 4.0 * 0.7 / math.sqrt(COUNT)
    assert abs(logit.std() - 0.7) < 4.0 * 0.7 / math.sqrt(2 * COUNT)


def test_uniform_times_are_uniform():
    t = np.asarray(SCHEDULE.inverse_log_snr(draw(Uniform(), jax.random.key(0), COUNT, SCHEDULE)[0]))
    assert abs(t.mean() - 0.5) < 4.0 / math.sqrt(12 * COUNT)
    assert abs((t**2).mean() - 1 / 3) < 4.0 * math.sqrt(4 / 45 / COUNT)


def test_low_discrepancy_leaves_no_gap_and_has_less_variance():
    draws = LowDiscrepancy().sample(jax.random.key(0), 64, SCHEDULE)
    t = np.sort(np.asarray(SCHEDULE.inverse_log_snr(draws)))
    np.testing.assert_allclose(np.diff(t), (SCHEDULE.t_max - SCHEDULE.t_min) / 64, rtol=0.02)

    def spread(law):
        mean = jax.vmap(lambda key: jnp.mean(WEIGHTED(*draw(law, key, 64, SCHEDULE))))
        return float(jax.jit(lambda keys: jnp.std(mean(keys)))(jax.random.split(jax.random.key(1), 500)))

    assert spread(LowDiscrepancy(LogNormal())) < 0.3 * spread(LogNormal())


def test_adaptive_starts_as_the_best_law_for_a_gaussian():
    # under the EDM weighting that is the log-normal
    law = Adaptive(num_bins=256)
    edges = law.edges(SCHEDULE)
    centres = 0.5 * (edges[1:] + edges[:-1])
    state = law.start(SCHEDULE, EDM)
    density = jax.jit(lambda law, x, state: law.log_density(x, SCHEDULE, state), static_argnums=0)
    np.testing.assert_allclose(density(law, centres, state), density(LogNormal(), centres, ()), atol=2e-3)


def test_adaptive_learns_the_best_law():
    # a constant ratio in each of four bins, so that the optimum is a histogram
    law, truth = Adaptive(num_bins=4, decay=0.99, floor=0.1), jnp.array([1.0, 0.3, 2.0, 0.1])
    start = AdaptiveState(*jnp.zeros((3, 4)))

    def step(state, key):
        log_snr = law.sample(key, 4096, SCHEDULE, state)
        k = jnp.clip(((log_snr - LOW) / (HIGH - LOW) * 4).astype(int), 0, 3)
        return law.update(state, log_snr, truth[k], SCHEDULE), None

    state = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[0])(
        start, jax.random.split(jax.random.key(0), 200)
    )
    np.testing.assert_allclose(state.moments, truth**2, rtol=1e-3)
    np.testing.assert_allclose(law.masses(state), 0.9 * truth / truth.sum() + 0.1 / 4, rtol=1e-3)


class Tiny(nnx.Module):
    """Two trained numbers, whose gradients are large at different levels."""

    def __init__(self):
        self.event_shape = (2,)
        self.gain, self.shift = nnx.Param(jnp.float32(0.5)), nnx.Param(jnp.float32(0.3))

    def __call__(self, x, c_noise, cond=None):
        return self.gain[...] * jnp.tanh(3.0 * x) + self.shift[...] * c_noise**2


def test_gradient_seen_along_random_directions_has_its_size_in_units_of_each_array():
    denoiser = NetworkDenoiser(Tiny(), schedule=SCHEDULE).unfreeze()
    law = Adaptive(num_bins=6, decay=0.999)
    objective = Objective(noise_levels=law)
    x = jax.random.normal(jax.random.key(0), (256, 2))
    units = jax.tree.unflatten(jax.tree.structure(denoiser.params), [jnp.float32(2.0), jnp.float32(-0.4)])

    @jax.jit
    def seen_and_exact(state):
        def look(state, key):
            return objective.follow_gradient(denoiser, key, x, None, state, units), None

        state = jax.lax.scan(look, state, jax.random.split(jax.random.key(1), 400))[0]

        def size(log_snr, key, x):
            t = SCHEDULE.inverse_log_snr(log_snr)
            slopes = jax.grad(lambda params: objective.loss(denoiser.with_params(params), key, x, t))(denoiser.params)
            in_units = jax.tree.leaves(jax.tree.map(jnp.divide, slopes, units))
            return EDM(log_snr) ** 2 * sum(jnp.sum(slope**2) for slope in in_units)

        edges = law.edges(SCHEDULE)
        log_snr = edges[:-1, None] + (edges[1:] - edges[:-1])[:, None] * jnp.linspace(0.0, 1.0, 256)
        keys = jax.random.split(jax.random.key(2), (6, 256))
        exact = jax.vmap(jax.vmap(size), (0, 0, None))(log_snr, keys, x).mean(1) * jnp.exp(-2.0 * state.log_scale)
        return state.moments / state.weights, exact

    seen, exact = (np.asarray(values) for values in seen_and_exact(objective.start(denoiser)))
    assert exact.max() > 3.0 * exact.min()
    # some hundred squares in the average of the rarest bin, with a relative deviation of about two each
    np.testing.assert_allclose(np.sqrt(seen), np.sqrt(exact), rtol=0.15)


def test_adaptive_lowers_the_variance_of_the_loss():
    law, state = LAWS["Adaptive"]

    def spread(state):
        return float(jnp.std(WEIGHTED(*draw(law, jax.random.key(2), COUNT, SCHEDULE, state))))

    assert spread(state) < 0.5 * spread(law.start(SCHEDULE, EDM))


def test_schedule_from_what_was_learned_has_its_quantiles():
    law, state = LAWS["Adaptive"]
    schedule = noise.Tabulated.from_density(law.edges(SCHEDULE), law.masses(state), num_knots=513)
    u = jnp.array([0.1, 0.4, 0.9])
    found = schedule.log_snr(1.0 - u)  # time runs from clean to noise
    np.testing.assert_allclose(found, law.quantile(u, SCHEDULE, state), atol=0.02)


def test_update_touches_the_bins_of_the_batch_alone():
    law = Adaptive(num_bins=8, decay=0.9)
    state = law.start(SCHEDULE, EDM)
    edges = law.edges(SCHEDULE)
    log_snr = jnp.array([edges[2] + 0.1, edges[2] + 0.2, edges[5] + 0.1])
    values = jnp.array([2.0, 2.0, 1.0]) * jnp.exp(state.log_scale[jnp.array([2, 2, 5])])
    moved = jax.jit(lambda *args: law.update(*args, SCHEDULE))(state, log_snr, values)
    expected = np.zeros(8)
    expected[2], expected[5] = (1.0 - 0.9**2) * 4.0, (1.0 - 0.9) * 1.0
    np.testing.assert_allclose(moved.moments, expected, rtol=1e-5)
    np.testing.assert_allclose(moved.weights, expected / np.array([1, 1, 4, 1, 1, 1, 1, 1]), rtol=1e-5)
    # what is unseen is taken to be as the rest: 4 and 1, each by its weight and by its share of the start
    start = jax.nn.softmax(state.log_scale)
    overall = (start[2] * 0.19 * 4.0 + start[5] * 0.1) / (start[2] * 0.19 + start[5] * 0.1)
    sizes = np.sqrt(expected + (1.0 - np.asarray(moved.weights)) * overall)
    learned = start * sizes / (start * sizes).sum()
    np.testing.assert_allclose(law.masses(moved), 0.9 * learned + 0.1 * start, rtol=1e-4)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "std must be positive and finite; got 0.0", lambda: LogNormal(std=0.0)),
        (ValueError, "mean must be finite", lambda: LogNormal(mean=math.nan)),
        (ValueError, "num_bins must be at least 1; got 0", lambda: Adaptive(num_bins=0)),
        (ValueError, r"floor must lie in \[0, 1\]; got 1.5", lambda: Adaptive(floor=1.5)),
        (ValueError, "floor must be positive and finite; got 0.0", lambda: Adaptive(floor=0.0)),
        (ValueError, "follows must be one of 'gradient', 'loss'; got 'score'", lambda: Adaptive(follows="score")),
        (ValueError, "1 must exceed decay=1.0; got 1.0", lambda: Adaptive(decay=1.0)),
        (
            TypeError,
            r"noise_levels must be a train.levels.NoiseLaw such as LogNormal\(\); got 3",
            lambda: check_noise_law(3),
        ),
        (
            TypeError,
            "noise_levels must be a train.levels.NoiseLaw .*; got 'uniform'",
            lambda: LowDiscrepancy("uniform"),
        ),
    ],
)
def test_mistakes_are_named(error, message, make):
    with pytest.raises(error, match=message):
        make()
