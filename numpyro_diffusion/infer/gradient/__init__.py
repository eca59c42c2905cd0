"""Kernels that move all latent sites by the gradient of the joint posterior, and that gradient at draws."""

from numpyro_diffusion.infer.gradient.diffusive_gibbs import DiffusiveGibbs
from numpyro_diffusion.infer.gradient.hmc import ScoreHMC
from numpyro_diffusion.infer.gradient.langevin import MALA, ULA
from numpyro_diffusion.infer.gradient.scores import JointScores, joint_scores
from numpyro_diffusion.infer.gradient.tweedie import Tweedie

__all__ = ["DiffusiveGibbs", "JointScores", "MALA", "ScoreHMC", "Tweedie", "ULA", "joint_scores"]
