"""Kernels that move all latent sites by the gradient of the joint posterior."""
