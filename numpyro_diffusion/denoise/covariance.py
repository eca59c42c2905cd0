r"""The uncertainty of the clean point: Tweedie's second formula.

The posterior covariance of the clean point is the Jacobian of its mean,

$$\mathrm{Cov}[x \mid x_t] = \frac{\sigma_t^2}{\alpha_t}\, \frac{\partial \hat x_0}{\partial x_t}
= \frac{\sigma_t^2}{\alpha_t^2} \left( I + \sigma_t^2\, \nabla^2 \log p_t(x_t) \right),$$

a linear map that is never formed: a product with a vector is one Jacobian-vector product, two to three evaluations of
the denoiser. For an exact denoiser it is exact. The Jacobian of a network need not be symmetric, let alone positive:
`matvec` and `rmatvec` then differ, and `symmetric` is their mean.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
    Rozet et al., Learning diffusion priors from observations by expectation maximization, 2024 (posterior covariance
    in guidance), https://arxiv.org/abs/2405.13712.
    Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, 2007,
    https://doi.org/10.1016/j.apnum.2007.01.003.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.prediction import Denoiser


class Diagonal(NamedTuple):
    """An estimated diagonal, entry by entry."""

    value: jax.Array  # posterior variances, of event_shape
    standard_error: jax.Array  # over the probes, of event_shape; NaN for a single one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Covariance:
    """The posterior covariance at one noisy point, as a linear map of `event_shape`; made by `covariance`.

    Args:
        denoiser: the model.
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
    """

    denoiser: Denoiser
    x_t: jax.Array
    t: ArrayLike

    def _factor(self) -> jax.Array:
        schedule = self.denoiser.schedule
        return (schedule.sigma(self.t) ** 2 / schedule.alpha(self.t)).astype(self.x_t.dtype)

    def _mean(self, x_t: jax.Array) -> jax.Array:
        return self.denoiser(x_t, self.t).x0

    def matvec(self, v: jax.Array) -> jax.Array:
        """The product with a vector of `event_shape`, by a Jacobian-vector product."""
        return self._factor() * jax.jvp(self._mean, (self.x_t,), (jnp.asarray(v, self.x_t.dtype),))[1]

    __matmul__ = matvec

    def rmatvec(self, v: jax.Array) -> jax.Array:
        """The product of the transpose with a vector of `event_shape`, by a vector-Jacobian product."""
        return self._factor() * jax.vjp(self._mean, self.x_t)[1](jnp.asarray(v, self.x_t.dtype))[0]

    def symmetric(self, v: jax.Array) -> jax.Array:
        """The product of the symmetric part with a vector of `event_shape`."""
        return 0.5 * (self.matvec(v) + self.rmatvec(v))

    def dense(self) -> jax.Array:
        """The matrix, shape (d, d) with d the size of an event: d Jacobian-vector products."""
        basis = jnp.eye(self.x_t.size, dtype=self.x_t.dtype).reshape(-1, *self.x_t.shape)
        return jax.vmap(self.matvec)(basis).reshape(self.x_t.size, -1).T

    def diagonal(self, key: jax.Array, num_probes: int) -> Diagonal:
        r"""The posterior variances by Rademacher probes, $E[z \odot C z]$: unbiased for each entry.

        Args:
            key: random key.
            num_probes: number of probes, one Jacobian-vector product each.

        Returns:
            The estimate and its standard error, both of `event_shape`.

        Raises:
            ValueError: if `num_probes` is below one.
        """
        _checks.at_least(1, num_probes=num_probes)
        probes = jax.random.rademacher(key, (num_probes, *self.x_t.shape), self.x_t.dtype)
        products = probes * jax.vmap(self.matvec)(probes)
        spread = jnp.std(products, 0, ddof=1) if num_probes > 1 else jnp.full_like(self.x_t, jnp.nan)
        return Diagonal(products.mean(0), spread / jnp.sqrt(jnp.asarray(num_probes, self.x_t.dtype)))


def covariance(denoiser: Denoiser, x_t: jax.Array, t: ArrayLike) -> Covariance:
    r"""The posterior covariance at a noisy point, $(\sigma_t^2 / \alpha_t)\, \partial \hat x_0 / \partial x_t$.

    Args:
        denoiser: the model.
        x_t: noisy point of `event_shape`.
        t: its time, a scalar.

    Returns:
        A linear map: `covariance @ v`, `rmatvec`, `symmetric`, `diagonal` by probes, `dense` for small events.

    Raises:
        ValueError: if `x_t` is not of `event_shape`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, covariance
        >>> from numpyro_diffusion.noise import Rectified
        >>> posterior = covariance(Gaussian([0.0, 0.0], 1.0, Rectified()), jnp.ones(2), 0.5)
        >>> posterior.dense().tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    x_t = jnp.asarray(x_t, jnp.result_type(x_t, float))
    if x_t.shape != denoiser.event_shape:
        raise ValueError(f"x_t must be one point of shape {denoiser.event_shape}; got {x_t.shape}. Use jax.vmap")
    return Covariance(denoiser, x_t, t)
