r"""A model in the noise behind its diffusion sites.

A deterministic solver maps noise $w \sim N(0, I)$ to points $x = F(w)$ of a prior, which may depend on other sites. In
the coordinates $(w, \theta)$ the prior of the diffusion sites is a standard normal law and the rest is evaluated at
$F(w)$. `InNoise` is that model, as a function of a point for samplers of this library (`InNoise.evaluate`: the prior,
the likelihood and what is reported) and as a NumPyro model for others (`kernel.stand_in`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to

from numpyro_diffusion.infer.kernel.stand_in import Point, StandIn
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.structure import LatentSite, Structure
from numpyro_diffusion.reparam import noise_name


class InNoise(StandIn):
    """A model with a standard normal site in place of each diffusion site, named by `reparam.noise_name`."""

    def normal_shapes(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the noise."""
        return {noise_name(name): _noise_shape(structure.latent[name]) for name in structure.diffusion}

    def images(self, reading: Reading, point: Point, given: Any = None) -> Point:
        """The points of the diffusion sites; those whose prior depends on another come after it."""
        latent, diffusion = reading.structure.latent, reading.structure.diffusion
        others = self._others(reading, point)
        if not reading.structure.dependent:
            others = jax.tree.map(jnp.zeros_like, others)  # the priors are the same anywhere
        images = {name: _somewhere(latent[name]) for name in diffusion}
        priors = reading.evaluate(others, images).priors
        for name in diffusion:
            if latent[name].depends_on & set(diffusion):
                priors = reading.evaluate(others, images).priors
            images[name] = priors[name].flow(point[noise_name(name)])
        return images


def _noise_shape(site: LatentSite) -> tuple[int, ...]:
    return site.prior_site.batch_shape + site.prior_site.prior.noise_shape


def _somewhere(site: LatentSite) -> jax.Array:
    """A point of the support, if that is known."""
    zeros = jnp.zeros(site.unconstrained_shape)
    return jnp.zeros(site.shape) if site.support is None else biject_to(site.support)(zeros)
