"""Solvers: from noise to data, with noise along the way or without."""

from numpyro_diffusion.solve.adam import AdamFlow
from numpyro_diffusion.solve.adaptive import AdaptiveFlow
from numpyro_diffusion.solve.ancestral import Ancestral, EulerMaruyama
from numpyro_diffusion.solve.base import Solver, sample, solve, terminal_moments, terminal_point
from numpyro_diffusion.solve.corrector import PredictorCorrector
from numpyro_diffusion.solve.exponential import DPMSolverPP, ExponentialEuler
from numpyro_diffusion.solve.ode import Heun
from numpyro_diffusion.solve.sde import StochasticHeun

__all__ = [
    "AdamFlow",
    "AdaptiveFlow",
    "Ancestral",
    "DPMSolverPP",
    "EulerMaruyama",
    "ExponentialEuler",
    "Heun",
    "PredictorCorrector",
    "Solver",
    "StochasticHeun",
    "sample",
    "solve",
    "terminal_moments",
    "terminal_point",
]
