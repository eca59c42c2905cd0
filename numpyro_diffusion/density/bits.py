r"""Densities of quantised data: uniform dequantisation and bits per dimension.

A density on real numbers says nothing about pixels that take 256 values: a model may put unbounded density on each.
Spread the values uniformly over their bins of width $\Delta$, $\tilde x = x + \Delta\, U$; then by Jensen's inequality

$$-\log_2 P(x) \le -\frac{1}{\log 2} \left( E_U \log p(\tilde x) + d \log \Delta \right), \qquad
P(x) = \int_{[x, x + \Delta)^d} p :$$

the cost of the dequantised data in bits bounds that of the quantised data under the model that $p$ gives for them.

References:
    Theis, van den Oord, Bethge, A note on the evaluation of generative models, 2016,
    https://arxiv.org/abs/1511.01844.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks


def bits_per_dim(log_density: ArrayLike, num_dims: int, bin_width: float = 1.0) -> jax.Array:
    r"""The cost of a quantised point in bits per dimension, $-(\log p + d \log \Delta) / (d \log 2)$.

    Args:
        log_density: log-density, or a bound on it, of dequantised points, in nats, any shape.
        num_dims: number of dimensions $d$.
        bin_width: spacing $\Delta$ of the values, in the units of the data.

    Returns:
        Bits per dimension, of the shape of `log_density`.

    Raises:
        ValueError: if `num_dims` is below one or `bin_width` not positive.
    """
    _checks.at_least(1, num_dims=num_dims)
    _checks.positive(bin_width=bin_width)
    return -(jnp.asarray(log_density) / num_dims + jnp.log(bin_width)) / jnp.log(2.0)


def dequantize(key: jax.Array, x: ArrayLike, bin_width: float = 1.0) -> jax.Array:
    """A uniform point of the bin [x, x + bin_width) of each entry.

    Args:
        key: random key.
        x: quantised values, any shape.
        bin_width: their spacing.

    Returns:
        Real values of the same shape.

    Raises:
        ValueError: if `bin_width` is not positive.
    """
    _checks.positive(bin_width=bin_width)
    x = jnp.asarray(x, jnp.result_type(x, float))
    return x + bin_width * jax.random.uniform(key, x.shape, x.dtype)
