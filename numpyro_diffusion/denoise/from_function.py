r"""Denoisers written by the user: from a noised log-density, or from a score, a noise or a posterior mean.

Where $\log p_t(x_t)$ is known at every time, up to a constant that may depend on it, Tweedie's formula has the
denoiser,

$$\hat\varepsilon = -\sigma_t \nabla \log p_t(x_t), \qquad
\hat x_0 = \frac{x_t + \sigma_t^2 \nabla \log p_t(x_t)}{\alpha_t},$$

by automatic differentiation (`FromDensity`): for a box, a wall or another shape whose density under Gaussian noise has
a closed form. If you have the score itself, or one of its other forms, such as a network of another library,
`FromFunction` takes it as it is. Either is the denoiser of a law $p$ if $p_t$ is that law under noise,

$$p_t(x_t) = \int p(x)\, N(x_t; \alpha_t x, \sigma_t^2 I)\, \mathrm{d}x.$$

For another path of densities to the same $p$ it is like a `Product`: a target at every level, for kernels that test
their moves, but not a reverse process.

Mixtures of Gaussians are in `analytic`, flax networks and learned energies in `network`.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.prediction import DensityKind, Prediction
from numpyro_diffusion.noise import Schedule, schedule_for

PREDICTS = ("score", "eps", "x0")


class Written:
    """What all have in common: a static function, mostly of (x_t, t, parameters), and where the data lie."""

    _choice: bool | str | tuple[int, int, int, bool]  # of the user, besides the function

    def __init__(
        self,
        name: str,
        function: Callable[..., jax.Array],
        event_shape: tuple[int, ...],
        schedule: Schedule | None,
        location: ArrayLike,
        scale: ArrayLike,
        parameters: Any,
    ) -> None:
        if not callable(function):
            raise TypeError(f"{name} must be callable as (x_t, t, parameters); got {type(function).__name__}")
        if not isinstance(event_shape, tuple):
            raise TypeError(f"event_shape must be a tuple such as (2,); got {event_shape!r}")
        location, scale = (jnp.asarray(v, jnp.result_type(float)) for v in (location, scale))
        if location.shape not in ((), event_shape):
            raise ValueError(f"location must be a scalar or have shape {event_shape}; got {location.shape}")
        if scale.shape != ():
            raise ValueError(f"scale must be a scalar, one for all dimensions; got shape {scale.shape}")
        if not isinstance(scale, jax.core.Tracer):
            _checks.positive(scale=np.asarray(scale))
        self._function, self.event_shape, self.parameters = function, event_shape, parameters
        self.location, self.scale = location, scale
        self._schedule = schedule_for(scale, None, schedule)

    @property
    def schedule(self) -> Schedule:
        """The noising process, in the units of the data; no gradient flows into its scale."""
        return jax.tree.map(jax.lax.stop_gradient, self._schedule)

    def _check_point(self, x_t: jax.Array) -> jax.Array:
        if jnp.shape(x_t) != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {jnp.shape(x_t)}. Use jax.vmap")
        return jnp.asarray(x_t, jnp.result_type(x_t, float))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        static = self._function, self.event_shape, self._choice
        return (self._schedule, self.location, self.scale, self.parameters), static

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> Self:
        self = object.__new__(cls)
        self._function, self.event_shape, self._choice = static
        self._schedule, self.location, self.scale, self.parameters = leaves
        return self


@jax.tree_util.register_pytree_node_class
class FromDensity(Written):
    r"""The denoiser of a noised log-density.

    Args:
        log_density: $\log p_t(x_t)$ as a function `(x_t, t, parameters)` of one point, its time and arrays, to a
            scalar. It is static: another function is another program.
        event_shape: shape of one point.
        schedule: the noising process that the function knows, in the units of the data; by default the levels of
            `VE()` in units of `scale`.
        location: a centre of the data, of `event_shape` or a scalar.
        scale: a typical standard deviation of the data, a positive scalar.
        parameters: arrays that the function needs, a pytree.
        normalized: whether the function is the normalised log-density at every time. Mixtures need it.

    Raises:
        TypeError: if `log_density` is not callable, `event_shape` not a tuple or `schedule` not a schedule.
        ValueError: if `location` has the wrong shape, `scale` is not a positive scalar, or the schedule's log-SNR does
            not fall or its lowest noise level is above `scale`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.scipy.stats import norm
        >>> from numpyro_diffusion.denoise import FromDensity
        >>> from numpyro_diffusion.noise import Rectified
        >>> def log_density(x_t, t, centre):  # N(centre, 1) under noise
        ...     return norm.logpdf(x_t, (1 - t) * centre, jnp.hypot(1 - t, t)).sum()
        >>> denoiser = FromDensity(log_density, (1,), Rectified(), parameters=3.0)
        >>> denoiser(jnp.array([1.5]), 0.5).x0.tolist()
        [3.0]
    """

    def __init__(
        self,
        log_density: Callable[[jax.Array, ArrayLike, Any], jax.Array],
        event_shape: tuple[int, ...],
        schedule: Schedule | None = None,
        location: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        parameters: Any = None,
        normalized: bool = False,
    ) -> None:
        super().__init__("log_density", log_density, event_shape, schedule, location, scale, parameters)
        self._choice = bool(normalized)

    @property
    def density_kind(self) -> DensityKind:
        return "normalized" if self._choice else "unnormalized"

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        x_t = self._check_point(x_t)
        eps = -self.schedule.sigma(t) * jax.grad(self.log_density)(x_t, t)
        return Prediction.from_eps(eps.astype(x_t.dtype), x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """The function given, at a noisy point of `event_shape` and its time: a scalar."""
        value = self._function(self._check_point(x_t), t, self.parameters)
        if jnp.shape(value) != ():
            raise ValueError(f"log_density must return a scalar; got shape {jnp.shape(value)}. Sum over the dimensions")
        return value


@jax.tree_util.register_pytree_node_class
class FromFunction(Written):
    r"""The denoiser of a function of your own: a score, a predicted noise or a posterior mean.

    Args:
        function: `(x_t, t, parameters)` of one point of `event_shape`, its time and arrays, to an array of
            `event_shape`. It is static, so put what changes into `parameters`.
        event_shape: shape of one point.
        predicts: what the function returns: "score", $\nabla \log p_t(x_t)$; "eps", $E[\varepsilon \mid x_t]$; or "x0",
            $E[x \mid x_t]$, whose score loses digits where the noise is small beside the values of the data.
        schedule: the noising process that the function knows, in the units of the data; by default the levels of
            `VE()` in units of `scale`.
        location: a centre of the data, of `event_shape` or a scalar.
        scale: a typical standard deviation of the data, a positive scalar.
        parameters: arrays that the function needs, a pytree.

    Raises:
        TypeError: if `function` is not callable, `event_shape` not a tuple or `schedule` not a schedule.
        ValueError: if `predicts` is unknown, `location` has the wrong shape, `scale` is not a positive scalar, or the
            schedule's log-SNR does not fall or its lowest noise level is above `scale`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import FromFunction
        >>> from numpyro_diffusion.noise import VE
        >>> schedule = VE(0.002, 80.0)
        >>> def score(x_t, t, centre):  # of N(centre, 1) under noise
        ...     return (centre - x_t) / (1.0 + schedule.sigma(t) ** 2)
        >>> denoiser = FromFunction(score, (2,), "score", schedule, location=3.0, parameters=3.0)
        >>> denoiser(jnp.array([3.0, 3.0]), 0.5).x0.tolist()
        [3.0, 3.0]
    """

    def __init__(
        self,
        function: Callable[[jax.Array, ArrayLike, Any], jax.Array],
        event_shape: tuple[int, ...],
        predicts: Literal["score", "eps", "x0"],
        schedule: Schedule | None = None,
        location: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        parameters: Any = None,
    ) -> None:
        _checks.one_of("predicts", predicts, PREDICTS)
        super().__init__("function", function, event_shape, schedule, location, scale, parameters)
        self._choice = predicts

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        x_t = self._check_point(x_t)
        value = jnp.asarray(self._function(x_t, t, self.parameters), x_t.dtype)
        if value.shape != self.event_shape:
            raise ValueError(f"function must return shape {self.event_shape}; got {value.shape}")
        if self._choice == "x0":
            return Prediction.from_x0(value, x_t, t, self.schedule)
        eps = value if self._choice == "eps" else (-self.schedule.sigma(t) * value).astype(x_t.dtype)
        return Prediction.from_eps(eps, x_t, t, self.schedule)
