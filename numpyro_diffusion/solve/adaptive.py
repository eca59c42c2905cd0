r"""The probability flow with step sizes chosen by an error estimate, by diffrax.

The flow of `flow` in its own coordinates and clock, where an embedded Runge-Kutta pair estimates the error of each step
and a controller keeps it below `rtol` and `atol`. The map from noise to data is then smooth only up to those
tolerances, which matters to gradient-based kernels; and the number of evaluations differs from point to point, so that
under `jax.vmap` every point waits for the slowest. A fixed grid has neither problem: this solver is for reference
solutions and for laws whose scales no grid has been tuned to.

References:
    Tsitouras, Runge-Kutta pairs of order 5(4) satisfying only the first column simplifying assumption, 2011,
    https://doi.org/10.1016/j.camwa.2011.06.002.
    Kidger, On neural differential equations, 2021, https://arxiv.org/abs/2202.02435.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import TimeGrid, UniformLogSNR
from numpyro_diffusion.solve import flow
from numpyro_diffusion.solve.base import Memory, Solver


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdaptiveFlow(Solver):
    """The probability flow by Tsitouras' pair of orders 5 and 4 with adaptive steps.

    Args:
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step, in units of the spread of the noisy law.
        max_steps: number of steps after which it gives up; the result is then NaN.
        grid: where `solve` starts and ends; the steps between are its own.

    Raises:
        ValueError: if a tolerance is not positive or `max_steps` below one.
        ImportError: when it runs, if diffrax is not installed.
    """

    rtol: float = 1e-4
    atol: float = 1e-5
    max_steps: int = 1024

    num_times = 2  # the two ends of the ladder; diffrax chooses the times between them
    grid: TimeGrid = UniformLogSNR()
    law = "flow"
    order = 5
    evaluations_per_step = None  # known only after the run: see `integrate`

    def __post_init__(self) -> None:
        _checks.positive(rtol=self.rtol, atol=self.atol)
        _checks.at_least(1, max_steps=self.max_steps)

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        return self.integrate(denoiser, x_t, t, s)[0], memory

    def integrate(self, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, s: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Moves one point along the flow from time `t` to time `s`, in either direction.

        Returns:
            The point at time `s`, NaN if `max_steps` were not enough, and the number of denoiser evaluations.
        """

        def velocity(time: jax.Array, w: jax.Array) -> jax.Array:
            return flow.velocity(denoiser, w, time)

        w, evaluations = self.follow(denoiser, velocity, flow.to_rest(denoiser, x_t, t).astype(x_t.dtype), t, s)
        return flow.from_rest(denoiser, w, s).astype(x_t.dtype), evaluations

    def follow(
        self, denoiser: Denoiser, velocity: Callable[[jax.Array, Any], Any], start: Any, t: ArrayLike, s: ArrayLike
    ) -> tuple[Any, jax.Array]:
        """Solves an equation in the clock of `flow`.

        Args:
            denoiser: the model, for its schedule and scale.
            velocity: right-hand side as a function of time `t` and state, per unit of the clock.
            start: the state at time `t`, any pytree of arrays.
            t: where it is.
            s: where it goes.

        Returns:
            The state at time `s`, NaN if `max_steps` were not enough, and the number of evaluations of `velocity`.
        """
        diffrax = _diffrax()

        def field(clock: jax.Array, state: Any, _: None) -> Any:
            time = denoiser.schedule.inverse_noise_level(denoiser.scale * jnp.sinh(clock))
            return jax.tree.map(lambda v, y: v.astype(y.dtype), velocity(time, state), state)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            flow.clock(denoiser, t),
            flow.clock(denoiser, s),
            None,
            start,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            max_steps=self.max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        reached = jax.tree.map(lambda y: jnp.where(done, y[0], jnp.nan), solution.ys)
        return reached, 1 + 6 * solution.stats["num_steps"]  # the pair reuses its last stage


def _diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("AdaptiveFlow needs diffrax: pip install 'numpyro-diffusion[adaptive]'") from error
    return diffrax
