"""Diffusion models as priors, samplers and MCMC kernels in NumPyro."""

__version__ = "0.1.0"
