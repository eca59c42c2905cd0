r"""The exact denoiser of a set of points.

Points $x_i$ with weights $w_i$, each blurred by a bandwidth $h$, are a law $\sum_i w_i N(x_i, h^2 I)$: the mixture of
`GaussianMixture` with a component for each point. With $\tau^2 = \alpha^2 h^2 + \sigma^2$,

$$E[x \mid x_t] = \bar x + \frac{\alpha h^2}{\tau^2} (x_t - \alpha \bar x), \qquad
\bar x = \sum_i r_i(x_t)\, x_i, \qquad r_i \propto w_i\, N(x_t; \alpha x_i, \tau^2 I).$$

This is what a network that has learned its examples by heart computes: without a bandwidth, draws are the points
themselves. All points enter each evaluation, block by block, so that memory does not grow with their number.

As the denoiser of the blurred points it is exact. As an estimate of the denoiser of the law that the points were drawn
from (or are importance draws of, with weights) it has the error of a self-normalised mean, see `weighted`, and the bias
of the bandwidth.

References:
    Silverman, Density estimation for statistics and data analysis, 1986, section 4.3.2 (the default bandwidth).
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022, appendix B.3 (the ideal
    denoiser of a finite set), https://arxiv.org/abs/2206.00364.
"""

import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.designed.weighted import Estimate
from numpyro_diffusion.denoise.prediction import Prediction
from numpyro_diffusion.noise import Schedule, schedule_for


@jax.tree_util.register_pytree_node_class
class FromSamples:
    r"""The exact denoiser of weighted points, blurred by a bandwidth.

    Args:
        samples: shape (N, *event_shape).
        bandwidth: standard deviation $h$ of the blur, a scalar, at least 0. None takes Silverman's rule for a normal
            law of the points' scale, $s\,(4 / ((d + 2) n))^{1 / (d + 4)}$ with the weights' effective size $n$: too
            wide for several modes far apart.
        weights: shape (N,), non-negative, not all zero; they are normalised. None weighs all alike.
        schedule: the noising process, in the units of the data; by default the levels of `VE()` in units of the scale
            of the points, down to below the bandwidth.
        block_size: how many points are looked at at once.

    Raises:
        TypeError: if `schedule` is not a schedule.
        ValueError: if `samples` has fewer than two points or one that is not finite, if all points are the same, the
            bandwidth is negative, the weights do not match or all vanish, or the schedule's lowest noise level is above
            the bandwidth.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import FromSamples
        >>> x = jax.random.normal(jax.random.key(0), (2000, 1))
        >>> denoiser = FromSamples(x, bandwidth=0.1)
        >>> found = denoiser.estimate(jnp.array([1.0]), denoiser.schedule.inverse_noise_level(1.0))
        >>> bool(abs(found.prediction.x0[0] - 0.5) < 4 * found.standard_error[0] + 0.01)  # of N(0, 1): x_t / 2
        True
    """

    def __init__(
        self,
        samples: ArrayLike,
        bandwidth: float | None = None,
        weights: ArrayLike | None = None,
        schedule: Schedule | None = None,
        *,
        block_size: int = 1024,
    ) -> None:
        samples = np.asarray(samples, jnp.result_type(float))
        if samples.ndim < 2 or len(samples) < 2:
            raise ValueError(f"samples must have shape (N, *event_shape) with N of at least 2; got {samples.shape}")
        _checks.finite("samples", samples)
        _checks.at_least(1, block_size=block_size)
        weights = np.ones(len(samples)) if weights is None else np.asarray(weights, float)
        if weights.shape != (len(samples),):
            raise ValueError(f"weights must have shape ({len(samples)},), one for each point; got {weights.shape}")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError("weights must be finite and non-negative with a positive sum")
        weights = weights / weights.sum()
        centre = np.tensordot(weights, samples.astype(float), 1)
        spread = (samples - centre).reshape(len(samples), -1) ** 2
        scale, dimension = math.sqrt(weights @ spread.mean(1)), spread.shape[1]
        if not scale > 0:
            raise ValueError("samples must not all be the same point; those with a weight are")
        if bandwidth is None:
            bandwidth = scale * (4.0 * np.sum(weights**2) / (dimension + 2.0)) ** (1.0 / (dimension + 4.0))
        if not (np.isfinite(bandwidth) and bandwidth >= 0):
            raise ValueError(f"bandwidth must be at least 0 and finite; got {bandwidth}")
        self._schedule = schedule_for(scale, bandwidth or None, schedule)
        dtype = jnp.result_type(float)
        self.location, self.scale = jnp.asarray(centre, dtype), jnp.asarray(scale, dtype)
        self.bandwidth = jnp.asarray(bandwidth, dtype)
        blocks = -(-len(samples) // block_size)
        size = -(-len(samples) // blocks)
        missing = blocks * size - len(samples)  # filled by points without weight
        centred = np.concatenate([samples - centre, np.zeros((missing, *samples.shape[1:]))])
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.concatenate([weights, np.zeros(missing)]))
        self._blocks = jnp.asarray(centred.reshape(blocks, size, *samples.shape[1:]), dtype)
        self._log_weights = jnp.asarray(log_weights.reshape(blocks, size), dtype)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self._blocks.shape[2:]

    @property
    def schedule(self) -> Schedule:
        """The noising process, in the units of the data; no gradient flows into its scale."""
        return jax.tree.map(jax.lax.stop_gradient, self._schedule)

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        return self.estimate(x_t, t).prediction

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""The diffused log-density $\log p_t(x_t)$ of the blurred points, normalised, in nats: a scalar."""
        return self.estimate(x_t, t).log_density

    def estimate(self, x_t: jax.Array, t: ArrayLike) -> Estimate:
        """The prediction, exact for the points, with its error as that of the law that they were drawn from.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.

        Returns:
            The `Estimate`; its error knows nothing of the bandwidth.
        """
        if jnp.shape(x_t) != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {jnp.shape(x_t)}. Use jax.vmap")
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = (alpha * self.bandwidth) ** 2 + sigma**2
        axes = tuple(range(1, self._blocks.ndim - 1))
        from_centre = x_t - alpha * self.location

        def add(sums: tuple, block: tuple) -> tuple[tuple, None]:
            largest, *before = sums
            points, log_weights = block
            residuals = from_centre - alpha * points
            log_r = log_weights - 0.5 * jnp.sum(residuals**2, axes) / variance
            new = jnp.maximum(largest, jax.lax.stop_gradient(log_r.max()))
            r = jnp.exp(log_r - new)
            kept = jnp.where(jnp.isneginf(largest), 0.0, jnp.exp(largest - new))

            def summed(weights: jax.Array, values: jax.Array) -> jax.Array:
                return jnp.tensordot(weights, values, 1, precision="highest")

            here = [r.sum(), (r**2).sum(), summed(r, points), summed(r, residuals)]
            here += [summed(r**2, residuals), summed(r**2, residuals**2)]
            factors = [kept, kept**2, kept, kept, kept**2, kept**2]
            return (new, *(f * b + h for f, b, h in zip(factors, before, here, strict=True))), None

        zero, zeros = jnp.zeros((), x_t.dtype), jnp.zeros(self.event_shape, x_t.dtype)
        first = jnp.full((), -jnp.inf, x_t.dtype), zero, zero, zeros, zeros, zeros, zeros
        body = jax.checkpoint(add) if len(self._blocks) > 1 else add
        (largest, total, squares, points, residual, linear, quadratic), _ = jax.lax.scan(
            body, first, (self._blocks, self._log_weights)
        )
        residual = residual / total
        x0 = self.location + points / total + alpha * self.bandwidth**2 / variance * residual
        eps = sigma / variance * residual
        spread = jnp.maximum(quadratic - 2.0 * residual * linear + residual**2 * squares, 0.0)
        error = sigma**2 / (alpha * variance) * jnp.sqrt(spread) / total
        size = 0.5 * zeros.size * jnp.log(2.0 * math.pi * variance)
        prediction = Prediction(x0.astype(x_t.dtype), eps.astype(x_t.dtype), x_t, t, self.schedule)
        return Estimate(prediction, error, total**2 / squares, largest + jnp.log(total) - size)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws of the blurred points, shape `sample_shape + event_shape`."""
        key_point, key_noise = jax.random.split(key)
        chosen = jax.random.categorical(key_point, self._log_weights.reshape(-1), shape=sample_shape)
        points = self.location + self._blocks.reshape(-1, *self.event_shape)[chosen]
        return points + self.bandwidth * jax.random.normal(key_noise, points.shape, points.dtype)

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self._blocks, self._log_weights, self.bandwidth, self.location, self.scale, self._schedule), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple) -> Self:
        self = object.__new__(cls)
        self._blocks, self._log_weights, self.bandwidth, self.location, self.scale, self._schedule = leaves
        return self
