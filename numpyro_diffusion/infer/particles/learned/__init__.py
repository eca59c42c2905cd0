"""Chains that learn where to jump: the law, what it is fitted to, moves, and the sampler."""

from numpyro_diffusion.infer.particles.learned.sampler import LearnedMCMC

__all__ = ["LearnedMCMC"]
