r"""Time grids: the times that a solver visits, from noise to data.

A grid is a rule that places $n$ times $t_1 > \dots > t_n$ on [`t_min`, `t_max`] of a schedule, both ends included.
Since a schedule is known by its noise level $\lambda = \sigma_t / \alpha_t$, a rule stated on $\lambda$ visits the same
levels under every schedule with the same ends; one stated on $t$ does not.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise.schedule import Schedule


class TimeGrid(abc.ABC):
    """A rule for placing the times of a solver; frozen, hashable, and called as `grid(schedule, num_times)`."""

    @abc.abstractmethod
    def __call__(self, schedule: Schedule, num_times: int) -> jax.Array:
        """`num_times` decreasing times from `schedule.t_max` to `schedule.t_min`, both included."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class UniformTime(TimeGrid):
    """Times evenly spaced in `t`."""

    def __call__(self, schedule: Schedule, num_times: int) -> jax.Array:
        return jnp.linspace(schedule.t_max, schedule.t_min, num_times)


@jax.tree_util.register_static
@dataclass(frozen=True)
class UniformLogSNR(TimeGrid):
    """Times evenly spaced in log-SNR: noise levels in geometric progression."""

    def __call__(self, schedule: Schedule, num_times: int) -> jax.Array:
        ends = schedule.log_snr(schedule.t_max), schedule.log_snr(schedule.t_min)
        return _pin_ends(schedule, schedule.inverse_log_snr(jnp.linspace(*ends, num_times)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Karras(TimeGrid):
    r"""Noise levels evenly spaced after the power $1 / \rho$: denser near the data than in geometric progression.

    Args:
        rho: exponent; 1 is linear in the noise level, and the limit of large values is `UniformLogSNR`.

    Raises:
        ValueError: if `rho` is not positive.

    References:
        Karras et al. 2022, equation 5, https://arxiv.org/abs/2206.00364.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        _checks.positive(rho=self.rho)

    def __call__(self, schedule: Schedule, num_times: int) -> jax.Array:
        first, last = (schedule.noise_level(t) ** (1.0 / self.rho) for t in (schedule.t_max, schedule.t_min))
        return _pin_ends(schedule, schedule.inverse_noise_level(jnp.linspace(first, last, num_times) ** self.rho))


def _pin_ends(schedule: Schedule, times: jax.Array) -> jax.Array:
    return times.at[0].set(schedule.t_max).at[-1].set(schedule.t_min)


def grid_from(grid: TimeGrid, schedule: Schedule, start: ArrayLike, num_times: int) -> jax.Array:
    """The times that a grid places from exactly `start` down to the cleanest.

    Args:
        grid: the rule.
        schedule: the noising process.
        start: the noisiest of the times, which may be traced.
        num_times: how many, at least 2.

    Returns:
        Decreasing times, shape (num_times,).
    """
    return grid(_From(schedule, start), num_times)


@dataclass(frozen=True)
class _From(Schedule):
    """The part of a schedule below a time."""

    base: Schedule
    t_max: ArrayLike  # type: ignore[assignment]  # it may be traced

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.base.t_min

    def alpha(self, t: ArrayLike) -> jax.Array:
        return self.base.alpha(t)

    def sigma(self, t: ArrayLike) -> jax.Array:
        return self.base.sigma(t)

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return self.base.inverse_log_snr(log_snr)
