r"""A denoiser designed by hand, from a noised log-density that one can write down.

Where $\log p_t(x_t)$ is known at every time, up to a constant that may depend on it, Tweedie's formula has the
denoiser,

$$\hat x_0 = \frac{x_t + \sigma_t^2 \nabla \log p_t(x_t)}{\alpha_t},$$

by automatic differentiation: a box, a wall, a shape, whose density under Gaussian noise is an integral with a name. It
is the denoiser of a law $p$ if $p_t$ is that law under noise,

$$p_t(x_t) = \int p(x)\, N(x_t; \alpha_t x, \sigma_t^2 I)\, \mathrm{d}x.$$

For another path of densities to the same $p$ it is what `Product` is: a target at every level, for kernels that test
their moves, and no reverse process.

Mixtures of Gaussians are in `analytic`, learned energies in `network`.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.composed import DensityKind
from numpyro_diffusion.denoise.prediction import Prediction
from numpyro_diffusion.noise import VE, Scaled, Schedule, check_decreasing


@jax.tree_util.register_pytree_node_class
class FromDensity:
    r"""The denoiser of a noised log-density.

    Args:
        log_density: $\log p_t(x_t)$ as a function `(x_t, t, parameters)` of one point, its time and arrays, to a
            scalar. It is static: the same function is the same program.
        event_shape: shape of one point.
        schedule: the noising process, in the units of the data; `VE()` by default.
        location: a centre of the data, of `event_shape` or a scalar.
        scale: a typical standard deviation of the data, a positive scalar.
        parameters: arrays that the function needs, a pytree.
        normalized: whether the function is the normalised log-density at every time. Mixtures need it.

    Raises:
        TypeError: if `log_density` is not callable, `event_shape` no tuple or `schedule` no schedule.
        ValueError: if `location` has the wrong shape, `scale` is no positive scalar, or the schedule's log-SNR does not
            fall.

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
        if not callable(log_density):
            raise TypeError(f"log_density must be callable as (x_t, t, parameters); got {type(log_density).__name__}")
        if not isinstance(event_shape, tuple):
            raise TypeError(f"event_shape must be a tuple such as (2,); got {event_shape!r}")
        schedule = VE() if schedule is None else schedule
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a noise.Schedule; got {type(schedule).__name__}")
        if not isinstance(schedule, Scaled):  # a scale may be traced, and moves nothing up or down
            check_decreasing(schedule)
        location, scale = (jnp.asarray(v, jnp.result_type(float)) for v in (location, scale))
        if location.shape not in ((), event_shape):
            raise ValueError(f"location must be a scalar or have shape {event_shape}; got {location.shape}")
        if scale.shape != ():
            raise ValueError(f"scale must be a scalar, one for all dimensions; got shape {scale.shape}")
        if not isinstance(scale, jax.core.Tracer):
            _checks.positive(scale=np.asarray(scale))
        self._function, self.event_shape, self._normalized = log_density, event_shape, bool(normalized)
        self.schedule, self.location, self.scale, self.parameters = schedule, location, scale, parameters

    @property
    def density_kind(self) -> DensityKind:
        return "normalized" if self._normalized else "unnormalized"

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: None = None) -> Prediction:
        x_t = jnp.asarray(x_t, jnp.result_type(x_t, float))
        score = jax.grad(self.log_density)(x_t, t)
        x0 = (x_t + self.schedule.sigma(t) ** 2 * score) / self.schedule.alpha(t)
        return Prediction(x0.astype(x_t.dtype), x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """The function given, at a noisy point of `event_shape` and its time: a scalar."""
        if jnp.shape(x_t) != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {jnp.shape(x_t)}. Use jax.vmap")
        value = self._function(x_t, t, self.parameters)
        if jnp.shape(value) != ():
            raise ValueError(f"log_density must return a scalar; got shape {jnp.shape(value)}. Sum over the dimensions")
        return value

    def tree_flatten(self):
        static = self._function, self.event_shape, self._normalized
        return (self.schedule, self.location, self.scale, self.parameters), static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        self = object.__new__(cls)
        self._function, self.event_shape, self._normalized = static
        self.schedule, self.location, self.scale, self.parameters = leaves
        return self
