r"""What is known about a clean point: a Gaussian observation of it, or any likelihood.

An `Observation` is $y = h(x) + s \varepsilon$, a `Likelihood` a function of $x$ that can be differentiated. Both hold
their arrays as leaves, so that new data do not compile a new program. For what a denoiser makes of them see `guided`,
for how they are read from a NumPyro model see `infer.model.observation`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    r"""A Gaussian observation of a clean point, $y = h(x) + s \varepsilon$.

    Args:
        y: what was observed, of any shape.
        scale: its standard deviation $s$, a scalar or of the shape of `y`.
        mean: the map $h$, from a point of `event_shape` and `parameters` to the shape of `y`.
        parameters: arrays that the map needs, such as a matrix; a pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.guidance import linear
        >>> linear(jnp.ones((1, 2)), jnp.array([3.0]), 0.5).mean_of(jnp.ones(2)).tolist()
        [2.0]
    """

    y: jax.Array
    scale: jax.Array
    mean: Callable[[jax.Array, Any], jax.Array] = field(metadata={"static": True})
    parameters: Any = None

    def mean_of(self, x: jax.Array) -> jax.Array:
        """What would be observed of a clean point without noise."""
        return self.mean(x, self.parameters)


def linear(matrix: ArrayLike, y: ArrayLike, scale: ArrayLike) -> Observation:
    r"""The observation $y = A x + s \varepsilon$ of a flattened point.

    Args:
        matrix: A, shape (m, d) with d the size of an event.
        y: shape (m,).
        scale: standard deviation, a scalar or (m,).

    Returns:
        An `Observation`, for `Guided`.

    Raises:
        ValueError: if shapes do not agree or a scale is not positive.
    """
    matrix, y, scale = (jnp.asarray(v, jnp.result_type(float)) for v in (matrix, y, scale))
    if matrix.ndim != 2 or y.shape != matrix.shape[:1]:
        raise ValueError(f"matrix must be (m, d) and y (m,); got {matrix.shape} and {y.shape}")
    if scale.shape not in ((), y.shape):
        raise ValueError(f"scale must be a scalar or of shape {y.shape}; got {scale.shape}")
    if not isinstance(scale, jax.core.Tracer) and not bool((scale > 0).all()):
        raise ValueError("scale must be positive. For a hard constraint on entries use `reconstructed`")
    return Observation(y, scale, _apply_matrix, matrix)


def _apply_matrix(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return matrix @ x.reshape(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likelihood:
    """Any log-likelihood of a clean point that can be differentiated.

    Args:
        log_density: a function of the point and of `parameters`, up to a constant.
        parameters: arrays that it needs; a pytree.
    """

    log_density: Callable[[jax.Array, Any], jax.Array] = field(metadata={"static": True})
    parameters: Any = None
