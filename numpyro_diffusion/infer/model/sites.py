r"""The diffusion sites of a NumPyro model: their points, their coordinates, and the rest of the model.

The joint density of a model with diffusion sites $x$ and other latent sites $\theta$ is

$$p(x, \theta, y) = \underbrace{\prod_i p(x_i)}_{\text{priors}} \;
\underbrace{p(\theta)\, p(y \mid x, \theta)}_{\text{rest}}.$$

A site holds the points of its plates, of `expand` and `to_event`, and of a batch of conditions, in three coordinate
systems: the support, NumPyro's unconstrained space, and the denoiser's own space.

With a constrained support, the Jacobian of the support belongs to the prior as well. The rest is therefore evaluated at
constrained values, never through NumPyro's unconstrained potential, which would include it.

What guidance can use of an observed site is the normal law of its data (`NormalData`).

This file only reads models, see also `record`; `drop_prior` is in `handlers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import conditioned

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, is_diffusion_site


@dataclass(frozen=True)
class PriorSite:
    """A latent diffusion site as found in a trace.

    Args:
        prior: the distribution of one point.
        batch_shape: how many points the site holds, as a shape: of plates, `expand`, `to_event`, a batch of conditions.
    """

    prior: DiffusionPrior
    batch_shape: tuple[int, ...]

    @classmethod
    def of(cls, prior: DiffusionPrior, shape: tuple[int, ...]) -> "PriorSite":
        """The site of a prior whose values have a shape."""
        return cls(prior, tuple(shape[: len(shape) - prior.event_dim]))

    @property
    def support(self) -> constraints.Constraint:
        """Of the whole site, as NumPyro sees it."""
        return constraints.independent(self.prior.support, len(self.batch_shape))

    def draw(self, key: jax.Array) -> jax.Array:
        """A draw of the prior at all points, in NumPyro's unconstrained coordinates."""
        leading = self.batch_shape[: len(self.batch_shape) - len(self.prior.batch_shape)]
        return self.unconstrain(self.prior.sample(key, leading))

    def constrain(self, z: jax.Array) -> jax.Array:
        """From NumPyro's unconstrained coordinates to the support."""
        return biject_to(self.support)(z)

    def unconstrain(self, x: jax.Array) -> jax.Array:
        """From the support to NumPyro's unconstrained coordinates."""
        return biject_to(self.support).inv(x)

    def to_denoiser(self, z: jax.Array) -> jax.Array:
        """From NumPyro's unconstrained coordinates to the denoiser's own space."""
        transform = self.prior.transform
        return z if transform is None or self.same_coordinates else transform.inv(self.constrain(z))

    def from_denoiser(self, u: jax.Array) -> jax.Array:
        """From the denoiser's own space to NumPyro's unconstrained coordinates."""
        transform = self.prior.transform
        return u if transform is None or self.same_coordinates else self.unconstrain(transform(u))

    def log_det(self, u: jax.Array) -> jax.Array:
        """The logarithm of the prior's transform's Jacobian at points of the denoiser's space, a scalar for all."""
        transform = self.prior.transform
        return jnp.zeros(()) if transform is None else jnp.sum(transform.log_abs_det_jacobian(u, transform(u)))

    def over_points(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """Maps a function of the denoiser of one point, and that point's part of each array, over all points.

        Args:
            function: of a denoiser and one point's values, to a pytree of arrays.
            *arrays: values of all points, `batch_shape` first.

        Returns:
            Its values, `batch_shape` first.
        """
        return self.prior.over_points(function, self.batch_shape, *arrays)

    @property
    def denoiser(self) -> Denoiser:
        """The prior's denoiser, for what all points have in common: schedule, shape, location and scale."""
        return self.prior.denoisers

    @property
    def same_coordinates(self) -> bool:
        """Whether the denoiser's own space is NumPyro's unconstrained one."""
        transform, numpyros = self.prior.transform, biject_to(self.support)
        while isinstance(numpyros, dist.transforms.IndependentTransform):
            numpyros = numpyros.base_transform
        return transform is None or type(transform) is type(numpyros) and transform == numpyros


def traced(model: Model, args: tuple, kwargs: Mapping[str, Any], values: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Runs a model at given values of its latent sites.

    Those not given are drawn, diffusion sites excepted: these stand at the origin of their unconstrained coordinates,
    so that reading a model never solves a reverse process.
    """

    def given_or_origin(site: Mapping[str, Any]) -> jax.Array | None:
        if site["type"] == "sample" and site["name"] not in values and is_diffusion_site(site):
            to_support = biject_to(site["fn"].support)
            return to_support(jnp.zeros(to_support.inverse_shape(site["fn"].shape())))
        return values.get(site["name"])

    model = seed(substitute(conditioned(model), substitute_fn=given_or_origin), jax.random.key(0))
    return trace(model).get_trace(*args, **kwargs)


class NormalData(NamedTuple):
    """The data of a site and their normal law; of `scale`, `factor` and `covariance` one is given."""

    value: jax.Array
    mean: jax.Array  # broadcasts to the site's shape, as all of these do
    mask: jax.Array  # which entries count
    power: jax.Array | float  # of a scale handler, which changes the spread
    scale: jax.Array | None  # standard deviations
    factor: jax.Array | None  # lower Cholesky factors, (*shape, shape[-1])
    covariance: jax.Array | None  # (*shape, shape[-1])

    def whiten(self, value: jax.Array) -> jax.Array:
        """Values of the site in units of its spread, flat; zero under the mask."""
        shape = jnp.shape(self.value)
        mask = jnp.broadcast_to(self.mask, shape)
        value = jnp.where(mask, jnp.broadcast_to(jnp.asarray(value, jnp.result_type(float)), shape), 0.0)
        if self.scale is not None:
            whitened = value / jnp.where(mask, self.scale, 1.0)
        else:
            factor = jnp.linalg.cholesky(self.covariance) if self.factor is None else self.factor
            factor = jnp.where(mask[..., None], factor, jnp.eye(shape[-1], dtype=value.dtype))
            whitened = solve_triangular(factor, value[..., None], lower=True)[..., 0]
        return (jnp.sqrt(self.power) * whitened).reshape(-1)


def normal_data(site: Mapping[str, Any]) -> NormalData | None:
    """The data of a site and their law if it is normal, in plates and under masks; None if it is not."""
    fn, mask = site["fn"], jnp.ones((), bool)
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            kept = jnp.asarray(fn._mask)
            mask = mask & kept.reshape(kept.shape + (1,) * fn.event_dim * (kept.ndim > 0))
        fn = fn.base_dist
    value = jnp.broadcast_to(site["value"], jnp.broadcast_shapes(jnp.shape(site["value"]), site["fn"].shape()))
    power = 1.0 if site["scale"] is None else site["scale"]
    match fn:
        case dist.Normal():
            return NormalData(value, fn.loc, mask, power, fn.scale, None, None)
        case dist.MultivariateNormal():
            return NormalData(value, fn.loc, mask, power, None, fn.scale_tril, None)
        case dist.LowRankMultivariateNormal():
            return NormalData(value, fn.loc, mask, power, None, None, fn.covariance_matrix)
    return None
