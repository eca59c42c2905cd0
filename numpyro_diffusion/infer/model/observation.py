r"""What a NumPyro model observes of its diffusion site, read off the model for guidance.

Guidance wants the data as $y = h(x) + s \varepsilon$. A model says it in its own words: a site whose distribution is
`Normal` or `MultivariateNormal`, whose mean depends on the diffusion site and whose spread does not. Several such sites
are one observation with more entries, each divided by its own scale, so that

$$\log L(x) = -\tfrac12 \left\| \tilde y - \tilde h(x) \right\|^2 + \text{const.}$$

Any other term that depends on the diffusion site (a `factor`, a Poisson count, a scale that varies with $x$) makes the
likelihood one that only its gradient can tell of. What does not depend on the site is left out. Reading is for
proposals: kernels weigh with the model as it stands.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.ops.provenance import eval_provenance

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Repeated
from numpyro_diffusion.guidance import MOMENTS, Guided, Likelihood, Observation
from numpyro_diffusion.infer.model.sites import Model, PriorSite, check_walkable, log_rest, prior_sites, traced


def check_moment(moment: str | None) -> None:
    """Raises unless it is one of `guidance.MOMENTS`, or None."""
    if moment is not None:
        _checks.one_of("moment", moment, MOMENTS)


def guided_site(
    model: Model,
    args: tuple,
    kwargs: Mapping[str, Any],
    moment: str | None = None,
    observation: Observation | Likelihood | None = None,
) -> tuple[str, PriorSite, Guided]:
    """The one diffusion site of a model, with its denoiser guided by the rest.

    Args:
        model: NumPyro model.
        args: its arguments.
        kwargs: its keyword arguments, with the values that a composite kernel conditions on.
        moment: the second moment of `Guided`; None takes "mmps" for a Gaussian observation and "dps" for another.
        observation: what is observed of a point of the denoiser's own space, plates included; None reads the model.

    Returns:
        The site's name, the site, and the guided denoiser of all points in its plates.

    Raises:
        ValueError: for a model with several diffusion sites, or a moment that cannot handle the likelihood.
    """
    sites = prior_sites(model, args, kwargs)
    if len(sites) > 1:
        raise ValueError(
            f"guidance moves one diffusion site; the model has {sorted(sites)}. Give each its own block of "
            "numpyro.infer.Gibbs, or use NoiseSpace(model)"
        )
    check_walkable("a guided walk", sites)
    ((name, site),) = sites.items()
    denoiser = site.prior.denoiser
    if site.batch_shape:
        denoiser = Repeated(denoiser, site.batch_shape)
    if observation is None:
        observation = read_observation(model, args, kwargs, name, site)
    is_gaussian = isinstance(observation, Observation)
    if moment not in (None, "dps") and not is_gaussian:
        raise ValueError(
            f"moment {moment!r} needs a Gaussian observation of site {name!r}; the model has another term that depends "
            'on it. Use moment="dps", or give an `observation` that is near enough to steer by'
        )
    return name, site, Guided(denoiser, observation, moment or ("mmps" if is_gaussian else "dps"))


def read_observation(
    model: Model, args: tuple, kwargs: Mapping[str, Any], name: str, site: PriorSite
) -> Observation | Likelihood:
    """The data as an observation of the denoiser's own space, or as a likelihood if they are not Gaussian."""

    def constrained(u: jax.Array) -> dict[str, jax.Array]:
        return {name: site.constrain(site.from_denoiser(u))}

    def sites_at(u: jax.Array) -> dict[str, Any]:
        trace = traced(model, args, kwargs, constrained(u))
        return {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}

    origin = jnp.zeros((*site.batch_shape, *site.prior.noise_shape))
    seen = _depending(sites_at, origin)
    gaussian = {n: _gaussian(sites_at(origin)[n]) for n in seen}
    if not seen or any(entry is None for entry in gaussian.values()) or _depending(sites_at, origin, _spread) & seen:
        return Likelihood(lambda u, _: log_rest(model, args, kwargs, constrained(u)).astype(jnp.result_type(float)))

    def mean(u: jax.Array, _: Any) -> jax.Array:
        found = sites_at(u)
        return jnp.concatenate([_whiten(found[n], _gaussian(found[n])[0]) for n in sorted(seen)])

    found = sites_at(origin)
    y = jnp.concatenate([_whiten(found[n], found[n]["value"]) for n in sorted(seen)])
    return Observation(y, jnp.ones(()), mean)


def _depending(
    sites_at: Callable[[jax.Array], dict[str, Any]],
    u: jax.Array,
    leaves: Callable[[Mapping[str, Any]], Any] = lambda site: (jax.tree.leaves(site["fn"]), site["value"]),
) -> set[str]:
    """Names of the observed sites whose arrays depend on the diffusion site."""
    found = eval_provenance(lambda u: {n: leaves(s) for n, s in sites_at(u).items()}, u=u)
    return {n for n, tree in found.items() if any(jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, frozenset)))}


def _gaussian(site: Mapping[str, Any]) -> tuple[jax.Array, jax.Array] | None:
    """Mean, and standard deviations or Cholesky factor, of a site's normal distribution; None if it has another."""
    fn = site["fn"]
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.Normal):
        return jnp.broadcast_to(fn.loc, site["fn"].shape()), jnp.broadcast_to(fn.scale, site["fn"].shape())
    if isinstance(fn, dist.MultivariateNormal):
        return jnp.broadcast_to(fn.loc, site["fn"].shape()), fn.scale_tril
    return None


def _spread(site: Mapping[str, Any]) -> Any:
    """What must not depend on the diffusion site: the data, their spread, and a handler's scale."""
    gaussian = _gaussian(site)
    return site["value"], None if gaussian is None else gaussian[1], site["scale"]


def _whiten(site: Mapping[str, Any], value: jax.Array) -> jax.Array:
    """Values of a site in units of its spread, flat; a scaled log-density is one of another spread."""
    spread = _gaussian(site)[1]
    value = jnp.asarray(value, jnp.result_type(float))
    if jnp.shape(spread) == jnp.shape(value):
        whitened = value / spread
    else:
        factor = jnp.broadcast_to(spread, (*value.shape, value.shape[-1]))
        whitened = solve_triangular(factor, value[..., None], lower=True)
    power = 1.0 if site["scale"] is None else site["scale"]
    return (jnp.sqrt(power) * whitened).reshape(-1)
