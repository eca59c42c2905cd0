"""Training: from examples to a denoiser."""

from numpyro_diffusion.train import levels, losses, weighting
from numpyro_diffusion.train.distill import (
    DistillResult,
    GivenQuality,
    GivenResult,
    MapQuality,
    distill,
    distill_given,
    given_quality,
    map_quality,
)
from numpyro_diffusion.train.fit import FitResult, fit
from numpyro_diffusion.train.levels import Adaptive
from numpyro_diffusion.train.objective import Objective, denoising_loss

__all__ = [
    "Adaptive",
    "DistillResult",
    "FitResult",
    "GivenQuality",
    "GivenResult",
    "MapQuality",
    "Objective",
    "denoising_loss",
    "distill",
    "distill_given",
    "fit",
    "given_quality",
    "levels",
    "losses",
    "map_quality",
    "weighting",
]
