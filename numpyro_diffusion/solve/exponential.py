r"""Exponential integrators: the linear part of the reverse process exactly, the posterior mean by extrapolation.

With the clean point held at $D$, the reverse process of noise share $\eta$ is linear, and from level $\lambda_t$ to
$\lambda_s$, with $r = \lambda_s / \lambda_t$, its solution is exact:

$$u_s = D + r^{1 + \eta^2} (u_t - D) + \lambda_s \sqrt{1 - r^{2 \eta^2}}\, z, \qquad u = x / \alpha.$$

`ExponentialEuler` takes $D = \hat x_0(x_t)$. At $\eta = 0$ it is DDIM and at $\eta = 1$ the ancestral step, digit for
digit: both were exponential integrators before they were called so. Between the two it differs from `Ancestral` in how
$\eta$ scales the noise. `DPMSolverPP` extrapolates instead: with $h = \log \lambda_t / \lambda_s$ and the step before,

$$D = \hat x_0(x_t) + \frac{h}{2 h_{\text{before}}} \left( \hat x_0(x_t) - \hat x_0(x_{\text{before}}) \right),$$

which makes the flow of order two at one evaluation a step: DPM-Solver++(2M), and SDE-DPM-Solver++(2M) at $\eta = 1$.
Its first step has nothing to remember and is one of `ExponentialEuler`.

References:
    Lu et al., DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models, 2022,
    https://arxiv.org/abs/2211.01095.
    Zhang and Chen, Fast sampling of diffusion models with exponential integrator, 2023,
    https://arxiv.org/abs/2204.13902.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Karras, TimeGrid, UniformLogSNR
from numpyro_diffusion.solve.base import Memory, Solver


@jax.tree_util.register_static
@dataclass(frozen=True)
class ExponentialEuler(Solver):
    r"""The reverse process with the posterior mean frozen over a step, of order one.

    Args:
        num_steps: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1]; 0 is the probability flow.
        grid: where the times lie.

    Raises:
        ValueError: if `num_steps` is below 2 or `eta` lies outside [0, 1].
    """

    num_steps: int = 64
    eta: float = 0.0
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
        return self.advance(denoiser, x_t, self.remember(denoiser, x_t), t, s, key, cond)[0]

    def advance(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
        cond: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        held, memory = self.held(denoiser, denoiser(x_t, t).x0, memory, t, s)
        mean, deviation = self.transition(denoiser, held, x_t, t, s)
        if not self.stochastic:
            return mean, memory
        return mean + deviation * jax.random.normal(key, x_t.shape, x_t.dtype), memory

    def held(
        self, denoiser: Denoiser, x0: jax.Array, memory: Memory, t: ArrayLike, s: ArrayLike
    ) -> tuple[jax.Array, Memory]:
        """The clean point that a step from `t` to `s` holds, given the posterior mean at `t`; and what to remember."""
        return x0, memory

    def transition(
        self, denoiser: Denoiser, held: jax.Array, x_t: jax.Array, t: ArrayLike, s: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """The Gaussian law of a step, for a clean point that is held.

        Args:
            denoiser: the model, whose schedule it is.
            held: the clean point, of `event_shape`.
            x_t: the noisy point, of `event_shape`.
            t: its time.
            s: the earlier time.

        Returns:
            Mean, of `event_shape`, and standard deviation, a scalar.
        """
        schedule = denoiser.schedule
        ratio = schedule.noise_level(s) / schedule.noise_level(t)
        mean = schedule.alpha(s) * (held + ratio ** (1.0 + self.eta**2) * (x_t / schedule.alpha(t) - held))
        return mean, schedule.sigma(s) * jnp.sqrt(1.0 - ratio ** (2.0 * self.eta**2))


@jax.tree_util.register_static
@dataclass(frozen=True)
class DPMSolverPP(ExponentialEuler):
    r"""DPM-Solver++(2M): the posterior mean extrapolated from the step before, of order two for the flow.

    Args:
        num_steps: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1]; 0 is the probability flow.
        grid: where the times lie; the authors' is uniform in log-SNR.

    Raises:
        ValueError: if `num_steps` is below 2 or `eta` lies outside [0, 1].
    """

    num_steps: int = 18
    grid: TimeGrid = UniformLogSNR()

    def remember(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
        return jnp.zeros_like(x_t), -jnp.ones(())  # the posterior mean one step before, and its time: none yet

    def held(
        self, denoiser: Denoiser, x0: jax.Array, memory: Memory, t: ArrayLike, s: ArrayLike
    ) -> tuple[jax.Array, Memory]:
        before, t_before = memory
        clock = denoiser.schedule.log_snr
        known = t_before > t
        span = clock(t) - clock(jnp.where(known, t_before, t))
        growth = jnp.where(known, 0.5 * (clock(s) - clock(t)) / jnp.where(known, span, 1.0), 0.0)
        return x0 + growth.astype(x0.dtype) * (x0 - before), (x0, jnp.asarray(t, t_before.dtype))
