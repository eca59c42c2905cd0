"""Kernels made of kernels."""

from numpyro_diffusion.infer.combine.compose import Cycle, Mixture
from numpyro_diffusion.infer.combine.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.combine.parallel_tempering import ParallelTempering
from numpyro_diffusion.infer.combine.vectorize import Vectorize

__all__ = ["Cycle", "DiffusionGibbs", "Mixture", "ParallelTempering", "Vectorize"]
