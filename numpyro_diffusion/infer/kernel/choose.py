r"""Choices: to accept or to reject, one of several candidates, which particles to copy. One policy for all kernels.

A log-density that is NaN or plus infinity is invalid: such a candidate is never taken, and the kernel counts it as
diverging. Minus infinity is a density of zero, an ordinary rejection. If a kernel uses gradients, a candidate whose
gradient is not finite, although its density is, is rejected and counted too.

**Metropolis.** A proposal is accepted with $a = \min(1, e^r)$, $r$ the log-ratio. **Metropolised Gibbs** chooses one of
$M$ candidates by weight and accepts it over the current point, of weight $w_0$, with

$$a = \min\left(1, \frac{\sum_{i \ge 1} w_i}{\sum_{i \ge 0, i \ne j} w_i}\right).$$

**Particles** with weights $w_i \propto e^{\ell_i}$ have the effective sample size $(\sum w_i)^2 / \sum w_i^2$.
Resampling makes copies in proportion to the weights. The systematic scheme shifts a comb of $N$ teeth by one uniform
offset,

$$u_i = \frac{i + U}{N}, \qquad a_i = \min \left\{ k : \sum_{j \le k} w_j \ge u_i \right\},$$

so a particle has $\lfloor N w \rfloor$ or $\lceil N w \rceil$ copies: $N w$ on average, with little variance. The
conditional scheme is the same law given that the first copy is of the first particle, which a particle Gibbs sampler
needs.

References:
    Liu, Peskun's theorem and a modified discrete-state Gibbs sampler, 1996, https://doi.org/10.1093/biomet/83.3.681.
    Douc, Cappé, Moulines, Comparison of resampling schemes for particle filtering, 2005,
    https://arxiv.org/abs/cs/0507025.
    Chopin and Singh, On particle Gibbs sampling, 2015 (conditional systematic resampling),
    https://arxiv.org/abs/1304.1887.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_BISECTIONS = 60


class Choice(NamedTuple):
    """What came of a proposal."""

    point: Any  # the new one or the old one
    accept_prob: jax.Array
    accepted: jax.Array
    diverging: jax.Array  # whether a density or a gradient was invalid


def metropolis(
    key: jax.Array, log_ratio: jax.Array, new: Any, old: Any, log_density: ArrayLike = 0.0, gradient: Any = ()
) -> Choice:
    """Accepts a proposal or keeps the point.

    Args:
        key: random key.
        log_ratio: logarithm of the acceptance ratio, a scalar.
        new: the proposal, a pytree.
        old: the current point, of the same structure.
        log_density: of the proposal; where it is minus infinity, nothing else is checked.
        gradient: a pytree that must be finite at the proposal otherwise.

    Returns:
        A `Choice`.
    """
    log_ratio = jnp.where(jnp.isneginf(log_density), -jnp.inf, log_ratio)
    fine = jnp.isneginf(log_ratio) | (is_density(log_ratio) & all_finite(gradient))
    accept_prob = jnp.where(fine, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    accepted = jax.random.uniform(key, dtype=accept_prob.dtype) < accept_prob
    return Choice(select(accepted, new, old), accept_prob, accepted, ~fine)


def metropolised_gibbs(key: jax.Array, log_weights: jax.Array, current: jax.Array, new: Any, old: Any) -> Choice:
    """Chooses one of several candidates by weight and accepts it over the current point.

    Args:
        key: random key.
        log_weights: of the candidates as the model gives them, shape (M,).
        current: that of the current point.
        new: the candidates, a pytree with a leading axis of M.
        old: the current point, of the same structure without it.

    Returns:
        A `Choice`; diverging if a weight was NaN or infinite.
    """
    key_choice, key_accept = jax.random.split(key)
    weights = without_improper(log_weights)
    chosen = jax.random.categorical(key_choice, weights)
    others = jnp.where(jnp.arange(weights.size) == chosen, -jnp.inf, weights)
    log_ratio = jax.nn.logsumexp(weights) - jnp.logaddexp(jax.nn.logsumexp(others), current)
    accept_prob = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
    accepted = jax.random.uniform(key_accept, dtype=accept_prob.dtype) < accept_prob
    candidate = jax.tree.map(lambda leaf: leaf[chosen], new)
    return Choice(select(accepted, candidate, old), accept_prob, accepted, ~is_density(log_weights).all())


def keep_finite(new: Any, old: Any) -> tuple[Any, jax.Array]:
    """The new point if all of it is finite, otherwise the old one; and whether the new one was not finite."""
    fine = all_finite(new)
    return select(fine, new, old), ~fine


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two pytrees of the same structure, by a scalar truth value, with the dtypes of the second."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(jnp.result_type(b)), yes, no)


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite, a scalar."""
    return jnp.all(jnp.stack([jnp.array(True), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]))


def is_density(log_density: jax.Array) -> jax.Array:
    """Whether numbers can be logarithms of a density or of a weight: neither NaN nor plus infinity."""
    return ~(jnp.isnan(log_density) | jnp.isposinf(log_density))


def without_improper(log_weights: jax.Array) -> jax.Array:
    """Logarithms of weights, with minus infinity (never taken) for NaN and plus infinity.

    Args:
        log_weights: logarithms of weights or likelihoods, any shape.

    Returns:
        The same shape.
    """
    return jnp.where(is_density(log_weights), log_weights, -jnp.inf)


def effective_size(log_weights: jax.Array) -> jax.Array:
    """The effective sample size of unnormalised weights, between 1 and their number; 0 if all of them vanish.

    Args:
        log_weights: logarithms, shape (N,); minus infinity is a weight of zero.

    Returns:
        A scalar.
    """
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    return jnp.where(jnp.isfinite(largest), jnp.sum(weights) ** 2 / jnp.sum(weights**2), 0.0)


def systematic(key: jax.Array, log_weights: jax.Array, count: int | None = None) -> jax.Array:
    """Draws ancestors by one comb.

    Args:
        key: random key.
        log_weights: logarithms of unnormalised weights, shape (N,), not all minus infinity.
        count: number of copies in all; N by default.

    Returns:
        Indices in increasing order, shape (count,).
    """
    count = log_weights.size if count is None else count
    teeth = (jnp.arange(count) + jax.random.uniform(key, dtype=log_weights.dtype)) / count
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights))
    cumulative = cumulative / cumulative[-1]
    last = jnp.max(jnp.where(jnp.isfinite(log_weights), jnp.arange(log_weights.size), 0))
    return jnp.minimum(jnp.searchsorted(cumulative, teeth, side="right"), last)


def conditional_systematic(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Draws ancestors by one comb, given that the first copy is of the first particle.

    The comb is drawn from its law given that a tooth falls on the first particle, and the copies are then turned so
    that one of the first particle's, chosen at random, comes first.

    Args:
        key: random key.
        log_weights: logarithms of unnormalised weights, shape (N,); the first must be finite.

    Returns:
        Indices, shape (N,), of which the first is 0.
    """
    count = log_weights.size
    key_offset, key_turn = jax.random.split(key)
    weights = jax.nn.softmax(log_weights)
    expected = count * weights[0]
    # given a copy of the first particle, weighted by the number of its copies: a uniform place within its share
    place = jax.random.uniform(key_offset, dtype=weights.dtype) * expected
    offset = place - jnp.floor(place)
    teeth = (jnp.arange(count) + offset) / count
    cumulative = jnp.cumsum(weights)
    ancestors = jnp.minimum(jnp.searchsorted(cumulative / cumulative[-1], teeth, side="right"), count - 1)
    copies = jnp.sum(ancestors == 0)
    turn = jnp.floor(jax.random.uniform(key_turn) * copies).astype(int)
    return jnp.roll(ancestors, -turn).at[0].set(0)


def next_temperature(log_likelihood: jax.Array, temperature: ArrayLike, threshold: float) -> jax.Array:
    r"""The largest step after which enough particles are still effective.

    Bisects for $\beta'$ with $\mathrm{ESS}(e^{(\beta' - \beta) \ell}) = \mathrm{threshold} \cdot M$, where $M$ is the
    number of particles whose likelihood is not zero: a hard constraint costs what it costs, whatever the step.

    Args:
        log_likelihood: of each particle, shape (N,).
        temperature: the current inverse temperature $\beta$, in [0, 1).
        threshold: share of the particles, in (0, 1].

    Returns:
        The next inverse temperature, in (`temperature`, 1].
    """
    alive = jnp.sum(jnp.isfinite(log_likelihood))
    centred = log_likelihood - jnp.max(log_likelihood)

    def size_at(beta: jax.Array) -> jax.Array:
        return effective_size(jnp.where(jnp.isfinite(centred), (beta - temperature) * centred, -jnp.inf))

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        enough = size_at(middle) >= threshold * alive
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    one = jnp.ones((), log_likelihood.dtype)
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.asarray(temperature, one.dtype), one))
    return jnp.where(size_at(one) >= threshold * alive, one, jnp.where(low > temperature, low, high))
