"""What a kernel needs to know about a NumPyro model: its sites, their densities, what is observed."""

from numpyro_diffusion.infer.model.density import Density, LineIntegral, LogPrior, Score, Status, with_density
from numpyro_diffusion.infer.model.handlers import drop_prior, with_flow
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.model.structure import Structure

__all__ = [
    "Density",
    "LineIntegral",
    "LogPrior",
    "Reading",
    "Record",
    "Score",
    "Status",
    "Structure",
    "drop_prior",
    "with_density",
    "with_flow",
]
