"""Kernels for `numpyro.infer.MCMC`: diffusion priors inside ordinary models."""

from numpyro_diffusion.infer.base import DiffusionKernel
from numpyro_diffusion.infer.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.noise_space import NoiseSpace
from numpyro_diffusion.infer.pcn import DiffusionPCN
from numpyro_diffusion.infer.split import drop_prior

__all__ = ["DiffusionGibbs", "DiffusionKernel", "DiffusionPCN", "NoiseSpace", "drop_prior"]
