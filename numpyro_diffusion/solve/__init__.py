"""Solvers: from noise to data, with noise along the way or without."""

from numpyro_diffusion.solve.ancestral import Ancestral
from numpyro_diffusion.solve.base import Solver, sample, solve, terminal_moments, terminal_point
from numpyro_diffusion.solve.ode import Heun
from numpyro_diffusion.solve.sde import StochasticHeun

__all__ = ["Ancestral", "Heun", "Solver", "StochasticHeun", "sample", "solve", "terminal_moments", "terminal_point"]
