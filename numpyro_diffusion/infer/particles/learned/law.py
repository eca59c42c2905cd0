r"""A law that is learned from chains, as a proposal: a diffusion whose draws have weights that are exact.

The law of whitened vectors $w$ starts as a mixture of normal laws, one or more for each mode that the chains have found
(`modes`). Under noise it stays one, with closed forms at every level: its density, its denoiser, and the law of a point
at one level given that at the next. Where a mixture is not enough, a network learns by how much its denoiser is off,

$$D_\theta(y, \lambda) = D_{\mathrm{mix}}(y, \lambda) + \delta_\theta(y, \lambda),$$

and the law is that of a walk down the levels $\lambda_K > \dots > \lambda_1 > \lambda_0 = 0$,

$$q(y_0 \dots y_K) = p_{\mathrm{mix}, \lambda_K}(y_K) \prod_k q(y_{k-1} \mid y_k), \qquad
q(y_{k-1} \mid y_k) = \sum_j r_j(y_k)\, N\!\left(m_j(y_k) + (1 - \rho_k)\, \delta_\theta(y_k),\, V_{j,k}\right),$$

$\rho_k = \lambda_{k-1}^2 / \lambda_k^2$. Without the network this is the mixture, whatever the levels are.

**The weight.** The density of $y_0$ alone is not known, and not needed. On whole walks the posterior is $\pi(y_0)$
times the law $f$ of the noise that is added, and

$$\frac{\pi(y_0)\, f(y_1 \dots y_K \mid y_0)}{q(y_0 \dots y_K)}$$

is an importance weight that is exact for any network, any levels and any number of them: errors cost acceptance, not
truth. A chain that stands at $w$ draws its own walk anew, by adding noise. Without levels the weight is $\pi / q$.

References:
    Sohl-Dickstein et al., Deep unsupervised learning using nonequilibrium thermodynamics, 2015 (the law of a walk),
    https://arxiv.org/abs/1503.03585.
    Gabrié, Rotskoff, Vanden-Eijnden, Adaptive Monte Carlo augmented with normalizing flows, 2022,
    https://arxiv.org/abs/2105.12603.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.learned.units import Units


def log_normal(x: jax.Array, variance: jax.Array) -> jax.Array:
    """Log-density of independent centred normal entries, summed over the last axis."""
    return norm.logpdf(x, scale=jnp.sqrt(variance)).sum(-1)


class Modes(NamedTuple):
    """A mixture of J normal laws in d dimensions, with covariances V diag(s) V'."""

    log_weights: jax.Array  # (J,), of sum one
    means: jax.Array  # (J, d)
    variances: jax.Array  # s, (J, d)
    axes: jax.Array  # V, (J, d, d), a direction in each column

    def along(self, y: jax.Array) -> jax.Array:
        """Coordinates of a point from each mean along the axes, (J, d)."""
        return jnp.einsum("jik,ji->jk", self.axes, y - self.means)

    def log_parts(self, y: jax.Array, level: ArrayLike) -> jax.Array:
        """Log-density of each part, with its weight, under noise, (J,)."""
        return self.log_weights + log_normal(self.along(y), self.variances + level**2)

    def log_density(self, y: jax.Array, level: ArrayLike) -> jax.Array:
        """Of a point under noise, a scalar."""
        return jax.nn.logsumexp(self.log_parts(y, level))

    def given(self, y: jax.Array, level: ArrayLike) -> jax.Array:
        """Posterior means of the clean point by part, given a noisy one, (J, d)."""
        gain = self.variances / (self.variances + level**2)
        return self.means + jnp.einsum("jik,jk->ji", self.axes, gain * self.along(y))

    def denoise(self, y: jax.Array, level: ArrayLike) -> jax.Array:
        """The posterior mean of the clean point, (d,)."""
        return jax.nn.softmax(self.log_parts(y, level)) @ self.given(y, level)

    def sample(self, key: jax.Array, level: ArrayLike) -> jax.Array:
        """A point under noise, (d,)."""
        key_part, key_point = jax.random.split(key)
        j = jax.random.categorical(key_part, self.log_weights)
        xi = jax.random.normal(key_point, self.means.shape[1:], self.means.dtype)
        return self.means[j] + self.axes[j] @ (jnp.sqrt(self.variances[j] + level**2) * xi)


class Step(NamedTuple):
    """The law of a point at a level, given that at the level above: a mixture of normal laws."""

    log_weights: jax.Array  # (J,)
    means: jax.Array  # (J, d)
    variances: jax.Array  # along the axes of the modes, (J, d)


class Law(NamedTuple):
    """A learned law of unconstrained vectors, as a proposal; a pytree.

    Args:
        modes: the mixture, of whitened vectors.
        units: location and factor of the vectors.
        denoiser: the network with the mixture inside; None for the mixture alone.
        levels: noise levels of the walk, increasing, (K,); none for the mixture alone.
    """

    modes: Modes
    units: Units
    denoiser: NetworkDenoiser | None
    levels: jax.Array

    @property
    def num_modes(self) -> int:
        """Normal laws in the mixture, without the wide one."""
        return len(self.modes.log_weights) - 1

    def draw(self, key: jax.Array) -> jax.Array:
        """A walk down to a whitened vector, the first row, (K + 1, d)."""
        key_top, *keys = jax.random.split(key, len(self.levels) + 1)
        top = self.modes.sample(key_top, self.levels[-1] if len(self.levels) else 0.0)
        if not keys:
            return top[None]

        def down(y: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
            level, below, key = at
            key_part, key_point = jax.random.split(key)
            step = self._step(y, level, below)
            j = jax.random.categorical(key_part, step.log_weights)
            xi = jax.random.normal(key_point, y.shape, y.dtype)
            new = step.means[j] + self.modes.axes[j] @ (jnp.sqrt(step.variances[j]) * xi)
            return new, new

        _, rest = jax.lax.scan(down, top, (self.levels, self._below, jnp.stack(keys)), reverse=True)
        return jnp.concatenate([rest, top[None]])

    def noised(self, key: jax.Array, w: jax.Array) -> jax.Array:
        """A walk up from a whitened vector, (K + 1, d)."""
        added = jnp.sqrt(self.levels**2 - self._below**2)[:, None]
        noise = added * jax.random.normal(key, (len(self.levels), w.size), w.dtype)
        return jnp.concatenate([w[None], w + jnp.cumsum(noise, 0)])

    def log_density(self, walk: jax.Array) -> jax.Array:
        """Log-density of a walk over that of its noise, as one of the unconstrained vector; a scalar."""
        top = self.modes.log_density(walk[-1], self.levels[-1] if len(self.levels) else 0.0)

        def part(lower: jax.Array, upper: jax.Array, level: jax.Array, below: jax.Array) -> jax.Array:
            step = self._step(upper, level, below)
            off = jnp.einsum("jik,ji->jk", self.modes.axes, lower - step.means)
            down = jax.nn.logsumexp(step.log_weights + log_normal(off, step.variances))
            return down - log_normal(upper - lower, level**2 - below**2)

        parts = jax.vmap(part)(walk[:-1], walk[1:], self.levels, self._below)
        return top + jnp.sum(parts) - self.units.log_det

    @property
    def _below(self) -> jax.Array:
        """The level below each, zero for the lowest."""
        return jnp.concatenate([jnp.zeros(min(1, len(self.levels)), self.levels.dtype), self.levels[:-1]])

    def _step(self, y: jax.Array, level: jax.Array, below: jax.Array) -> Step:
        ratio = (below / level) ** 2
        variances = self.modes.variances
        left = variances * level**2 / (variances + level**2)  # of the clean point, given the noisy one
        clean = self.modes.given(y, level)
        if self.denoiser is not None:
            schedule = self.denoiser.schedule
            t = schedule.inverse_noise_level(level)
            predicted = self.denoiser((schedule.alpha(t) * y).astype(y.dtype), t).x0
            clean = clean + (predicted - self.modes.denoise(y, level))
        return Step(
            jax.nn.log_softmax(self.modes.log_parts(y, level)),
            ratio * y + (1.0 - ratio) * clean,
            (1.0 - ratio) ** 2 * left + (1.0 - ratio) * below**2,
        )
