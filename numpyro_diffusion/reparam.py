r"""Noise space: sample the solver's noise, report the point that it is mapped to.

A deterministic solver is a map $x = F(z)$ with $z \sim N(0, I)$. Sampling $z$ instead of $x$ turns a diffusion site
into a standard normal one followed by a deterministic one, so that any NumPyro kernel, SVI guide or optimiser applies,
and is exact for the law that the solver pushes forward: no density, no log-determinant, no inverse is needed.
`infer.NoiseSpace` does this to a whole model and reports the original sites.

References:
    Papaspiliopoulos, Roberts, Sköld, A general framework for the parametrization of hierarchical models, 2007,
    https://doi.org/10.1214/088342307000000014.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.reparam import Reparam
from numpyro.primitives import _PYRO_STACK

from numpyro_diffusion.distributions import DiffusionPrior

__all__ = ["NoiseReparam"]


def noise_name(site: str) -> str:
    """The name of the noise site that replaces a diffusion site."""
    return f"{site}_noise"


class NoiseReparam(Reparam):
    """Replaces a `DiffusionPrior` site `x` by a standard normal site `x_noise` and a deterministic `x`.

    Example:
        >>> import numpyro
        >>> from numpyro.handlers import reparam, seed, trace
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.reparam import NoiseReparam
        >>> def model():
        ...     numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0])))
        >>> in_noise = reparam(model, config={"x": NoiseReparam()})
        >>> [(s["name"], s["type"]) for s in trace(seed(in_noise, 0)).get_trace().values()]
        [('x_noise', 'sample'), ('x', 'deterministic')]
    """

    def __call__(
        self, name: str, fn: dist.Distribution, obs: jax.Array | None
    ) -> tuple[dist.Distribution | None, jax.Array | None]:
        """Called by `numpyro.handlers.reparam`.

        Args:
            name: the site.
            fn: its distribution, a `DiffusionPrior`, possibly in plates.
            obs: its observed value; there must be none.

        Returns:
            None and the point of the flow, which makes the site deterministic. If the value of the site is known to a
            handler around the model that wants it as written, by its name in `values_as_written` (so `to_arviz` reads
            draws), the distribution and None, which leave the site as it is.

        Raises:
            TypeError: if the site is not a `DiffusionPrior`.
            ValueError: if the site is observed.
        """
        if obs is not None:
            raise ValueError(f"site {name!r} is observed: its noise cannot be sampled; drop the reparameterisation")
        if any(name in getattr(handler, "values_as_written", ()) for handler in _PYRO_STACK):
            return fn, None  # a handler outside has the value: the site stays as it is, and no flow is solved
        prior, expand_shape, event_dim = self._unwrap(fn)
        if not isinstance(prior, DiffusionPrior):
            raise TypeError(f"NoiseReparam needs a DiffusionPrior at site {name!r}; got {type(prior).__name__}")
        extra = event_dim - prior.event_dim
        noise = dist.Normal(jnp.zeros(prior.noise_shape), 1.0).to_event(len(prior.noise_shape))
        noise = noise.expand(expand_shape).to_event(extra)
        return None, prior.flow(numpyro.sample(noise_name(name), noise))
