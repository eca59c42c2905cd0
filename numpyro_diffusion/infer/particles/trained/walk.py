r"""A walk from noise to data with a learned denoiser, and its exact weight under a density.

In units of the prior, with noise levels $0 = \lambda_0 < \lambda_1 < \dots < \lambda_K$ and $\rho = \lambda_k^2 /
\lambda_{k+1}^2$, the walk starts at $x_K \sim N(m, s^2 (1 + \lambda_K^2))$ and steps down by

$$x_k \sim N\left((1 - \rho)\, \hat x_0 + \rho\, x_{k+1},\; (1 - \rho)^2 V + (1 - \rho)\, \lambda_k^2\right),$$

so its density $q$ is a product of normal laws, and that of noise added to a point, $f$, is another. Of a target $\pi$

$$W = \frac{\pi(x_0) \prod_k N(x_{k+1}; x_k, \lambda_{k+1}^2 - \lambda_k^2)}{q(x_0 \dots x_K)}, \qquad
E_q W = \int \pi ,$$

exactly, for any levels and any $\hat x_0$, $V$, $m$ and $s$. These are learned. With $D = x / (1 + \lambda^2)$ and
$V_0 = \lambda^2 / (1 + \lambda^2)$, mean and variance of the clean point if the target were $N(0, I)$,

$$\hat x_0 = D + \sqrt{V_0}\, (g\, u + F), \qquad V = V_0\, e^{G}, \qquad
u = \frac{v}{\sqrt{1 + v^2}}, \quad v = \sqrt{V_0}\, \nabla \log \frac{\pi(D)}{N(D; 0, I)},$$

with a network $(F, G)$ of $x$, $u$ and $\lambda$, which is zero at first, and a gate $g$ by level and coordinate. So
before training, with $g = 0$, the walk ends at $N(0, I)$ itself, and $W = \pi / N$.

What it learns from is in `training`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_diffusion.infer.particles.learned.law import log_normal

LogDensity = Callable[[jax.Array], jax.Array]

_WIDEST = 8.0
"""Largest change of a log-variance by the network."""


class Learned(NamedTuple):
    """What is trained; a pytree."""

    network: nnx.State
    gate: jax.Array  # of the gradient, by level, (K, D)
    centre: jax.Array  # of the start, (D,)
    log_spread: jax.Array  # of the start, (D,)


class Walked(NamedTuple):
    """The end of a walk, and the two parts of the logarithm of its weight."""

    point: jax.Array  # (D,)
    log_tilt: jax.Array  # of the target over N(0, I) at the point, as the model gives it
    log_rest: jax.Array  # of all else


class Walk:
    """How walks go down.

    Args:
        levels: noise levels, increasing, in units of the prior, (K,).
        guided: whether the gradient of the target steers.
        detached: whether a walk counts as given in derivatives, which then are those of its density alone.
    """

    def __init__(self, levels: np.ndarray, guided: bool, detached: bool = True) -> None:
        self.levels, self.guided, self.detached = levels, guided, detached
        self.graph: Any = None

    @property
    def evaluations(self) -> int:
        """Of the target by a walk: gradients at each level, and the value at its end."""
        return 1 + self.guided * len(self.levels)

    def untrained(self, backbone: nnx.Module, size: int) -> Learned:
        """What there is before training, of vectors of a given size."""
        self.graph, network = nnx.split(backbone)
        gate = np.zeros((len(self.levels), size), np.float32)
        return Learned(network, jnp.asarray(gate), jnp.zeros(size), jnp.zeros(size))

    def __call__(self, learned: Learned, key: jax.Array, log_tilt: LogDensity, power: jax.Array) -> Walked:
        """One walk, for the target $N(0, I)$ times a power of what tilts it."""
        network, size = nnx.merge(self.graph, learned.network), learned.centre.size
        levels = jnp.asarray(self.levels, learned.centre.dtype)
        below = jnp.concatenate([jnp.zeros(1, levels.dtype), levels[:-1]])
        key_top, key_steps = jax.random.split(key)

        def given(x: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(x) if self.detached else x

        def down(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
            (x, log_rest), (level, under, gate, key) = carry, at
            ratio, added = (under / level) ** 2, level**2 - under**2
            shift, clean = self._clean(network, gate, x, level, log_tilt, power)
            mean, variance = (1.0 - ratio) * shift, (1.0 - ratio) ** 2 * clean + (1.0 - ratio) * under**2
            step = given(mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape, x.dtype))
            log_rest = log_rest + log_normal(step, added) - log_normal(step - mean, variance)
            return (x + step, log_rest), None

        variance = (1.0 + levels[-1] ** 2) * jnp.exp(2.0 * learned.log_spread)
        top = given(learned.centre + jnp.sqrt(variance) * jax.random.normal(key_top, (size,), levels.dtype))
        start = top, -log_normal(top - learned.centre, variance)
        each = levels, below, learned.gate, jax.random.split(key_steps, len(levels))
        (x, log_rest), _ = jax.lax.scan(down, start, each, reverse=True)
        return Walked(x, log_tilt(x), log_rest + log_normal(x, jnp.ones(())))

    def _clean(
        self, network: Any, gate: jax.Array, x: jax.Array, level: jax.Array, log_tilt: LogDensity, power: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Mean of the clean point, less the noisy one, and its variance, (D,) each."""
        spread = 1.0 + level**2
        unit = level / jnp.sqrt(spread)
        u = jnp.zeros_like(x)
        if self.guided:
            steep = unit * power * jax.grad(log_tilt)(x / spread)
            steep = jnp.where(jnp.isfinite(steep), steep, 0.0)  # it only steers
            u = steep / jnp.sqrt(1.0 + steep**2)
        seen = jnp.concatenate([x / jnp.sqrt(spread), u]).astype(jnp.float32)
        shift, widening = jnp.split(network(seen, 0.25 * jnp.log(level).astype(jnp.float32)).astype(x.dtype), 2)
        widening = _WIDEST * jnp.tanh(widening / _WIDEST)
        return unit * (gate * u + shift - unit * x), unit**2 * jnp.exp(widening)
