"""The version: read by the build, by checkpoints and by `numpyro_diffusion` itself."""

__version__ = "0.2.0"
