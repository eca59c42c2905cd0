r"""The weighted walk of `DesignedDiffusion`: one level down at a time, by an estimated denoiser.

See `sampler` for the step and its weight, and `denoise.designed.target` for the estimates. The density of intermediate
levels only steers, and may use particles that all walks share. At the lowest level each walk has its own, so that its
estimate is unbiased whatever the others have seen.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from numpyro_diffusion.denoise.designed.target import Particles, Shared, posterior, shared
from numpyro_diffusion.infer.kernel.choose import without_improper
from numpyro_diffusion.infer.particles.designed.vector import Standardised
from numpyro_diffusion.infer.particles.evidence import harmonic_mean, resample_uneven

_AT_ONCE = 256
"""Walks whose particles are in memory together."""


class Level(NamedTuple):
    """What happened at one noise level."""

    noise_level: jax.Array  # in units of the scale
    effective_size: jax.Array  # of all islands together, before resampling
    per_island: jax.Array  # of one island, its harmonic mean over islands, before resampling
    resampled: jax.Array  # share of the islands
    inner_size: jax.Array  # effective particles behind an estimate, the median over walks


class Cloud(NamedTuple):
    """Weighted walks, island by island."""

    points: jax.Array  # (islands * n, D)
    seen: Particles  # what the particles of each say there
    log_weights: jax.Array  # (islands, n), since the last resampling
    log_evidence: jax.Array  # (islands,), up to the last resampling


@dataclass(frozen=True)
class Walk:
    """How walks go down.

    Args:
        shape: islands, and walks on each.
        num_inner: particles behind each estimate alone.
        num_shared: particles behind all estimates.
        num_steps: Langevin steps of each inner particle.
        ess_threshold: share of an island's walks below which they are resampled.
    """

    shape: tuple[int, int]
    num_inner: int
    num_shared: int
    num_steps: int
    ess_threshold: float

    def start(self, key: jax.Array, vector: Standardised, size: int, level: jax.Array) -> tuple[Cloud, Shared | None]:
        """Walks at the highest level, and the particles that all of them share."""
        key_points, key_shared, key_look = jax.random.split(key, 3)
        islands, n = self.shape
        variance = 1.0 + level**2
        points = jnp.sqrt(variance) * jax.random.normal(key_points, (islands * n, size))
        pool = None
        if self.num_shared and not self.num_steps:
            pool = shared(vector.log_density, key_shared, (size,), self.num_shared, 0.0, 1.0)
        seen = self.look(key_look, vector, pool, points, level)
        log_weights = seen.log_density - _log_normal(points, variance)
        return Cloud(points, seen, log_weights.reshape(self.shape), jnp.zeros(islands)), pool

    def down(
        self,
        key: jax.Array,
        vector: Standardised,
        pool: Shared | None,
        cloud: Cloud,
        above: jax.Array,
        below: jax.Array,
    ) -> tuple[Cloud, Level]:
        """One level down: resamples where weights have become uneven, steps and weighs."""
        key_resample, key_step, key_look = jax.random.split(key, 3)
        log_weights = without_improper(cloud.log_weights)
        ancestors, log_weights, log_gain, sizes, now = resample_uneven(key_resample, log_weights, self.ess_threshold)
        level = Level(above, sizes.sum(), harmonic_mean(sizes), jnp.mean(now), jnp.median(cloud.seen.effective_size))
        x_t, seen = jax.tree.map(lambda leaf: leaf[ancestors], (cloud.points, cloud.seen))
        ratio = (below / above) ** 2
        trust = (seen.effective_size / (seen.effective_size + 1.0))[:, None]
        clean = trust * seen.variance + (1.0 - trust) / (1.0 + above**-2.0)
        variance = (1.0 - ratio) ** 2 * clean + (1.0 - ratio) * below**2
        step = (1.0 - ratio) * seen.shift + jnp.sqrt(variance) * jax.random.normal(key_step, x_t.shape)
        new = self.look(key_look, vector, pool, x_t + step, below)
        there = _log_normal(step - (1.0 - ratio) * seen.shift, variance)
        gained = new.log_density - seen.log_density + _log_normal(step, above**2 - below**2) - there
        log_weights = log_weights + gained.reshape(self.shape)
        return Cloud(x_t + step, new, log_weights, cloud.log_evidence + log_gain), level

    def look(
        self, key: jax.Array, vector: Standardised, pool: Shared | None, points: jax.Array, level: jax.Array
    ) -> Particles:
        """What the particles of each walk say."""

        def one(each: tuple[jax.Array, jax.Array]) -> Particles:
            return posterior(
                vector.log_density,
                each[0],
                each[1],
                level,
                0.0,
                1.0,
                num_particles=self.num_inner,
                num_steps=self.num_steps,
                others=pool,
            )

        keys = jax.random.split(key, len(points))
        return jax.lax.map(one, (keys, points), batch_size=_batch(len(points)))


def _log_normal(x: jax.Array, variance: jax.Array) -> jax.Array:
    """Log-density of N(0, variance) at points (..., D)."""
    return norm.logpdf(x, scale=jnp.sqrt(variance)).sum(-1)


def _batch(count: int) -> int:
    """How many of them at once: without a remainder, which would be a second program, if that is possible."""
    best = max(size for size in range(1, _AT_ONCE + 1) if count % size == 0)
    return best if 4 * best > _AT_ONCE else min(_AT_ONCE, count)


def check_alive(cloud: Cloud, level: jax.Array) -> None:
    """Raises if no walk is left."""
    if not bool((without_improper(cloud.log_weights) > -jnp.inf).any()):
        raise ValueError(
            f"the model's density must be positive and finite at some particle; at noise level {float(level):.3g} it "
            "is zero or NaN at all of them. Look for a factor that is not finite, or give location= and scale= nearer "
            "to the posterior"
        )
