"""Diffusion without a trained network, on an ordinary model."""

from numpyro_diffusion.infer.particles.designed.sampler import DesignedDiffusion

__all__ = ["DesignedDiffusion"]
