"""Kernels on the noise behind the diffusion sites."""

from numpyro_diffusion.infer.noise.crank_nicolson import CrankNicolson
from numpyro_diffusion.infer.noise.delayed_acceptance import DelayedAcceptance
from numpyro_diffusion.infer.noise.elliptical_slice import EllipticalSlice
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace

__all__ = ["CrankNicolson", "DelayedAcceptance", "EllipticalSlice", "NoiseSpace"]
