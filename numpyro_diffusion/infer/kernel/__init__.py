"""Shared by all kernels: NumPyro's contract, the start, the accept step, adaptation, inner kernels."""

from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.inner import KernelLike, build

__all__ = ["Compiled", "DiffusionKernel", "KernelLike", "build"]
