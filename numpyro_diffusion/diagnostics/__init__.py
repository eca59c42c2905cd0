"""What a run has to say about itself: statistics for ArviZ, whether its chains have converged, and its calibration."""

from numpyro_diffusion.diagnostics.arviz import to_arviz
from numpyro_diffusion.diagnostics.calibration import Calibration
from numpyro_diffusion.diagnostics.convergence import Verdict, verdict
from numpyro_diffusion.diagnostics.coverage import (
    ecdf_bands,
    highest_density_coverage,
    interval_coverage,
    simulations_needed,
    spread_skill,
    uniformity_p_value,
)
from numpyro_diffusion.diagnostics.nested import nested_rhat

__all__ = [
    "Calibration",
    "Verdict",
    "ecdf_bands",
    "highest_density_coverage",
    "interval_coverage",
    "nested_rhat",
    "simulations_needed",
    "spread_skill",
    "to_arviz",
    "uniformity_p_value",
    "verdict",
]
