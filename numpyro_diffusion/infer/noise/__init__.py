"""Kernels on the noise behind the diffusion sites."""

from numpyro_diffusion.infer.noise.elliptical_slice import EllipticalSlice
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace

__all__ = ["EllipticalSlice", "NoiseSpace"]
