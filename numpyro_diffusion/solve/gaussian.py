r"""Steps that are Gaussian, with the clean point held: ancestral, exponential Euler, Euler-Maruyama, DPM-Solver++.

Hold the clean point at $D$ over a step. Then the reverse process of noise share $\eta$ is linear, and from level
$\lambda_t$ to $\lambda_s$, with $r = \lambda_s / \lambda_t$ and $u = x / \alpha$, its step is

$$u_s = D + k\, (u_t - D) + \lambda_s f z, \qquad z \sim N(0, I).$$

The *kept* share $k$ of the old noise and the *fresh* noise $f$ are functions of $r$. The new noise has the right level
when $D$ is the clean point, $\lambda_s^2 = k^2 \lambda_t^2 + \lambda_s^2 f^2$, if $k = r \sqrt{1 - f^2}$. That leaves
one number to choose:

    Ancestral          f^2 = eta^2 (1 - r^2)      how Song et al. (2021) scale the noise of Ho et al. (2020)
    ExponentialEuler   f^2 = 1 - r^(2 eta^2)      the exact solution of the process of noise share eta

Both are DDIM at $\eta = 0$ and DDPM at $\eta = 1$; between the two they differ. `EulerMaruyama` has the mean of DDPM
and the noise of the noisier end, $k = r^2$ and $f = \sqrt{1 - r^2} / r$: the other of the two choices of variance of Ho
et al. All three ignore that the clean point is uncertain. Where the law of $x$ is flat on the scale of $\lambda_t$, the
variance of the noise is too small by the factor $r^2$ in the first two, and right in the last; where $x$ is almost
known, it is right in the first two, and too large by $1 / r^2$ in the last.

`DPMSolverPP` does not hold $D = \hat x_0(x_t)$ but extrapolates: with $h = \log \lambda_t / \lambda_s$ and the step
before,

$$D = \hat x_0(x_t) + \frac{h}{2 h_{\text{before}}} \left( \hat x_0(x_t) - \hat x_0(x_{\text{before}}) \right),$$

which is of order two with one evaluation a step: DPM-Solver++(2M), and SDE-DPM-Solver++(2M) at $\eta = 1$. Its first
step has no step before it and is one of `ExponentialEuler`.

References:
    Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, https://arxiv.org/abs/2006.11239.
    Song, Meng, Ermon, Denoising diffusion implicit models, 2021, https://arxiv.org/abs/2010.02502.
    Lu et al., DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models, 2022,
    https://arxiv.org/abs/2211.01095.
    Zhang and Chen, Fast sampling of diffusion models with exponential integrator, 2023,
    https://arxiv.org/abs/2204.13902.
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Karras, TimeGrid, UniformLogSNR
from numpyro_diffusion.solve.base import Law, Memory, Solver


class GaussianSolver(Solver):
    """A solver whose step from `x_t` is a Gaussian of known mean and deviation, by which guided walks are weighted."""

    order = 1
    evaluations_per_step = 1

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        held, memory = self.held(denoiser, denoiser(x_t, t).x0.astype(x_t.dtype), memory, t, s)
        mean, deviation = self.transition(denoiser, held, x_t, t, s)
        if self.stochastic:
            mean = mean + deviation * jax.random.normal(key, x_t.shape, x_t.dtype)  # type: ignore[arg-type]
        return mean.astype(x_t.dtype), memory

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
        kept, fresh = self._shares(schedule.noise_level(s) / schedule.noise_level(t))
        mean = schedule.alpha(s) * (held + kept * (x_t / schedule.alpha(t) - held))
        return mean, schedule.sigma(s) * fresh

    @abc.abstractmethod
    def _shares(self, ratio: jax.Array) -> tuple[jax.Array, ArrayLike]:
        """Kept share of the old noise and deviation of the fresh one, from the ratio of the noise levels."""


class _Eta(GaussianSolver):
    """A Gaussian solver with a share of the reverse process's noise."""

    eta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.fraction(eta=self.eta)

    @property
    def law(self) -> Law:  # type: ignore[override]
        return "flow" if self.eta == 0.0 else "reverse" if self.eta == 1.0 else "marginals"

    def _shares(self, ratio: jax.Array) -> tuple[jax.Array, ArrayLike]:
        if not self.stochastic:
            return ratio, 0.0
        fresh = self._fresh_variance(ratio)
        return ratio * jnp.sqrt(1.0 - fresh), jnp.sqrt(fresh)

    @abc.abstractmethod
    def _fresh_variance(self, ratio: jax.Array) -> jax.Array:
        """Variance of the fresh noise in units of that of the new level."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Ancestral(_Eta):
    r"""DDPM ($\eta = 1$), DDIM ($\eta = 0$) and everything between them, of order one.

    Args:
        num_times: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1]; 0 is the probability flow.
        grid: where the times lie.

    Raises:
        ValueError: if `num_times` is below 2 or `eta` lies outside [0, 1].
    """

    num_times: int = 64
    eta: float = 1.0
    grid: TimeGrid = Karras()

    def _fresh_variance(self, ratio: jax.Array) -> jax.Array:
        return self.eta**2 * (1.0 - ratio**2)


@jax.tree_util.register_static
@dataclass(frozen=True)
class EulerMaruyama(GaussianSolver):
    r"""The Euler-Maruyama method for the reverse process, in $u = x_t / \alpha_t$ and the clock $\lambda^2$.

    $u_s = u_t + (\lambda_t^2 - \lambda_s^2) \nabla \log p(u_t; \lambda_t) + \sqrt{\lambda_t^2 - \lambda_s^2}\, z$,
    of weak order one.

    Args:
        num_times: number of times visited, one denoiser evaluation each.
        grid: where the times lie.

    Raises:
        ValueError: if `num_times` is below 2.
    """

    num_times: int = 64
    grid: TimeGrid = Karras()

    law = "reverse"

    def _shares(self, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ratio**2, jnp.sqrt((1.0 - ratio) * (1.0 + ratio)) / ratio


@jax.tree_util.register_static
@dataclass(frozen=True)
class ExponentialEuler(_Eta):
    r"""The reverse process of noise share $\eta$ with the posterior mean frozen over a step, of order one.

    Args:
        num_times: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1]. At the two ends it is `Ancestral`.
        grid: where the times lie.

    Raises:
        ValueError: if `num_times` is below 2 or `eta` lies outside [0, 1].
    """

    num_times: int = 64
    eta: float = 0.0
    grid: TimeGrid = Karras()

    def _fresh_variance(self, ratio: jax.Array) -> jax.Array:
        return 1.0 - ratio ** (2.0 * self.eta**2)


@jax.tree_util.register_static
@dataclass(frozen=True)
class DPMSolverPP(ExponentialEuler):
    r"""DPM-Solver++(2M): the posterior mean extrapolated from the step before, of order two.

    Args:
        num_times: number of times visited, one denoiser evaluation each.
        eta: share of the reverse process's noise, in [0, 1]; 0 is the probability flow.
        grid: where the times lie; the authors' is uniform in log-SNR.

    Raises:
        ValueError: if `num_times` is below 2 or `eta` lies outside [0, 1].
    """

    num_times: int = 18
    grid: TimeGrid = UniformLogSNR()

    order = 2

    def init(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
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
