r"""A model whose diffusion sites are tied to given points instead of to their priors.

For split Gibbs the prior $p(x)$ of a site is replaced by $N(z; x, \rho^2 I)$ around the current $x$, in the denoiser's
own space, and every other term of the model is evaluated at $z$. The site is written as

$$z = x + \rho\, w, \qquad w \sim N(0, I),$$

so that $w$ has unit scale at every $\rho$, and a step size adapted at one $\rho$ is right for another. That is a
stand-in of the model (`kernel.stand_in`) with $w$ as its standard normal sites. The centre and $\rho$ are passed as a
keyword argument, like the values that NumPyro's `Gibbs` conditions on, so that they may be traced.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from numpyro_diffusion.infer.kernel.stand_in import Point, StandIn, inside
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.structure import Structure

_COUPLING_KWARG = "_split_gibbs_coupling"


def offset_name(site: str) -> str:
    """The name of the site of `w`."""
    return f"{site}_offset"


class Coupled(StandIn):
    """A model with diffusion sites tied to points, which it takes out of its keyword arguments: see `with_coupling`."""

    keyword = _COUPLING_KWARG

    def normal_shapes(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the offsets: those of points of the denoisers' own spaces."""
        sites = {name: structure.latent[name].prior_site for name in structure.diffusion}
        return {offset_name(name): site.batch_shape + site.prior.noise_shape for name, site in sites.items()}

    def images(self, reading: Reading, point: Point, given: tuple[dict[str, jax.Array], ArrayLike]) -> Point:
        """The points of the diffusion sites, on their supports."""
        centre, rho = given
        images = {}
        for name, site in reading.sites().items():
            u = centre[name] + rho * point[offset_name(name)]
            images[name] = u if site.prior.transform is None else site.prior.transform(u)
        return images


def with_coupling(kwargs: Mapping[str, Any], centre: Mapping[str, jax.Array], rho: ArrayLike) -> dict[str, Any]:
    """Keyword arguments of a `Coupled` model.

    Args:
        kwargs: those of the model.
        centre: the point $x$ of each diffusion site, in its denoiser's space.
        rho: the coupling.

    Returns:
        The same with the coupling, for a kernel on the stand-in.
    """
    return {**inside(kwargs), _COUPLING_KWARG: (dict(centre), rho)}
