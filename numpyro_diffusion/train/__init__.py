"""Training: from examples to a denoiser."""

from numpyro_diffusion.train import levels, losses, weighting
from numpyro_diffusion.train.fit import FitResult, fit
from numpyro_diffusion.train.levels import Adaptive
from numpyro_diffusion.train.objective import Objective, denoising_loss

__all__ = [
    "Adaptive",
    "FitResult",
    "Objective",
    "denoising_loss",
    "fit",
    "levels",
    "losses",
    "weighting",
]
