"""Guidance: denoisers given data, which are denoisers too."""

from numpyro_diffusion.guidance.classifier_free import ClassifierFree
from numpyro_diffusion.guidance.guided import GUIDANCES, Guided, Outlook
from numpyro_diffusion.guidance.observation import Likelihood, Observation, linear
from numpyro_diffusion.guidance.reconstructed import Reconstructed

__all__ = [
    "GUIDANCES",
    "ClassifierFree",
    "Guided",
    "Likelihood",
    "Observation",
    "Outlook",
    "Reconstructed",
    "linear",
]
