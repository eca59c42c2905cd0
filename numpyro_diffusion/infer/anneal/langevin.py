r"""Langevin steps at one noise level, with a Metropolis test or without.

Both propose $x_t' = x_t + h s(x_t) + \sqrt{2 h}\, \xi$, each site with its own $h$. `adjusted` accepts with

$$a = \min\left(1, \frac{\pi(x_t')\, k(x_t \mid x_t')}{\pi(x_t)\, k(x_t' \mid x_t)}\right), \qquad
k(x' \mid x) = N(x'; x + h s(x), 2 h),$$

where the reverse move starts from the new point's score, so the noisy posterior $\pi$ of the level stays invariant.

References:
    Roberts and Tweedie, Exponential convergence of Langevin distributions and their discrete approximations, 1996,
    https://doi.org/10.2307/3318418.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.infer.anneal.posterior import NoisyPosterior, Point, langevin_steps
from numpyro_diffusion.infer.kernel.choose import keep_finite, metropolis

_MOST_DRIFT = 1000.0
"""A step counts as diverging if its score moves it by more than this many times its noise."""


class LevelStatistics(NamedTuple):
    """Means over the steps at a level, or arrays of them over levels."""

    accept_prob: jax.Array  # NaN without a test
    score_norm: jax.Array  # of all sites together, in the units of one over x_t


def unadjusted(
    keys: jax.Array, posterior: NoisyPosterior, x_t: Point, t: Mapping[str, ArrayLike], step_size: Mapping
) -> tuple[Point, LevelStatistics, jax.Array]:
    """One Langevin step for each key, taken unless it is not finite.

    Args:
        keys: random keys, one a step.
        posterior: the target at noise.
        x_t: where to begin.
        t: time of each site.
        step_size: step of each site, in squared units of `x_t`.

    Returns:
        The last point, the level's statistics, and whether a step diverged.
    """

    def step(x_t: Point, key: jax.Array) -> tuple[Point, tuple[jax.Array, jax.Array]]:
        score = posterior.score(x_t, t)
        proposal = langevin_steps(key, x_t, score, step_size)
        moved, not_finite = keep_finite(proposal, x_t)
        return moved, (_norm(score), not_finite | _is_driven(score, step_size))

    x_t, (norms, bad) = jax.lax.scan(step, x_t, keys)
    norm = jnp.mean(norms).astype(jnp.result_type(float))
    return x_t, LevelStatistics(jnp.full_like(norm, jnp.nan), norm), bad.any()


def adjusted(
    keys: jax.Array, posterior: NoisyPosterior, x_t: Point, t: Mapping[str, ArrayLike], step_size: Mapping
) -> tuple[Point, LevelStatistics, jax.Array]:
    """One tested Langevin step for each key; otherwise as `unadjusted`, for priors with a density at this level."""
    evaluate = jax.value_and_grad(lambda x_t: posterior.log_density(x_t, t))

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, tuple]:
        x_t, log_density, score = carry
        key_move, key_accept = jax.random.split(key)
        proposal = langevin_steps(key_move, x_t, score, step_size)
        new_log_density, new_score = evaluate(proposal)
        forward = _log_transition(x_t, proposal, score, step_size)
        backward = _log_transition(proposal, x_t, new_score, step_size)
        log_ratio = new_log_density - log_density + backward - forward
        new = proposal, new_log_density, new_score
        choice = metropolis(key_accept, log_ratio, new, carry, new_log_density, new_score)
        return choice.point, (choice.accept_prob, _norm(score), choice.diverging)

    (x_t, _, _), (accept_prob, norms, bad) = jax.lax.scan(step, (x_t, *evaluate(x_t)), keys)
    means = (jnp.mean(value).astype(jnp.result_type(float)) for value in (accept_prob, norms))
    return x_t, LevelStatistics(*means), bad.any()


def _log_transition(x: Point, x_new: Point, score: Point, step_size: Mapping) -> jax.Array:
    """Log-density of proposing `x_new` from `x`, up to a constant."""
    squares = {n: jnp.sum((x_new[n] - x[n] - step_size[n] * score[n]) ** 2) / step_size[n] for n in x}
    return -0.25 * sum(squares.values())


def _norm(score: Point) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(value**2) for value in score.values()))


def _is_driven(score: Point, step_size: Mapping) -> jax.Array:
    drift = sum(step_size[n] * jnp.mean(value**2) for n, value in score.items())
    return drift > 2.0 * _MOST_DRIFT**2
