r"""A model in noise space as a function of one vector, with the prior and the likelihood apart.

Over $q = (w, \theta)$, the noise $w$ of all diffusion sites and all other latent sites in unconstrained coordinates
(`coordinates.InNoise`), flattened to D numbers, up to a constant

$$\log \pi_\beta(q) = \log N(w; 0, I) + \log p(\theta(q)) + \log |\det J(q)| + \beta \log L(F(w), \theta),$$

so $\beta = 0$ is the prior, whose draws are free, and $\beta = 1$ the posterior. A model without diffusion sites has
$q = \theta$.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.handlers import reparam

from numpyro_diffusion.infer.model.handlers import Model, is_diffusion_site
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.noise.coordinates import InNoise
from numpyro_diffusion.reparam import NoiseReparam

Point = dict[str, jax.Array]


class LogDensity(NamedTuple):
    """The two parts of a model at a point, scalars."""

    prior: jax.Array  # of the noise and the other sites, with their Jacobians, up to a constant
    likelihood: jax.Array  # of all observations and factors


class NoiseVector:
    """The noise of a model's diffusion sites and its other latent sites as one vector of shape (D,).

    Args:
        reading: the model at its arguments.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._in_noise = InNoise(reading.model)
        self._shapes = self._in_noise.shapes(reading)
        flat, self._unravel = ravel_pytree({name: jnp.zeros(shape) for name, shape in self._shapes.items()})
        self.size = flat.size
        """D, the number of coordinates."""

    @property
    def names(self) -> list[str]:
        """Of each coordinate its site, that of the noise for a diffusion site; a list of D."""
        sizes = {name: value.size for name, value in self._unravel(jnp.zeros(self.size)).items()}
        return [name for name, size in sizes.items() for _ in range(size)]

    def flatten(self, values: Point) -> jax.Array:
        """A vector from the noise of diffusion sites and constrained values of the others, as the prior draws them."""
        others = self._reading.structure.others
        unconstrained = self._reading.unconstrain({name: values[name] for name in others})
        return ravel_pytree({name: unconstrained.get(name, values[name]) for name in self._shapes})[0]

    def log_density(self, q: jax.Array) -> LogDensity:
        """Both parts at one point."""
        parts = self._in_noise.evaluate(self._reading, self._unravel(q))
        return LogDensity(parts.log_prior.astype(q.dtype), parts.log_likelihood.astype(q.dtype))

    def along(self, q: jax.Array, name: str, values: jax.Array) -> LogDensity:
        """Both parts at values of a scalar site, unconstrained, (K,), with all others as they are: two of (K,)."""
        point = self._unravel(q)

        def at(value: jax.Array) -> LogDensity:
            parts = self._in_noise.evaluate(self._reading, {**point, name: value})
            return LogDensity(parts.log_prior.astype(q.dtype), parts.log_likelihood.astype(q.dtype))

        return jax.vmap(at)(values)

    def report(self, q: jax.Array) -> Point:
        """Constrained values of the model's own latent sites and its deterministic ones."""
        parts = self._in_noise.evaluate(self._reading, self._unravel(q))
        return {**parts.values, **parts.deterministic}


def in_noise(model: Model) -> Model:
    """The model with noise sites in place of its diffusion sites, to draw both from the prior."""

    def config(site: Mapping[str, Any]) -> Callable | None:
        return NoiseReparam() if is_diffusion_site(site) else None

    return reparam(model, config=config)
