"""Backbones: the networks inside a learned denoiser, each written for one point and one noise level."""

from numpyro_diffusion.nn.condition import Condition, ConditionEmbedding
from numpyro_diffusion.nn.embed import FourierEmbedding
from numpyro_diffusion.nn.mlp import MLP
from numpyro_diffusion.nn.unet import UNet

__all__ = ["MLP", "Condition", "ConditionEmbedding", "FourierEmbedding", "UNet"]
