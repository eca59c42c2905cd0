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
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, Repeated
from numpyro_diffusion.guidance import GUIDANCES, Guided, Likelihood, Observation
from numpyro_diffusion.infer.model.checks import check_walkable
from numpyro_diffusion.infer.model.joint import Joint, are_equal, spans
from numpyro_diffusion.infer.model.record import Evaluation, Reading
from numpyro_diffusion.infer.model.sites import PriorSite

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
    parts = reading.evaluate(reading.origin())
    sites = reading.sites_of(parts)
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
        observation = _read(reading, sites, denoiser, parts)
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
    observation: Observation | Likelihood, denoiser: Denoiser, sites: Mapping[str, PriorSite]
) -> Observation | Likelihood:
    """An observation of a dict of points as one of the joint point."""
    if isinstance(observation, Likelihood):
        log_density: Callable = observation.log_density
        return Likelihood(lambda u, p: log_density(_split(denoiser, sites, u), p), observation.parameters)
    mean: Callable = observation.mean
    y, scale, parameters = observation.y, observation.scale, observation.parameters
    return Observation(y, scale, lambda u, p: mean(_split(denoiser, sites, u), p), parameters)


def _read(
    reading: Reading, sites: Mapping[str, PriorSite], denoiser: Denoiser, parts: Evaluation
) -> Observation | Likelihood:
    """The data as an observation of the denoiser's own space, or as a likelihood if they are not Gaussian."""

    def point(u: jax.Array) -> Point:
        points = _split(denoiser, sites, u)
        return {name: site.from_denoiser(points[name]) for name, site in sites.items()}

    seen = {name: law for name, law in sorted(reading.structure.observed.items()) if law.depends_on & sites.keys()}
    if not seen or any(not law.is_normal or law.spread_depends_on & sites.keys() for law in seen.values()):
        return Likelihood(lambda u, _: reading.log_rest(point(u)))

    def mean(u: jax.Array, _: Any) -> jax.Array:
        observed = reading.evaluate(point(u)).observed
        return jnp.concatenate([observed[name].whiten(observed[name].mean) for name in seen])

    y = jnp.concatenate([parts.observed[name].whiten(parts.observed[name].value) for name in seen])
    return Observation(y, jnp.ones(()), mean)
