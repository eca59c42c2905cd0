"""Kernels on the noise behind the diffusion sites."""
