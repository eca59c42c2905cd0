r"""What a NumPyro model observes of its diffusion sites, read from the model for guidance.

Guidance needs the data as $y = h(x) + s \varepsilon$. In a model that is a site whose distribution is `Normal`,
`MultivariateNormal` or `LowRankMultivariateNormal`, whose mean depends on a diffusion site and whose spread does not.
Several such sites are one observation with more entries, each divided by its own spread, so that

$$\log L(x) = -\tfrac12 \left\| \tilde y - \tilde h(x) \right\|^2 + \text{const.}$$

Entries under a mask (`handlers.mask`, `Distribution.mask`) have no term in the likelihood: their data and their mean
are read as zero, whatever they are, NaN included.

With any other term that depends on a diffusion site (a `factor`, a Poisson count, a scale or a mask that varies with
$x$) only the gradient of the likelihood can be used. Terms that do not depend on the sites are left out. All of this is
only for proposals: kernels weigh by the model itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from numpyro.ops.provenance import eval_provenance

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, Repeated
from numpyro_diffusion.guidance import GUIDANCES, Guided, Likelihood, Observation
from numpyro_diffusion.infer.model.checks import check_walkable
from numpyro_diffusion.infer.model.joint import Joint, are_equal, spans
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite, traced

Point = dict[str, jax.Array]


def check_guidance(guidance: str | None) -> None:
    """Raises `ValueError` unless the guidance is one of `guidance.GUIDANCES`, or None."""
    if guidance is not None:
        _checks.one_of("guidance", guidance, GUIDANCES)


@dataclass(frozen=True)
class GuidedSites:
    """The diffusion sites of a model as one point of a denoiser that the rest of the model guides.

    Args:
        sites: the sites, by name.
        guided: the guided denoiser of all of them, plates included.
    """

    sites: dict[str, PriorSite]
    guided: Guided

    def to_denoiser(self, z: Mapping[str, jax.Array]) -> jax.Array:
        """From NumPyro's unconstrained coordinates to a point of the denoiser, of `event_shape`."""
        points = [site.to_denoiser(z[name]) for name, site in self.sites.items()]
        joint = _joint_of(self.guided.base)
        return points[0] if joint is None else joint.join(points)

    def from_denoiser(self, u: jax.Array) -> Point:
        """From a point of the denoiser to NumPyro's unconstrained coordinates."""
        points = _split(self.guided.base, self.sites, u)
        return {name: site.from_denoiser(points[name]) for name, site in self.sites.items()}

    def constrain(self, z: Mapping[str, jax.Array]) -> Point:
        """From NumPyro's unconstrained coordinates to the supports."""
        return {name: site.constrain(z[name]) for name, site in self.sites.items()}


def _joint_of(denoiser: Denoiser) -> Joint | None:
    return denoiser if isinstance(denoiser, Joint) else None


def _split(denoiser: Denoiser, sites: Mapping[str, PriorSite], u: jax.Array) -> Point:
    """A point of the denoiser by site, each in its own denoiser's space."""
    joint = _joint_of(denoiser)
    return dict(zip(sites, [u] if joint is None else joint.split(u), strict=True))


def guided_sites(
    reading: Reading,
    guidance: str | None = None,
    observation: Observation | Likelihood | None = None,
) -> GuidedSites:
    """The diffusion sites of a model, with a denoiser of all of them that the rest of the model guides.

    Args:
        reading: the model at its arguments.
        guidance: one of `guidance.GUIDANCES`; None takes "mmps" for a Gaussian observation and "dps" for another.
        observation: what is observed of a point of the denoiser's own space, plates included, or, of several sites, of
            a dict of such points; None reads the model.

    Returns:
        The `GuidedSites`.

    Raises:
        ValueError: for a guidance that cannot handle the likelihood, or several sites whose ladders of noise levels
            have different spans.
    """
    sites = reading.sites()
    check_walkable("a guided walk", sites)
    denoisers = [
        Repeated(site.prior.denoiser, site.batch_shape) if site.batch_shape else site.prior.denoiser
        for site in sites.values()
    ]
    ratios = spans(denoisers) if len(denoisers) > 1 else None
    if ratios is not None and not are_equal(ratios):
        raise ValueError(
            f"a guided walk takes all diffusion sites down one ladder, so the schedules of {list(sites)} must have the "
            f"same ratio of highest to lowest noise level; got {[round(ratio) for ratio in ratios]}. Give them such "
            "schedules (denoise.reschedule), or give each site its own block of numpyro.infer.Gibbs, or use "
            "NoiseSpace(model)"
        )
    denoiser = denoisers[0] if len(denoisers) == 1 else Joint(tuple(denoisers))
    if observation is None:
        observation = read_observation(reading, sites, denoiser)
    elif len(sites) > 1:
        observation = _of_joint(observation, denoiser, sites)
    is_gaussian = isinstance(observation, Observation)
    if guidance not in (None, "dps") and not is_gaussian:
        raise ValueError(
            f"guidance={guidance!r} needs a Gaussian observation of {list(sites)}; the model has another term that "
            'depends on them. Use guidance="dps", or give an `observation` that is close enough to steer by'
        )
    return GuidedSites(sites, Guided(denoiser, observation, guidance or ("mmps" if is_gaussian else "dps")))


def guided_site(
    reading: Reading,
    guidance: str | None = None,
    observation: Observation | Likelihood | None = None,
) -> tuple[str, PriorSite, Guided]:
    """The same for a model with one diffusion site: its name, the site, and the guided denoiser of its points.

    Raises:
        ValueError: as `guided_sites`, and for a model with several diffusion sites.
    """
    found = guided_sites(reading, guidance, observation)
    if len(found.sites) > 1:
        raise ValueError(
            f"guidance={guidance!r} takes one diffusion site here; the model has {sorted(found.sites)}. Use "
            "guidance=None, or GuidedPCN(model) or ParticleGibbs(model), which take several"
        )
    ((name, site),) = found.sites.items()
    return name, site, found.guided


def _of_joint(
    observation: Observation | Likelihood, denoiser: Joint, sites: Mapping[str, PriorSite]
) -> Observation | Likelihood:
    """An observation of a dict of points as one of the joint point."""
    if isinstance(observation, Likelihood):
        log_density = observation.log_density
        return Likelihood(lambda u, p: log_density(_split(denoiser, sites, u), p), observation.parameters)
    y, scale, mean, parameters = observation.y, observation.scale, observation.mean, observation.parameters
    return Observation(y, scale, lambda u, p: mean(_split(denoiser, sites, u), p), parameters)


def read_observation(reading: Reading, sites: Mapping[str, PriorSite], denoiser: Denoiser) -> Observation | Likelihood:
    """The data as an observation of the denoiser's own space, or as a likelihood if they are not Gaussian."""

    def point(u: jax.Array) -> Point:
        points = _split(denoiser, sites, u)
        return {name: site.from_denoiser(points[name]) for name, site in sites.items()}

    def sites_at(u: jax.Array) -> dict[str, Any]:
        values = {name: sites[name].constrain(z) for name, z in point(u).items()}
        trace = traced(reading.model, reading.args, reading.kwargs, values)
        return {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}

    origin = jnp.zeros(denoiser.event_shape)
    seen = _depending(sites_at, origin)
    found = sites_at(origin)
    gaussian = {n: _gaussian(found[n]) for n in seen}
    if not seen or any(entry is None for entry in gaussian.values()) or _depending(sites_at, origin, _spread) & seen:
        return Likelihood(lambda u, _: reading.log_rest(point(u)))

    def mean(u: jax.Array, _: Any) -> jax.Array:
        found = sites_at(u)
        laws = {n: _gaussian(found[n]) for n in sorted(seen)}
        return jnp.concatenate([law.whiten(law.mean) for law in laws.values()])

    y = jnp.concatenate([gaussian[n].whiten(found[n]["value"]) for n in sorted(seen)])
    return Observation(y, jnp.ones(()), mean)


def _depending(
    sites_at: Callable[[jax.Array], dict[str, Any]],
    u: jax.Array,
    leaves: Callable[[Mapping[str, Any]], Any] = lambda site: (jax.tree.leaves(site["fn"]), site["value"]),
) -> set[str]:
    """Names of the observed sites whose arrays depend on a diffusion site."""
    found = eval_provenance(lambda u: {n: leaves(s) for n, s in sites_at(u).items()}, u=u)
    return {n for n, tree in found.items() if any(jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, frozenset)))}


class _Gaussian(NamedTuple):
    """The normal law of an observed site; `scale` or `factor` is None."""

    mean: jax.Array  # of the site's shape
    scale: jax.Array | None  # standard deviations, of the site's shape
    factor: jax.Array | None  # lower Cholesky factors, (*shape, shape[-1])
    mask: jax.Array  # which entries count, of the site's shape
    power: jax.Array | float  # of a scale handler, which changes the spread

    def whiten(self, value: jax.Array) -> jax.Array:
        """Values of the site in units of its spread, flat; zero under the mask."""
        value = jnp.where(self.mask, jnp.asarray(value, jnp.result_type(float)), 0.0)
        if self.factor is None:
            whitened = value / jnp.where(self.mask, self.scale, 1.0)
        else:
            factor = jnp.where(self.mask[..., None], self.factor, jnp.eye(value.shape[-1], dtype=value.dtype))
            whitened = solve_triangular(factor, value[..., None], lower=True)[..., 0]
        return (jnp.sqrt(self.power) * whitened).reshape(-1)


def _gaussian(site: Mapping[str, Any]) -> _Gaussian | None:
    """The law of a site if it is normal, in plates and under masks; None if it is not."""
    shape, fn, mask = site["fn"].shape(), site["fn"], jnp.ones((), bool)
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            kept = jnp.asarray(fn._mask)
            mask = mask & kept.reshape(kept.shape + (1,) * fn.event_dim * (kept.ndim > 0))
        fn = fn.base_dist
    power = 1.0 if site["scale"] is None else site["scale"]
    mask = jnp.broadcast_to(mask, shape)
    if isinstance(fn, dist.Normal):
        return _Gaussian(jnp.broadcast_to(fn.loc, shape), jnp.broadcast_to(fn.scale, shape), None, mask, power)
    if isinstance(fn, dist.MultivariateNormal):
        factor = fn.scale_tril
    elif isinstance(fn, dist.LowRankMultivariateNormal):
        factor = jnp.linalg.cholesky(fn.covariance_matrix)
    else:
        return None
    return _Gaussian(jnp.broadcast_to(fn.loc, shape), None, jnp.broadcast_to(factor, (*shape, shape[-1])), mask, power)


def _spread(site: Mapping[str, Any]) -> Any:
    """What must not depend on the diffusion sites: the data, and their law except the mean."""
    law = _gaussian(site)
    return site["value"], site["scale"], None if law is None else law[1:]
