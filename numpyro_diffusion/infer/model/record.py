r"""A model, read once for a run: its sites, and its parts as functions of one point.

A point $q$ is the unconstrained values of all latent sites as NumPyro has them. One execution of the model there gives

$$\log \pi(q) = \sum_i \log p_i(x_i) + \sum_k \log p_k(\theta_k) + \log p(y \mid x, \theta) +
\sum_j \log |\det J_j(q)|,$$

with its terms separate (`Evaluation`): the priors of the diffusion sites as distributions, never evaluated; those of
the other latent sites; what is observed; the Jacobian of each constrained site. Kernels combine what they need.

A `Record` belongs to one run. It makes programs of the model, each from one execution of the user's Python code: an
abstract trace for the `structure`, and a function for the parts of the model at a point, which is traced once and used
wherever a kernel evaluates the model, at the start, in a step or in a gradient. Arrays and floats among the model's
arguments are arguments of these programs. A model that asks for their values gets them, and is traced once more where
they are symbols. A run that starts anew makes a new record, so that variables which the model reads are read anew.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned
from numpyro.infer.util import _unconstrain_reparam, compute_log_probs, unconstrain_fn

from numpyro_diffusion import _precision
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, as_written, drop_prior, is_diffusion_site, prior_inside
from numpyro_diffusion.infer.model.sites import NormalData, PriorSite, normal_data
from numpyro_diffusion.infer.model.structure import Structure, read_structure

TAKEN = (jax.Array, np.ndarray, np.inexact, float)
"""What a program takes among the model's arguments; whole numbers may be shapes."""


class Evaluation(NamedTuple):
    """The parts of a model at one point."""

    log_likelihood: jax.Array  # of all sites that are not latent, factors among them, a scalar
    log_others: dict[str, jax.Array]  # log-density of each latent site that is no diffusion site
    log_jacobian: dict[str, jax.Array]  # of the constrained support of each latent site that has one
    priors: dict[str, DiffusionPrior]  # of each diffusion site; they may depend on the point
    values: dict[str, jax.Array]  # constrained, of each latent site
    deterministic: dict[str, jax.Array]
    observed: dict[str, NormalData]  # sites that are not latent, as far as their law is normal

    @property
    def log_rest(self) -> jax.Array:
        """Of everything but the diffusion priors and the Jacobians, a scalar."""
        return self.log_likelihood + sum(self.log_others.values())


class Record:
    """A model, for one run of a kernel.

    Args:
        model: NumPyro model.
    """

    def __init__(self, model: Model) -> None:
        self._model = conditioned(model)
        self._structures: dict[Any, Structure] = {}
        self._programs: dict[Any, Any] = {}
        self._asks_for_values = False

    @property
    def model(self) -> Model:
        """The model, which takes what a composite kernel conditions on among its keyword arguments."""
        return self._model

    def at(self, args: tuple, kwargs: Mapping[str, Any]) -> "Reading":
        """The model at given arguments; keyword arguments hold what a composite kernel conditions on."""
        return Reading(self, args, dict(kwargs))

    def _with_symbols(self, make: Callable[[], Any]) -> Any:
        """What `make` makes, with the values of arguments in place of symbols if it fails without."""
        if self._asks_for_values:
            return make()
        try:
            return make()
        except Exception:
            self._asks_for_values = True
            return make()  # a model that is wrong shows it again


class _Arguments:
    """A model's arguments, split into those of a program and those that it is made for."""

    def __init__(self, record: Record, args: tuple, kwargs: Mapping[str, Any]) -> None:
        leaves, tree = jax.tree.flatten((args, dict(kwargs)))
        kinds = jax.core.Tracer if record._asks_for_values else TAKEN
        taken = [isinstance(leaf, kinds) for leaf in leaves]
        fixed = [None if is_taken else leaf for leaf, is_taken in zip(leaves, taken, strict=True)]
        self.arrays = [leaf for leaf, is_taken in zip(leaves, taken, strict=True) if is_taken]
        self.fixed = fixed
        self.key = tree, tuple(taken), tuple(map(_identity, fixed))
        self._tree, self._taken = tree, taken

    def restore(self, arrays: list) -> tuple[tuple, dict[str, Any]]:
        """The arguments with arrays in their places."""
        given = iter(arrays)
        merged = [next(given) if taken else leaf for taken, leaf in zip(self._taken, self.fixed, strict=True)]
        return jax.tree.unflatten(self._tree, merged)

    def forget(self) -> "_Arguments":
        """Lets go of the arrays: `restore` and what is fixed stay."""
        self.arrays = []
        return self


class Reading:
    """A model at its arguments; made by `Record.at`.

    Args:
        record: the record of the run.
        args: the model's arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, record: Record, args: tuple, kwargs: dict[str, Any]) -> None:
        self._record, self.args, self.kwargs = record, args, kwargs

    @property
    def given(self) -> dict[str, jax.Array]:
        """What a composite kernel conditions on."""
        return self.kwargs.get(GIBBS_SITES_KWARG, {})

    @property
    def record(self) -> Record:
        """The record of the run."""
        return self._record

    @property
    def model(self) -> Model:
        """The model, which takes what a composite kernel conditions on among its keyword arguments."""
        return self._record._model

    @property
    def structure(self) -> Structure:
        """What the model is made of, from one abstract trace; what is given by a composite kernel is not latent."""
        kwargs = {name: value for name, value in self.kwargs.items() if name != GIBBS_SITES_KWARG}
        record, model = self._record, self.model

        def find() -> Structure:
            arguments = _Arguments(record, self.args, kwargs)
            key = arguments.key, tuple((jnp.shape(v), jnp.result_type(v)) for v in arguments.arrays)
            if key not in record._structures:

                def at_arguments(arrays: list) -> Any:
                    args, kwargs = arguments.restore(arrays)
                    return model(*args, **kwargs)

                with block():  # no handler that is active outside, as around a stand-in, is to see the model
                    record._structures[key] = read_structure(at_arguments, arguments.arrays)
            return record._structures[key]

        return record._with_symbols(find).given(self.given)

    def run(self, function: Callable[..., Any], *operands: Any) -> Any:
        """A function of the model, traced once for all its uses in a run.

        Args:
            function: called as `function(model, args, kwargs, *operands)`; the same object in all uses.
            *operands: pytrees of arrays.

        Returns:
            What the function returns, a pytree of arrays. It is not compiled if nothing around it is.
        """
        record, model = self._record, self.model
        if not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves((self.args, self.kwargs, operands))):
            with block():
                return function(model, self.args, self.kwargs, *operands)

        def call() -> Any:
            arguments = _Arguments(record, self.args, self.kwargs)
            arrays, key = arguments.arrays, (function, arguments.key)
            if key not in record._programs:
                made_for = arguments.forget()  # holding what is fixed keeps its identity from being used again

                def program(arrays: list, operands: tuple) -> Any:
                    return function(model, *made_for.restore(arrays), *operands)

                record._programs[key] = jax.jit(program)
            with block(), _precision.highest():  # one setting for all uses
                return record._programs[key](arrays, jax.tree.map(_strong, operands))

        return record._with_symbols(call)

    def evaluate(self, z: Mapping[str, jax.Array], values: Mapping[str, jax.Array] | None = None) -> Evaluation:
        """The parts of the model at a point.

        Args:
            z: unconstrained values of latent sites.
            values: constrained values of the others; None if there are none.

        Returns:
            The `Evaluation`; sites that have `values` have no Jacobian.
        """
        return self.run(_evaluate, dict(z), dict(values or {}))

    def origin(self) -> dict[str, jax.Array]:
        """The origin of the unconstrained coordinates: a point to read priors at that depend on none."""
        sites = self.structure.latent.items()
        return {name: jnp.zeros(site.unconstrained_shape) for name, site in sites if not site.is_discrete}

    def sites(self, z: Mapping[str, jax.Array] | None = None) -> dict[str, PriorSite]:
        """The diffusion sites with their priors; `z` is needed if these depend on other latent sites."""
        return self.sites_of(self.evaluate(self.origin() if z is None else z))

    def sites_of(self, parts: Evaluation) -> dict[str, PriorSite]:
        """The diffusion sites with the priors of an evaluation."""
        latent = self.structure.latent
        return {name: PriorSite.of(prior, latent[name].shape) for name, prior in parts.priors.items()}

    def sites_in_the_abstract(self) -> dict[str, PriorSite]:
        """The diffusion sites with shapes in place of the arrays of their priors; nothing is computed."""
        latent = self.structure.latent
        return {name: latent[name].prior_site for name in self.structure.diffusion}

    def log_rest(self, z: Mapping[str, jax.Array]) -> jax.Array:
        """The log-density of everything but the diffusion priors, a scalar, in JAX's default precision."""
        return self.evaluate(z).log_rest.astype(jnp.result_type(float))

    def constrain(
        self,
        z: Mapping[str, jax.Array],
        deterministic: bool = False,
        values: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Values on the supports and, if asked, those of the deterministic sites; `values` are on them already.

        The model need not run for supports that are always the same. Where it must, it runs as it is: `MCMC` asks
        outside of any program too, where a new one would be compiled in every run.
        """
        supports = self._supports(z)
        if supports is not None and not (deterministic and self.structure.deterministic):
            return {**{name: biject_to(supports[name])(value) for name, value in z.items()}, **(values or {})}
        with block():
            parts = _evaluate(self.model, self.args, self.kwargs, dict(z), dict(values or {}))
        return {**parts.values, **parts.deterministic} if deterministic else parts.values

    def unconstrain(self, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Values on the supports in unconstrained coordinates; the model runs only where it computes supports."""
        supports = self._supports(values)
        if supports is not None:
            return {name: biject_to(supports[name]).inv(value) for name, value in values.items()}
        model = seed(self.model, jax.random.key(0))
        found = unconstrain_fn(model, self.args, self.kwargs, dict(values))
        return {name: found[name] for name in values}

    def _supports(self, names: Mapping[str, Any]) -> dict[str, Any] | None:
        """The supports of latent sites; None if the model computes one."""
        latent = self.structure.latent
        supports = {name: latent[name].support for name in names if name in latent}
        return None if len(supports) < len(names) or None in supports.values() else supports


def _identity(value: Any) -> Any:
    """The identity of an argument that a program is made for: of the object for an array, the value of a number."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return id(value)
    try:
        return type(value), hash(value), value
    except TypeError:
        return id(value)


def _strong(value: Any) -> jax.Array:
    """The array that does not take its type from others, as a number of Python does: one program for both."""
    value = jnp.asarray(value)
    return jax.lax.convert_element_type(value, value.dtype) if value.weak_type else value


def _evaluate(model: Model, args: tuple, kwargs: dict[str, Any], z: dict, values: dict) -> Evaluation:
    def substituted(site: Mapping[str, Any]) -> jax.Array | None:
        return values[site["name"]] if site["name"] in values else _unconstrain_reparam(z, site)

    at_point = substitute(seed(drop_prior(model), jax.random.key(0)), substitute_fn=substituted)
    with _precision.highest():  # likelihoods of precise data lose their digits in less
        log_probs, sites = compute_log_probs(at_point, args, kwargs, {})
        observed = {name: normal_data(s) for name, s in sites.items() if s["type"] == "sample" and s["is_observed"]}
    added = {name: f"_{name}_log_det" for name in z}  # factors, which `uncondition` frees with all that is observed
    log_jacobian = {name: log_probs.pop(site) for name, site in added.items() if site in log_probs}
    free = {name: s for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
    latent = {name: s for name, s in free.items() if name not in added.values()}
    diffusion = {name: s for name, s in latent.items() if is_diffusion_site(s)}
    priors, zero = {name: prior_inside(as_written(s), True) for name, s in diffusion.items()}, jnp.zeros(())
    return Evaluation(
        log_likelihood=jnp.asarray(sum((v for name, v in log_probs.items() if name not in latent), start=zero)),
        log_others={name: zero + log_probs[name] for name in latent if name not in diffusion},
        log_jacobian=log_jacobian,
        priors={name: prior for name, prior in priors.items() if prior is not None},
        values={name: jnp.asarray(s["value"]) for name, s in latent.items()},
        deterministic={name: s["value"] for name, s in sites.items() if s["type"] == "deterministic"},
        observed={name: data for name, data in observed.items() if data is not None},
    )
