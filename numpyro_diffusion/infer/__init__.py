"""Kernels for `numpyro.infer.MCMC`: diffusion priors inside ordinary models."""

from numpyro_diffusion.infer.anneal.annealed import AnnealedLangevin
from numpyro_diffusion.infer.anneal.guided_reverse import GuidedReverse
from numpyro_diffusion.infer.anneal.posterior import at_clean_point
from numpyro_diffusion.infer.combine.compose import Cycle, Mixture
from numpyro_diffusion.infer.combine.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.combine.vectorize import Vectorize
from numpyro_diffusion.infer.gradient.diffusive_gibbs import DiffusiveGibbs
from numpyro_diffusion.infer.gradient.hmc import ScoreHMC
from numpyro_diffusion.infer.gradient.langevin import MALA, ULA
from numpyro_diffusion.infer.gradient.tweedie import Tweedie
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.model.density import Density, LineIntegral, Provider, Score, Status, with_density
from numpyro_diffusion.infer.model.handlers import drop_prior
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace
from numpyro_diffusion.infer.particles.tempered import TemperedSMC
from numpyro_diffusion.infer.particles.twisted import TwistedSMC
from numpyro_diffusion.infer.reverse.guided_pcn import GuidedPCN
from numpyro_diffusion.infer.reverse.independence import Independence
from numpyro_diffusion.infer.reverse.particle_gibbs import ParticleGibbs
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN
from numpyro_diffusion.infer.reverse.split_gibbs import SplitGibbs

__all__ = [
    "MALA",
    "ULA",
    "AnnealedLangevin",
    "Cycle",
    "Density",
    "DiffusionGibbs",
    "DiffusionKernel",
    "DiffusionPCN",
    "DiffusiveGibbs",
    "GuidedPCN",
    "Independence",
    "LineIntegral",
    "Mixture",
    "NoiseSpace",
    "ParticleGibbs",
    "GuidedReverse",
    "Provider",
    "Score",
    "ScoreHMC",
    "SplitGibbs",
    "Status",
    "TemperedSMC",
    "Tweedie",
    "TwistedSMC",
    "Vectorize",
    "at_clean_point",
    "drop_prior",
    "with_density",
]
