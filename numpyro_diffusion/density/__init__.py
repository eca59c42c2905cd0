"""Densities: log p(x) of a diffusion model by its probability flow."""

from numpyro_diffusion.density.flow import LogProb, log_prob

__all__ = ["LogProb", "log_prob"]
