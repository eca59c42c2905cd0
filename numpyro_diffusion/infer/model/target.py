r"""The posterior of a model as a function of one vector, as far as a provider knows it.

In NumPyro's unconstrained coordinates $q$ of all latent sites, flattened,

$$\log \pi(q) = \sum_i \log p_i(x_i(q)) + \log L(x(q), \theta(q)) + \log |\det J(q)|,$$

with the priors $p_i$ of the diffusion sites as a `provider` answers for them, and the rest of the model $L$ with the
Jacobian of every constrained support as NumPyro computes them. A model without diffusion sites has an empty sum, so the
kernels on top serve ordinary models too. The same vector and the same law as in NumPyro's HMC and NUTS: kernels on
them can be mixed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.handlers import seed
from numpyro.infer.gibbs import conditioned
from numpyro.infer.initialization import init_to_sample, init_to_uniform
from numpyro.infer.util import initialize_model, potential_energy

from numpyro_diffusion.infer.model.density import LineIntegral, Provider, provided
from numpyro_diffusion.infer.model.sites import (
    Model,
    dependent_priors,
    drop_prior,
    is_diffusion_site,
    only_prior,
    prior_sites,
    traced,
)


class Evaluation(NamedTuple):
    """What is known of the target at a point."""

    log_density: jax.Array  # of the target; without a density, of the model without its diffusion priors
    gradient: jax.Array  # of the log-density of the target, (D,)


class Target:
    """The target of a model at given arguments, over vectors of shape (D,).

    Args:
        model: NumPyro model.
        provider: what answers for its diffusion sites.
        args: the model's arguments.
        kwargs: its keyword arguments, with the values that a composite kernel conditions on.
        z: a point as NumPyro has it, unconstrained values by site; it gives the coordinates their order.
    """

    def __init__(self, model: Model, provider: Provider, args: tuple, kwargs: dict, z: dict[str, jax.Array]) -> None:
        self._provider = provider
        self._model, self._args, self._kwargs = conditioned(model), args, kwargs
        self.flat, self.unflatten = ravel_pytree(z)

    def _log_density(self, model: Model, q: jax.Array) -> jax.Array:
        seeded = seed(model, jax.random.key(0))
        return -jnp.asarray(potential_energy(seeded, self._args, self._kwargs, self.unflatten(q)), q.dtype)

    def _log_rest(self, q: jax.Array) -> jax.Array:
        return self._log_density(drop_prior(self._model), q)

    def log_target(self, q: jax.Array) -> jax.Array:
        """A scalar whose gradient is that of the target's log-density, and which is it if the provider has one."""
        return self._log_density(provided(self._model, self._provider), q)

    def evaluate(self, q: jax.Array) -> Evaluation:
        """The gradient, and what there is of the value, at one point."""
        value, gradient = jax.value_and_grad(self.log_target)(q)
        return Evaluation(value if self._provider.has_density else self._log_rest(q), gradient)

    def _prior_gradient(self, q: jax.Array) -> jax.Array:
        """The gradient of the diffusion priors alone."""
        return jax.grad(partial(self._log_density, only_prior(provided(self._model, self._provider))))(q)

    def log_ratio(self, here: Evaluation, there: Evaluation, q: jax.Array, q_new: jax.Array) -> jax.Array:
        """The log-density of the target at `q_new` minus that at `q`."""
        difference = there.log_density - here.log_density
        if isinstance(self._provider, LineIntegral):
            difference += self._provider.work(self._prior_gradient, q, q_new)
        return difference

    def circulation(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """The work of the priors' scores around a triangle, in nats; NaN if the provider does not measure it."""
        if isinstance(self._provider, LineIntegral) and self._provider.circulation:
            return self._provider.around(self._prior_gradient, a, b, c)
        return jnp.full((), jnp.nan, a.dtype)


def check(model: Model, provider: Provider, args: tuple, kwargs: dict, kernel: str) -> None:
    """Raises unless every latent site is continuous, differentiable, and answered for by the provider.

    Args:
        model: NumPyro model.
        provider: what answers for its diffusion sites.
        args: its arguments.
        kwargs: its keyword arguments.
        kernel: name of the kernel that asks.

    Raises:
        ValueError: if there is no latent site, one is discrete, a diffusion prior lacks what the kernel needs, or the
            model cannot be differentiated.
    """
    sites = traced(model, args, kwargs, {})
    latent = {name: s for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
    if not latent:
        raise ValueError(f"{kernel} needs a latent site; the model has none")
    discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
    if discrete:
        raise ValueError(
            f"{kernel} moves continuous sites by gradients; sites {discrete} are discrete. Marginalise them, or give "
            "them a block of numpyro.infer.Gibbs, such as DiscreteGibbs"
        )
    dependent = dependent_priors(model, args, kwargs)
    for name, site in prior_sites(model, args, kwargs, required=False).items():
        provider.check(name, site.prior, name in dependent, kernel)
    shapes = {name: biject_to(s["fn"].support).inverse_shape(jnp.shape(s["value"])) for name, s in latent.items()}
    try:
        target = Target(model, provider, args, kwargs, {name: jnp.zeros(shape) for name, shape in shapes.items()})
        jax.eval_shape(jax.grad(target.log_target), target.flat)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{kernel} needs a model that JAX can differentiate. Use DiffusionPCN or DiffusionGibbs for one that it "
            f"cannot: {error}"
        ) from error


def _start_of(site: dict | None = None) -> Any:
    """NumPyro's initialisation strategy: diffusion sites are drawn from their priors, others uniformly."""
    if site is None:
        return partial(_start_of)
    return init_to_sample(site) if is_diffusion_site(site) else init_to_uniform(site)


def initial_point(key: jax.Array, model: Model, provider: Provider, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
    """Unconstrained values of all latent sites with a finite log-density and gradient, if 100 tries find some."""
    answered = provided(conditioned(model), provider)
    options = {"init_strategy": _start_of, "dynamic_args": True}
    return initialize_model(key, answered, model_args=args, model_kwargs=kwargs, **options).param_info.z
