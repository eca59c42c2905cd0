r"""A population of Hamiltonian chains at one temperature: one metric and one step size for all of them.

Each walker $q_i$ moves by leapfrog on $\log \pi_\beta$ in the coordinates of `noise.vector` and is accepted or
rejected by itself, so that $\pi_\beta$ stays invariant for each. What walkers share is how: a `metric`, which an island
has from where all the others are, and one step size $\epsilon$, which follows the mean acceptance $a$,

$$\log \epsilon \leftarrow \log \epsilon + \kappa\,(a - a^*),$$

and a walker's own step depends on where it is: with the gradient $g$ in the metric's coordinates,

$$\epsilon(q) = \epsilon\, \Bigl(1 + \frac{|g|^2}{c D}\Bigr)^{-1/2} e^{\xi}, \qquad \xi \sim t_4 / 2.$$

With $c = 10$, steps are alike but for $\xi$ where the target is as narrow as the metric says, $|g|^2 \approx D$; in a
part that is much narrower, such as the neck of a funnel, they shrink in proportion to its width. A common step could
not enter it at all, and every walker would miss it alike. The end $q'$ of a trajectory would have drawn the same step
with another density, and the ratio of the two, $f(\xi') / f(\xi)$, belongs into the Metropolis test: the step is a
variable that is drawn anew for every move. One walker has an influence of order $1/N$ on the step. On a metric of $D$
dimensions it would be $D / N$, and variances would end some ten per cent off, but no walker has a part in its own. For
the draws at the end nothing follows the walkers any more, and they are independent chains.

Moves at a temperature end when the walkers have forgotten where they started, in the *worst* coordinate: a mean over
coordinates hides the slowest, which is often a scale.

References:
    Bou-Rabee, Carpenter, Marsden, GIST: Gibbs self-tuning for locally adaptive Hamiltonian Monte Carlo, 2024,
    https://arxiv.org/abs/2404.15253.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.infer.kernel.choose import metropolis
from numpyro_diffusion.infer.kernel.metric import Metric, estimate
from numpyro_diffusion.infer.noise.vector import NoiseVector
from numpyro_diffusion.infer.particles.mutate import correlations

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

    metric: Metric  # of each island, a leading axis
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
    accept_prob: jax.Array  # of each walker, mean over moves, (N,)
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
    metric: Metric,
    step_size: jax.Array,
    num_steps: int,
) -> tuple[Walker, Move]:
    """One move of one walker: where it is then, and what happened."""
    key_momentum, key_step, key_accept = jax.random.split(key, 3)
    momentum = jax.random.normal(key_momentum, walker.q.shape, walker.q.dtype)
    xi = _SPREAD * jax.random.t(key_step, _FREEDOM, (), walker.q.dtype)
    log_step = _log_local(walker, metric) + xi
    step_size *= jnp.exp(log_step)

    def leapfrog(carry: tuple[Walker, jax.Array], _: None) -> tuple[tuple[Walker, jax.Array], None]:
        at, p = carry
        p = p + 0.5 * step_size * metric.pull(at.gradient)
        at = walker_at(coordinates, at.q + step_size * metric.push(p), temperature)
        return (at, p + 0.5 * step_size * metric.pull(at.gradient)), None

    (there, momentum_there), _ = jax.lax.scan(leapfrog, (walker, momentum), None, num_steps)
    log_ratio = there.log_density - walker.log_density
    log_ratio += 0.5 * (jnp.sum(momentum**2) - jnp.sum(momentum_there**2))
    of_step = _log_spread(log_step - _log_local(there, metric)) - _log_spread(xi)
    choice = metropolis(key_accept, log_ratio + of_step, there, walker, there.log_density, there.gradient)
    return choice.point, Move(choice.accept_prob, choice.diverging | (log_ratio < -_LARGE_ERROR))


def _log_local(walker: Walker, metric: Metric) -> jax.Array:
    """Logarithm of the step where a walker is, in units of the common one."""
    steepness = jnp.mean(metric.pull(walker.gradient) ** 2) / _STEEP
    return -0.5 * jnp.log1p(jnp.where(jnp.isfinite(steepness), steepness, 0.0))


def _log_spread(xi: jax.Array) -> jax.Array:
    """Log-density of a step about the local one, up to a constant."""
    return -0.5 * (_FREEDOM + 1.0) * jnp.log1p((xi / _SPREAD) ** 2 / _FREEDOM)


def make_moves(
    key: jax.Array,
    coordinates: NoiseVector,
    walkers: Walker,
    origin: jax.Array,
    temperature: jax.Array,
    tuning: Tuning,
    adapting: jax.Array,
    num_moves: jax.Array,
    *,
    num_steps: int,
) -> tuple[Walker, Tuning, Moves]:
    """Moves all walkers, adapting or not.

    Args:
        key: random key.
        coordinates: of the model.
        walkers: at the temperature, a leading axis of N.
        origin: points of the same walkers at an earlier time, (N, D).
        temperature: inverse, in (0, 1].
        tuning: how they move.
        adapting: whether to estimate the metric anew, once, and to let the step size follow the acceptance.
        num_moves: how many.
        num_steps: leapfrog steps of a move.

    Returns:
        The walkers, how they move at the end, and what happened since, with the correlation with the origin.
    """
    metric = jax.lax.cond(adapting, lambda: metric_of(walkers, len(tuning.metric.scale)), lambda: tuning.metric)

    def one(i: jax.Array, carry: tuple) -> tuple:
        walkers, tuning, accepted, diverging = carry
        walkers, moves = _all(jax.random.fold_in(key, i), coordinates, walkers, temperature, tuning, num_steps)
        gain = jnp.where(adapting, _GAIN, 0.0) * (jnp.mean(moves.accept_prob) - _TARGET_ACCEPTANCE)
        tuning = tuning._replace(step_size=tuning.step_size * jnp.exp(gain))
        return walkers, tuning, accepted + moves.accept_prob, diverging + moves.diverging

    none = jnp.zeros(len(walkers.q)), jnp.zeros(len(walkers.q), jnp.int32)
    first = walkers, tuning._replace(metric=metric), *none
    walkers, tuning, accepted, diverging = jax.lax.fori_loop(0, num_moves, one, first)
    left = jnp.abs(correlations(origin, walkers.q))
    return walkers, tuning, Moves(num_moves, left.max(), left.argmax(), accepted / num_moves, diverging.sum())


def joined(before: Moves | None, after: Moves) -> Moves:
    """What happened in both, with the correlation at the end."""
    if before is None:
        return after
    number = before.num_moves + after.num_moves
    accepted = (before.num_moves * before.accept_prob + after.num_moves * after.accept_prob) / number
    diverging = before.num_diverging + after.num_diverging
    return after._replace(num_moves=number, accept_prob=accepted, num_diverging=diverging)


def metric_of(walkers: Walker, num_islands: int) -> Metric:
    """The metric of each island, which is that of where the walkers of the others are, not its own."""
    others = np.array([[j for j in range(num_islands) if j != i] for i in range(num_islands)])
    q, gradient = (_by_island(leaf, num_islands)[others] for leaf in (walkers.q, walkers.gradient))
    size = q.shape[-1]
    return jax.vmap(estimate)(q.reshape(num_islands, -1, size), gradient.reshape(num_islands, -1, size))


def _by_island(walkers: Any, num_islands: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(num_islands, -1, *leaf.shape[1:]), walkers)


def _all(
    key: jax.Array, coordinates: NoiseVector, walkers: Walker, temperature: jax.Array, tuning: Tuning, steps: int
) -> tuple[Walker, Move]:
    """One move of every walker: where they are, and what happened to each."""

    def one(key: jax.Array, walker: Walker, metric: Metric) -> tuple[Walker, Move]:
        return trajectory(key, coordinates, walker, temperature, metric, tuning.step_size, steps)

    keys, number = jax.random.split(key, len(walkers.q)), len(walkers.q)
    moved = jax.vmap(jax.vmap(one, (0, 0, None)))(*_by_island((keys, walkers), len(tuning.metric.scale)), tuning.metric)
    return jax.tree.map(lambda leaf: leaf.reshape(number, *leaf.shape[2:]), moved)
