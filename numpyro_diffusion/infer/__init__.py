"""Kernels for `numpyro.infer.MCMC`: diffusion priors inside ordinary models."""

from numpyro_diffusion.infer.annealed import AnnealedLangevin
from numpyro_diffusion.infer.base import DiffusionKernel
from numpyro_diffusion.infer.compose import Cycle, Mixture
from numpyro_diffusion.infer.diffusive_gibbs import DiffusiveGibbs
from numpyro_diffusion.infer.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.guided_pcn import GuidedPCN
from numpyro_diffusion.infer.hmc import ScoreHMC
from numpyro_diffusion.infer.independence import Independence
from numpyro_diffusion.infer.langevin import MALA, ULA
from numpyro_diffusion.infer.noise_space import NoiseSpace
from numpyro_diffusion.infer.noisy import at_clean_point
from numpyro_diffusion.infer.particle_gibbs import ParticleGibbs
from numpyro_diffusion.infer.pcn import DiffusionPCN
from numpyro_diffusion.infer.predictor_corrector import PredictorCorrector
from numpyro_diffusion.infer.provider import Density, LineIntegral, Provider, Score, Status, with_density
from numpyro_diffusion.infer.smc import TemperedSMC
from numpyro_diffusion.infer.split import drop_prior
from numpyro_diffusion.infer.split_gibbs import SplitGibbs
from numpyro_diffusion.infer.tweedie import Tweedie
from numpyro_diffusion.infer.twisted_smc import TwistedSMC
from numpyro_diffusion.infer.vectorize import Vectorize

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
    "PredictorCorrector",
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
