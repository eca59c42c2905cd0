"""Pictures of priors, runs and their calibration: each takes `ax=` and returns it, and needs matplotlib."""

from numpyro_diffusion.plots.calibration import plot_coverage, plot_ecdf_difference, plot_rank_histogram
from numpyro_diffusion.plots.levels import plot_acceptance, plot_evidence, plot_levels, plot_weightings
from numpyro_diffusion.plots.points import plot_paths, plot_posterior, plot_score

__all__ = [
    "plot_acceptance",
    "plot_coverage",
    "plot_ecdf_difference",
    "plot_evidence",
    "plot_levels",
    "plot_paths",
    "plot_posterior",
    "plot_rank_histogram",
    "plot_score",
    "plot_weightings",
]
