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

Where the model has an unknown scale, moves are of all other coordinates, summed over values of it
(`noise.lattice`), and the scale is drawn at their end. What is called $q$ above is without it then.

Moves at a temperature end when the walkers have forgotten where they started, in the *worst* coordinate: a mean over
coordinates hides the slowest, which is often a scale. Where that takes many moves, trajectories become twice as long
(`climb`): many short ones are a random walk, which needs more gradients.

References:
    Bou-Rabee, Carpenter, Marsden, GIST: Gibbs self-tuning for locally adaptive Hamiltonian Monte Carlo, 2024,
    https://arxiv.org/abs/2404.15253.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_diffusion.infer.kernel.choose import metropolis, select, without_improper
from numpyro_diffusion.infer.kernel.metric import Metric, estimate
from numpyro_diffusion.infer.noise.lattice import Lattice, lattice_of
from numpyro_diffusion.infer.noise.vector import LogDensity, NoiseVector
from numpyro_diffusion.infer.particles.mutate import correlations

_TARGET_ACCEPTANCE = 0.7
_GAIN = 0.5
_STEEP = 10.0
"""Mean square of a gradient, in the metric's coordinates, above which steps shrink."""
_SPREAD = 0.5
"""Scale of the logarithm of a walker's step about the local one."""
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
    lattice: Lattice | None = None  # of each island, for the site that moves are summed over


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


class Target:
    """The tempered density of a model.

    Args:
        coordinates: of the model.
        temperature: inverse, in [0, 1].
        summed: name of the site that moves are summed over; None for none.
    """

    def __init__(self, coordinates: NoiseVector, temperature: jax.Array, summed: str | None = None) -> None:
        self._coordinates, self._temperature, self.summed = coordinates, temperature, summed
        self.index = None if summed is None else coordinates.names.index(summed)
        """Of the coordinate of that site."""

    def at(self, q: jax.Array) -> Walker:
        """A walker at a point, (D,)."""

        def tempered(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            parts = self._coordinates.log_density(q)
            return self._tempered(parts).astype(q.dtype), parts.likelihood

        (log_density, log_likelihood), gradient = jax.value_and_grad(tempered, has_aux=True)(q)
        return Walker(q, log_density, gradient, log_likelihood)

    def sum_at(self, q: jax.Array, values: jax.Array) -> tuple[Walker, "Nodes"]:
        """A walker whose density is summed over values of the site, (K,).

        The gradient in the coordinate of the site is zero, and the log-likelihood unknown until `drawn`.
        """

        def summed(q: jax.Array) -> tuple[jax.Array, Nodes]:
            parts = self._coordinates.along(q, self.summed, values)  # type: ignore[arg-type]
            tempered = without_improper(self._tempered(parts))
            return logsumexp(tempered).astype(q.dtype), Nodes(
                tempered.astype(q.dtype), parts.likelihood.astype(q.dtype)
            )

        (log_density, nodes), gradient = jax.value_and_grad(summed, has_aux=True)(q)
        gradient = gradient.at[self.index].set(0.0)
        return Walker(q, log_density, gradient, jnp.full_like(log_density, jnp.nan)), nodes

    def drawn(self, u: jax.Array, walker: Walker, values: jax.Array, nodes: "Nodes") -> Walker:
        """The walker with the site drawn from the values that it was summed over, by a uniform number in [0, 1)."""
        upper = jnp.cumsum(jax.nn.softmax(nodes.log_density))
        below = jnp.minimum(u * upper[-1], jnp.nextafter(upper[-1], 0.0))  # rounding never ends at a value of none
        k = jnp.searchsorted(upper, below, side="right")
        return walker._replace(q=walker.q.at[self.index].set(values[k]), log_likelihood=nodes.log_likelihood[k])

    def _tempered(self, parts: LogDensity) -> jax.Array:
        is_prior = self._temperature == 0.0  # minus infinity times zero is not a number
        return parts.prior + jnp.where(is_prior, 0.0, self._temperature * parts.likelihood)


class Nodes(NamedTuple):
    """What is summed over, at each value of the site, (K,)."""

    log_density: jax.Array  # tempered
    log_likelihood: jax.Array


def trajectory(
    key: jax.Array, target: Target, walker: Walker, tuning: Tuning, num_steps: jax.Array, anew: jax.Array
) -> tuple[Walker, Move]:
    """One move of one walker, with a metric of its own: where it is then, and what happened.

    Where its density is not known yet (`anew`), or is summed over new values, a step of length zero comes first. One
    loop for both: the flow and its gradient are a large program, which is compiled once.
    """
    key_normal, key_uniform, key_accept = jax.random.split(key, 3)  # few calls: each takes long to compile
    normal = jax.random.normal(key_normal, (1 + walker.q.size,), walker.q.dtype)
    shift, which, u, v = jax.random.uniform(key_uniform, (4,), walker.q.dtype)
    momentum, metric, values = normal[1:], tuning.metric, None
    if target.summed is not None:
        momentum = momentum.at[target.index].set(0.0)
        values = tuning.lattice.around(walker.q[target.index], shift)  # type: ignore[union-attr]
        anew = jnp.ones_like(anew)
    xi = _SPREAD * normal[0] * jnp.sqrt(-2.0 / (jnp.log(u) + jnp.log(v)))  # Student's t, four degrees of freedom

    def at(q: jax.Array) -> tuple[Walker, Nodes | None]:
        return (target.at(q), None) if values is None else target.sum_at(q, values)

    def leapfrog(i: jax.Array, carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
        start, here, p = carry
        step_size = tuning.step_size * jnp.exp(_log_local(start[0], metric) + xi)
        half = p + 0.5 * step_size * metric.pull(here[0].gradient)
        there = at(jnp.where(i == 0, here[0].q, here[0].q + step_size * metric.push(half)))
        p = jnp.where(i == 0, p, half + 0.5 * step_size * metric.pull(there[0].gradient))
        return select(i == 0, there, start), there, p

    nodes = None if values is None else Nodes(*jnp.zeros((2, len(values)), walker.q.dtype))
    begin = (walker, nodes), (walker, nodes), momentum
    start, end, momentum_there = jax.lax.fori_loop(1 - anew, num_steps + 1, leapfrog, begin)
    there, log_ratio = end[0], end[0].log_density - start[0].log_density
    log_ratio += 0.5 * (jnp.sum(momentum**2) - jnp.sum(momentum_there**2))
    back = _log_local(start[0], metric) + xi - _log_local(there, metric)
    of_step = _log_spread(back) - _log_spread(xi)
    choice = metropolis(key_accept, log_ratio + of_step, end, start, there.log_density, there.gradient)
    moved, nodes = choice.point
    moved = moved if values is None else target.drawn(which, moved, values, nodes)
    return moved, Move(choice.accept_prob, choice.diverging | (log_ratio < -_LARGE_ERROR))


def _log_local(walker: Walker, metric: Metric) -> jax.Array:
    """Logarithm of the step where a walker is, in units of the common one."""
    steepness = jnp.mean(metric.pull(walker.gradient) ** 2) / _STEEP
    return -0.5 * jnp.log1p(jnp.where(jnp.isfinite(steepness), steepness, 0.0))


def _log_spread(xi: jax.Array) -> jax.Array:
    """Log-density of a step about the local one, up to a constant."""
    return -2.5 * jnp.log1p((xi / _SPREAD) ** 2 / 4.0)


def make_moves(
    keys: jax.Array,
    target: Target,
    walkers: Walker,
    tuning: Tuning,
    num_moves: ArrayLike,
    *,
    num_steps: ArrayLike,
    anew: ArrayLike = 0,
) -> tuple[Walker, Move]:
    """Moves walkers while nothing adapts.

    Args:
        keys: a random key for each walker, (N,).
        target: the model at a temperature.
        walkers: a leading axis of N, some islands one after the other.
        tuning: how they move, on each of these islands.
        num_moves: how many.
        num_steps: leapfrog steps of a move; none leaves walkers where they are.
        anew: 1 if they come from another temperature and their densities are to be computed; otherwise 0.

    Returns:
        The walkers, and for each the sums over its moves of what happened.
    """
    steps = jnp.asarray(num_steps), jnp.asarray(anew)

    def one(i: jax.Array, carry: tuple[Walker, Move]) -> tuple[Walker, Move]:
        walkers, before = carry
        walkers, now = _all(jax.vmap(jax.random.fold_in, (0, None))(keys, i), target, walkers, tuning, steps)
        return walkers, Move(before.accept_prob + now.accept_prob, before.diverging + now.diverging)

    none = Move(jnp.zeros(len(walkers.q)), jnp.zeros(len(walkers.q), jnp.int32))
    return jax.lax.fori_loop(0, num_moves, one, (walkers, none))


def followed(step_size: jax.Array, sums: Move, num_moves: jax.Array) -> jax.Array:
    """The step size after it has followed the acceptance of all walkers in some moves."""
    return step_size * jnp.exp(_GAIN * (jnp.mean(sums.accept_prob) - _TARGET_ACCEPTANCE * num_moves))


def summary(origin: jax.Array, q: jax.Array, sums: Move, num_moves: jax.Array) -> Moves:
    """What happened in some moves of all walkers, which were at `origin`, (N, D), at an earlier time."""
    left = jnp.abs(correlations(origin, q))
    return Moves(num_moves, left.max(), left.argmax(), sums.accept_prob / num_moves, sums.diverging.sum())


def joined(before: Moves | None, after: Moves) -> Moves:
    """What happened in both, with the correlation at the end."""
    if before is None:
        return after
    number = before.num_moves + after.num_moves
    accepted = (before.num_moves * before.accept_prob + after.num_moves * after.accept_prob) / number
    diverging = before.num_diverging + after.num_diverging
    return after._replace(num_moves=number, accept_prob=accepted, num_diverging=diverging)


def tuned(target: Target, walkers: Walker, step_size: jax.Array, num_islands: int) -> Tuning:
    """Each island with the metric, and the lattice, of where the walkers of the others are, not its own."""
    others = np.array([[j for j in range(num_islands) if j != i] for i in range(num_islands)])

    def of_others(leaf: jax.Array) -> jax.Array:
        return _by_island(leaf, num_islands)[others].reshape(num_islands, -1, *leaf.shape[1:])

    q, gradient, lattice = of_others(walkers.q), of_others(walkers.gradient), None
    if target.summed is not None:
        lattice = jax.vmap(lattice_of)(q[..., target.index])
        q = q.at[..., target.index].set(0.0)  # moves leave it in its place
    return Tuning(jax.vmap(estimate)(q, gradient), step_size, lattice)


def _by_island(walkers: Any, num_islands: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(num_islands, -1, *leaf.shape[1:]), walkers)


def _all(keys: jax.Array, target: Target, walkers: Walker, tuning: Tuning, steps: tuple) -> tuple[Walker, Move]:
    """One move of every walker: where they are, and what happened to each."""
    number, islands = len(walkers.q), len(tuning.metric.scale)
    by_island = tuning._replace(step_size=jnp.broadcast_to(tuning.step_size, islands))
    num_steps, anew = steps
    one = partial(trajectory, target=target, num_steps=num_steps, anew=anew)

    def island(keys: jax.Array, walkers: Walker, tuning: Tuning) -> tuple[Walker, Move]:
        return jax.vmap(lambda key, walker: one(key, walker=walker, tuning=tuning))(keys, walkers)

    keys, grouped = _by_island((keys, walkers), islands)
    moved = jax.vmap(island)(keys, grouped, by_island)
    return jax.tree.map(lambda leaf: leaf.reshape(number, *leaf.shape[2:]), moved)
