r"""Several diffusion sites as one point: a denoiser of all of them, on one ladder of noise levels.

Independent points $x_i \sim p_i$, each noised by a schedule of its own, are one point under one schedule if their
ladders of noise levels differ only by a factor. With $c_i$ the ratio of the highest noise level of site $i$ to that of
the first,

$$u_i = x_i / c_i, \qquad \lambda_i = c_i \lambda, \qquad
\hat u_i(u_t, t) = \frac1{c_i} \hat x_{0,i}\!\left( \alpha_i(t_i)\, \frac{c_i u_{t,i}}{\alpha(t)},\, t_i \right),
\quad \lambda_i(t_i) = c_i \lambda(t),$$

so that a solver walks every site as it would alone: on the grid of the site's own levels, from its own terminal law.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.noise import Schedule

_TOLERANCE = 0.01
"""Relative difference below which spans of ladders count as equal."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joint:
    """A denoiser of several independent points, as one flat vector, each in a unit of its own.

    Args:
        denoisers: one for each point; their ladders of noise levels have the same ratio of highest to lowest.
    """

    denoisers: tuple[Denoiser, ...]

    @property
    def schedule(self) -> Schedule:
        return self.denoisers[0].schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (sum(np.prod(d.event_shape, dtype=int) for d in self.denoisers),)

    @property
    def location(self) -> jax.Array:
        """Of every entry, of `event_shape`."""
        return self.join([jnp.broadcast_to(d.location, d.event_shape) for d in self.denoisers])

    @property
    def scale(self) -> jax.Array:
        """Of every entry, of `event_shape`."""
        return self.join([jnp.broadcast_to(d.scale, d.event_shape) for d in self.denoisers])

    def join(self, points: Sequence[jax.Array]) -> jax.Array:
        """Points of the denoisers' own spaces as one vector, of `event_shape`."""
        units = zip(points, self._units(), strict=True)
        return jnp.concatenate([(jnp.asarray(x, jnp.result_type(float)) / c).reshape(-1) for x, c in units])

    def split(self, u: jax.Array) -> list[jax.Array]:
        """The opposite of `join`."""
        ends = np.cumsum([np.prod(d.event_shape, dtype=int) for d in self.denoisers])[:-1]
        parts = zip(jnp.split(u, ends), self._units(), self.denoisers, strict=True)
        return [(c * part).reshape(d.event_shape).astype(u.dtype) for part, c, d in parts]

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """The predictions of all points."""
        level, alpha = self.schedule.noise_level(t), self.schedule.alpha(t)

        def one(denoiser: Denoiser, x: jax.Array, unit: jax.Array) -> Prediction:
            own = denoiser.schedule
            own_t = jnp.clip(own.inverse_noise_level(unit * level), own.t_min, own.t_max)
            return denoiser((own.alpha(own_t) / alpha).astype(x.dtype) * x, own_t)

        members = zip(self.denoisers, self.split(x_t), self._units(), strict=True)
        predictions = [one(*member) for member in members]
        x0 = self.join([prediction.x0 for prediction in predictions])
        eps = jnp.concatenate([prediction.eps.reshape(-1) for prediction in predictions])  # the same in any unit
        return Prediction(x0.astype(x_t.dtype), eps.astype(x_t.dtype), x_t, t, self.schedule)

    def _units(self) -> list[jax.Array]:
        highest = [d.schedule.noise_level(d.schedule.t_max) for d in self.denoisers]
        return [level / highest[0] for level in highest]


def spans(denoisers: Sequence[Denoiser]) -> list[float] | None:
    """Ratios of the highest noise level of each denoiser to its lowest; None inside jit, if a schedule is traced."""
    try:
        with jax.ensure_compile_time_eval():  # most schedules are plain numbers, also inside jit
            return [_span(d.schedule) for d in denoisers]
    except jax.errors.ConcretizationTypeError:
        return None


def are_equal(values: Sequence[float]) -> bool:
    """Whether spans are equal up to rounding, so that the ladders differ only by a factor."""
    return bool(np.allclose(values, values[0], rtol=_TOLERANCE))


def _span(schedule: Schedule) -> float:
    schedule = getattr(schedule, "base", schedule)  # the unit of a `Scaled` one, which may be traced, is in both
    return float(schedule.noise_level(schedule.t_max) / schedule.noise_level(schedule.t_min))
