"""Solvers: from noise to data, with noise along the way or without."""

from numpyro_diffusion.solve.adams import Adams
from numpyro_diffusion.solve.adaptive import AdaptiveFlow
from numpyro_diffusion.solve.base import Solver, sample, solve, terminal_moments, terminal_point
from numpyro_diffusion.solve.corrector import PredictorCorrector
from numpyro_diffusion.solve.flow import FlowMap, Heun, push_forward
from numpyro_diffusion.solve.gaussian import Ancestral, DPMSolverPP, EulerMaruyama, ExponentialEuler, GaussianSolver
from numpyro_diffusion.solve.given import GivenMap, draw_given, evaluations_given, flow_given, noise_given
from numpyro_diffusion.solve.stochastic import StochasticHeun

__all__ = [
    "Adams",
    "AdaptiveFlow",
    "Ancestral",
    "DPMSolverPP",
    "EulerMaruyama",
    "ExponentialEuler",
    "FlowMap",
    "GaussianSolver",
    "GivenMap",
    "Heun",
    "PredictorCorrector",
    "Solver",
    "StochasticHeun",
    "draw_given",
    "evaluations_given",
    "flow_given",
    "noise_given",
    "push_forward",
    "sample",
    "solve",
    "terminal_moments",
    "terminal_point",
]
