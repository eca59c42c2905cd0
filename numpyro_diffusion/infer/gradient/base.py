r"""What the kernels on a model's joint posterior have in common: a target, a start, and the way back to the model.

A kernel here moves all latent sites of a model at once, in NumPyro's unconstrained coordinates, by the gradient of a
`Target`. Which answers it takes from the diffusion priors is its `provider`. It starts at a draw of the diffusion
priors, reports sites on their supports, and can be a block of NumPyro's `Gibbs`. How to move is the matter of
`langevin` and `hmc`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.handlers import seed
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned
from numpyro.infer.util import constrain_fn, unconstrain_fn

from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.model import target
from numpyro_diffusion.infer.model.density import Provider, Score, Status
from numpyro_diffusion.infer.model.sites import Model, prior_sites
from numpyro_diffusion.infer.model.target import Evaluation, Target


class GradientKernel(DiffusionKernel):
    """Base of the kernels that move by the gradient of the joint posterior.

    Args:
        model: NumPyro model, with diffusion sites or without.
        provider: what answers for the diffusion sites.

    Raises:
        TypeError: if `model` is not callable or `provider` is no provider.
    """

    takes_point = True

    def __init__(self, model: Model, provider: Provider) -> None:
        super().__init__(model)
        if not isinstance(provider, Provider):
            raise TypeError(f"provider must be a Provider such as infer.Density(); got {provider!r}")
        self._provider = provider

    @property
    def status(self) -> Status:
        """What the kernel is exact for, or what is approximate."""
        return self._provider.status

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        target.check(self._model, self._provider, args, kwargs, type(self).__name__)

    def _target(self, z: dict[str, jax.Array], args: tuple, kwargs: dict) -> Target:
        return Target(self._model, self._provider, args, kwargs, z)

    def _first(
        self, key: jax.Array, init_params: dict | None, args: tuple, kwargs: dict
    ) -> tuple[dict[str, jax.Array], Evaluation]:
        """Where a chain starts, and the target there."""
        if init_params is None:
            z = target.initial_point(key, self._model, self._provider, args, kwargs)
        elif GIBBS_SITES_KWARG in kwargs:  # a composite kernel gives constrained values
            z = unconstrain_fn(conditioned(self._model), args, kwargs, init_params)
            z = {name: z[name] for name in init_params}
        else:
            z = init_params
        z = {name: jnp.asarray(value, jnp.result_type(value, float)) for name, value in z.items()}
        at = self._target(z, args, kwargs)
        return z, at.evaluate(at.flat)

    def _evaluations(self, args: tuple, kwargs: dict) -> int:
        """Denoiser evaluations behind one evaluation of the target, per point."""
        sites = prior_sites(self._model, args, kwargs, required=False)
        return sum(self._provider.evaluations(site.prior) for site in sites.values())

    def _check_start(self, state: NamedTuple) -> None:
        finite = jnp.isfinite(state.evaluation.log_density) & jnp.isfinite(state.evaluation.gradient).all(-1)
        bad = int(jnp.sum(~finite))
        if bad:
            raise ValueError(
                f"the log-density or its gradient is not finite at the start of {bad} of {finite.size} chains. Pass "
                "init_params where it is finite"
            )

    def refresh(self, state: NamedTuple, model_args: tuple, model_kwargs: dict | None) -> NamedTuple:
        """Evaluates the target anew after a composite kernel has moved the point or what it is conditioned on."""
        at = self._target(state.z, model_args, {} if model_kwargs is None else model_kwargs)
        return state._replace(evaluation=at.evaluate(at.flat))

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports."""
        return self._constrain(model_args, model_kwargs, return_deterministic=False)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports and the model's deterministic sites."""
        return self._constrain(model_args, model_kwargs, return_deterministic=True)

    def _constrain(self, args: tuple, kwargs: dict | None, **options: Any) -> Callable[[dict], dict]:
        kwargs = {} if kwargs is None else kwargs
        model = seed(conditioned(self._model), jax.random.key(0))  # Gibbs asks before it knows the other blocks' values
        return lambda z: constrain_fn(model, args, kwargs, z, **options)


def flatten(z: dict[str, jax.Array]) -> jax.Array:
    """The vector of a point, shape (D,)."""
    return ravel_pytree(z)[0]


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two pytrees of the same structure, by a scalar truth value."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def proper(log_ratio: jax.Array) -> jax.Array:
    """Whether the logarithm of a ratio of densities can be one: not NaN and not plus infinity."""
    return ~(jnp.isnan(log_ratio) | jnp.isposinf(log_ratio))


def require_test(provider: Provider, kernel: str) -> None:
    """Raises if a provider has nothing to test a move with."""
    if type(provider) is Score:
        raise ValueError(f"{kernel} tests its moves; Score() has nothing to test with. Use Density() or LineIntegral()")
