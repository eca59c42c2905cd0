r"""A population of Hamiltonian chains at one temperature: one metric and one step size for all of them.

Each walker $q_i$ moves by leapfrog on $\log \pi_\beta$ in the coordinates of `noise.vector` and is accepted or
rejected by itself, so that $\pi_\beta$ stays invariant for each. What all walkers share is how: the `metric`, estimated
from where they are, and the step size $\epsilon$, which follows their mean acceptance $a$,

$$\log \epsilon \leftarrow \log \epsilon + \kappa\,(a - a^*),$$

and a walker's own step depends on where it is: with the gradient $g$ in the metric's coordinates,

$$\epsilon(q) = \epsilon\, \Bigl(1 + \frac{|g|^2}{c D}\Bigr)^{-1/2} e^{\xi}, \qquad \xi \sim t_4 / 2.$$

With $c = 10$, steps are alike but for $\xi$ where the target is as narrow as the metric says, $|g|^2 \approx D$; in a
part that is much narrower, such as the neck of a funnel, they shrink in proportion to its width. A common step could
not enter it at all, and every walker would miss it alike. The end $q'$ of a trajectory would have drawn the same step
with another density, and the ratio of the two, $f(\xi') / f(\xi)$, belongs into the Metropolis test: the step is a
variable that is drawn anew for every move. One walker has an influence of order $1/N$ on metric and step. For the draws
at the end nothing follows the walkers any more, and they are independent chains.

Moves at a temperature end when the walkers have forgotten where they started, in the *worst* coordinate: a mean over
coordinates hides the slowest, which is often a scale.

References:
    Bou-Rabee, Carpenter, Marsden, GIST: Gibbs self-tuning for locally adaptive Hamiltonian Monte Carlo, 2024,
    https://arxiv.org/abs/2404.15253.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion.infer.kernel.choose import metropolis
from numpyro_diffusion.infer.kernel.metric import Metric, estimate
from numpyro_diffusion.infer.noise.vector import NoiseVector
from numpyro_diffusion.infer.particles.mutate import correlations, least_correlation

_TARGET_ACCEPTANCE = 0.8
_GAIN = 0.5
_STEEP = 10.0
"""Mean square of a gradient, in the metric's coordinates, above which steps shrink."""
_SPREAD, _FREEDOM = 0.5, 4.0
"""Scale of the logarithm of a walker's step about the local one, and degrees of freedom."""
_LARGE_ERROR = 1000.0
"""Error of the energy above which a move counts as diverging, as in Stan."""


class Walker(NamedTuple):
    """One chain at a temperature; or many, with a leading axis."""

    q: jax.Array  # (D,)
    log_density: jax.Array  # of the tempered target
    gradient: jax.Array  # of the same, (D,)
    log_likelihood: jax.Array


class Tuning(NamedTuple):
    """How all walkers move."""

    metric: Metric
    step_size: jax.Array


class Move(NamedTuple):
    """What happened in one move."""

    accept_prob: jax.Array
    diverging: jax.Array  # whether it ended where the density is not finite, or with a large error of the energy


class Moves(NamedTuple):
    """What happened in some moves of all walkers."""

    num_moves: jax.Array
    correlation: jax.Array  # left between walkers and their starts in the worst coordinate
    worst: jax.Array  # index of that coordinate
    accept_prob: jax.Array  # mean over moves, and over walkers or of each, (N,)
    num_diverging: jax.Array  # of all, see `Move`


def walker_at(coordinates: NoiseVector, q: jax.Array, temperature: jax.Array) -> Walker:
    """A chain at a point, (D,)."""

    def tempered(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = coordinates.log_density(q)
        return (parts.prior + temperature * parts.likelihood).astype(q.dtype), parts.likelihood

    (log_density, log_likelihood), gradient = jax.value_and_grad(tempered, has_aux=True)(q)
    return Walker(q, log_density, gradient, log_likelihood)


def trajectory(
    key: jax.Array,
    coordinates: NoiseVector,
    walker: Walker,
    temperature: jax.Array,
    tuning: Tuning,
    num_steps: int,
) -> tuple[Walker, Move]:
    """One move of one walker: where it is then, and what happened."""
    key_momentum, key_step, key_accept = jax.random.split(key, 3)
    momentum = jax.random.normal(key_momentum, walker.q.shape, walker.q.dtype)
    xi = _SPREAD * jax.random.t(key_step, _FREEDOM, (), walker.q.dtype)
    log_step = _log_local(walker, tuning.metric) + xi
    step_size = tuning.step_size * jnp.exp(log_step)

    def leapfrog(carry: tuple[Walker, jax.Array], _: None) -> tuple[tuple[Walker, jax.Array], None]:
        at, p = carry
        p = p + 0.5 * step_size * tuning.metric.pull(at.gradient)
        at = walker_at(coordinates, at.q + step_size * tuning.metric.push(p), temperature)
        return (at, p + 0.5 * step_size * tuning.metric.pull(at.gradient)), None

    (there, momentum_there), _ = jax.lax.scan(leapfrog, (walker, momentum), None, num_steps)
    log_ratio = there.log_density - walker.log_density
    log_ratio += 0.5 * (jnp.sum(momentum**2) - jnp.sum(momentum_there**2))
    of_step = _log_spread(log_step - _log_local(there, tuning.metric)) - _log_spread(xi)
    choice = metropolis(key_accept, log_ratio + of_step, there, walker, there.log_density, there.gradient)
    return choice.point, Move(choice.accept_prob, choice.diverging | (log_ratio < -_LARGE_ERROR))


def _log_local(walker: Walker, metric: Metric) -> jax.Array:
    """Logarithm of the step where a walker is, in units of the common one."""
    steepness = jnp.mean(metric.pull(walker.gradient) ** 2) / _STEEP
    return -0.5 * jnp.log1p(jnp.where(jnp.isfinite(steepness), steepness, 0.0))


def _log_spread(xi: jax.Array) -> jax.Array:
    """Log-density of a step about the local one, up to a constant."""
    return -0.5 * (_FREEDOM + 1.0) * jnp.log1p((xi / _SPREAD) ** 2 / _FREEDOM)


def move_until_forgotten(
    key: jax.Array,
    coordinates: NoiseVector,
    walkers: Walker,
    temperature: jax.Array,
    tuning: Tuning,
    *,
    num_steps: int,
    correlation: float,
    max_moves: int,
    factor: jax.Array,
) -> tuple[Walker, Tuning, Moves]:
    """Moves all walkers, adapting, until they have forgotten where they started.

    Args:
        key: random key.
        coordinates: of the model.
        walkers: at the temperature, a leading axis of N.
        temperature: inverse, in (0, 1].
        tuning: how they move to begin with; the metric is estimated anew.
        num_steps: leapfrog steps of a move.
        correlation: largest correlation with their starts that walkers may have at the end, in any coordinate.
        max_moves: largest number of moves, times `factor`.
        factor: how many times as many moves to make as it takes to forget.

    Returns:
        The walkers, how they move at the end, and what happened.
    """
    enough = jnp.maximum(correlation, least_correlation(walkers.q))

    def one(carry: tuple, key: jax.Array) -> tuple:
        walkers, tuning = carry
        walkers, moves = _all(key, coordinates, walkers, temperature, tuning, num_steps)
        accept_prob = jnp.mean(moves.accept_prob)
        step_size = tuning.step_size * jnp.exp(_GAIN * (accept_prob - _TARGET_ACCEPTANCE))
        return (walkers, tuning._replace(step_size=step_size)), (accept_prob, moves.diverging.sum())

    def going(carry: tuple) -> jax.Array:
        _, _, _, moves, needed = carry
        return moves.num_moves < jnp.minimum(needed, max_moves) * factor

    def some(carry: tuple) -> tuple:
        key, now, tuning, moves, needed = carry
        key, key_moves = jax.random.split(key)
        tuning = tuning._replace(metric=estimate(now.q, now.gradient))
        keys = jax.random.split(key_moves, _AT_ONCE)
        (now, tuning), (accept_prob, diverging) = jax.lax.scan(one, (now, tuning), keys)
        left = jnp.abs(correlations(walkers.q, now.q))
        moves = Moves(
            num_moves=moves.num_moves + _AT_ONCE,
            correlation=left.max(),
            worst=left.argmax(),
            accept_prob=moves.accept_prob + accept_prob.sum(),  # the sum, until the end
            num_diverging=moves.num_diverging + diverging.sum(),
        )
        forgotten = (left.max() <= enough) & (needed > max_moves)
        return key, now, tuning, moves, jnp.where(forgotten, moves.num_moves, needed)

    count = jnp.zeros((), jnp.int32)
    none = Moves(count, jnp.ones(()), jnp.zeros((), int), jnp.zeros(()), count)
    tuning = tuning._replace(metric=estimate(walkers.q, walkers.gradient))
    needed = jnp.asarray(max_moves + 1, jnp.int32)
    _, walkers, tuning, moves, _ = jax.lax.while_loop(going, some, (key, walkers, tuning, none, needed))
    return walkers, tuning, moves._replace(accept_prob=moves.accept_prob / moves.num_moves)


def draws_of(
    key: jax.Array,
    coordinates: NoiseVector,
    walkers: Walker,
    tuning: Tuning,
    *,
    num_steps: int,
    num_draws: int,
    between: jax.Array,
) -> tuple[jax.Array, Moves]:
    """Goes on with every walker as a chain at temperature 1, with nothing adapting.

    Args:
        key: random key.
        coordinates: of the model.
        walkers: at temperature 1, a leading axis of N.
        tuning: how they move.
        num_steps: leapfrog steps of a move.
        num_draws: draws to keep of each.
        between: moves from one to the next.

    Returns:
        The draws, (N, num_draws, D), and what happened.
    """

    def draw(carry: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        def once(i: jax.Array, carry: tuple) -> tuple:
            walkers, accepted, diverging = carry
            key_now = jax.random.fold_in(key, i)
            walkers, moves = _all(key_now, coordinates, walkers, jnp.ones(()), tuning, num_steps)
            return walkers, accepted + moves.accept_prob, diverging + moves.diverging

        carry = jax.lax.fori_loop(0, between, once, carry)
        return carry, carry[0].q

    start, zero = walkers.q, jnp.zeros(len(walkers.q))
    first = walkers, zero, jnp.zeros_like(zero, jnp.int32)
    (walkers, accepted, diverging), q = jax.lax.scan(draw, first, jax.random.split(key, num_draws))
    left = jnp.abs(correlations(start, walkers.q))
    accept_prob = accepted / (num_draws * between)
    moves = Moves(num_draws * between, left.max(), left.argmax(), accept_prob, diverging.sum())
    return jnp.moveaxis(q, 0, 1), moves


def _all(
    key: jax.Array, coordinates: NoiseVector, walkers: Walker, temperature: jax.Array, tuning: Tuning, steps: int
) -> tuple[Walker, Move]:
    """One move of every walker: where they are, and what happened to each."""

    def one(key: jax.Array, walker: Walker) -> tuple[Walker, Move]:
        return trajectory(key, coordinates, walker, temperature, tuning, steps)

    return jax.vmap(one)(jax.random.split(key, len(walkers.q)), walkers)


_AT_ONCE = 4
"""Moves between two estimates of the metric."""
