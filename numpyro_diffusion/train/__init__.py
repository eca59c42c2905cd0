"""Training: from examples to a denoiser."""

from numpyro_diffusion.train.fit import FitResult, fit
from numpyro_diffusion.train.losses import NoiseLevels, denoising_loss, edm_weight

__all__ = ["FitResult", "NoiseLevels", "denoising_loss", "edm_weight", "fit"]
