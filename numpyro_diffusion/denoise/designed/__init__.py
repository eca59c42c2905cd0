"""Denoisers that nobody trains: from draws of a law, or from its log-density."""

from numpyro_diffusion.denoise.designed.samples import FromSamples
from numpyro_diffusion.denoise.designed.target import FromTarget
from numpyro_diffusion.denoise.designed.weighted import Estimate

__all__ = ["Estimate", "FromSamples", "FromTarget"]
