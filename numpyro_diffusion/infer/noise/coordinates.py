r"""A model in noise space: its latent sites as one vector, with the prior and the likelihood apart.

Every diffusion site $x$ is replaced by its noise, $x = F(w)$ with $w \sim N(0, I)$, and all other sites stand in
NumPyro's unconstrained coordinates. Over these, the vector $q = (w, \theta)$,

$$\log \pi_\beta(q) = \log N(w; 0, I) + \log p(\theta(q)) + \log |\det J(q)| + \beta \log L(F(w), \theta),$$

so $\beta = 0$ is the prior, whose draws are free, and $\beta = 1$ the posterior. A model without diffusion sites has
$q = \theta$. For the kernel that runs a NumPyro kernel on this density see `noise_space`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.model.record import Evaluation, Reading
from numpyro_diffusion.reparam import noise_name

Point = dict[str, jax.Array]


class LogDensity(NamedTuple):
    """The two parts of a model at a point, scalars."""

    prior: jax.Array  # of the noise and the other sites, with their Jacobians
    likelihood: jax.Array  # of all observations and factors


class NoiseCoordinates:
    """The noise of a model's diffusion sites and its other latent sites as one vector of shape (D,).

    Args:
        reading: the model at its arguments.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        structure = reading.structure
        self._dependent = set(structure.dependent)
        noise = {
            name: jnp.zeros((*site.batch_shape, *site.prior.noise_shape))
            for name, site in reading.sites_in_the_abstract().items()
        }
        others = {name: jnp.zeros(structure.latent[name].unconstrained_shape) for name in structure.others}
        flat, self._unravel = ravel_pytree((noise, others))
        self.size = flat.size
        """D, the number of coordinates."""

    def flatten(self, values: Point) -> jax.Array:
        """A vector from the noise of diffusion sites, by `noise_name`, and unconstrained values of the others."""
        noise, others = self._unravel(jnp.zeros(self.size))
        return ravel_pytree(({n: values[noise_name(n)] for n in noise}, {n: values[n] for n in others}))[0]

    @property
    def names(self) -> list[str]:
        """Of each coordinate its site, that of the noise for a diffusion site; a list of D."""
        noise, others = self._unravel(jnp.zeros(self.size))
        sizes = {**{noise_name(n): v.size for n, v in noise.items()}, **{n: v.size for n, v in others.items()}}
        return [name for name, size in sizes.items() for _ in range(size)]

    def _at(self, q: jax.Array) -> tuple[Point, Evaluation]:
        """The noise by site, and the model at the point that it is mapped to."""
        noise, others = self._unravel(q)
        z = {**self._reading.origin(), **others}
        sites = self._reading.sites(z)
        for name, w in noise.items():
            if name in self._dependent:  # on sites that may have been filled in meanwhile
                sites = self._reading.sites(z)
            z[name] = sites[name].unconstrain(sites[name].prior.flow(w))
        return noise, self._reading.evaluate(z)

    def log_density(self, q: jax.Array) -> LogDensity:
        """Both parts at one point."""
        noise, parts = self._at(q)
        jacobians = [value for name, value in parts.log_jacobian.items() if name not in parts.priors]
        normal = [jax.scipy.stats.norm.logpdf(w).sum() for w in noise.values()]
        prior = sum([*normal, *jacobians], start=parts.log_rest - parts.log_likelihood)
        return LogDensity(prior.astype(q.dtype), parts.log_likelihood.astype(q.dtype))

    def report(self, q: jax.Array) -> Point:
        """Constrained values of the model's own latent sites and its deterministic ones."""
        _, parts = self._at(q)
        return {**parts.values, **parts.deterministic}
