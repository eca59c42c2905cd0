r"""The Langevin step, written once, and the rule that gives its size from the score.

$$x \leftarrow x + h\, \nabla \log p(x) + \sqrt{2 h}\, z, \qquad z \sim N(0, I),$$

leaves $p$ invariant as $h \to 0$; at a finite step it is biased by order $h$ (for $N(0, 1)$ the variance is
$1 / (1 - h/2)$). Song et al. choose $h$ such that the ratio of the score's step to the noise is fixed,
$h = 2 (r \|z\| / \|g\|)^2$ with norms averaged over a batch. The norm at a single point will not do: a step whose size
depends on where it starts does not leave $p$ invariant, and explodes where the score happens to vanish. But the mean is
bounded, $E\|g\|^2 \le d / \sigma_t^2$, since a posterior mean of the noise is on average no longer than the noise, with
equality where there is nothing but noise. So

$$h = 2 r^2 \sigma_t^2,$$

the same for all points of a level and never beyond the stable range of a score whose slope is at most $1 / \sigma_t^2$.

The kernels of `infer` accept or reject such steps.

References:
    Song et al., Score-based generative modeling through stochastic differential equations, 2021, algorithms 4 and 5,
    https://arxiv.org/abs/2011.13456.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def langevin_step(key: jax.Array, x: jax.Array, score: jax.Array, step_size: ArrayLike) -> jax.Array:
    """One unadjusted Langevin step.

    Args:
        key: random key.
        x: the point, any shape.
        score: the gradient of the log-density there, of the same shape.
        step_size: the step $h$, in squared units of `x`.

    Returns:
        The new point.
    """
    noise = jax.random.normal(key, x.shape, x.dtype)
    return x + step_size * score + jnp.sqrt(2.0 * step_size) * noise


def snr_step_size(sigma: ArrayLike, snr: float) -> jax.Array:
    r"""The step $h = 2 r^2 \sigma_t^2$, whose part by the score is on average at most `snr` times its noise.

    Args:
        sigma: standard deviation $\sigma_t$ of the noise at this level, in the units of `x`.
        snr: the ratio $r$ of Song et al.; they use 0.16 for images.

    Returns:
        A step in squared units of `x`.
    """
    return 2.0 * (snr * jnp.asarray(sigma)) ** 2
