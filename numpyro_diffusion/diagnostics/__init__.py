"""What a run has to say about itself: statistics for ArviZ, and whether its chains have converged."""

from numpyro_diffusion.diagnostics.arviz import to_arviz
from numpyro_diffusion.diagnostics.convergence import Verdict, verdict
from numpyro_diffusion.diagnostics.nested import nested_rhat
from numpyro_diffusion.diagnostics.runs import by_level

__all__ = ["Verdict", "by_level", "nested_rhat", "to_arviz", "verdict"]
