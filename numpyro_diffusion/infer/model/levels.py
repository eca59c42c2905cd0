r"""Ladders of noise levels: strictly decreasing, and within a prior's schedule.

A level is $\lambda = \sigma_t / \alpha_t$, the standard deviation of the noise in units of the denoiser's space, and
has one time on each schedule.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.noise import Schedule


def decreasing(name: str, levels: Sequence[float]) -> tuple[float, ...]:
    """Noise levels as numbers.

    Args:
        name: of the argument, for the error.
        levels: noise levels, at least one.

    Returns:
        The same.

    Raises:
        ValueError: if they are not positive, finite and strictly decreasing.
    """
    values = np.asarray(levels, np.float64)
    if values.ndim != 1 or len(values) < 1:
        raise ValueError(f"{name} must be a list of noise levels; got shape {values.shape}")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"{name} must be positive and finite; got {values.tolist()}")
    rises = np.flatnonzero(np.diff(values) >= 0)
    if len(rises):
        k = rises[0]
        raise ValueError(f"{name} must be strictly decreasing; got {values[k]:.6g} and then {values[k + 1]:.6g}")
    return tuple(values.tolist())


def check_within(argument: str, levels: Sequence[float], name: str, site: PriorSite) -> None:
    """Raises `ValueError` unless all levels lie on the schedule of a site's prior; inside jit it may not be known."""
    schedule = site.denoiser.schedule
    ends = [schedule.noise_level(t) for t in (schedule.t_min, schedule.t_max)]
    if any(isinstance(end, jax.core.Tracer) for end in ends):
        return
    lowest, highest = (float(end) for end in ends)
    outside = [level for level in levels if not lowest * (1 - 1e-4) <= level <= highest * (1 + 1e-4)]
    if outside:
        raise ValueError(
            f"{argument} must lie within the noise levels that the prior of site {name!r} knows, {lowest:.4g} to "
            f"{highest:.4g}; got {outside[0]:.6g}"
        )


def time_of(levels: ArrayLike | Sequence[float], schedule: Schedule) -> jax.Array:
    """The times of noise levels on a schedule, of the same shape."""
    times = schedule.inverse_noise_level(jnp.asarray(levels, jnp.result_type(float)))
    return jnp.clip(times, schedule.t_min, schedule.t_max)
