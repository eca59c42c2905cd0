r"""Independent points of one law, as a single denoiser over all of them.

A plate of $n$ points $x_i \sim p$ is one point of $\prod_i p(x_i)$, whose posterior mean is that of each. Solvers and
guidance, which move one point, then move the whole plate, and an observation may see all of it.
"""

from dataclasses import dataclass, field

import jax
from jax.typing import ArrayLike

from numpyro_diffusion.denoise.around import Around
from numpyro_diffusion.denoise.prediction import Denoiser, Prediction


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Repeated(Around):
    """A denoiser of independent points.

    Args:
        base: the denoiser of one.
        batch_shape: how many, as a shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, Repeated
        >>> Repeated(Gaussian([0.0, 1.0]), (3,))(jnp.zeros((3, 2)), 0.5).x0.shape
        (3, 2)
    """

    base: Denoiser
    batch_shape: tuple[int, ...] = field(metadata={"static": True})

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (*self.batch_shape, *self.base.event_shape)

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> Prediction:
        """The predictions of all points, under the same condition."""

        def one(x_t: jax.Array) -> jax.Array:
            return self.base(x_t, t, cond).x0

        for _ in self.batch_shape:
            one = jax.vmap(one)
        return Prediction(one(x_t), x_t, t, self.schedule)
