"""Kernels that move all latent sites by the gradient of the joint posterior."""

from numpyro_diffusion.infer.gradient.diffusive_gibbs import DiffusiveGibbs
from numpyro_diffusion.infer.gradient.hmc import ScoreHMC
from numpyro_diffusion.infer.gradient.langevin import MALA, ULA
from numpyro_diffusion.infer.gradient.tweedie import Tweedie

__all__ = ["DiffusiveGibbs", "MALA", "ScoreHMC", "Tweedie", "ULA"]
