r"""Reconstruction: what is known of a point put in the place of what is predicted (RePaint's mask).

Walked by a solver, the known entries end where they should and the others see them through $x_t$ alone: an
approximation, like its model. For the exact posterior give the model a narrow likelihood, or none and `DiffusionPCN`.

References:
    Lugmayr et al., RePaint: inpainting using denoising diffusion probabilistic models, 2022,
    https://arxiv.org/abs/2201.09865.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.denoise.around import Around


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reconstructed(Around):
    """Entries that are known without noise, put in the place of their predictions (RePaint).

    Walked by a solver, the known entries end where they should and the others see them through $x_t$ alone: an
    approximation, like its model.

    Args:
        base: the denoiser of the prior.
        known: which entries are known, truth values of `event_shape`.
        y: their values, of `event_shape`; what stands at the others does not matter.
    """

    base: Denoiser
    known: jax.Array
    y: jax.Array

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: None = None) -> Prediction:
        """The prediction with the known entries in place."""
        x0 = self.base(x_t, t).x0
        return Prediction(jnp.where(self.known, jnp.asarray(self.y, x0.dtype), x0), x_t, t, self.schedule)
