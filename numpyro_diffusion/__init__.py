"""Diffusion models as priors, samplers and MCMC kernels in NumPyro."""

from numpyro_diffusion._version import __version__
from numpyro_diffusion.checkpoint import load, save
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import with_density
from numpyro_diffusion.learned import prior_from_idata, prior_from_samples
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.train import fit

__all__ = [
    "DiffusionPrior",
    "NoiseReparam",
    "__version__",
    "fit",
    "load",
    "prior_from_idata",
    "prior_from_samples",
    "save",
    "to_arviz",
    "with_density",
]
