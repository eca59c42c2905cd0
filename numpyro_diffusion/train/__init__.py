"""Training: from examples to a denoiser."""

from numpyro_diffusion.train import levels, losses, weighting
from numpyro_diffusion.train.distill import DistillResult, MapQuality, distill, map_quality
from numpyro_diffusion.train.fit import FitResult, fit
from numpyro_diffusion.train.levels import Adaptive
from numpyro_diffusion.train.objective import Objective, denoising_loss

__all__ = [
    "Adaptive",
    "DistillResult",
    "FitResult",
    "MapQuality",
    "Objective",
    "denoising_loss",
    "distill",
    "fit",
    "levels",
    "losses",
    "map_quality",
    "weighting",
]
