"""Scores without truth: Stein discrepancies of draws, the quality of a denoiser, and what a denoiser must satisfy."""

from numpyro_diffusion.diagnostics.scores.consistency import Circulation, Consistency, circulation, tweedie_consistency
from numpyro_diffusion.diagnostics.scores.quality import (
    DenoisingLosses,
    Divergence,
    Mass,
    denoising_losses,
    fisher_divergence,
    mass,
)
from numpyro_diffusion.diagnostics.scores.stein import (
    Discrepancy,
    SteinTest,
    score_function,
    stein_discrepancy,
    stein_test,
    stein_thin,
)

__all__ = [
    "Circulation",
    "Consistency",
    "DenoisingLosses",
    "Discrepancy",
    "Divergence",
    "Mass",
    "SteinTest",
    "circulation",
    "denoising_losses",
    "fisher_divergence",
    "mass",
    "score_function",
    "stein_discrepancy",
    "stein_test",
    "stein_thin",
    "tweedie_consistency",
]
