"""Samplers that move a population of particles from the prior to the posterior."""

from numpyro_diffusion.infer.particles.designed import DesignedDiffusion
from numpyro_diffusion.infer.particles.learned import LearnedMCMC
from numpyro_diffusion.infer.particles.population import PopulationHMC
from numpyro_diffusion.infer.particles.tempered import TemperedSMC
from numpyro_diffusion.infer.particles.trained import DenoisingDiffusionSampler
from numpyro_diffusion.infer.particles.twisted import TwistedSMC

__all__ = [
    "DenoisingDiffusionSampler",
    "DesignedDiffusion",
    "LearnedMCMC",
    "PopulationHMC",
    "TemperedSMC",
    "TwistedSMC",
]
