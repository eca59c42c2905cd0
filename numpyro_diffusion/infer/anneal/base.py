"""What kernels share whose every draw is a trajectory from noise to data, guided by the rest of the model.

They move all diffusion sites of a model at once, keep no likelihood between draws, and need the likelihood's gradient.
How a trajectory is walked is the matter of `annealed` and `predictor_corrector`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_diffusion.infer.anneal.posterior import Guidance, NoisyPosterior, Point, noisy_posterior
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.model.observation import check_guidance
from numpyro_diffusion.infer.model.sites import (
    Model,
    PriorSite,
    dependent_priors,
    other_latent_sites,
    prior_draw,
    prior_sites,
    with_deterministic,
)


def given_or_drawn(
    key: jax.Array, sites: Mapping[str, PriorSite], init_params: Mapping | None, kwargs: Mapping
) -> Point:
    """Where a chain begins, in NumPyro's unconstrained coordinates: where it is told to, or a draw of the prior."""
    if init_params is None:
        return prior_draw(key, sites)
    values = {name: jnp.asarray(init_params[name]) for name in sites}
    if GIBBS_SITES_KWARG in kwargs:  # a composite kernel gives constrained values
        return {name: site.unconstrain(values[name]) for name, site in sites.items()}
    return values


def kept_if_finite(new: Point, old: Point) -> tuple[Point, jax.Array]:
    """The new point if all of it is finite, the old one if not; and whether it was not."""
    fine = jnp.all(jnp.stack([jnp.isfinite(value).all() for value in new.values()]))
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old), ~fine


class TrajectoryKernel(DiffusionKernel):
    """Base of the kernels that draw all diffusion sites by a guided trajectory.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites.
        guidance: what stands for the likelihood of noisy points, see `noisy`, or one of `guidance.GUIDANCES`; None
            takes `at_clean_point`.

    Raises:
        TypeError: for a model or a guidance that is not callable.
        ValueError: for an unknown guidance; when run, for one that cannot handle the likelihood.
    """

    def __init__(self, model: Model, guidance: Guidance | str | None) -> None:
        super().__init__(model)
        if isinstance(guidance, str):
            check_guidance(guidance)
        elif not (guidance is None or callable(guidance)):
            raise TypeError(f"guidance must be callable, as infer.at_clean_point is; got {type(guidance).__name__}")
        self._guidance = guidance

    def _posterior(self, args: tuple, kwargs: dict) -> NoisyPosterior:
        return noisy_posterior(self._model, args, kwargs, self._guidance)

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        if isinstance(self._guidance, str):
            self._posterior(args, kwargs)
        sites, kernel = prior_sites(self._model, args, kwargs), type(self).__name__
        others = other_latent_sites(self._model, args, kwargs)
        if others:
            raise ValueError(
                f"{kernel} moves DiffusionPrior sites only; the model also has latent sites {others}. Use "
                f"DiffusionGibbs(model, x_kernel={kernel}), which moves these by NUTS"
            )
        dependent = dependent_priors(self._model, args, kwargs) if len(sites) > 1 else set()
        if dependent:
            raise ValueError(
                f"the priors of diffusion sites {sorted(dependent)} depend on other diffusion sites that {kernel} "
                "moves together with them; use NoiseSpace(model)"
            )

    def refresh(self, state: tuple, model_args: tuple, model_kwargs: dict | None) -> tuple:
        """The identity: nothing that depends on the conditioning is kept between draws."""
        return state

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the support."""
        sites = prior_sites(self._model, model_args, {} if model_kwargs is None else model_kwargs)
        return lambda z: {name: site.constrain(z[name]) for name, site in sites.items()}

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the support and the model's deterministic sites."""
        constrain = self.get_constrain_fn(model_args, model_kwargs)
        return lambda z: with_deterministic(self._model, model_args, model_kwargs or {}, constrain(z))
