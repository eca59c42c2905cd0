r"""Denoisers made from another one: a condition held, many independent points, a noisy look, another schedule.

**A condition held.** A network $\hat x_0(x_t, t, c)$ that was trained with conditions stands for a family of laws
$p(x \mid c)$. With $c$ held it is the denoiser of one of them, $E[x \mid x_t, c]$, and solvers, densities and kernels
need not know of the others. The condition is a leaf like the weights, but it is never frozen: a law may depend on
another quantity of a model, and gradients in that quantity are needed.

**Independent points.** A plate of $n$ points $x_i \sim p$ is one point of $\prod_i p(x_i)$, whose posterior mean is
that of each. Solvers and guidance, which move one point, then move the whole plate, and an observation may see all of
it.

**A noisy look at the point.** The law of $x$ given $x_t$ is a prior like any other, and its denoiser needs no training.
Two looks at $x$ are one look at a lower level: with $u = x_t / \alpha_t$ at level $L$ and $y = x_s / \alpha_s$ at level
$\ell$,

$$E[x \mid x_t, x_s] = \hat x_0(m; c), \qquad c^{-2} = L^{-2} + \ell^{-2}, \qquad m = c^2 (u / L^2 + y / \ell^2),$$

$$\hat\varepsilon = \frac{\ell\, (y - u)}{L^2 + \ell^2} + \frac{c}{\ell}\, \hat\varepsilon(m; c),$$

neither of which cancels. So a deterministic solver draws $x$ given $x_t$ as a smooth map of fresh noise: see
`solve.draw_given`.

**Another schedule**: train with one, sample with another. What is known of $x$ at time $t$ depends on the noise level
$\lambda = \sigma_t / \alpha_t$ alone. A point noised under the schedule $(\alpha', \sigma')$ is, up to a factor, one
noised under $(\alpha, \sigma)$ to the time of the same level:

$$\lambda(t) = \lambda'(t'), \qquad x_t = \frac{\alpha_t}{\alpha'_{t'}}\, x'_{t'}, \qquad
\hat x_0'(x'_{t'}, t') = \hat x_0(x_t, t), \qquad \hat\varepsilon'(x'_{t'}, t') = \hat\varepsilon(x_t, t).$$

Both are the same numbers, whatever the network's target. Products and mixtures of several denoisers are in `combined`;
`nn` says how a network takes conditions.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022, appendix B,
    https://arxiv.org/abs/2206.00364.
    Kingma et al., Variational diffusion models, 2021, section 5.1, https://arxiv.org/abs/2107.00630.
    Holderrieth et al., GLASS flows: transition sampling for alignment of flow and diffusion models, 2025 (two looks in
    one), https://arxiv.org/abs/2509.25170.
"""

import dataclasses
import inspect
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise.prediction import Denoiser, DensityKind, Prediction, density_kind
from numpyro_diffusion.noise import Scaled, Schedule, check_decreasing


class Around:
    """Base of the denoisers that hold another as `base`, of the same schedule, event shape, location and scale."""

    base: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    @property
    def location(self) -> ArrayLike:
        return self.base.location

    @property
    def scale(self) -> ArrayLike:
        return self.base.scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioned(Around):
    """A conditional denoiser that always answers under the same condition.

    Args:
        base: a conditional denoiser, called as `base(x_t, t, cond)`.
        cond: its condition, as the denoiser takes it.

    Raises:
        TypeError: if `base` takes no condition.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import Conditioned, NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> network = NetworkDenoiser(MLP((2,), cond_shape=(3,), rngs=nnx.Rngs(0)))
        >>> Conditioned(network, jnp.ones(3))(jnp.zeros(2), 0.5).x0.shape
        (2,)
    """

    base: Denoiser
    cond: ArrayLike

    def __post_init__(self) -> None:
        # Only its class is checked: a pytree is also rebuilt around leaves that are not arrays.
        if callable(self.base) and not _takes_condition(self.base):
            kind = type(self.base).__name__
            inside = f". To hold a condition inside, give {kind} a Conditioned(denoiser, cond)"
            raise TypeError(
                f"base must be a conditional denoiser, called as base(x_t, t, cond); {kind} takes no condition"
                f"{inside if isinstance(self.base, Around) else ''}"
            )

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """Predicts the clean point under the condition held."""
        return self.base(x_t, t, self.cond)  # type: ignore[call-arg]

    @property
    def density_kind(self) -> DensityKind | None:
        return density_kind(self.base)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """The diffused log-density under the condition held, where the denoiser has one."""
        return self.base.log_density(x_t, t, self.cond)  # type: ignore[attr-defined]


def _takes_condition(denoiser: Denoiser) -> bool:
    try:
        inspect.signature(type(denoiser).__call__).bind(denoiser, None, None, None)
    except TypeError:
        return False
    return not isinstance(denoiser, Rescheduled) or _takes_condition(denoiser.base)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(Around):
    r"""The exact denoiser of $p(x \mid x_t)$, from that of $p(x)$.

    Its schedule is that of the base. Two looks together are never above its highest level, but may be below its lowest,
    by a factor of at most $\sqrt 2$ if both are within it. The base is then asked at its lowest level, and its score
    there stands for that at $c$.

    Args:
        base: the denoiser of $p(x)$.
        x_t: the noisy point that is known, of `event_shape`.
        t: its time, a scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, Given
        >>> from numpyro_diffusion.noise import VE
        >>> law = Gaussian([0.0], 1.0, VE(0.01, 100.0))
        >>> given = Given(law, jnp.array([1.0]), 0.5)  # the noise level is 1, so x is N(0.5, 0.5)
        >>> round(float(given(jnp.array([20.0]), 1.0).x0[0]), 3)  # a second look by noise of 100 hardly matters
        0.501
    """

    base: Denoiser
    x_t: jax.Array
    t: ArrayLike

    @property
    def location(self) -> jax.Array:
        """The mean, of `event_shape`, that the law would have if the base's were Gaussian."""
        known = (self.scale / self.schedule.noise_level(self.t)) ** 2
        return known * (self._seen - self.base.location) + self.base.location

    @property
    def scale(self) -> jax.Array:
        """The standard deviation that the law would have if the base's were Gaussian."""
        level = self.schedule.noise_level(self.t)
        return level * self.base.scale / jnp.hypot(self.base.scale, level)

    @property
    def density_kind(self) -> DensityKind | None:
        return density_kind(self.base)

    def __call__(self, x_s: jax.Array, s: ArrayLike) -> Prediction:
        """Predicts the clean point from a second noisy one, whose time `s` may be below or above `t`."""
        gap, share, m, at = self._looks(x_s, s)
        level, prediction = self.schedule.noise_level(s), self.base(m, at)
        both, asked = self._level_of_both(share, level)
        short = (asked - both) * (asked + both) / asked  # zero unless the base does not know so low a level
        x0 = prediction.x0 + short * prediction.eps
        eps = (1.0 - share) / level * gap + both**2 / (asked * level) * prediction.eps
        dtype = jnp.result_type(prediction.x0)
        return Prediction(x0.astype(dtype), eps.astype(dtype), x_s, s, self.schedule)

    def together(self, x_s: jax.Array, s: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Both looks as one noisy point of the base, and its time."""
        return self._looks(x_s, s)[2:]

    def log_density(self, x_s: jax.Array, s: ArrayLike) -> jax.Array:
        """The diffused log-density, where the base has one; with what a constant of the base leaves of it."""
        gap, _, m, at = self._looks(x_s, s)
        schedule, size = self.schedule, jnp.size(x_s)
        spread = jnp.hypot(schedule.noise_level(self.t), schedule.noise_level(s))
        of_gap = -0.5 * jnp.sum((gap / spread) ** 2) - size * jnp.log(spread * math.sqrt(2.0 * math.pi))
        units = schedule.alpha(at) / schedule.alpha(self.t) / schedule.alpha(s)
        at_both, at_one = self.base.log_density(m, at), self.base.log_density(self.x_t, self.t)  # type: ignore[attr-defined]
        return at_both + of_gap - at_one + size * jnp.log(units)

    @property
    def _seen(self) -> jax.Array:
        return self.x_t / self.schedule.alpha(self.t)

    def _looks(self, x_s: jax.Array, s: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The gap from first look to second; the weight of the second; both as one point for the base, and its time."""
        schedule = self.schedule
        gap, level = x_s / schedule.alpha(s) - self._seen, schedule.noise_level(s)
        share = 1.0 / (1.0 + (level / schedule.noise_level(self.t)) ** 2)
        _, asked = self._level_of_both(share, level)
        at = jnp.clip(schedule.inverse_noise_level(asked), schedule.t_min, schedule.t_max)
        return gap, share, (schedule.alpha(at) * (self._seen + share * gap)).astype(x_s.dtype), at

    def _level_of_both(self, share: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The level of both looks together, and the one at which the base is asked."""
        both = level * jnp.sqrt(share)
        return both, jnp.maximum(both, self.schedule.noise_level(self.schedule.t_min))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Repeated(Around):
    """A denoiser of independent points.

    Args:
        base: the denoiser of one.
        batch_shape: how many, as a shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, Repeated
        >>> Repeated(Gaussian([0.0, 1.0]), (3,))(jnp.zeros((3, 2)), 0.5).x0.shape
        (3, 2)
    """

    base: Denoiser
    batch_shape: tuple[int, ...] = field(metadata={"static": True})

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, *self.base.event_shape)

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """The predictions of all points."""

        def one(x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            prediction = self.base(x_t, t)
            return prediction.x0, prediction.eps

        for _ in self.batch_shape:
            one = jax.vmap(one)
        return Prediction(*one(x_t), x_t, t, self.schedule)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rescheduled:
    """A denoiser that is asked under another schedule; made by `reschedule`.

    Args:
        base: the denoiser that answers, conditional or not.
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

    @property
    def density_kind(self) -> DensityKind | None:
        return density_kind(self.base)

    def __call__(self, x_t: jax.Array, t: ArrayLike, *cond: ArrayLike | None) -> Prediction:
        """The prediction under the new schedule; `cond` is for a conditional `base`."""
        factor, base_t = self._translate(t, jnp.result_type(x_t))
        prediction = self.base(factor * x_t, base_t, *cond)
        return Prediction(prediction.x0, prediction.eps, x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike, *cond: ArrayLike | None) -> jax.Array:
        """The diffused log-density under the new schedule, where the denoiser has one; up to a constant if that is."""
        factor, base_t = self._translate(t, jnp.result_type(x_t))
        return self.base.log_density(factor * x_t, base_t, *cond) + jnp.size(x_t) * jnp.log(factor)  # type: ignore[attr-defined]

    def _translate(self, t: ArrayLike, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """The factor that takes a point to the denoiser's schedule, and the time of the same noise level there."""
        clock = self.base.schedule
        base_t = jnp.clip(clock.inverse_noise_level(self.schedule.noise_level(t)), clock.t_min, clock.t_max)
        return (clock.alpha(base_t) / self.schedule.alpha(t)).astype(dtype), base_t


def reschedule(denoiser: Denoiser, schedule: Schedule) -> Rescheduled:
    r"""The same posterior mean under another schedule.

    Args:
        denoiser: the model.
        schedule: the other noising process, in the units of the denoiser's own schedule: those of the data for an exact
            denoiser, the data's standard deviation for a network.

    Returns:
        A denoiser. Its schedule is the one given, cut to the noise levels that the denoiser knows.

    Raises:
        TypeError: if `schedule` is not a schedule, or a `Scaled` one.
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
    return dataclasses.replace(schedule, t_min=t_min, t_max=t_max)  # type: ignore[type-var]  # all are dataclasses


def inside(denoiser: Denoiser) -> Denoiser:
    """The denoiser inside wrappers that change its schedule or hold its condition: any `denoiser`, or itself."""
    while isinstance(denoiser, Rescheduled | Conditioned):
        denoiser = denoiser.base
    return denoiser
