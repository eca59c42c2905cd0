"""Denoisers: what is the clean point behind a noisy one, and how do we know?"""

from numpyro_diffusion.denoise.analytic import Gaussian, GaussianMixture
from numpyro_diffusion.denoise.combined import MixtureOf, Product
from numpyro_diffusion.denoise.covariance import Covariance, covariance
from numpyro_diffusion.denoise.designed import Estimate, FromSamples, FromTarget
from numpyro_diffusion.denoise.from_function import FromDensity, FromFunction
from numpyro_diffusion.denoise.network import NetworkDenoiser
from numpyro_diffusion.denoise.prediction import Denoiser, Prediction, density_kind, require_denoiser
from numpyro_diffusion.denoise.wrapped import Around, Conditioned, Given, Repeated, Rescheduled, inside, reschedule

__all__ = [
    "Around",
    "Conditioned",
    "Covariance",
    "Denoiser",
    "Estimate",
    "FromDensity",
    "FromFunction",
    "FromSamples",
    "FromTarget",
    "Gaussian",
    "GaussianMixture",
    "Given",
    "MixtureOf",
    "NetworkDenoiser",
    "Prediction",
    "Product",
    "Repeated",
    "Rescheduled",
    "covariance",
    "density_kind",
    "inside",
    "require_denoiser",
    "reschedule",
]
