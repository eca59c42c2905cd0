r"""How a network is told the noise level: sines and cosines of a scalar coordinate.

A multilayer perceptron learns slowly along a raw scalar input, because its kernel is dominated by low frequencies. So
the noise coordinate $c$ enters as

$$\phi(c) = \left( \sin(\omega_1 c), \ldots, \sin(\omega_m c),\; \cos(\omega_1 c), \ldots, \cos(\omega_m c) \right),
\qquad \omega_j = \omega_m^{(j - 1) / (m - 1)}.$$

The coordinate of this library is $c = -\tfrac18 \log \mathrm{SNR} = \tfrac14 \log (\sigma / \alpha)$, which runs from
about -1.6 to 1.6 over the noise levels 0.002 to 500. The lowest frequency, 1, is monotone over that range; the highest
turns once while the noise level grows by a factor of two.

The frequencies are a fixed geometric ladder: no parameters, nothing drawn at random, nothing to store. For what a
network does with the features see `mlp`.

References:
    Tancik et al., Fourier features let networks learn high frequency functions in low dimensional domains, 2020,
    https://arxiv.org/abs/2006.10739.
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022 (the coordinate c_noise),
    https://arxiv.org/abs/2206.00364.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks


class FourierEmbedding(nnx.Module):
    r"""Sines and cosines of a scalar at fixed, geometrically spaced frequencies.

    Args:
        features: number of features, even and at least 4: half are sines, half cosines.
        max_frequency: the highest frequency $\omega_m$, in radians per unit of the coordinate; above 1.

    Raises:
        ValueError: if `features` is odd or too small, or `max_frequency` is not above 1.

    Example:
        >>> from numpyro_diffusion.nn import FourierEmbedding
        >>> FourierEmbedding(4)(0.0).tolist()
        [0.0, 0.0, 1.0, 1.0]
    """

    def __init__(self, features: int, max_frequency: float = 32.0) -> None:
        _checks.at_least(4, features=features)
        if features % 2:
            raise ValueError(f"features must be even, one sine and one cosine per frequency; got {features}")
        _checks.exceeds("max_frequency", max_frequency, "the lowest frequency", 1.0)
        self.features = features
        self.max_frequency = float(max_frequency)

    def __call__(self, c_noise: ArrayLike) -> jax.Array:
        """The features of one coordinate.

        Args:
            c_noise: the noise coordinate, a scalar.

        Returns:
            Shape (features,), in the precision of `c_noise`.
        """
        c_noise = jnp.asarray(c_noise)
        frequencies = np.geomspace(1.0, self.max_frequency, self.features // 2)
        angles = c_noise * jnp.asarray(frequencies, jnp.result_type(c_noise, float))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
