r"""One denoiser under another schedule: train with one, sample with another.

What is known of $x$ at time $t$ depends on the noise level $\lambda = \sigma_t / \alpha_t$ alone. A point noised under
the schedule $(\alpha', \sigma')$ is, up to a factor, one noised under $(\alpha, \sigma)$ to the time of the same level:

$$\lambda(t) = \lambda'(t'), \qquad x_t = \frac{\alpha_t}{\alpha'_{t'}}\, x'_{t'}, \qquad
\hat x_0'(x'_{t'}, t') = \hat x_0(x_t, t).$$

The posterior mean is the same number, whatever the network's target. This file changes the clock, not the law: see
`noise` for schedules and `solve` for what a clock changes.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022, appendix B,
    https://arxiv.org/abs/2206.00364.
    Kingma et al., Variational diffusion models, 2021, section 5.1, https://arxiv.org/abs/2107.00630.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise.prediction import Denoiser, Prediction
from numpyro_diffusion.noise import Scaled, Schedule, check_decreasing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rescheduled:
    """A denoiser that is asked under another schedule; made by `reschedule`.

    Args:
        base: the denoiser that answers.
        schedule: the noising process under which it is asked, in the units of the data.
    """

    base: Denoiser
    schedule: Schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    @property
    def location(self) -> ArrayLike:
        return self.base.location

    @property
    def scale(self) -> ArrayLike:
        return self.base.scale

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: jax.Array | None = None) -> Prediction:
        factor, base_t = self._translate(t, jnp.result_type(x_t))
        return Prediction(self.base(factor * x_t, base_t, cond).x0, x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike, *cond: jax.Array | None) -> jax.Array:
        """The diffused log-density under the new schedule, where the denoiser has one: up to a constant if it is so."""
        factor, base_t = self._translate(t, jnp.result_type(x_t))
        return self.base.log_density(factor * x_t, base_t, *cond) + jnp.size(x_t) * jnp.log(factor)

    def _translate(self, t: ArrayLike, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """The time of the same noise level on the denoiser's clock, after the factor that takes a point there."""
        clock = self.base.schedule
        base_t = jnp.clip(clock.inverse_noise_level(self.schedule.noise_level(t)), clock.t_min, clock.t_max)
        return (clock.alpha(base_t) / self.schedule.alpha(t)).astype(dtype), base_t


def reschedule(denoiser: Denoiser, schedule: Schedule) -> Rescheduled:
    r"""The same posterior mean under another schedule.

    Args:
        denoiser: the model.
        schedule: the other noising process, in the units of the denoiser's own: of the data for an exact denoiser, of
            the data's standard deviation for a network.

    Returns:
        A denoiser. Its schedule is the one given, cut to the noise levels that the denoiser knows.

    Raises:
        TypeError: if `schedule` is no schedule, or a `Scaled` one.
        ValueError: if its log-SNR does not fall, or the two schedules have no noise level in common.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, reschedule
        >>> from numpyro_diffusion.noise import VE, Rectified
        >>> denoiser = reschedule(Gaussian([1.0, 2.0], 1.0, VE()), Rectified())
        >>> denoiser(jnp.array([0.5, 1.0]), 0.5).x0.tolist()
        [1.0, 2.0]
    """
    if not isinstance(schedule, Schedule) or isinstance(schedule, Scaled):
        raise TypeError(f"schedule must be a noise.Schedule, not Scaled; got {type(schedule).__name__}")
    check_decreasing(schedule)
    known = denoiser.schedule
    known, scale = (known.base, known.scale) if isinstance(known, Scaled) else (known, None)
    with jax.ensure_compile_time_eval():  # schedules are plain numbers, also inside jit
        schedule = _cut(schedule, float(known.noise_level(known.t_min)), float(known.noise_level(known.t_max)))
    return Rescheduled(denoiser, schedule if scale is None else Scaled(schedule, scale))


def _cut(schedule: Schedule, lowest: float, highest: float) -> Schedule:
    """The part of a schedule between two noise levels."""
    ends = [float(schedule.inverse_noise_level(level)) for level in (lowest, highest)]
    t_min, t_max = max(schedule.t_min, ends[0]), min(schedule.t_max, ends[1])
    if not t_min < t_max:
        raise ValueError(f"{schedule} has no noise level in common with the denoiser, whose are {lowest} to {highest}")
    if (t_min, t_max) == (schedule.t_min, schedule.t_max):
        return schedule
    return dataclasses.replace(schedule, t_min=t_min, t_max=t_max)
