"""The base of the kernels here: every draw is a walk from noise to data, guided by the rest of the model.

They move all diffusion sites of a model at once, keep no likelihood between draws, and need the likelihood's gradient.
`annealed` and `guided_reverse` say how they walk.
"""

from numpyro_diffusion.infer.anneal.posterior import Guidance, NoisyPosterior, noisy_posterior
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, State
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.checks import check_walk
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.observation import check_guidance
from numpyro_diffusion.infer.model.record import Reading


class AnnealedKernel(DiffusionKernel[State]):
    """Base of the kernels that draw all diffusion sites by a guided walk down the noise levels.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites.
        guidance: what stands for the likelihood of noisy points, see `posterior`, or one of `guidance.GUIDANCES`;
            None takes `at_clean_point`.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        TypeError: for a model or a guidance that is not callable.
        ValueError: for an unknown guidance; when run, for one that cannot handle the likelihood.
    """

    def __init__(self, model: Model, guidance: Guidance | str | None, init_strategy: Strategy | None) -> None:
        super().__init__(model, init_strategy)
        if isinstance(guidance, str):
            check_guidance(guidance)
        elif not (guidance is None or callable(guidance)):
            raise TypeError(f"guidance must be callable, as infer.at_clean_point is; got {type(guidance).__name__}")
        self._guidance = guidance

    def _posterior(self, reading: Reading) -> NoisyPosterior:
        return noisy_posterior(reading, self._guidance)

    def _check_model(self, reading: Reading) -> None:
        check_walk(type(self).__name__, reading)
        if isinstance(self._guidance, str):
            self._posterior(reading)

    def refresh(self, state: tuple, model_args: tuple, model_kwargs: dict | None) -> tuple:
        """The identity: nothing that depends on the conditioning is kept between draws."""
        return state
