"""Real examples that need no download beyond a package.

Data that take whole values are dequantised: uniform noise spreads each value over the unit interval around it, so that
a density exists and posterior intervals can be compared with the truth. This file is not a general loader: users bring
arrays.
"""

import jax
import jax.numpy as jnp

__all__ = ["digits"]


def digits(key: jax.Array, num_held_out: int = 100) -> tuple[jax.Array, jax.Array]:
    """The 1,797 handwritten digits of scikit-learn, dequantised and shuffled.

    Args:
        key: random key of the dequantisation and the shuffle.
        num_held_out: digits kept for testing.

    Returns:
        Training and held-out images, shapes (1797 - num_held_out, 8, 8) and (num_held_out, 8, 8); grey values run from
        -0.5 to 16.5, 0 is paper.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical recognition of handwritten digits, 1998, https://doi.org/10.24432/C50P49.
    """
    from sklearn.datasets import load_digits

    images = jnp.asarray(load_digits().images, jnp.float32)
    key_noise, key_order = jax.random.split(key)
    images = images + jax.random.uniform(key_noise, images.shape, minval=-0.5, maxval=0.5)
    images = jax.random.permutation(key_order, images)
    return images[num_held_out:], images[:num_held_out]
