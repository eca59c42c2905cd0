r"""What a solver is: a step from a time to an earlier one, and the loop that walks a grid of times.

Divide a noisy point by its signal, $u = x_t / \alpha_t$, and clock it by its noise level
$\lambda = \sigma_t / \alpha_t$: then every schedule is the same process, $u = x + \lambda \varepsilon$, with the
probability flow $\mathrm{d}u / \mathrm{d}\lambda = \hat\varepsilon$. All solvers step in these coordinates or in ones
derived from them, so that a schedule is nothing but a choice of clock. A solver with `num_times = n` visits $n$ times:
$n - 1$ steps down to `t_min`, where it returns the posterior mean.

As the steps become finer, a walk tends to one of three things. The `law` of a solver says to which:

* "flow": the probability flow, a smooth map from noise to data without noise on the way;
* "reverse": the noising process run backwards, so that what it draws from a noisy point is the law of $x$ given $x_t$;
* "marginals": a process with the marginals $p_t$ and another joint law. Its draws are right; $x$ given $x_t$ is not.

A move that noises a point and denoises it again needs "reverse". `order` is the order of the error in that law: with
64 times the variance of $x$ given $x_t$ is off by about 2 % at order 2, and by 13 to 32 % at order 1
(`docs/concepts/exactness.md`).

Solvers start from the terminal law $N(\alpha_1 m, \alpha_1^2 s^2 + \sigma_1^2)$ with the denoiser's location $m$ and
scale $s$. The true law at $t = 1$ has these moments on average but is not Gaussian: the error shrinks with
$\alpha_1 s / \sigma_1$, 0.013 for `VE()` on standardised data.

The loop is written once, here, for one point; the memory it needs does not grow with the number of steps. The other
files of this folder have the steps.
"""

import abc
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import TimeGrid

Memory = Any  # a pytree of arrays that a solver carries from step to step
Law = Literal["flow", "reverse", "marginals"]


class Solver(abc.ABC):
    """One way to walk from noise to data: a frozen dataclass of plain numbers, registered as a static pytree.

    Attributes:
        num_times: number of times visited, at least 2.
        grid: where these times lie.
        law: what the walk tends to as its steps become finer: "flow", "reverse" or "marginals"; see the module.
        order: order of the error in that law: of the point for a flow, of means over draws for the others.
        evaluations_per_step: denoiser evaluations in a step; None if not known before the run.

    Raises:
        ValueError: if `num_times` is below 2.
        TypeError: if `grid` is not a `TimeGrid`.
    """

    num_times: int
    grid: TimeGrid
    law: ClassVar[Law]
    order: ClassVar[int]
    evaluations_per_step: ClassVar[int | None]

    def __post_init__(self) -> None:
        _checks.at_least(2, num_times=self.num_times)
        if not isinstance(self.grid, TimeGrid):
            raise TypeError(f"grid must be a TimeGrid such as noise.Karras(); got {self.grid!r}")

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise, which all do but those of the flow."""
        return self.law != "flow"

    def init(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
        """The memory before the first step.

        Args:
            denoiser: the model.
            x_t: the point that the walk starts from, of `event_shape`.

        Returns:
            A pytree of arrays of fixed shapes, empty for a solver that needs nothing but the point.
        """
        return ()

    @abc.abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Moves one point from time `t` to the earlier time `s`.

        Args:
            denoiser: the model.
            x_t: point of `event_shape` at time `t`.
            memory: what `init` or the step before returned.
            t: where it is, a scalar.
            s: where it goes, a scalar below `t`.
            key: random key; deterministic solvers take None.

        Returns:
            The point at time `s` and the memory after the step, both of the shapes and in the precision they had.
        """

    def evaluations(self, start: int | jax.Array = 0) -> int | jax.Array | None:
        """Denoiser evaluations of a walk from the `start`-th time of the grid; None if not known before the run."""
        if self.evaluations_per_step is None:
            return None
        return (self.num_times - 1 - start) * self.evaluations_per_step + 1

    def times(self, denoiser: Denoiser) -> jax.Array:
        """The `num_times` times visited, decreasing."""
        return self.grid(denoiser.schedule, self.num_times)


def total_evaluations(counts: Iterable[int | jax.Array | None]) -> int | jax.Array:
    """The sum of numbers of evaluations; 0 if one is not known, as those of an adaptive solver are not."""
    total: int | jax.Array = 0
    for count in counts:
        if count is None:
            return 0
        total = total + count
    return total


def terminal_moments(denoiser: Denoiser) -> tuple[jax.Array, jax.Array]:
    r"""Mean and standard deviation of the terminal law, from which solvers start at `t_max`.

    Args:
        denoiser: the model, whose `location` and `scale` they follow.

    Returns:
        The mean, of `event_shape`, and the deviation, a scalar.
    """
    alpha, sigma = (f(denoiser.schedule.t_max) for f in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    mean = jnp.broadcast_to(alpha * denoiser.location, denoiser.event_shape)
    return mean, jnp.sqrt((alpha * denoiser.scale) ** 2 + sigma**2)


def terminal_point(denoiser: Denoiser, z: jax.Array) -> jax.Array:
    """Maps standard normal noise to the terminal law.

    Args:
        denoiser: the model.
        z: standard normal noise, of `event_shape`.

    Returns:
        A point at `t_max`, of `event_shape`.
    """
    mean, deviation = terminal_moments(denoiser)
    return mean + deviation * z


@_precision.highest()
def solve(
    solver: Solver,
    denoiser: Denoiser,
    x_t: jax.Array,
    key: jax.Array | None = None,
    start: ArrayLike = 0,
    times: jax.Array | None = None,
) -> jax.Array:
    """Walks one point from the `start`-th time of the solver's grid down to a clean point.

    Args:
        solver: how to step.
        denoiser: the model.
        x_t: point of `event_shape` at that time.
        key: random key; deterministic solvers take None.
        start: index into the grid. The default walks the whole grid and can be differentiated in reverse mode at the
            memory cost of one point and the outputs of a network's dense layers per step; all else is computed again.
            A traced index runs only the steps that are left.
        times: decreasing times to visit, down to where the posterior mean is taken; None takes the solver's grid.

    Returns:
        The clean point, in the precision of `x_t`.
    """
    times = solver.times(denoiser) if times is None else times
    x_t = walk(solver, denoiser, x_t, key, start, times)
    return denoiser(x_t, times[-1]).x0.astype(x_t.dtype)


@_precision.highest()
def walk(
    solver: Solver, denoiser: Denoiser, x_t: jax.Array, key: jax.Array | None, start: ArrayLike, times: jax.Array
) -> jax.Array:
    """The noisy point at the last of the times, walked to from the `start`-th: `solve` but for the posterior mean."""
    num_steps = len(times) - 1

    def step(k: ArrayLike, carry: tuple[jax.Array, Memory]) -> tuple[jax.Array, Memory]:
        x_t, memory = carry
        step_key = None if key is None else jax.random.fold_in(key, k)
        return solver.step(denoiser, x_t, memory, times[k], times[k + 1], step_key)

    carry = x_t, solver.init(denoiser, x_t)
    if isinstance(start, int) and start == 0:
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(lambda carry, k: (step(k, carry), None), policy=kept)
        (x_t, _), _ = jax.lax.scan(body, carry, jnp.arange(num_steps))
    else:
        x_t, _ = jax.lax.fori_loop(start, num_steps, step, carry)
    return x_t


def sample(
    solver: Solver,
    denoiser: Denoiser,
    key: jax.Array,
    sample_shape: tuple[int, ...] = (),
) -> jax.Array:
    """Draws clean points: noise from the terminal law, walked down the whole grid.

    Args:
        solver: how to step.
        denoiser: the model.
        key: random key.
        sample_shape: how many independent points.

    Returns:
        Points of shape `sample_shape + event_shape`.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.solve import Ancestral, sample
        >>> sample(Ancestral(num_times=20), Gaussian([1.0, 2.0]), jax.random.key(0), (5,)).shape
        (5, 2)
    """

    def one(key: jax.Array) -> jax.Array:
        key_noise, key_steps = jax.random.split(key)
        x_1 = terminal_point(denoiser, jax.random.normal(key_noise, denoiser.event_shape))
        return solve(solver, denoiser, x_1, key_steps if solver.stochastic else None)

    for _ in sample_shape:
        one = jax.vmap(one)
    return one(jax.random.split(key, sample_shape))
