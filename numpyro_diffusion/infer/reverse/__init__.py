"""Kernels that move by the prior's own reverse process."""

from numpyro_diffusion.infer.reverse.guided_pcn import GuidedPCN
from numpyro_diffusion.infer.reverse.independence import Independence
from numpyro_diffusion.infer.reverse.particle_gibbs import ParticleGibbs
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN
from numpyro_diffusion.infer.reverse.split_gibbs import SplitGibbs

__all__ = ["DiffusionPCN", "GuidedPCN", "Independence", "ParticleGibbs", "SplitGibbs"]
