r"""The noise behind a point: the inverse $z = F^{-1}(x)$ of the flow $x = F(z)$, up to the error of a solver.

To start a chain in noise space at a given image, start it at the noise behind the image. The probability flow is solved
upwards from the smallest noise level, by Heun's method in the coordinates of `solve.flow` and with more steps than a
flow solver usually has. The flow solver then returns the image, up to its own error and the smallest noise level.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.solve import Heun, terminal_moments

_SOLVER = Heun(128)


def noise_behind(site: PriorSite, u: jax.Array) -> jax.Array:
    """The noise that the flow of a site's prior takes to given points.

    Args:
        site: the site.
        u: points of the denoiser's own space, of the site's batch shape.

    Returns:
        Noise of the same shape.
    """
    return site.over_points(_walk_up, u)


def _walk_up(denoiser: Denoiser, u: jax.Array) -> jax.Array:
    times = _SOLVER.times(denoiser)[::-1]

    def step(x_t: jax.Array, k: ArrayLike) -> tuple[jax.Array, None]:
        return _SOLVER.step(denoiser, x_t, (), times[k], times[k + 1])[0], None

    start = (denoiser.schedule.alpha(times[0]) * u).astype(u.dtype)
    x_t, _ = jax.lax.scan(step, start, jnp.arange(len(times) - 1))
    mean, deviation = terminal_moments(denoiser)
    return ((x_t - mean) / deviation).astype(u.dtype)
