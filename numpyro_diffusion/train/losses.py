r"""Denoising score matching: the regression whose solution is the posterior mean.

Noise a clean point, guess it back, and pay for the squared error:

$$L = E_{t,\, x,\, \varepsilon} \left[ w(\log \mathrm{SNR}(t)) \, \frac{1}{d c^2}
\left\| \hat x_0(\alpha_t x + \sigma_t \varepsilon, t) - x \right\|^2 \right].$$

At each time the minimiser over all functions is $E[x \mid x_t]$, whatever the weight $w > 0$ and the law of $t$; these
two only decide where a finite network spends its capacity. With $c$ the data's standard deviation and the SNR in units
of it, the weight of Karras et al. is

$$w = 1 + \mathrm{SNR} = \frac{(\sigma / \alpha)^2 + c^2}{(\sigma / \alpha)^2 c^2} \quad (\text{for } c = 1),$$

under which the network's own output has a squared error of order one at every noise level. Noise levels are log-normal:
most of the effort goes where denoising is neither trivial nor hopeless. Karras et al. centre them at -1.2 for images of
standard deviation 0.5, which is -0.5 in units of $c$; the default spread is 1.5, wider than their 1.2, because a
sampler walks the whole ladder and the noisiest rungs decide how much mass each mode receives.

Everything is written for one point and one key, and for any `Denoiser`: the loss of an exact denoiser is the floor
that a trained one is compared with. Batches, steps and optimisers are in `fit`.

References:
    Vincent, A connection between score matching and denoising autoencoders, 2011,
    https://doi.org/10.1162/NECO_a_00142.
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Schedule, perturb


@jax.tree_util.register_static
@dataclass(frozen=True)
class NoiseLevels:
    r"""Log-normal noise levels for training: $\log (\sigma_t / (\alpha_t c)) \sim N(\mathrm{mean}, \mathrm{std}^2)$.

    Args:
        mean: centre of the log noise level, in units of the data's standard deviation $c$.
        std: its standard deviation, positive.

    Raises:
        ValueError: if `std` is not positive or `mean` not finite.
    """

    mean: float = -0.5
    std: float = 1.5

    def __post_init__(self) -> None:
        _checks.finite("mean", self.mean)
        _checks.positive(std=self.std)

    def time(self, key: jax.Array, schedule: Schedule, scale: ArrayLike = 1.0) -> jax.Array:
        """Draws the time of a noise level, clipped to [`schedule.t_min`, `schedule.t_max`].

        Args:
            key: random key.
            schedule: the noising process, in the units of the data.
            scale: the data's standard deviation, a scalar.

        Returns:
            A scalar time.
        """
        level = scale * jnp.exp(self.mean + self.std * jax.random.normal(key))
        return jnp.clip(schedule.inverse_noise_level(level), schedule.t_min, schedule.t_max)


def edm_weight(log_snr: ArrayLike) -> jax.Array:
    r"""The weight of the squared error of $\hat x_0$ that makes every noise level count alike: $1 + \mathrm{SNR}$.

    Args:
        log_snr: $\log \alpha^2 / \sigma^2$ of data of unit variance, any shape.

    Returns:
        Weights above one, of the same shape.
    """
    return 1.0 + jnp.exp(log_snr)


def denoising_loss(
    denoiser: Denoiser,
    key: jax.Array,
    x: jax.Array,
    noise_levels: NoiseLevels | None = None,
    weight: Callable[[ArrayLike], jax.Array] = edm_weight,
) -> jax.Array:
    r"""The denoising loss of one point, one noise level and one noise.

    $w(\log \mathrm{SNR}) \, \| \hat x_0(x_t, t) - x \|^2 / (d c^2)$, with the SNR in units of the scale $c$.

    Args:
        denoiser: any denoiser; its `scale` sets the unit.
        key: random key, for the level and the noise.
        x: clean point of the denoiser's event shape, in the units of the data.
        noise_levels: law of the noise level; `NoiseLevels()` by default.
        weight: function of the standardised log-SNR.

    Returns:
        A scalar; per dimension, so that events of different sizes compare.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.train import denoising_loss
        >>> bool(denoising_loss(Gaussian(jnp.zeros(2)), jax.random.key(0), jnp.ones(2)) > 0)
        True
    """
    key_level, key_noise = jax.random.split(key)
    noise_levels = NoiseLevels() if noise_levels is None else noise_levels
    schedule, scale = denoiser.schedule, denoiser.scale
    t = noise_levels.time(key_level, schedule, scale)
    x0 = denoiser(perturb(key_noise, schedule, x, t).astype(x.dtype), t).x0
    squared_error = jnp.sum(((x0 - x) / scale) ** 2) / max(1, int(np.prod(x.shape)))
    return weight(schedule.log_snr(t) + 2.0 * jnp.log(scale)).astype(x.dtype) * squared_error
