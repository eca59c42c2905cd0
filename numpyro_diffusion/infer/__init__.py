"""Kernels for `numpyro.infer.MCMC`: diffusion priors inside ordinary models."""

from numpyro_diffusion.infer.base import DiffusionKernel
from numpyro_diffusion.infer.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.langevin import MALA, ULA
from numpyro_diffusion.infer.noise_space import NoiseSpace
from numpyro_diffusion.infer.pcn import DiffusionPCN
from numpyro_diffusion.infer.provider import Density, LineIntegral, Provider, Score, Status, with_density
from numpyro_diffusion.infer.split import drop_prior
from numpyro_diffusion.infer.tweedie import Tweedie

__all__ = [
    "MALA",
    "ULA",
    "Density",
    "DiffusionGibbs",
    "DiffusionKernel",
    "DiffusionPCN",
    "LineIntegral",
    "NoiseSpace",
    "Provider",
    "Score",
    "Status",
    "Tweedie",
    "drop_prior",
    "with_density",
]
