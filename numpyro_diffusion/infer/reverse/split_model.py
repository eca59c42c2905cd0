r"""A model whose diffusion sites are tied to given points instead of to their priors.

For split Gibbs the prior $p(x)$ of a site is replaced by $N(z; x, \rho^2 I)$ around the current $x$, in the denoiser's
own space, and every other term of the model is evaluated at $z$. The site is written as

$$z = x + \rho\, w, \qquad w \sim N(0, I),$$

so that $w$ has unit scale at every $\rho$, and a step size adapted at one $\rho$ is right for another. The centre and
$\rho$ are passed as a keyword argument, like the values that NumPyro's `Gibbs` conditions on, so that they may be
traced.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.handlers import reparam
from numpyro.infer.gibbs import conditioned
from numpyro.infer.reparam import Reparam

from numpyro_diffusion.infer.model.handlers import Model, as_written, is_diffusion_site

_COUPLING_KWARG = "_split_gibbs_coupling"


def offset_name(site: str) -> str:
    """The name of the site of `w`."""
    return f"{site}_offset"


def coupled(model: Model) -> Model:
    """A model that takes the coupling out of its keyword arguments, see `with_coupling`, and runs under it."""
    return partial(_coupled_model, conditioned(model))


def with_coupling(kwargs: Mapping[str, Any], centre: Mapping[str, jax.Array], rho: ArrayLike) -> dict[str, Any]:
    """Keyword arguments of a `coupled` model.

    Args:
        kwargs: those of the model.
        centre: the point $x$ of each diffusion site, in its denoiser's space.
        rho: the coupling.

    Returns:
        The same with the coupling.
    """
    return {**kwargs, _COUPLING_KWARG: (dict(centre), rho)}


def _coupled_model(model: Model, *args: Any, **kwargs: Any) -> Any:
    """Module-level, so that kernels on it can be pickled."""
    centre, rho = kwargs.pop(_COUPLING_KWARG)

    def config(site: Mapping[str, Any]) -> Callable | None:
        if not is_diffusion_site(site):
            return None
        return lambda name, fn, obs: _Coupled(centre[name], rho)(name, as_written(site), obs)

    return reparam(model, config=config)(*args, **kwargs)


class _Coupled(Reparam):
    """Replaces a `DiffusionPrior` site by an offset from a centre."""

    def __init__(self, centre: jax.Array, rho: ArrayLike) -> None:
        self.centre, self.rho = centre, rho

    def __call__(self, name: str, fn: dist.Distribution, obs: None) -> tuple[None, jax.Array]:
        prior, expand_shape, event_dim = self._unwrap(fn)
        offset = dist.Normal(0.0, 1.0).expand(prior.noise_shape).to_event(len(prior.noise_shape))
        offset = offset.expand(expand_shape).to_event(event_dim - prior.event_dim)
        u = self.centre + self.rho * numpyro.sample(offset_name(name), offset)
        return None, u if prior.transform is None else prior.transform(u)
