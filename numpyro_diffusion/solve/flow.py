r"""The probability flow: the deterministic path with the same marginals as the reverse process.

Let $m$ and $s$ be the denoiser's location and scale, $\lambda = \sigma_t / \alpha_t$ the noise level,
$\rho = \sqrt{s^2 + \lambda^2}$, and run the clock $\varphi = \operatorname{asinh}(\lambda / s)$ from data to noise:

$$w = \frac{1}{\rho} \left( \frac{x_t}{\alpha_t} - m \right), \qquad
\frac{\mathrm{d}w}{\mathrm{d}\varphi} = \hat\varepsilon - \frac{\lambda}{\rho}\, w.$$

Every schedule is the same flow in these coordinates, the terminal law is $w \sim N(0, I)$, and the velocity is zero if
the data are $N(m, s^2 I)$: steps are spent on what is not Gaussian. The clock is linear in $\lambda$ below the scale of
the data and logarithmic above it. Heun's method averages the velocities at both ends of a step and is of order two;
Euler's method in $\lambda$ is `Ancestral(eta=0)`.

A flow keeps the law but is not a reversible move: it is the map behind `NoiseReparam`, not a proposal.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
    Lu and Song, Simplifying, stabilizing and scaling continuous-time consistency models, 2024 (coordinates at rest,
    with an angle for a clock), https://arxiv.org/abs/2410.11081.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Karras, TimeGrid
from numpyro_diffusion.solve.base import Memory, Solver


def clock(denoiser: Denoiser, t: ArrayLike) -> jax.Array:
    r"""$\varphi = \operatorname{asinh}(\lambda_t / s)$, from data to noise."""
    return jnp.arcsinh(denoiser.schedule.noise_level(t) / denoiser.scale)


def spread(denoiser: Denoiser, t: ArrayLike) -> jax.Array:
    r"""$\rho = \sqrt{s^2 + \lambda_t^2}$, the scale of the data with their noise."""
    return jnp.hypot(denoiser.scale, denoiser.schedule.noise_level(t))


def to_rest(denoiser: Denoiser, x_t: jax.Array, t: ArrayLike) -> jax.Array:
    """The coordinate `w` of a noisy point."""
    return (x_t / denoiser.schedule.alpha(t) - denoiser.location) / spread(denoiser, t)


def from_rest(denoiser: Denoiser, w: jax.Array, t: ArrayLike) -> jax.Array:
    """The noisy point at a coordinate `w`."""
    return denoiser.schedule.alpha(t) * (denoiser.location + spread(denoiser, t) * w)


def velocity(denoiser: Denoiser, w: jax.Array, t: ArrayLike) -> jax.Array:
    r"""$\mathrm{d}w / \mathrm{d}\varphi$ of the probability flow."""
    prediction = denoiser(from_rest(denoiser, w, t).astype(w.dtype), t)
    slope = denoiser.schedule.noise_level(t) / spread(denoiser, t)
    return (prediction.eps - slope * w).astype(w.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method for the probability flow, of order two.

    Args:
        num_times: number of times visited, two denoiser evaluations a step.
        grid: where the times lie.

    Raises:
        ValueError: if `num_times` is below 2.
    """

    num_times: int = 18
    grid: TimeGrid = Karras()

    law = "flow"
    order = 2
    evaluations_per_step = 2

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        w = to_rest(denoiser, x_t, t).astype(x_t.dtype)
        tick = (clock(denoiser, s) - clock(denoiser, t)).astype(x_t.dtype)
        here = velocity(denoiser, w, t)
        there = velocity(denoiser, w + tick * here, s)
        return from_rest(denoiser, w + 0.5 * tick * (here + there), s).astype(x_t.dtype), memory
