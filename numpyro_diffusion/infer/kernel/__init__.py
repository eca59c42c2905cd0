"""What all kernels share: NumPyro's contract, the start, the accept step, adaptation."""

from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.inner import KernelLike, build

__all__ = ["Compiled", "DiffusionKernel", "KernelLike", "build"]
