r"""What a solver is: a step from a time to an earlier one, and the loop that walks a grid of them.

Divide a noisy point by its signal, $u = x_t / \alpha_t$, and clock it by its noise level
$\lambda = \sigma_t / \alpha_t$: then every schedule is the same process, $u = x + \lambda \varepsilon$, with the
probability flow $\mathrm{d}u / \mathrm{d}\lambda = \hat\varepsilon$. All solvers step in these coordinates or in ones
derived from them, so that a schedule is a choice of clock and of nothing else. A solver with `num_steps = n` visits $n$
times: $n - 1$ steps down to `t_min`, and there the posterior mean, which is the answer.

Solvers start from the terminal law $N(\alpha_1 m, \alpha_1^2 s^2 + \sigma_1^2)$ with the denoiser's location $m$ and
scale $s$. The true law at $t = 1$ has these moments on average but is not Gaussian: what this costs shrinks with
$\alpha_1 s / \sigma_1$, 0.013 for `VE()` on standardised data.

The loop is written once, here, for one point; a step never allocates more than the next point, whatever the number of
steps. Which step to take is the matter of the other files. Most steps depend on the point alone; a solver that looks
back, or carries moments, has a memory (`remember`, `advance`).
"""

import abc
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import TimeGrid

Memory = Any  # a pytree of arrays that a solver carries from step to step


class Solver(abc.ABC):
    """One way to walk from noise to data: a frozen dataclass of plain numbers, registered as a static pytree.

    Attributes:
        num_steps: number of times visited, at least 2.
        grid: where these times lie.
        stochastic: whether a step draws noise.
        evaluations_per_step: denoiser evaluations in a step.
    """

    num_steps: int
    grid: TimeGrid
    stochastic: ClassVar[bool]
    evaluations_per_step: ClassVar[int]

    def __post_init__(self) -> None:
        _checks.at_least(2, num_steps=self.num_steps)
        if not isinstance(self.grid, TimeGrid):
            raise TypeError(f"grid must be a TimeGrid such as noise.Karras(); got {self.grid!r}")

    @abc.abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
        cond: jax.Array | None = None,
    ) -> jax.Array:
        """Moves one point from time `t` to the earlier time `s`.

        Args:
            denoiser: the model.
            x_t: point of `event_shape` at time `t`.
            t: where it is, a scalar.
            s: where it goes, a scalar below `t`.
            key: random key; deterministic solvers take None.
            cond: what a conditional denoiser is conditioned on.

        Returns:
            The point at time `s`.
        """

    def remember(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
        """What a solver with a memory knows before its first step, of fixed shapes; the others remember nothing."""
        return ()

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
        """`step` with a memory of the steps before: the point at time `s`, and what to remember."""
        return self.step(denoiser, x_t, t, s, key, cond), memory

    def evaluations(self, start: ArrayLike = 0) -> ArrayLike:
        """Number of denoiser evaluations of a walk that begins at the `start`-th time of the grid."""
        return (self.num_steps - 1 - start) * self.evaluations_per_step + 1

    def times(self, denoiser: Denoiser) -> jax.Array:
        """The `num_steps` times visited, decreasing."""
        return self.grid(denoiser.schedule, self.num_steps)


def terminal_moments(denoiser: Denoiser) -> tuple[jax.Array, jax.Array]:
    r"""Mean, of `event_shape`, and standard deviation, a scalar, of the terminal law at `t_max`."""
    alpha, sigma = (f(denoiser.schedule.t_max) for f in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    mean = jnp.broadcast_to(alpha * denoiser.location, denoiser.event_shape)
    return mean, jnp.sqrt((alpha * denoiser.scale) ** 2 + sigma**2)


def terminal_point(denoiser: Denoiser, z: jax.Array) -> jax.Array:
    """Maps standard normal noise to the terminal law."""
    mean, deviation = terminal_moments(denoiser)
    return mean + deviation * z


def solve(
    solver: Solver,
    denoiser: Denoiser,
    x_t: jax.Array,
    key: jax.Array | None = None,
    start: ArrayLike = 0,
    cond: jax.Array | None = None,
    times: jax.Array | None = None,
) -> jax.Array:
    """Walks one point from the `start`-th time of the solver's grid down to a clean point.

    Args:
        solver: how to step.
        denoiser: the model.
        x_t: point of `event_shape` at that time.
        key: random key; deterministic solvers take None.
        start: index into the grid. The default walks the whole grid and can be differentiated in reverse mode at the
            memory cost of one point per step. A traced index runs only the steps that are left.
        cond: what a conditional denoiser is conditioned on.
        times: decreasing times to visit, down to where the posterior mean is taken; None takes the solver's grid.

    Returns:
        The clean point.
    """
    times = solver.times(denoiser) if times is None else times
    num_steps = len(times) - 1

    def step(k: ArrayLike, carry: tuple[jax.Array, Memory]) -> tuple[jax.Array, Memory]:
        x_t, memory = carry
        step_key = None if key is None else jax.random.fold_in(key, k)
        x_s, memory = solver.advance(denoiser, x_t, memory, times[k], times[k + 1], step_key, cond)
        return x_s.astype(x_t.dtype), memory

    carry = x_t, solver.remember(denoiser, x_t)
    if isinstance(start, int) and start == 0:
        body = jax.checkpoint(lambda carry, k: (step(k, carry), None))
        (x_t, _), _ = jax.lax.scan(body, carry, jnp.arange(num_steps))
    else:
        x_t, _ = jax.lax.fori_loop(start, num_steps, step, carry)
    return denoiser(x_t, times[-1]).x0


def sample(
    solver: Solver,
    denoiser: Denoiser,
    key: jax.Array,
    sample_shape: tuple[int, ...] = (),
    cond: jax.Array | None = None,
) -> jax.Array:
    """Draws clean points: noise from the terminal law, walked down the whole grid.

    Args:
        solver: how to step.
        denoiser: the model.
        key: random key.
        sample_shape: how many independent points.
        cond: what a conditional denoiser is conditioned on, the same for all of them.

    Returns:
        Points of shape `sample_shape + event_shape`.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.solve import Ancestral, sample
        >>> sample(Ancestral(num_steps=20), Gaussian([1.0, 2.0]), jax.random.key(0), (5,)).shape
        (5, 2)
    """

    def one(key: jax.Array) -> jax.Array:
        key_noise, key_steps = jax.random.split(key)
        x_1 = terminal_point(denoiser, jax.random.normal(key_noise, denoiser.event_shape))
        return solve(solver, denoiser, x_1, key_steps if solver.stochastic else None, cond=cond)

    for _ in sample_shape:
        one = jax.vmap(one)
    return one(jax.random.split(key, sample_shape))
