"""Kernels that walk down all noise levels for each draw."""

from numpyro_diffusion.infer.anneal.annealed import AnnealedLangevin
from numpyro_diffusion.infer.anneal.guided_reverse import GuidedReverse
from numpyro_diffusion.infer.anneal.posterior import at_clean_point

__all__ = ["AnnealedLangevin", "GuidedReverse", "at_clean_point"]
