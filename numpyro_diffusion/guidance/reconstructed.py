r"""Reconstruction: known entries of a point replace their predictions (RePaint's mask).

Walked by a solver, the known entries end at their values. The others depend on them only through $x_t$, which is an
approximation, like RePaint's own. For the exact posterior write the known entries as data with a narrow likelihood.

References:
    Lugmayr et al., RePaint: inpainting using denoising diffusion probabilistic models, 2022,
    https://arxiv.org/abs/2201.09865.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.denoise.wrapped import Around


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reconstructed(Around):
    """Entries that are known without noise replace their predictions (RePaint).

    Walked by a solver, the known entries end at their values. The others depend on them only through $x_t$, which is an
    approximation, like RePaint's own.

    Args:
        base: the denoiser of the prior.
        known: which entries are known, truth values of `event_shape`.
        y: their values, of `event_shape`; those of the other entries do not matter.
    """

    base: Denoiser
    known: jax.Array
    y: jax.Array

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """The prediction with the known entries in place."""
        prediction = self.base(x_t, t)
        given = Prediction.from_x0(jnp.asarray(self.y, prediction.x0.dtype), x_t, t, self.schedule)
        x0, eps = (jnp.where(self.known, a, b) for a, b in ((given.x0, prediction.x0), (given.eps, prediction.eps)))
        return Prediction(x0, eps, x_t, t, self.schedule)
