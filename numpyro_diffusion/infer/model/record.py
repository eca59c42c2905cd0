r"""A model, read once for a run: its sites, and its parts as functions of one point.

A point $q$ is the unconstrained values of all latent sites as NumPyro has them. One execution of the model there gives

$$\log \pi(q) = \sum_i \log p_i(x_i) + \underbrace{\log p(\theta)\, p(y \mid x, \theta)}_{\text{log rest}} +
\sum_j \log |\det J_j(q)|,$$

with its terms separate (`Evaluation`): the priors of the diffusion sites as distributions, never evaluated; the rest;
the Jacobian of each constrained site. Kernels combine what they need.

A `Record` belongs to one run. Its `Reading` at the model's arguments has the `structure`, from an abstract trace, and
evaluates the model through a function that JAX traces once for arguments of one kind: however often a kernel evaluates
it, at the start, in a step or in post-processing, the user's Python code runs only two or three times. A run that
starts anew makes a new record, so that variables which the model reads are read anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params
from numpyro.distributions import biject_to
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned
from numpyro.infer.util import _unconstrain_reparam, compute_log_probs
from numpyro.primitives import Messenger

from numpyro_diffusion import _precision
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, as_written, drop_prior, is_diffusion_site, prior_inside
from numpyro_diffusion.infer.model.sites import PriorSite


class Evaluation(NamedTuple):
    """The parts of a model at one point."""

    log_rest: jax.Array  # of everything but the diffusion priors and the Jacobians, a scalar
    log_jacobian: dict[str, jax.Array]  # of the constrained support of each latent site that has one
    priors: dict[str, DiffusionPrior]  # of each diffusion site; they may depend on the point
    values: dict[str, jax.Array]  # constrained, of each latent site
    deterministic: dict[str, jax.Array]


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
        depends_on: names of the other latent sites that its distribution depends on.
        support_depends_on: names of sites that a composite kernel conditions on and its support depends on.
    """

    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    is_diffusion: bool
    is_discrete: bool
    is_dropped: bool
    is_altered: bool
    depends_on: frozenset[str] = frozenset()
    support_depends_on: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    Args:
        latent: its latent sites, in the order of the model.
        observed_priors: names of observed sites with a `DiffusionPrior`.
        subsampled: names of plates that show a part of the data.
        in_loop: names of diffusion sites inside NumPyro's `scan`.
        draws_elsewhere: whether it draws random numbers outside of sample sites.
        deterministic: names of its deterministic sites.
    """

    latent: dict[str, LatentSite]
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


class Record:
    """A model, for one run of a kernel.

    Args:
        model: NumPyro model.
    """

    def __init__(self, model: Model) -> None:
        self._model = conditioned(model)
        self._structures: dict[Any, Structure] = {}
        self._evaluators: dict[Any, Any] = {}

    def at(self, args: tuple, kwargs: Mapping[str, Any]) -> "Reading":
        """The model at given arguments; keyword arguments hold what a composite kernel conditions on."""
        return Reading(self, args, dict(kwargs))


class Reading:
    """A model at its arguments; made by `Record.at`."""

    def __init__(self, record: Record, args: tuple, kwargs: dict[str, Any]) -> None:
        self._record, self.args, self.kwargs = record, args, kwargs

    @property
    def model(self) -> Model:
        """The model, which takes what a composite kernel conditions on among its keyword arguments."""
        return self._record._model

    @property
    def structure(self) -> Structure:
        """What the model is made of, from one abstract trace."""
        leaves, tree = jax.tree.flatten((self.args, self.kwargs))
        key = tree, tuple((jnp.shape(v), jnp.result_type(v)) if _is_array(v) else _fixed(v) for v in leaves)
        known = self._record._structures
        if key not in known:
            known[key] = _structure(self.model, self.args, self.kwargs)
        return known[key]

    def evaluate(self, z: Mapping[str, jax.Array]) -> Evaluation:
        """The parts of the model at unconstrained values of all its latent sites."""
        if not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((self.args, self.kwargs, z))):
            return _evaluate(self.model, self.args, self.kwargs, dict(z))  # nothing is being compiled
        leaves, tree = jax.tree.flatten((self.args, self.kwargs))
        is_traced = [isinstance(v, jax.core.Tracer) for v in leaves]
        key = tree, tuple(None if traced else _fixed(v) for v, traced in zip(leaves, is_traced, strict=True))
        evaluators = self._record._evaluators
        if key not in evaluators:
            fixed = [None if traced else v for v, traced in zip(leaves, is_traced, strict=True)]
            model = self.model

            def run(moving: list, z: dict[str, jax.Array]) -> Evaluation:
                rest = iter(moving)
                merged = [next(rest) if traced else v for v, traced in zip(fixed, is_traced, strict=True)]
                args, kwargs = jax.tree.unflatten(tree, merged)
                return _evaluate(model, args, kwargs, z)

            evaluators[key] = jax.jit(run), fixed  # holding what is fixed keeps its identity from being used again
        moving = [v for v, traced in zip(leaves, is_traced, strict=True) if traced]
        return evaluators[key][0](moving, dict(z))

    def origin(self) -> dict[str, jax.Array]:
        """The origin of the unconstrained coordinates: a point to read priors at that depend on none."""
        sites = self.structure.latent.items()
        return {name: jnp.zeros(site.unconstrained_shape) for name, site in sites if not site.is_discrete}

    def sites(self, z: Mapping[str, jax.Array] | None = None) -> dict[str, PriorSite]:
        """The diffusion sites with their priors; `z` is needed if these depend on other latent sites."""
        return self._sites(self.evaluate(self.origin() if z is None else z).priors)

    def sites_in_the_abstract(self) -> dict[str, PriorSite]:
        """The diffusion sites with shapes in place of the arrays of their priors; nothing is computed."""
        return self._sites(jax.eval_shape(lambda z: self.evaluate(z).priors, self.origin()))

    def _sites(self, priors: dict[str, DiffusionPrior]) -> dict[str, PriorSite]:
        return {name: PriorSite.of(prior, self.structure.latent[name].shape) for name, prior in priors.items()}

    def log_rest(self, z: Mapping[str, jax.Array]) -> jax.Array:
        """The log-density of everything but the diffusion priors, a scalar, in JAX's default precision."""
        return self.evaluate(z).log_rest.astype(jnp.result_type(float))

    def constrain(self, z: Mapping[str, jax.Array], deterministic: bool = False) -> dict[str, jax.Array]:
        """Values on the supports and, if asked, those of the deterministic sites."""
        parts = self.evaluate(z)
        return {**parts.values, **parts.deterministic} if deterministic else parts.values


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _fixed(value: Any) -> Any:
    """The identity of an argument that is not traced: that of the object for an array, the value of a number."""
    if _is_array(value):
        return id(value)
    try:
        return type(value), hash(value), value
    except TypeError:
        return id(value)


def _evaluate(model: Model, args: tuple, kwargs: dict[str, Any], z: dict[str, jax.Array]) -> Evaluation:
    def reparametrised(site: Mapping[str, Any]) -> jax.Array | None:
        return _unconstrain_reparam(z, site)

    at_point = substitute(seed(drop_prior(model), jax.random.key(0)), substitute_fn=reparametrised)
    with _precision.highest():  # likelihoods of precise data lose their digits in less
        log_probs, sites = compute_log_probs(at_point, args, kwargs, {})
    log_jacobian = {name: log_probs.pop(f"_{name}_log_det") for name in z if f"_{name}_log_det" in log_probs}
    latent = {name: s for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
    priors = {name: prior_inside(as_written(s)) for name, s in latent.items() if is_diffusion_site(s)}
    return Evaluation(
        log_rest=jnp.asarray(sum(log_probs.values(), start=jnp.zeros(()))),
        log_jacobian=log_jacobian,
        priors=priors,
        values={name: jnp.asarray(s["value"]) for name, s in latent.items()},
        deterministic={name: s["value"] for name, s in sites.items() if s["type"] == "deterministic"},
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


def _structure(model: Model, args: tuple, kwargs: dict[str, Any]) -> Structure:
    """Reads a model by an abstract trace at the origin of its latent sites, whose values carry their names along."""
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

    given = kwargs.get(GIBBS_SITES_KWARG, {})

    def read() -> tuple[dict[str, list], dict[str, list]]:
        named = {name: _named(value, name) for name, value in given.items()}
        watch = _Watch(substitute(seed(model, jax.random.key(0)), substitute_fn=at_origin))
        sites = trace(watch).get_trace(*args, **({**kwargs, GIBBS_SITES_KWARG: named} if named else kwargs))
        samples = {name: s for name, s in sites.items() if s["type"] == "sample"}
        latent = {name: s for name, s in samples.items() if not s["is_observed"]}
        found.update(sites=sites, watch=watch, latent={name: _latent(s) for name, s in latent.items()})
        laws = {name: jax.tree.leaves((s["fn"], s["value"] if s["is_observed"] else ())) for name, s in samples.items()}
        return laws, {name: jax.tree.leaves(s["fn"].support) for name, s in latent.items()}

    jaxpr, shapes = jax.make_jaxpr(read, return_shape=True)()
    origins = _origins(jaxpr.jaxpr)
    laws, supports = jax.tree.unflatten(jax.tree.structure(shapes), origins)
    sites, watch, latent = found["sites"], found["watch"], found["latent"]
    plates = {name: s["args"] for name, s in sites.items() if s["type"] == "plate"}
    everything = frozenset().union(*(names for leaves in laws.values() for names in leaves))
    return Structure(
        latent={
            name: replace(
                site,
                depends_on=frozenset().union(*laws[name]) & (latent.keys() - {name}),
                support_depends_on=frozenset().union(*supports[name]) & given.keys(),
            )
            for name, site in latent.items()
        },
        observed_priors=tuple(
            name
            for name, s in sites.items()
            if s["type"] == "sample" and s["is_observed"] and prior_inside(s["fn"], True) is not None
        ),
        subsampled=tuple(name for name, (size, subsample_size) in plates.items() if (subsample_size or size) < size),
        in_loop=tuple(watch.in_loop),
        draws_elsewhere=_DRAWN in everything,
        deterministic=tuple(name for name, s in sites.items() if s["type"] == "deterministic"),
    )


def _latent(site: Mapping[str, Any]) -> LatentSite:
    """What can be said of a site while its trace is alive; on what it depends comes later."""
    fn = site["fn"]
    is_discrete = bool(fn.support.is_discrete)
    is_diffusion = is_diffusion_site(site)
    return LatentSite(
        shape=tuple(jnp.shape(site["value"])),
        unconstrained_shape=tuple(fn.shape() if is_discrete else biject_to(fn.support).inverse_shape(fn.shape())),
        is_diffusion=is_diffusion,
        is_discrete=is_discrete,
        is_dropped=as_written(site) is not fn,
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
