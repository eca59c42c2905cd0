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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute
from numpyro.infer.gibbs import conditioned
from numpyro.infer.util import _unconstrain_reparam, compute_log_probs

from numpyro_diffusion import _precision
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, as_written, drop_prior, is_diffusion_site, prior_inside
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.infer.model.structure import Structure, read_structure


class Evaluation(NamedTuple):
    """The parts of a model at one point."""

    log_rest: jax.Array  # of everything but the diffusion priors and the Jacobians, a scalar
    log_likelihood: jax.Array  # of all observations and factors, the part of `log_rest` that is no prior, a scalar
    log_jacobian: dict[str, jax.Array]  # of the constrained support of each latent site that has one
    priors: dict[str, DiffusionPrior]  # of each diffusion site; they may depend on the point
    values: dict[str, jax.Array]  # constrained, of each latent site
    deterministic: dict[str, jax.Array]


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
            known[key] = read_structure(self.model, self.args, self.kwargs)
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
        """Values on the supports and, if asked, those of the deterministic sites.

        The model need not run for supports that are always the same. Where it must, it runs as it is: `MCMC` asks
        outside of any program too, where a new one would be compiled in every run.
        """
        supports = {name: self.structure.latent[name].support for name in z if name in self.structure.latent}
        if len(supports) == len(z) and None not in supports.values():
            if not (deterministic and self.structure.deterministic):
                return {name: biject_to(supports[name])(value) for name, value in z.items()}
        parts = _evaluate(self.model, self.args, self.kwargs, dict(z))
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
    observed = [value for name, value in log_probs.items() if sites[name]["is_observed"]]
    return Evaluation(
        log_rest=jnp.asarray(sum(log_probs.values(), start=jnp.zeros(()))),
        log_likelihood=jnp.asarray(sum(observed, start=jnp.zeros(()))),
        log_jacobian=log_jacobian,
        priors=priors,
        values={name: jnp.asarray(s["value"]) for name, s in latent.items()},
        deterministic={name: s["value"] for name, s in sites.items() if s["type"] == "deterministic"},
    )
