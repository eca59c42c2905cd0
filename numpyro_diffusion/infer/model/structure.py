r"""What a model is made of, from one abstract trace: its sites, their shapes, and what depends on what.

Nothing is computed: the model runs once, on symbols. Latent sites stand at the origin of their unconstrained
coordinates, and each value carries the name of its site along, as an operation of the program that does nothing. What
names are behind an array of a distribution says on which sites it depends; loops and branches count as a whole.

A block of a composite kernel sees the same model with some sites given: `Structure.given`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params
from numpyro.distributions import biject_to
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, as_written, is_diffusion_site, prior_inside
from numpyro_diffusion.infer.model.sites import NormalData, PriorSite, normal_data


@dataclass(frozen=True)
class Law:
    """On what the term of a sample site depends, as seen by other sites.

    Args:
        depends_on: names of the latent sites that its distribution depends on, and its data if it is observed.
        is_normal: whether it is a normal law that `sites.normal_data` reads.
        spread_depends_on: names of those that the data and all of a normal law but its mean depend on.
    """

    depends_on: frozenset[str]
    is_normal: bool
    spread_depends_on: frozenset[str]


@dataclass(frozen=True)
class LatentSite:
    """What is known about a latent site before its value is known.

    Args:
        shape: of its constrained value.
        unconstrained_shape: of its value in NumPyro's coordinates.
        is_diffusion: whether it has a `DiffusionPrior`.
        is_discrete: whether its support is discrete.
        is_dropped: whether `drop_prior` has taken its prior out of the model.
        is_altered: whether a mask, a scale or a subsampling plate changes its term in the model.
        support: its support, where that is one and the same; None where the model computes it.
        depends_on: names of the other latent sites that its distribution depends on.
        support_depends_on: names of the other latent sites that its support depends on.
        support_given: names of sites that a composite kernel conditions on and its support depends on.
        prior: of a diffusion site, with shapes in place of its arrays.
    """

    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    is_diffusion: bool
    is_discrete: bool
    is_dropped: bool
    is_altered: bool
    support: Any = None
    depends_on: frozenset[str] = frozenset()
    support_depends_on: frozenset[str] = frozenset()
    support_given: frozenset[str] = frozenset()
    prior: DiffusionPrior | None = None

    @property
    def prior_site(self) -> PriorSite:
        """A diffusion site with its prior."""
        return PriorSite.of(self.prior, self.shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Args:
        latent: its latent sites, in the order of the model.
        laws: the terms of all its sample sites.
        observed_priors: names of observed sites with a `DiffusionPrior`.
        subsampled: names of plates that show a part of the data.
        in_loop: names of diffusion sites inside NumPyro's `scan`.
        draws_elsewhere: whether it draws random numbers outside of sample sites.
        deterministic: names of its deterministic sites.
    """

    latent: dict[str, LatentSite]
    laws: dict[str, Law]
    observed_priors: tuple[str, ...]
    subsampled: tuple[str, ...]
    in_loop: tuple[str, ...]
    draws_elsewhere: bool
    deterministic: tuple[str, ...]

    @property
    def diffusion(self) -> list[str]:
        """Names of the latent diffusion sites."""
        return [name for name, site in self.latent.items() if site.is_diffusion]

    @property
    def others(self) -> list[str]:
        """Names of the other latent sites."""
        return [name for name, site in self.latent.items() if not site.is_diffusion]

    @property
    def discrete(self) -> list[str]:
        """Names of the discrete latent sites."""
        return [name for name, site in self.latent.items() if site.is_discrete]

    @property
    def dependent(self) -> list[str]:
        """Names of the diffusion sites whose prior depends on another latent site."""
        return [name for name in self.diffusion if self.latent[name].depends_on]

    @property
    def observed(self) -> dict[str, Law]:
        """The terms of sites that are not latent."""
        return {name: law for name, law in self.laws.items() if name not in self.latent}

    def given(self, names: Iterable[str]) -> "Structure":
        """The structure of the model conditioned on some of its latent sites."""
        names = frozenset(names) & self.latent.keys()
        if not names:
            return self

        def of(site: LatentSite) -> LatentSite:
            given = site.support_given | site.support_depends_on & names
            return replace(site, depends_on=site.depends_on - names, support_given=given)

        priors = tuple(name for name in self.diffusion if name in names)
        return replace(
            self,
            latent={name: of(site) for name, site in self.latent.items() if name not in names},
            observed_priors=(*self.observed_priors, *priors),
            in_loop=tuple(name for name in self.in_loop if name not in names),
        )


_PREFIX = "numpyro_diffusion/"
_DRAWN = "/drawn"  # no name of a site: what a model draws that is none


def _named(value: jax.Array, name: str) -> jax.Array:
    """The same value, with a name that `_origins` finds behind all that is made of it."""
    return checkpoint_name(value, _PREFIX + name)


class _Watch(Messenger):
    """Handler: records what a trace does not keep."""

    def __init__(self, fn: Model) -> None:
        super().__init__(fn)
        self.in_loop: list[str] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "prng_key" and msg["kwargs"]["rng_key"] is not None:  # `seed` has given one
            msg["kwargs"]["rng_key"] = _named(msg["kwargs"]["rng_key"], _DRAWN)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow":
            _, found = msg["value"]
            body = found[0] if isinstance(found, tuple) else found  # of `scan`, or of a branch of `cond`
            self.in_loop += [name for name, site in body.trace.items() if is_diffusion_site(site)]


def read_structure(model: Callable[[list], Any], arrays: list) -> Structure:
    """Reads a model by an abstract trace at the origin of its latent sites, whose values carry their names along.

    Args:
        model: the model at its arguments, as a function of those that are arrays.
        arrays: these arguments.

    Returns:
        The `Structure`.
    """
    found: dict[str, Any] = {}

    def at_origin(site: Mapping[str, Any]) -> jax.Array | None:
        if site["type"] != "sample" or site["is_observed"] or site["value"] is not None:
            return None
        support = site["fn"].support
        if support.is_discrete:
            value = site["fn"](rng_key=jax.random.key(0), sample_shape=site["kwargs"].get("sample_shape", ()))
        else:
            to_support = biject_to(support)
            value = to_support(jnp.zeros(to_support.inverse_shape(site["fn"].shape())))
        return _named(value, site["name"])

    def read(arrays: list) -> tuple[dict[str, tuple], dict[str, DiffusionPrior]]:
        watch = _Watch(substitute(seed(model, jax.random.key(0)), substitute_fn=at_origin))
        sites = trace(watch).get_trace(arrays)
        samples = {name: s for name, s in sites.items() if s["type"] == "sample"}
        latent = {name: s for name, s in samples.items() if not s["is_observed"]}
        found.update(sites=sites, watch=watch, latent={name: _latent(s) for name, s in latent.items()})
        normal = {name: normal_data(s) for name, s in samples.items()}
        found["normal"] = {name for name, data in normal.items() if data is not None}
        behind = {
            name: (
                jax.tree.leaves((s["fn"], s["value"] if s["is_observed"] else ())),
                jax.tree.leaves(_spread(normal[name], s["is_observed"])),
                jax.tree.leaves(s["fn"].support) if name in latent else (),
            )
            for name, s in samples.items()
        }
        priors = {name: prior_inside(as_written(s), True) for name, s in latent.items()}
        return behind, {name: prior for name, prior in priors.items() if prior is not None}

    jaxpr, shapes = jax.make_jaxpr(read, return_shape=True)(arrays)
    behind, priors = shapes
    leaves, tree = jax.tree.flatten(behind)
    behind = jax.tree.unflatten(tree, _origins(jaxpr.jaxpr)[: len(leaves)])
    union = {name: tuple(frozenset().union(*names) for names in parts) for name, parts in behind.items()}
    sites, watch, latent = found["sites"], found["watch"], found["latent"]
    plates = {name: s["args"] for name, s in sites.items() if s["type"] == "plate"}
    return Structure(
        latent={
            name: replace(
                site,
                depends_on=union[name][0] & (latent.keys() - {name}),
                support_depends_on=union[name][2] & latent.keys(),
                prior=priors.get(name),
            )
            for name, site in latent.items()
        },
        laws={
            name: Law(of_law & latent.keys(), name in found["normal"], of_spread & latent.keys())
            for name, (of_law, of_spread, _) in union.items()
        },
        observed_priors=tuple(
            name
            for name, s in sites.items()
            if s["type"] == "sample" and s["is_observed"] and prior_inside(s["fn"], True) is not None
        ),
        subsampled=tuple(name for name, (size, subsample_size) in plates.items() if (subsample_size or size) < size),
        in_loop=tuple(watch.in_loop),
        draws_elsewhere=any(_DRAWN in names for names, _, _ in union.values()),
        deterministic=tuple(name for name, s in sites.items() if s["type"] == "deterministic"),
    )


def _spread(data: NormalData | None, is_observed: bool) -> Any:
    """What of a normal law must not depend on a site for the law to be one of noise about it."""
    return () if data is None else data._replace(mean=None, value=data.value if is_observed else None)  # type: ignore[arg-type]


def _latent(site: Mapping[str, Any]) -> LatentSite:
    """What can be said of a site while its trace is alive; on what it depends comes later."""
    fn = site["fn"]
    is_discrete = bool(fn.support.is_discrete)
    is_computed = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(fn.support))
    is_diffusion = is_diffusion_site(site)
    return LatentSite(
        shape=tuple(jnp.shape(site["value"])),
        unconstrained_shape=tuple(fn.shape() if is_discrete else biject_to(fn.support).inverse_shape(fn.shape())),
        is_diffusion=is_diffusion,
        is_discrete=is_discrete,
        is_dropped=as_written(site) is not fn,
        support=None if is_computed else fn.support,
        is_altered=_is_masked(as_written(site)) or not (site["scale"] is None or is_identically_one(site["scale"])),
    )


def _is_masked(fn: Any) -> bool:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.MaskedDistribution)


def _origins(jaxpr: Any) -> list[frozenset]:
    """Names of the sites that each output of a program may depend on; a loop or a call counts as a whole."""
    known: dict[Any, frozenset] = {}

    def of(variable: Any) -> frozenset:
        return frozenset() if isinstance(variable, Literal) else known.get(variable, frozenset())

    for eqn in jaxpr.eqns:
        names = frozenset().union(_names(eqn), *map(of, eqn.invars))
        known.update(dict.fromkeys(eqn.outvars, names))
    return [of(variable) for variable in jaxpr.outvars]


def _names(eqn: Any) -> frozenset:
    """Names of the sites that an operation introduces, by itself or inside."""
    if eqn.primitive.name == "name" and eqn.params["name"].startswith(_PREFIX):
        return frozenset({eqn.params["name"].removeprefix(_PREFIX)})
    inner = (inside for jaxpr in jaxprs_in_params(eqn.params) for inside in jaxpr.eqns)
    return frozenset().union(*map(_names, inner))
