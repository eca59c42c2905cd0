"""What draws and runs have to say about themselves: convergence, distances between laws, the quality of a score."""

from numpyro_diffusion.diagnostics.arviz import to_arviz
from numpyro_diffusion.diagnostics.convergence import Verdict, verdict
from numpyro_diffusion.diagnostics.distances import energy_distance, mmd, sliced_wasserstein
from numpyro_diffusion.diagnostics.nested import nested_rhat
from numpyro_diffusion.diagnostics.stein import (
    Discrepancy,
    SteinTest,
    score_function,
    stein_discrepancy,
    stein_test,
    stein_thin,
)
from numpyro_diffusion.diagnostics.two_sample import Comparison, Memorisation, classifier_test, compare, memorisation

__all__ = [
    "Comparison",
    "Discrepancy",
    "Memorisation",
    "SteinTest",
    "Verdict",
    "classifier_test",
    "compare",
    "energy_distance",
    "memorisation",
    "mmd",
    "nested_rhat",
    "score_function",
    "sliced_wasserstein",
    "stein_discrepancy",
    "stein_test",
    "stein_thin",
    "to_arviz",
    "verdict",
]
