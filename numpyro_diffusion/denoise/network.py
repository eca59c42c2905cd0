r"""A learned denoiser: a network, what its output means, and the units it lives in.

Users stay in the units of their data, $x_t = \alpha_t x + c\, \sigma_t\, \varepsilon$ with $c$ the data's standard
deviation, which is the schedule `Scaled(base, c)`. The network sees standardised ones: with location $m$,

$$u_t = \frac{x_t - \alpha_t m}{c} = \alpha_t u + \sigma_t \varepsilon, \qquad
F = \mathrm{backbone}\!\left( \frac{u_t}{\sqrt{\alpha_t^2 + \sigma_t^2}},\; -\tfrac18 \log \frac{\alpha_t^2}{\sigma_t^2}
\right), \qquad \hat x_0 = m + c\, \hat u_0(u_t, F).$$

The input has unit variance at every time, and its second argument is the same at the same noise level whatever the
schedule. What $F$ stands for is the `target`:

    target   F stands for                       posterior mean of u
    x0       u                                  F
    eps      the noise                          (u_t - sigma F) / alpha
    score    sigma times the score, -eps        (u_t + sigma F) / alpha
    v        alpha eps - sigma u                (alpha u_t - sigma F) / (alpha^2 + sigma^2)
    velocity alpha' u + sigma' eps              (sigma F - sigma' u_t) / (sigma alpha' - alpha sigma')
    edm      what a linear guess leaves over    (alpha u_t + sigma sqrt(alpha^2 + sigma^2) F) / (alpha^2 + sigma^2)

The last is the preconditioning of Karras et al. for any $(\alpha, \sigma)$: $\alpha / (\alpha^2 + \sigma^2)$ times
$u_t$ is the best linear guess for data of unit variance, its residual has standard deviation
$\sigma / \sqrt{\alpha^2 + \sigma^2}$, and $F$ estimates that residual in units of its deviation, of order one at every
time. It is the default; `eps` and `score` divide by $\alpha$ and lose precision where the noise is large. The velocity
is that of flow matching and of stochastic interpolants: eps - u for `Rectified`; under `VE` it grows with sigma.

This file evaluates networks; `nn` builds them and `train` trains them.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
    Song and Ermon, Improved techniques for training score-based generative models, 2020 (output divided by sigma),
    https://arxiv.org/abs/2006.09011.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.prediction import Prediction
from numpyro_diffusion.noise import VE, Scaled, Schedule, value_and_slope

# Posterior mean in standardised units from (u_t, network output, alpha, sigma, alpha', sigma').
TARGETS = {
    "edm": lambda u_t, out, a, s, *_: (a * u_t + s * jnp.sqrt(a**2 + s**2) * out) / (a**2 + s**2),
    "x0": lambda u_t, out, a, s, *_: out,
    "eps": lambda u_t, out, a, s, *_: (u_t - s * out) / a,
    "v": lambda u_t, out, a, s, *_: (a * u_t - s * out) / (a**2 + s**2),
    "velocity": lambda u_t, out, a, s, a_slope, s_slope: (s * out - s_slope * u_t) / (s * a_slope - a * s_slope),
    "score": lambda u_t, out, a, s, *_: (u_t + s * out) / a,
}


@jax.tree_util.register_pytree_node_class
class NetworkDenoiser:
    r"""The denoiser that a trained network stands for, in the units of the data.

    $\hat x_0 = m + c\, \hat u_0$ with $\hat u_0$ from the network's output as `target` says.

    It is frozen unless `unfreeze` is called: its weights, location and scale have zero gradient, so that no optimiser
    or SVI trains them by accident; gradients with respect to `x_t` and `cond` flow. The network runs in the precision
    of its weights, whatever that of `x_t`, and in evaluation mode, without dropout. The backbone given is copied.

    Args:
        backbone: a `flax.nnx.Module` with `event_shape`, called as `backbone(x, c_noise, cond)` on one point.
        schedule: the noising process in standardised units, where the data has unit variance; `VE()` by default.
        location: centre $m$ of the data, of `event_shape` or a scalar.
        scale: standard deviation $c$ of the data, a positive scalar.
        target: what the network's output means: "edm", "x0", "eps", "v", "velocity" or "score".

    Raises:
        TypeError: if `backbone` is not a flax module with an `event_shape`, or `schedule` is not a `Schedule`.
        ValueError: if `target` is unknown, `location` has the wrong shape, or `scale` is not a positive scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> denoiser = NetworkDenoiser(MLP((2,), rngs=nnx.Rngs(0)), location=5.0)
        >>> denoiser(jnp.array([5.0, 5.0]), 0.5).x0.tolist()
        [5.0, 5.0]
    """

    def __init__(
        self,
        backbone: nnx.Module,
        *,
        schedule: Schedule | None = None,
        location: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        target: str = "edm",
    ) -> None:
        if not isinstance(backbone, nnx.Module):
            raise TypeError(f"backbone must be a flax.nnx.Module; got {type(backbone).__name__}")
        if not isinstance(getattr(backbone, "event_shape", None), tuple):
            raise TypeError(f"backbone must have a tuple `event_shape`; {type(backbone).__name__} has none")
        _checks.one_of("target", target, TARGETS)
        self.event_shape = backbone.event_shape
        self.target = target
        self.frozen = True
        self._base = _check_schedule(VE() if schedule is None else schedule)
        self._graphdef, self.weights = nnx.split(_deterministic(backbone))
        self._location, self._scale = _check_units(location, scale, self.event_shape, self.dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """The precision of the weights, in which the network is evaluated."""
        floats = [w.dtype for w in jax.tree.leaves(self.weights) if jnp.issubdtype(w.dtype, jnp.floating)]
        return jnp.result_type(*floats) if floats else jnp.result_type(float)

    @property
    def location(self) -> jax.Array:
        """Centre of the data, of `event_shape`."""
        return jax.lax.stop_gradient(self._location) if self.frozen else self._location

    @property
    def scale(self) -> jax.Array:
        """Standard deviation of the data, a scalar."""
        return jax.lax.stop_gradient(self._scale) if self.frozen else self._scale

    @property
    def schedule(self) -> Scaled:
        """The noising process in the units of the data; its `base` is the one in standardised units."""
        return Scaled(self._base, self.scale)

    @property
    def backbone(self) -> nnx.Module:
        """The network, a copy with these weights."""
        return nnx.merge(self._graphdef, self.weights, copy=True)

    @property
    def params(self) -> nnx.State:
        """The part of the weights that is trained: every `nnx.Param`."""
        return nnx.split_state(self.weights, nnx.Param, ...)[0]

    def with_params(self, params: nnx.State) -> "NetworkDenoiser":
        """The same denoiser with other trained weights, of the structure of `params`."""
        return self._replace(weights=nnx.merge_state(self.weights, params))

    def with_units(self, location: ArrayLike, scale: ArrayLike) -> "NetworkDenoiser":
        """The same network for data of another location and scale."""
        location, scale = _check_units(location, scale, self.event_shape, self.dtype)
        return self._replace(_location=location, _scale=scale)

    def freeze(self) -> "NetworkDenoiser":
        """The same denoiser with zero gradient for its weights, location and scale."""
        return self._replace(frozen=True)

    def unfreeze(self) -> "NetworkDenoiser":
        """The same denoiser with gradients for its weights, location and scale; training uses it."""
        return self._replace(frozen=False)

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> Prediction:
        x_t = jnp.asarray(x_t, jnp.result_type(x_t, float))
        if x_t.shape != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {x_t.shape}. Use jax.vmap")
        (alpha, alpha_slope), (sigma, sigma_slope) = (
            value_and_slope(f, t) for f in (self._base.alpha, self._base.sigma)
        )
        coefficients = alpha, sigma, alpha_slope, sigma_slope, -self._base.log_snr(t) / 8.0
        alpha, sigma, *slopes, c_noise = (c.astype(x_t.dtype) for c in coefficients)
        u_t = (x_t - alpha * self.location.astype(x_t.dtype)) / self.scale.astype(x_t.dtype)
        out = self._evaluate(u_t / jnp.sqrt(alpha**2 + sigma**2), c_noise, cond)
        u0 = TARGETS[self.target](u_t, out.astype(x_t.dtype), alpha, sigma, *slopes)
        x0 = self.location.astype(x_t.dtype) + self.scale.astype(x_t.dtype) * u0
        return Prediction(x0, x_t, t, self.schedule)

    def _evaluate(self, *inputs: Any) -> jax.Array:
        """The network's output, everything cast to the precision of its weights."""
        weights = jax.tree.map(jax.lax.stop_gradient, self.weights) if self.frozen else self.weights
        out = nnx.merge(self._graphdef, weights)(*_cast(inputs, self.dtype))
        if jnp.shape(out) != self.event_shape:
            raise ValueError(f"backbone must return shape {self.event_shape}; got {jnp.shape(out)}")
        return out

    def _replace(self, **changes) -> "NetworkDenoiser":
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def tree_flatten(self):
        static = (self._graphdef, self._base, self.target, self.event_shape, self.frozen)
        return (self.weights, self._location, self._scale), static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        self = object.__new__(cls)
        self._graphdef, self._base, self.target, self.event_shape, self.frozen = static
        self.weights, self._location, self._scale = leaves
        return self


def _deterministic(backbone: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode, without the random streams that dropout would draw from."""
    backbone = nnx.clone(backbone)
    backbone.eval()
    for _, node in list(nnx.iter_graph(backbone)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Rngs | nnx.RngStream):
                    setattr(node, name, None)
    return backbone


def _cast(inputs: Any, dtype: jnp.dtype) -> Any:
    """Arrays of a pytree, the floating ones in another precision."""

    def cast(value: ArrayLike) -> jax.Array:
        value = jnp.asarray(value)
        return value.astype(dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value

    return jax.tree.map(cast, inputs)


def _check_schedule(schedule: Schedule) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a noise.Schedule; got {type(schedule).__name__}")
    if isinstance(schedule, Scaled):
        raise TypeError("schedule must be in standardised units; got a Scaled one. Give its base, and scale=")
    with jax.ensure_compile_time_eval():
        log_snr = np.asarray(schedule.log_snr(jnp.linspace(schedule.t_min, schedule.t_max, 33)))
    if not (np.diff(log_snr) < 0).all():
        raise ValueError(f"the log-SNR of schedule must decrease from t_min to t_max; that of {schedule} does not")
    return schedule


def _check_units(
    location: ArrayLike, scale: ArrayLike, event_shape: tuple[int, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Location of `event_shape` and scalar scale, both in the precision of the weights."""
    location, scale = jnp.asarray(location, dtype), jnp.asarray(scale, dtype)
    if location.shape not in ((), event_shape):
        raise ValueError(f"location must be a scalar or have shape {event_shape}; got {location.shape}")
    if scale.shape != ():
        raise ValueError(f"scale must be a scalar, one for all dimensions; got shape {scale.shape}")
    if not isinstance(location, jax.core.Tracer):
        _checks.finite("location", location)
    if not isinstance(scale, jax.core.Tracer):
        _checks.positive(scale=np.asarray(scale))
    return jnp.broadcast_to(location, event_shape), scale
