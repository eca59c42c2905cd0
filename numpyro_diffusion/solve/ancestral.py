r"""Ancestral sampling: the reverse of the noising process, one Gaussian step at a time.

Had the clean point been $\hat x_0$, the point at the earlier time $s$ given the one at $t$ would be Gaussian (Ho et al.
2020). The family of Song et al. 2021 keeps its marginals and scales its noise by $\eta$:

$$x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \tilde\sigma^2}\, \hat\varepsilon + \tilde\sigma z, \qquad
\tilde\sigma^2 = \eta^2 \sigma_s^2 \left(1 - \frac{\lambda_s^2}{\lambda_t^2}\right), \qquad z \sim N(0, I).$$

$\eta = 1$ is DDPM, whose walk is the reverse-time stochastic process in the limit of many steps; $\eta = 0$ is DDIM,
the Euler method for the probability flow. The reverse process, and not the flow, is what `infer.DiffusionPCN` needs.
The Euler-Maruyama method for that process has the same mean and the noise of the noisier end, $\lambda_t$ in place of
$\lambda_s$: the two choices of variance of Ho et al., too small and too large.
Its noise forgets that the clean point is uncertain, so at few steps the draws are too narrow: by a factor
$\lambda_s^2 / \lambda_t^2$ in the variance of the noise where the law of $x$ is flat on the scale of $\lambda_t$.
`StochasticHeun` does not pay this.

References:
    Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, https://arxiv.org/abs/2006.11239.
    Song, Meng, Ermon, Denoising diffusion implicit models, 2021, https://arxiv.org/abs/2010.02502.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Karras, TimeGrid
from numpyro_diffusion.solve.base import Solver


@jax.tree_util.register_static
@dataclass(frozen=True)
class Ancestral(Solver):
    r"""DDPM ($\eta = 1$), DDIM ($\eta = 0$) and what lies between.

    Args:
        num_steps: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1].
        grid: where the times lie.

    Raises:
        ValueError: if `num_steps` is below 2 or `eta` lies outside [0, 1].
    """

    num_steps: int = 64
    eta: float = 1.0
    grid: TimeGrid = Karras()

    evaluations_per_step = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.fraction(eta=self.eta)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
        cond: jax.Array | None = None,
    ) -> jax.Array:
        schedule = denoiser.schedule
        prediction = denoiser(x_t, t)
        sigma = schedule.sigma(s)
        if not self.stochastic:
            return schedule.alpha(s) * prediction.x0 + sigma * prediction.eps
        ratio = schedule.noise_level(s) / schedule.noise_level(t)
        noise = self.eta * sigma * jnp.sqrt(1.0 - ratio**2)
        mean = schedule.alpha(s) * prediction.x0 + jnp.sqrt(sigma**2 - noise**2) * prediction.eps
        return mean + noise * jax.random.normal(key, x_t.shape, x_t.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""The Euler-Maruyama method for the reverse process, in $u = x_t / \alpha_t$ and the clock $\lambda^2$.

    $u_s = u_t + (\lambda_t^2 - \lambda_s^2) \nabla \log p(u_t; \lambda_t) + \sqrt{\lambda_t^2 - \lambda_s^2}\, z$,
    of weak order one.

    Args:
        num_steps: number of times visited, one denoiser evaluation each.
        grid: where the times lie.

    Raises:
        ValueError: if `num_steps` is below 2.
    """

    num_steps: int = 64
    grid: TimeGrid = Karras()

    stochastic = True
    evaluations_per_step = 1

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
        cond: jax.Array | None = None,
    ) -> jax.Array:
        schedule = denoiser.schedule
        high, low = schedule.noise_level(t), schedule.noise_level(s)
        drop = (high - low) * (high + low)
        noise = jnp.sqrt(drop) * jax.random.normal(key, x_t.shape, x_t.dtype)
        return schedule.alpha(s) * (x_t / schedule.alpha(t) - drop / high * denoiser(x_t, t).eps + noise)
