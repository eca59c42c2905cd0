r"""A preconditioner from the score: Tweedie's covariance of the clean point at a noise level.

Given a point noised to level $\lambda$ at $x$, the prior has the covariance

$$C_\lambda(x) = \mathrm{Cov}[x_0 \mid x_t = \alpha_t x], \qquad \sigma_t / \alpha_t = \lambda,$$

which for a Gaussian prior is $\Sigma (\Sigma + \lambda^2)^{-1} \lambda^2$: the prior's own where that is narrow,
$\lambda^2$ where it is wide. It depends on the point, so a kernel that uses it must account for that in the density of
its proposal (`langevin.MALA` does). It knows nothing of the likelihood. A learned Jacobian need be neither symmetric
nor positive: the symmetric part is taken, and its eigenvalues are kept above a small share of the largest possible one,
$\lambda^2$.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import block_diag

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, covariance
from numpyro_diffusion.infer.kernel.adapt import Root
from numpyro_diffusion.infer.model.checks import check_has_prior
from numpyro_diffusion.infer.model.record import Reading

_FLOOR = 1e-4
"""Least eigenvalue, as a share of the squared level."""


@dataclass(frozen=True)
class Tweedie:
    """Tweedie's covariance at a noise level as a preconditioner; other latent sites keep the identity.

    Every step factorises a d by d matrix, so it is for events of up to a few hundred dimensions.

    Args:
        level: noise level in units of the data's scale, positive.

    Raises:
        ValueError: if `level` is not positive; when run, for a model without diffusion sites, or a site whose transform
            is not NumPyro's own for its support.
    """

    level: float = 1.0

    def __post_init__(self) -> None:
        _checks.positive(level=self.level)

    def check(self, reading: Reading) -> None:
        """Raises unless the denoiser of every diffusion site works in NumPyro's coordinates."""
        check_has_prior(reading.structure)
        for name, site in reading.sites_in_the_abstract().items():
            if not site.same_coordinates:
                raise ValueError(
                    f"Tweedie() needs site {name!r} in the denoiser's own coordinates; its transform is not NumPyro's "
                    "for it. Use dense_mass=True"
                )

    def _point_root(self, denoiser: Denoiser, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues and eigenvectors of the covariance at one point of the denoiser's space."""
        level = jnp.asarray(self.level * denoiser.scale, u.dtype)
        t = denoiser.schedule.inverse_noise_level(level)
        matrix = covariance(denoiser, (denoiser.schedule.alpha(t) * u).astype(u.dtype), t).dense()
        values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
        return jnp.maximum(values, _FLOOR * level**2), vectors

    def root(self, reading: Reading, z: dict[str, jax.Array]) -> Root:
        """The root of the preconditioner at a point, in NumPyro's unconstrained coordinates."""
        sites = reading.sites(z)
        roots: list[jax.Array] = []
        inverses: list[jax.Array] = []
        log_det: jax.Array | float = 0.0
        for name in sorted(z):
            if name not in sites:
                identity = jnp.eye(jnp.size(z[name]), dtype=z[name].dtype)
                roots, inverses = [*roots, identity], [*inverses, identity]
                continue
            values, vectors = sites[name].over_points(self._point_root, z[name])
            values, vectors = values.reshape(-1, values.shape[-1]), vectors.reshape(-1, *vectors.shape[-2:])
            for value, vector in zip(values, vectors, strict=True):
                roots.append(jnp.sqrt(value)[:, None] * vector.T)
                inverses.append(vector / jnp.sqrt(value))
            log_det = log_det + 0.5 * jnp.sum(jnp.log(values))
        dtype = ravel_pytree(z)[0].dtype
        root, inverse = (block_diag(*blocks).astype(dtype) for blocks in (roots, inverses))
        return Root(root, inverse, jnp.asarray(log_det, dtype))
