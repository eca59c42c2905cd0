r"""Draws of the clean point given a noisy one: by the flow of that law, or by the reverse process.

`denoise.Given` is the denoiser of $p(x \mid x_t)$, so its probability flow maps noise to a draw: a smooth function of
$(x_t, z)$, $z \sim N(0, I)$, with the error of a deterministic solver, which is much below that of a stochastic one.

With $u = x_t / \alpha_t$ at level $L$, the second look $y = x + \ell \varepsilon$ starts at $\ell = 5 L$, since $x$
given $x_t$ has a spread of about $L$ or less. Write $\bar x$ and $C$ for its mean and covariance. For a Gaussian the
flow from infinite noise comes down to

$$y = \bar x + (\ell^2 + C)^{1/2} z \approx \ell z + E[x \mid x_t, y' = \bar x + 2 \ell z \text{ at level } 2 \ell],$$

and the two agree up to a term in $(C / \ell^2)^3$: two evaluations for a start that knows the covariance. At the lowest
level $\lambda$ the rest of the way, to no noise at all, is half a step, for the noise falls to zero linearly there:
$x = y - \lambda \hat\varepsilon / 2$ for a law that is wide on that scale, in general the same in the coordinates at
rest (`flow`). The posterior mean, a whole step, would be too narrow by $(\lambda / L)^2$ of the variance.

`benchmarks/reverse_law.py` compares this with the reverse process.

References:
    Holderrieth et al., GLASS flows: transition sampling for alignment of flow and diffusion models, 2025,
    https://arxiv.org/abs/2509.25170.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Given
from numpyro_diffusion.noise import grid_from
from numpyro_diffusion.solve import flow
from numpyro_diffusion.solve.base import Solver, solve, walk

_START = 5.0
"""Level at which the second look starts, in units of that of the first."""


def draw_given(solver: Solver, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, key: jax.Array) -> jax.Array:
    r"""Draws from $p(x \mid x_t)$, up to the solver's error.

    Args:
        solver: of law "flow", to follow the flow of $x$ given $x_t$, or of law "reverse", to walk down from $x_t$; in
            its `num_times` times.
        denoiser: the model of $p(x)$.
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        key: random key.

    Returns:
        A clean point, in the precision of `x_t`.

    Raises:
        ValueError: for a solver of another law.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.solve import Adams, draw_given
        >>> draw_given(Adams(16), Gaussian([0.0, 0.0]), jnp.ones(2), 0.5, jax.random.key(0)).shape
        (2,)
    """
    if solver.law == "reverse":
        return solve(solver, denoiser, x_t, key, times=grid_from(solver.grid, denoiser.schedule, t, solver.num_times))
    if solver.law != "flow":
        raise ValueError(f"solver must be of law 'flow' or 'reverse'; {solver} has law={solver.law!r}")
    z = jax.random.normal(key, x_t.shape, x_t.dtype)
    return flow_given(solver, denoiser, x_t, t, z)


def flow_given(solver: Solver, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, z: jax.Array) -> jax.Array:
    """Maps standard normal noise to a draw of `draw_given`, smoothly.

    Args:
        solver: of law "flow".
        denoiser: the model of p(x).
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        z: standard normal noise, of `event_shape`.

    Returns:
        A clean point, in the precision of `x_t`.
    """
    given, schedule = Given(denoiser, x_t, t), denoiser.schedule
    level = jnp.minimum(_START * schedule.noise_level(t), 0.5 * schedule.noise_level(schedule.t_max))
    first, above = (
        jnp.clip(schedule.inverse_noise_level(v), schedule.t_min, schedule.t_max) for v in (level, 2 * level)
    )
    mean = given.base(x_t, t).x0
    pulled = given((schedule.alpha(above) * (mean + 2.0 * level * z)).astype(x_t.dtype), above).x0
    start = (schedule.alpha(first) * (pulled + level * z)).astype(x_t.dtype)
    times = grid_from(solver.grid, schedule, first, solver.num_times)
    x_s, last = walk(solver, given, start, None, 0, times), times[-1]
    w = flow.to_rest(given, x_s, last).astype(x_t.dtype)
    w = w - 0.5 * flow.clock(given, last) * flow.velocity(given, w, last)
    return (given.location + given.scale * w).astype(x_t.dtype)


def evaluations_given(solver: Solver) -> int | jax.Array | None:
    """Denoiser evaluations of `draw_given`.

    Args:
        solver: the solver that draws.

    Returns:
        Their number; None if it is not known before the run.
    """
    evaluations = solver.evaluations()
    return evaluations if evaluations is None or solver.law == "reverse" else evaluations + 2
