"""Samplers that a density alone has taught: the walk, its training, and the sampler."""

from numpyro_diffusion.infer.particles.trained.sampler import DenoisingDiffusionSampler

__all__ = ["DenoisingDiffusionSampler"]
