"""The noising process and the times at which it is looked at."""

from numpyro_diffusion.noise.adapted import check_decreasing, schedule_for
from numpyro_diffusion.noise.grid import Karras, TimeGrid, UniformLogSNR, UniformTime, grid_from
from numpyro_diffusion.noise.schedule import (
    VE,
    VP,
    Cosine,
    Rectified,
    Scaled,
    Schedule,
    SubVP,
    perturb,
    value_and_slope,
)
from numpyro_diffusion.noise.tabulated import Tabulated

__all__ = [
    "VE",
    "VP",
    "Cosine",
    "Karras",
    "Rectified",
    "Scaled",
    "Schedule",
    "SubVP",
    "Tabulated",
    "TimeGrid",
    "UniformLogSNR",
    "UniformTime",
    "check_decreasing",
    "grid_from",
    "perturb",
    "schedule_for",
    "value_and_slope",
]
