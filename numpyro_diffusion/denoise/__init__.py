"""Denoisers: what is the clean point behind a noisy one, and how do we know?"""

from numpyro_diffusion.denoise.analytic import Gaussian, GaussianMixture
from numpyro_diffusion.denoise.composed import MixtureOf, Product
from numpyro_diffusion.denoise.conditioned import Conditioned
from numpyro_diffusion.denoise.covariance import Covariance, covariance
from numpyro_diffusion.denoise.designed import FromDensity
from numpyro_diffusion.denoise.network import NetworkDenoiser
from numpyro_diffusion.denoise.prediction import Denoiser, Prediction
from numpyro_diffusion.denoise.repeated import Repeated
from numpyro_diffusion.denoise.reschedule import Rescheduled, reschedule

__all__ = [
    "Conditioned",
    "Covariance",
    "Denoiser",
    "FromDensity",
    "Gaussian",
    "GaussianMixture",
    "MixtureOf",
    "NetworkDenoiser",
    "Prediction",
    "Product",
    "Repeated",
    "Rescheduled",
    "covariance",
    "reschedule",
]
