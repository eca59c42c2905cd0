"""Densities: log p(x) of a diffusion model by its probability flow or by a map, and variational bounds on it."""

from numpyro_diffusion.density.bits import bits_per_dim, dequantize
from numpyro_diffusion.density.bound import (
    Elbo,
    ElboGap,
    elbo,
    elbo_gap,
    importance_weighted_bound,
    learn_variances,
)
from numpyro_diffusion.density.flow import Gradient, LogProb, clean_log_density, clean_score, log_prob
from numpyro_diffusion.density.pushforward import Pushed, pushed

__all__ = [
    "Elbo",
    "ElboGap",
    "Gradient",
    "LogProb",
    "Pushed",
    "bits_per_dim",
    "clean_log_density",
    "clean_score",
    "dequantize",
    "elbo",
    "elbo_gap",
    "importance_weighted_bound",
    "learn_variances",
    "log_prob",
    "pushed",
]
