"""Distillation: a solver's many evaluations learned by a map of one to a few."""

from numpyro_diffusion.train.distill.flow import DistillResult, MapQuality, distill, map_quality
from numpyro_diffusion.train.distill.given import GivenQuality, GivenResult, distill_given, given_quality

__all__ = [
    "DistillResult",
    "GivenQuality",
    "GivenResult",
    "MapQuality",
    "distill",
    "distill_given",
    "given_quality",
    "map_quality",
]
