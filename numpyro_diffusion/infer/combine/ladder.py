r"""A ladder of temperatures: swaps between its neighbours, and where its rungs should be.

Points at the inverse temperatures $\beta_0 < \dots < \beta_{K - 1} = 1$ change places with probability

$$a_k = \min\left(1, \Bigl(\frac{L(x_k)}{L(x_{k + 1})}\Bigr)^{\beta_{k + 1} - \beta_k}\right),$$

in every step first between the pairs (0, 1), (2, 3), ..., then between (1, 2), (3, 4), .... A point that has been
handed up in one pass is offered to the next rung in the next one. The order is fixed, not drawn. Drawn pairs make
points wander up and down at random, and a way through $K$ rungs takes a time of order $K^2$; here of order $K$. A pass
costs nothing beside a move, since it needs no likelihood that is not known.

The mean rejections $r_k = 1 - E\,a_k$ add up to the *communication barrier* $\Lambda \approx \sum_k r_k$, which hardly
depends on the rungs if there are enough of them. Most points make the way where all $r_k$ are equal, at equal
distances in $\Lambda(\beta) = \sum_{\beta_k < \beta} r_k$ (`equal_rejection`). A point then goes up and down once in
$K (2 + 2 \sum_k r_k / (1 - r_k))$ passes, so that about $2 \Lambda$ rungs are a good number.

The evidence is $\log Z = \sum_k \log E_{\beta_k}[L^{\beta_{k + 1} - \beta_k}]$, by means over draws (stepping stones).

References:
    Syed, Bouchard-Côté, Deligiannidis, Doucet, Non-reversible parallel tempering: a scalable highly parallel MCMC
    scheme, 2022, https://arxiv.org/abs/1905.02939.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.infer.kernel.choose import metropolis, without_improper
from numpyro_diffusion.infer.kernel.contract import pooled

Point = dict[str, jax.Array]
_SHORTEST_ROUND = 8
_LEAST_REJECTION = 1e-3
_SMALLEST_STEP = 1e-8


class Ladder(NamedTuple):
    """The rungs of one chain, and what has happened on them since warm-up."""

    temperatures: jax.Array  # inverse, rising to 1, (K,)
    swap_rates: jax.Array  # mean acceptance of swaps, since warm-up or since the rungs last moved, (K - 1,)
    num_swaps: jax.Array  # how many each is the mean of
    from_lowest: jax.Array  # whether the point at a rung has been at the lowest since it was last at 1, (K,)
    round_trips: jax.Array  # points that have come from the lowest rung to 1
    log_sums: jax.Array  # of L^(difference of temperatures) over draws, (K - 1,)
    log_evidence: jax.Array  # NaN in warm-up

    @classmethod
    def of(cls, temperatures: jax.Array) -> "Ladder":
        """One on which nothing has happened."""
        pairs, none = jnp.zeros(len(temperatures) - 1), jnp.zeros((), jnp.int32)
        at_rungs = jnp.zeros(len(temperatures), bool)
        return cls(temperatures, pairs, none, at_rungs, none, pairs - jnp.inf, none * jnp.nan)

    def step(
        self, key: jax.Array, log_likelihood: jax.Array, i: jax.Array, num_warmup: int, adapts: bool
    ) -> tuple["Ladder", jax.Array, jax.Array]:
        """Swaps points.

        Args:
            key: random key.
            log_likelihood: of the points at the rungs, (K,).
            i: number of the step.
            num_warmup: steps of warm-up, in which the rungs move if `adapts`.
            adapts: whether they do.

        Returns:
            The ladder after it, the index of the point that each rung has now, (K,), and whether a likelihood of a pair
            was NaN or infinite; it was not swapped.
        """
        order, accept_prob, diverging = swap(key, self.temperatures, log_likelihood)
        from_lowest = self.from_lowest[order].at[0].set(True)
        sampling = i >= num_warmup
        log_weights = jnp.diff(self.temperatures) * without_improper(log_likelihood[:-1])
        log_sums = jnp.where(sampling, jnp.logaddexp(self.log_sums, log_weights), -jnp.inf)
        count = jnp.log(jnp.maximum(i + 1 - num_warmup, 1))
        num_swaps = self.num_swaps + 1
        rates = self.swap_rates + (accept_prob - self.swap_rates) / num_swaps
        temperatures, ends = self.temperatures, ends_of_rounds(num_warmup) if adapts else ()
        if len(ends):
            better = equal_rejection(temperatures, pooled(rates))
            temperatures = jnp.where(jnp.any(i + 1 == jnp.asarray(ends)), better, temperatures)
        anew = jnp.any(i + 1 == jnp.asarray([*ends, num_warmup]))
        after = Ladder(
            temperatures=temperatures,
            swap_rates=jnp.where(anew, 0.0, rates),
            num_swaps=jnp.where(anew, 0, num_swaps),
            from_lowest=from_lowest.at[-1].set(False),
            round_trips=self.round_trips + (sampling & from_lowest[-1]),
            log_sums=log_sums,
            log_evidence=jnp.where(sampling, jnp.sum(log_sums - count), jnp.nan),
        )
        return after, order, diverging


class ParallelTemperingState(NamedTuple):
    """State of `ParallelTempering`, with K temperatures.

    Args:
        i: number of steps done.
        z: unconstrained values by site at temperature 1: the draw.
        points: the same at all temperatures, (K, ...).
        log_likelihood: there, (K,).
        ladder: the inverse temperatures, `ladder.temperatures`, and what has happened between them.
        kernel_states: of the kernel at each temperature but 0, the first axis; `kernel_states.step_size` and the like
            are fields to collect.
        swap_rates: mean acceptance of swaps between neighbours, since warm-up, (K - 1,).
        round_trips: how many points have come from the lowest temperature to 1, since warm-up.
        log_evidence: its estimate from all draws since warm-up, NaN before; relative to the lowest temperature's
            where that is not 0.
        accept_prob: of the kernel's last move at each temperature but 0, NaN if it has none.
        num_score_evals: denoiser evaluations of the last step at all temperatures, as far as the kernel counts them.
        diverging: whether a move or a swap met a density that is NaN or infinite, or the kernel diverged.
        rng_key: random key.
    """

    i: jax.Array
    z: Point
    points: Point
    log_likelihood: jax.Array
    ladder: Ladder
    kernel_states: Any
    swap_rates: jax.Array
    round_trips: jax.Array
    log_evidence: jax.Array
    accept_prob: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array

    @classmethod
    def of(
        cls,
        key: jax.Array,
        i: jax.Array,
        points: Point,
        log_likelihood: jax.Array,
        ladder: Ladder,
        kernel_states: Any,
        num_score_evals: jax.Array,
        diverging: jax.Array,
    ) -> "ParallelTemperingState":
        """With what can be read off the ladder and the kernel's states; `diverging` is that of the swaps."""
        missing = jnp.full(len(jax.tree.leaves(kernel_states)[0]), jnp.nan)
        return cls(
            i=i,
            z=jax.tree.map(lambda z: z[-1], points),
            points=points,
            log_likelihood=log_likelihood,
            ladder=ladder,
            kernel_states=kernel_states,
            swap_rates=ladder.swap_rates,
            round_trips=ladder.round_trips,
            log_evidence=ladder.log_evidence,
            accept_prob=jnp.asarray(getattr(kernel_states, "accept_prob", missing), missing.dtype),
            num_score_evals=jnp.asarray(num_score_evals, jnp.int32),
            diverging=jnp.any(jnp.asarray(getattr(kernel_states, "diverging", False))) | diverging,
            rng_key=key,
        )


def swap(key: jax.Array, temperatures: jax.Array, log_likelihood: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Swaps points between neighbours, first the even pairs, then the odd ones.

    Args:
        key: random key.
        temperatures: inverse, rising, (K,).
        log_likelihood: of the points at these, (K,).

    Returns:
        The index of the point that each temperature has now, (K,), the acceptance probability of each pair, (K - 1,),
        and whether a likelihood was NaN or infinite; it was not swapped.
    """
    pairs, yes, no = jnp.arange(len(temperatures) - 1), jnp.array(True), jnp.array(False)
    order, accept_prob, diverging = jnp.arange(len(temperatures)), jnp.zeros(len(pairs)), no
    for parity, key_parity in enumerate(jax.random.split(key)):
        lower, upper = log_likelihood[order][:-1], log_likelihood[order][1:]
        log_ratio, keys = jnp.diff(temperatures) * (lower - upper), jax.random.split(key_parity, len(pairs))
        choice = jax.vmap(lambda key, ratio, new: metropolis(key, ratio, yes, no, new))(keys, log_ratio, lower)
        tried = pairs % 2 == parity
        order = order[jnp.arange(len(order)) + jnp.diff(jnp.pad((tried & choice.accepted).astype(int), 1))]
        accept_prob = jnp.where(tried, choice.accept_prob, accept_prob)
        diverging |= jnp.any(tried & choice.diverging)
    return order, accept_prob, diverging


def first_spread(log_likelihood: jax.Array) -> jax.Array:
    """The median distance between log-likelihoods of draws of the prior, (K,), where they are finite; at least 1."""
    values = jnp.where(jnp.isfinite(log_likelihood), log_likelihood, jnp.nan)
    apart = jnp.abs(values[:, None] - values)[jnp.triu_indices(len(values), 1)]
    return jnp.maximum(jnp.nan_to_num(jnp.nanmedian(apart), nan=1.0), 1.0)


def first_ladder(count: int, spread: jax.Array) -> jax.Array:
    """Inverse temperatures to begin with: 0, and from 1 / `spread` to 1 in equal ratios, as suits Gaussian targets."""
    lowest = jnp.clip(1.0 / spread, _SMALLEST_STEP, 1.0 / (count - 1))
    return jnp.concatenate([jnp.zeros(1), lowest ** jnp.linspace(1.0, 0.0, count - 1)])


def equal_rejection(temperatures: jax.Array, accept_prob: jax.Array) -> jax.Array:
    """Inverse temperatures at which swaps would be rejected equally often.

    Args:
        temperatures: inverse, rising, (K,).
        accept_prob: mean acceptance of swaps between neighbours, (K - 1,).

    Returns:
        A ladder with the same ends, (K,).
    """
    rejected = jnp.clip(1.0 - accept_prob, _LEAST_REJECTION, 1.0)
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(rejected)])
    first, step = temperatures[0], temperatures[1] - temperatures[0]
    scale = jnp.log(temperatures - first + step)  # linear in the first step, as powers beyond
    found = jnp.interp(jnp.linspace(0.0, barrier[-1], len(barrier)), barrier, scale)
    inner = jnp.exp(found[1:-1]) - step + first
    return jnp.concatenate([temperatures[:1], inner, temperatures[-1:]]).astype(temperatures.dtype)


def ends_of_rounds(num_warmup: int) -> np.ndarray:
    """The steps of warm-up after which the ladder adapts: rounds double, and the last ends at half of warm-up."""
    halves = [num_warmup >> k for k in range(1, num_warmup.bit_length())]
    return np.asarray(sorted(n for n in halves if n >= _SHORTEST_ROUND), np.int32)
