r"""A conditional denoiser with its condition filled in: a denoiser like any other.

A network $\hat x_0(x_t, t, c)$ that was trained with conditions stands for a family of laws $p(x \mid c)$. With $c$
held,

$$\hat x_0(x_t, t) = E[x \mid x_t, c],$$

it is the denoiser of one of them, and solvers, densities and kernels need not know that there are others. The condition
is a leaf like the weights, but unlike them it is never frozen: a law may depend on another quantity of a model, and its
gradient in that quantity is wanted. How a network takes conditions is the matter of `nn`.
"""

from dataclasses import dataclass

import jax
from jax.typing import ArrayLike

from numpyro_diffusion.denoise.around import Around
from numpyro_diffusion.denoise.prediction import Denoiser, Prediction


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioned(Around):
    """A denoiser that always answers under the same condition.

    Args:
        base: a conditional denoiser.
        cond: its condition, as the denoiser takes it.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import Conditioned, NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> network = NetworkDenoiser(MLP((2,), cond_shape=(3,), rngs=nnx.Rngs(0)))
        >>> Conditioned(network, jnp.ones(3))(jnp.zeros(2), 0.5).x0.shape
        (2,)
    """

    base: Denoiser
    cond: ArrayLike

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: None = None) -> Prediction:
        """Predicts the clean point under the condition held.

        Raises:
            ValueError: if another condition is given.
        """
        if cond is not None:
            raise ValueError("cond must be None: this denoiser holds one. Give the other to its `base`")
        return self.base(x_t, t, self.cond)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        """The diffused log-density under the condition held, where the denoiser has one."""
        return self.base.log_density(x_t, t, self.cond)
