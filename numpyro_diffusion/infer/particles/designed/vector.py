r"""A model's joint density as a function of one vector in units of its prior.

With NumPyro's unconstrained values $q$ of all latent sites, their location $m$ and scale $s$,

$$w = (q - m) / s, \qquad \log \pi_w(w) = \log \pi(m + s w) + \textstyle\sum_j \log s_j ,$$

so that its integral is the evidence. Location and scale are given, or those of draws of the prior.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from numpyro.infer.util import unconstrain_fn

from numpyro_diffusion.infer.gradient import target
from numpyro_diffusion.infer.model.density import Density
from numpyro_diffusion.infer.model.handlers import Model, draw_prior
from numpyro_diffusion.infer.model.record import Reading, Record

Units = tuple[jax.Array, jax.Array]
Values = Mapping[str, ArrayLike]

_DRAWS = 1000
"""Draws of the prior that location and scale are taken from."""


class Standardised:
    """A model as a density of standardised vectors (D,).

    Args:
        reading: the model at its arguments.
        units: location and scale, (D,).
    """

    def __init__(self, reading: Reading, units: Units) -> None:
        self.reading, (self._location, self._scale) = reading, units
        self._target = target.Target(reading, Density("auto"), reading.origin())

    def log_density(self, w: jax.Array) -> jax.Array:
        """At one vector, a scalar."""
        value = self._target.log_target(self._location + self._scale * w)
        return (value + jnp.sum(jnp.log(self._scale))).astype(w.dtype)

    def point(self, w: jax.Array) -> dict[str, jax.Array]:
        """Unconstrained values by site."""
        return self._target.unflatten(self._location + self._scale * w)

    def constrain(self, w: jax.Array) -> dict[str, jax.Array]:
        """Values on the supports by site, with the deterministic ones."""
        return self.reading.constrain(self.point(w), deterministic=True)


def both(location: Values | None, scale: Values | None) -> tuple[Values, Values] | None:
    """Location and scale as the user gives them, None for none; raises `ValueError` for one without the other."""
    if (location is None) != (scale is None):
        raise ValueError(f"location and scale must be given together; got {location=}, {scale=}")
    return None if location is None or scale is None else (dict(location), dict(scale))


def given_units(reading: Reading, location: Values, scale: Values) -> Units:
    """Units that the user gives, (D,) each."""
    origin = reading.origin()

    def flat(values: Values) -> jax.Array:
        return ravel_pytree({k: jnp.broadcast_to(jnp.asarray(values[k], float), v.shape) for k, v in origin.items()})[0]

    return flat(location), flat(scale)


def units_of_prior(sampler: str, model: Model, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Units:
    """Mean and standard deviation of draws of the prior, (D,) each; those that are not finite are left out."""

    def draw(key: jax.Array) -> jax.Array:
        try:
            values = draw_prior(model, key, args, kwargs)
        except ValueError as error:
            raise ValueError(
                f"{sampler} takes its units from draws of the prior, and it cannot be drawn. Give location= and "
                f"scale=, unconstrained values by site: {error}"
            ) from error
        return ravel_pytree(unconstrain_fn(model, args, kwargs, values))[0]

    draws = jax.vmap(draw)(jax.random.split(key, _DRAWS))
    draws = jnp.where(jnp.isfinite(draws), draws, jnp.nan)
    return jnp.nanmean(draws, 0), jnp.nanstd(draws, 0)


def check_units(sampler: str, units: Units, given: bool) -> None:
    """Raises `ValueError` unless every location is finite and every scale positive."""
    location, scale = units
    if not bool(jnp.isfinite(location).all() & jnp.isfinite(scale).all() & (scale > 0).all()):
        source = "those given are not" if given else "the moments of the prior's draws are not"
        raise ValueError(
            f"{sampler} needs a finite location and a positive scale of every latent site; {source}. Give "
            "location= and scale=, unconstrained values by site"
        )


def check_model(sampler: str, reading: Reading, given: tuple[Values, Values] | None) -> None:
    """Raises `ValueError` unless a model can be sampled, in the units that the user has given, or None."""
    target.check(reading, Density("auto"), sampler)
    names = sorted(reading.structure.latent)
    for name, values in zip(("location", "scale"), given or (), strict=False):
        if sorted(values) != names:
            raise ValueError(f"{name} must have the latent sites {names}; got {sorted(values)}")


def vector_of(model: Model, units: Units, args: tuple, kwargs: dict[str, Any]) -> Standardised:
    """A model at its arguments, in given units."""
    return Standardised(Record(model).at(args, kwargs), units)
