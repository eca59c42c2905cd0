"""Backbones: the networks inside a learned denoiser, each written for one point and one noise level."""

from numpyro_diffusion.nn.condition import Condition
from numpyro_diffusion.nn.embed import FourierEmbedding
from numpyro_diffusion.nn.mlp import MLP

__all__ = ["Condition", "MLP", "FourierEmbedding"]
