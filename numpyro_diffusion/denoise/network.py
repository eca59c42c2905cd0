r"""A learned denoiser: a network, the meaning of its output, and its units.

Users stay in the units of their data, $x_t = \alpha_t x + c\, \sigma_t\, \varepsilon$ with $c$ the data's standard
deviation, which is the schedule `Scaled(base, c)`. The network sees standardised ones: with location $m$,

$$u_t = \frac{x_t - \alpha_t m}{c} = \alpha_t u + \sigma_t \varepsilon, \qquad
F = \mathrm{backbone}\!\left( \frac{u_t}{\sqrt{\alpha_t^2 + \sigma_t^2}},\; -\tfrac18 \log \frac{\alpha_t^2}{\sigma_t^2}
\right), \qquad \hat x_0 = m + c\, \hat u_0(u_t, F).$$

The input has unit variance at every time, and its second argument is the same at the same noise level whatever the
schedule. What $F$ stands for is the `target`; `targets` has the table, and the noise that goes with each. Both are
computed from $u_t$, from which the location has been subtracted once, so the noise keeps its digits wherever the data
lie.

Under the edm target the score at $w = u_t / \sqrt{\alpha^2 + \sigma^2}$ is $-w + (\alpha / \sigma) F$. So if $F$ is the
gradient of a scalar $\psi(w)$, the model has a density,

$$\log p_t(x_t) = -\tfrac12 \| w \|^2 + \frac{\alpha_t}{\sigma_t} \psi(w) + \mathrm{const}(t), \qquad F = \nabla \psi,$$

which is what the `energy` target learns, with the same loss and the same scaling as edm. The scalar is either the
network's own output (a free head, `MLP(..., scalar=True)`), or made from a network $f$ with values of the event's
shape as $\psi = \tfrac12 \| w \|^2 - \tfrac12 \| w - f(w) \|^2$. A gradient costs two to three evaluations of $f$. The
loss determines the gradient, and only where the noisy law has mass: between modes that do not overlap at time $t$ a
difference of log-densities is an extrapolation, as it is for any score.

This file evaluates networks; `nn` builds them and `train` trains them.

References:
    Salimans and Ho, Should EBMs model the energy or the score?, 2021, https://openreview.net/forum?id=9AS-TF2jRNb.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise.prediction import DensityKind, Prediction
from numpyro_diffusion.denoise.targets import TARGETS
from numpyro_diffusion.nn import modes
from numpyro_diffusion.nn.condition import Absent, ConditionEmbedding
from numpyro_diffusion.noise import VE, Scaled, Schedule, check_decreasing, value_and_slope


@jax.tree_util.register_pytree_node_class
class NetworkDenoiser:
    r"""The denoiser that a trained network stands for, in the units of the data.

    $\hat x_0 = m + c\, \hat u_0$ with $\hat u_0$ from the network's output as `target` says.

    It is frozen unless `unfreeze` is called: its weights, location and scale have zero gradient, so that no optimiser
    or SVI trains them by accident; gradients with respect to `x_t` and `cond` flow. The network runs in the precision
    of its weights, whatever that of `x_t`, and in evaluation mode, without dropout, unless `in_training` is called. The
    backbone given is copied.

    Args:
        backbone: a `flax.nnx.Module` with `event_shape`, called as `backbone(x, c_noise, cond)` on one point.
        schedule: the noising process in standardised units, where the data has unit variance; `VE()` by default.
        location: centre $m$ of the data, of `event_shape` or a scalar.
        scale: standard deviation $c$ of the data, a positive scalar.
        target: what the network's output means: "edm", "x0", "eps", "v", "velocity", "score" or "energy".
        precision: of the network's matrix products, as in `jax.default_matmul_precision`; None takes JAX's setting.
            Priors and kernels compute everything around the network in full precision.

    Raises:
        TypeError: if `backbone` is not a flax module with an `event_shape`, or `schedule` is not a `Schedule`.
        ValueError: if `target` is unknown, or not "energy" for a scalar backbone, `location` has the wrong shape, or
            `scale` is not a positive scalar.

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
        precision: str | None = None,
    ) -> None:
        if not isinstance(backbone, nnx.Module):
            raise TypeError(f"backbone must be a flax.nnx.Module; got {type(backbone).__name__}")
        event_shape = getattr(backbone, "event_shape", None)
        if not isinstance(event_shape, tuple):
            raise TypeError(f"backbone must have a tuple `event_shape`; {type(backbone).__name__} has none")
        _checks.one_of("target", target, TARGETS)
        _checks.one_of("precision", precision, (None, *_precision.PRECISIONS))
        if getattr(backbone, "scalar", False) and target != "energy":
            raise ValueError(f'target must be "energy" for a backbone that returns a scalar; got {target!r}')
        self.event_shape: tuple[int, ...] = event_shape
        self.target = target
        self.precision = precision
        self.frozen = True
        self._base = _check_schedule(VE() if schedule is None else schedule)
        self._graphdef, self.weights = nnx.split(modes.evaluation(backbone))
        self._training, self._key = modes.training(backbone), None
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
        """The network, a copy with these weights, in evaluation mode."""
        if self._training is None:
            return nnx.merge(self._graphdef, self.weights, copy=True)
        backbone = self._training.merge(jax.random.key(0), self.weights)
        backbone.eval()
        return backbone

    @property
    def training_mode(self) -> modes.TrainingMode | None:
        """How the random layers act in training; None for a network without any."""
        return self._training

    def in_training(self, key: jax.Array) -> "NetworkDenoiser":
        """The same denoiser with its random layers, such as dropout, drawn from a key: one function for each key."""
        return self if self._training is None else self._replace(_key=key)

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

    def with_condition_units(self, location: ArrayLike, scale: ArrayLike) -> "NetworkDenoiser":
        """The same network for conditions of another location and scale, both of its `cond_shape`.

        A network without a `ConditionEmbedding` stays as it is: it standardises conditions itself.
        """
        backbone = nnx.merge(self._graphdef, self.weights, copy=True)
        for _, node in nnx.iter_graph(backbone):
            if isinstance(node, ConditionEmbedding):
                node.location[...] = jnp.broadcast_to(jnp.asarray(location, self.dtype), node.cond_shape)
                node.scale[...] = jnp.broadcast_to(jnp.asarray(scale, self.dtype), node.cond_shape)
        return self._replace(weights=nnx.state(backbone))

    @property
    def needs_condition(self) -> bool:
        """Whether the network takes conditions and has never been trained without one, as far as that is known."""
        absent = [leaf[...] for _, leaf in nnx.to_flat_state(self.weights) if isinstance(leaf, Absent)]
        return any(not isinstance(leaf, jax.core.Tracer) and not np.any(leaf) for leaf in absent)

    def freeze(self) -> "NetworkDenoiser":
        """The same denoiser with zero gradient for its weights, location and scale."""
        return self._replace(frozen=True)

    def unfreeze(self) -> "NetworkDenoiser":
        """The same denoiser with gradients for its weights, location and scale; training uses it."""
        return self._replace(frozen=False)

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> Prediction:
        x_t, u_t, w, c_noise, coefficients = self._standardize(x_t, t)
        network = self._network(c_noise, cond)
        out = (jax.grad(network) if self.target == "energy" else network)(w).astype(x_t.dtype)
        u0, eps = TARGETS[self.target](u_t, out, *coefficients)
        x0 = self.location.astype(x_t.dtype) + self.scale.astype(x_t.dtype) * u0
        return Prediction(x0, eps, x_t, t, self.schedule)

    @property
    def density_kind(self) -> DensityKind | None:
        """An energy has a density up to a constant; another network has none."""
        return "unnormalized" if self.target == "energy" else None

    def log_density(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> jax.Array:
        r"""The log-density $\log p_t(x_t)$ of an energy, in nats, up to a constant.

        The constant depends on `t` and `cond`, so only differences between points at one time and condition mean
        anything. It is chosen so that standard normal data with $\psi = 0$ are normalised.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.
            cond: what the network is conditioned on.

        Returns:
            A scalar, whose gradient in `x_t` is the score of the prediction.

        Raises:
            TypeError: if the target is not "energy": another network has a score but no density.
        """
        if self.target != "energy":
            raise TypeError(
                f'log_density needs target="energy"; a network with target={self.target!r} has a score but no density. '
                "density.log_prob integrates its probability flow"
            )
        x_t, _, w, c_noise, (alpha, sigma, *_) = self._standardize(x_t, t)
        spread = 2.0 * math.pi * self.scale.astype(x_t.dtype) ** 2 * (alpha**2 + sigma**2)
        gaussian = -0.5 * jnp.sum(w**2 + jnp.log(spread))
        return gaussian + alpha / sigma * self._network(c_noise, cond)(w).astype(x_t.dtype)

    def _standardize(
        self, x_t: jax.Array, t: ArrayLike
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]:
        """The point, itself standardised, with unit variance, the noise coordinate, and alpha, sigma, their slopes."""
        x_t = jnp.asarray(x_t, jnp.result_type(x_t, float))
        if x_t.shape != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {x_t.shape}. Use jax.vmap")
        (alpha, alpha_slope), (sigma, sigma_slope) = (
            value_and_slope(f, t) for f in (self._base.alpha, self._base.sigma)
        )
        scalars = -self._base.log_snr(t) / 8.0, alpha, sigma, alpha_slope, sigma_slope
        c_noise, *coefficients = (c.astype(x_t.dtype) for c in scalars)
        u_t = (x_t - coefficients[0] * self.location.astype(x_t.dtype)) / self.scale.astype(x_t.dtype)
        return x_t, u_t, u_t / jnp.hypot(*coefficients[:2]), c_noise, coefficients

    def _network(self, c_noise: jax.Array, cond: Any) -> Callable[[jax.Array], jax.Array]:
        """The network's output at a point of unit variance; for an energy, the scalar made of it."""
        weights = jax.tree.map(jax.lax.stop_gradient, self.weights) if self.frozen else self.weights
        backbone = nnx.merge(self._graphdef, weights)
        scalar = getattr(backbone, "scalar", False)

        def network(w: jax.Array) -> jax.Array:
            w, *others = _cast((w, c_noise, cond), self.dtype)
            called = backbone if self._key is None else self._training.merge(self._key, weights)
            with _precision.network(self.precision):
                out, expected = called(w, *others), () if scalar else self.event_shape
            if jnp.shape(out) != expected:
                raise ValueError(f"backbone must return shape {expected}; got {jnp.shape(out)}")
            return jnp.sum((w - 0.5 * out) * out) if self.target == "energy" and not scalar else out

        return network

    def _replace(self, **changes: Any) -> "NetworkDenoiser":
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def tree_flatten(self) -> tuple[tuple, tuple]:
        static = self._graphdef, self._training, self._base, self.target, self.precision, self.event_shape, self.frozen
        return (self.weights, self._location, self._scale, self._key), static

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> "NetworkDenoiser":
        self = object.__new__(cls)
        self._graphdef, self._training, self._base, self.target, self.precision, self.event_shape, self.frozen = static
        self.weights, self._location, self._scale, self._key = leaves
        return self


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
    return check_decreasing(schedule)


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
