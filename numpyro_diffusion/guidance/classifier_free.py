r"""Classifier-free guidance: the effect of a condition, exaggerated.

The prediction of a conditional denoiser that also answers without its condition is moved along the difference,

$$\hat x_0(\varnothing) + w \left( \hat x_0(c) - \hat x_0(\varnothing) \right).$$

At $w = 1$ it is the conditional denoiser, at $w = 0$ the unconditional one. Above 1 it sharpens, and then it is not the
denoiser of any law: the product $p_t(x_t)\, p_t(c \mid x_t)^w$ is not a noised law.

References:
    Ho and Salimans, Classifier-free diffusion guidance, 2022, https://arxiv.org/abs/2207.12598.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.denoise.wrapped import Around


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFree(Around):
    r"""Guidance without a likelihood: $\hat x_0(\varnothing) + w \left( \hat x_0(c) - \hat x_0(\varnothing) \right)$.

    At $w = 1$ it is the conditional denoiser, at $w = 0$ the unconditional one. Above 1 it sharpens, and then it is not
    the denoiser of any law; see the module.

    Args:
        base: a denoiser trained with conditions and without.
        cond: the condition.
        weight: $w$, a scalar.
    """

    base: Denoiser
    cond: ArrayLike
    weight: ArrayLike = 1.0

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """The prediction under the condition held."""
        without, given = self.base(x_t, t), self.base(x_t, t, self.cond)  # type: ignore[call-arg]
        weight = jnp.asarray(self.weight, x_t.dtype)
        x0, eps = (a + weight * (b - a) for a, b in ((without.x0, given.x0), (without.eps, given.eps)))
        return Prediction(x0, eps, x_t, t, self.schedule)
