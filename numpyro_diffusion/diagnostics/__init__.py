"""What draws and runs have to say about themselves: convergence, calibration, distances, the quality of a score."""

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
from numpyro_diffusion.diagnostics.distances import energy_distance, mmd, sliced_wasserstein
from numpyro_diffusion.diagnostics.nested import nested_rhat
from numpyro_diffusion.diagnostics.runs import by_level
from numpyro_diffusion.diagnostics.scores import (
    Circulation,
    Consistency,
    DenoisingLosses,
    Discrepancy,
    Divergence,
    Mass,
    SteinTest,
    circulation,
    denoising_losses,
    fisher_divergence,
    mass,
    score_function,
    stein_discrepancy,
    stein_test,
    stein_thin,
    tweedie_consistency,
)
from numpyro_diffusion.diagnostics.two_sample import Comparison, Memorisation, classifier_test, compare, memorisation

__all__ = [
    "Calibration",
    "Circulation",
    "Comparison",
    "Consistency",
    "DenoisingLosses",
    "Discrepancy",
    "Divergence",
    "Mass",
    "Memorisation",
    "SteinTest",
    "Verdict",
    "circulation",
    "by_level",
    "classifier_test",
    "compare",
    "denoising_losses",
    "ecdf_bands",
    "energy_distance",
    "fisher_divergence",
    "highest_density_coverage",
    "interval_coverage",
    "mass",
    "memorisation",
    "mmd",
    "nested_rhat",
    "score_function",
    "simulations_needed",
    "sliced_wasserstein",
    "spread_skill",
    "stein_discrepancy",
    "stein_test",
    "stein_thin",
    "to_arviz",
    "tweedie_consistency",
    "uniformity_p_value",
    "verdict",
]
