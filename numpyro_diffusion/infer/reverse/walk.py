r"""A guided walk down the reverse process, and what it owes to the unguided one.

A solver that steps towards a held clean point draws $x_s \mid x_t$ from a Gaussian $p(x_s \mid x_t)$ of known mean and
deviation. Holding the point that a guidance predicts instead gives another, $q(x_s \mid x_t, y)$, of the same deviation
$\tilde\sigma$ and with the mean moved by $\delta$. A walk by $q$ is worth, as one by $p$, the product of

$$\log \frac{p(x_s \mid x_t)}{q(x_s \mid x_t, y)} = -\frac{\delta \cdot (x_s - \mu_q)}{\tilde\sigma^2} -
\frac{|\delta|^2}{2 \tilde\sigma^2}, \qquad \delta = \mu_q - \mu_p,$$

so whatever the guidance gets wrong can be set right by weights: it decides how even they are, and nothing else.

The sum $r$ of these logarithms has no bound. A walk that the guidance would hardly take counts for any amount, so that
it may hold a chain for good, or make an estimate of one particle. Therefore walks are drawn from a mixture, in which a
share $\epsilon$ goes without the guidance, and what a walk is worth is

$$\log \frac{\prod p}{(1 - \epsilon) \prod q + \epsilon \prod p} =
-\log \left( (1 - \epsilon)\, e^{-r} + \epsilon \right) \le -\log \epsilon.$$

A mixture of walks has steps of its own: from a walk with $r$ so far, the next goes by $q$ with the probability that the
walk so far has been one of $q$, $(1 - \epsilon)\, e^{-r} / ((1 - \epsilon)\, e^{-r} + \epsilon)$.

Who weighs what with them is the matter of `guided_pcn`, `twisted_smc` and `particle_gibbs`.

References:
    Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995,
    https://doi.org/10.1080/00401706.1995.10484303.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.guidance import Guided
from numpyro_diffusion.solve import Ancestral, GaussianSolver, Solver
from numpyro_diffusion.solve.base import Memory

_UNGUIDED = 0.1
"""Share of the walks that go without the guidance."""


def log_worth(log_ratio: jax.Array) -> jax.Array:
    """Log of the prior's density of a walk over the mixture's, from that over the guidance's; bounded above."""
    return -jnp.logaddexp(jnp.log1p(-_UNGUIDED) - log_ratio, jnp.log(_UNGUIDED))


class Transition(NamedTuple):
    """The law of the next point of a walk, under the prior and under the guidance."""

    mean: jax.Array  # under the prior, of `event_shape`
    shift: jax.Array  # from there to the mean under the guidance
    deviation: jax.Array  # of both, a scalar

    def draw(self, key: jax.Array, log_ratio: jax.Array) -> jax.Array:
        """A next point of a walk of the mixture whose log-ratio so far is given."""
        key_kind, key_noise = jax.random.split(key)
        log_odds = jnp.log1p(-_UNGUIDED) - jnp.log(_UNGUIDED) - log_ratio
        is_guided = jax.random.bernoulli(key_kind, jax.nn.sigmoid(log_odds))
        noise = jax.random.normal(key_noise, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.where(is_guided, self.shift, 0.0) + self.deviation.astype(noise.dtype) * noise

    def log_ratio(self, x_s: jax.Array) -> jax.Array:
        """Log of the prior's density over the guidance's at a next point."""
        gap = x_s - self.mean - self.shift
        return -jnp.sum(self.shift * (gap + 0.5 * self.shift)) / self.deviation**2

    def log_density(self, x_s: jax.Array) -> jax.Array:
        """Log of the prior's density at a next point, up to a constant of the step."""
        return -0.5 * jnp.sum((x_s - self.mean) ** 2) / self.deviation**2


def check_solver(solver: Solver) -> GaussianSolver:
    """The solver, if its steps are Gaussians of known mean and deviation.

    Raises:
        TypeError: if they are not.
    """
    if not (isinstance(solver, GaussianSolver) and solver.stochastic):
        raise TypeError(
            "a guided walk needs steps whose density is known: solver must be solve.DPMSolverPP(eta=1.0) or "
            f"solve.Ancestral(); got {solver!r}"
        )
    return solver


def transition(
    solver: GaussianSolver,
    denoiser: Denoiser,
    x0: jax.Array,
    guided: jax.Array,
    x_t: jax.Array,
    memory: Memory,
    t: ArrayLike,
    s: ArrayLike,
) -> tuple[Transition, Memory]:
    """The law of a step.

    Args:
        solver: how to step.
        denoiser: the model, whose schedule it is.
        x0: the posterior mean under the prior, of `event_shape`.
        guided: the posterior mean given the observation, of `event_shape`.
        x_t: the noisy point, of `event_shape`.
        memory: what the solver remembers of the step before.
        t: its time.
        s: the earlier time.

    Returns:
        A `Transition` and what to remember.
    """
    held, memory = solver.held(denoiser, x0, memory, t, s)
    mean, deviation = solver.transition(denoiser, held, x_t, t, s)
    shifted, _ = solver.transition(denoiser, held + guided - x0, x_t, t, s)
    return Transition(mean.astype(x_t.dtype), (shifted - mean).astype(x_t.dtype), deviation), memory


def bridge(key: jax.Array, denoiser: Denoiser, x: jax.Array, x_t: jax.Array, t: ArrayLike, s: ArrayLike) -> jax.Array:
    r"""Draws $x_s \mid x_t, x$, exactly: the noising process of a clean point that is known, seen backwards."""
    mean, deviation = Ancestral().transition(denoiser, x, x_t, t, s)
    return (mean + deviation * jax.random.normal(key, x_t.shape)).astype(x_t.dtype)


def guided_walks(
    key: jax.Array, solver: GaussianSolver, guided: Guided, x: jax.Array, start: ArrayLike, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noises a clean point once, and walks down again `count` times under the guidance.

    The walk that leads back to the clean point itself is drawn too, as the noising process seen backwards: what it is
    worth under the prior is what a test needs to know of the current point. All walks are one batch.

    Args:
        key: random key.
        solver: how to step, as `check_solver` lets pass.
        guided: the guided denoiser.
        x: the clean point, of `event_shape`.
        start: index of the time to noise to, in the solver's grid.
        count: number of walks.

    Returns:
        Clean points (count, ...), the logarithms of what their walks are worth (count,), and that of the walk that
        leads back, a scalar.
    """
    denoiser, times = guided.base, solver.times(guided)
    key_noise, key_walk = jax.random.split(key)
    t = times[start]
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_t = (denoiser.schedule.alpha(t) * x + denoiser.schedule.sigma(t) * noise).astype(x.dtype)
    points = jnp.broadcast_to(x_t, (count + 1, *x.shape))

    def one(
        key: jax.Array, x_t: jax.Array, memory: Memory, log_ratio: jax.Array, is_back: jax.Array, k: ArrayLike
    ) -> tuple:
        t, s = times[k], times[k + 1]
        step, memory = transition(solver, denoiser, *guided.means(x_t, t), x_t, memory, t, s)
        x_s = jnp.where(is_back, bridge(key, denoiser, x, x_t, t, s), step.draw(key, log_ratio))
        return x_s, memory, log_ratio + step.log_ratio(x_s)

    def step(k: ArrayLike, carry: tuple) -> tuple:
        keys = jax.random.split(jax.random.fold_in(key_walk, k), count + 1)
        return jax.vmap(one, (0, 0, 0, 0, 0, None))(keys, *carry, is_back, k)

    is_back = jnp.arange(count + 1) == count
    memory = jax.vmap(lambda x_t: solver.init(denoiser, x_t))(points)
    carry = points, memory, jnp.zeros(count + 1, x.dtype)
    points, _, log_ratio = jax.lax.fori_loop(start, len(times) - 1, step, carry)
    clean = jax.vmap(lambda x_t: denoiser(x_t, times[-1]).x0)(points[:-1])
    worth = log_worth(log_ratio)
    return clean, worth[:-1], worth[-1]


def outlooks(
    solver: GaussianSolver, guided: Guided, points: jax.Array, memory: Memory, t: ArrayLike, s: ArrayLike
) -> tuple[jax.Array, Transition, Memory]:
    """What particles can expect, and where they go next: one call of the network for all of them.

    Args:
        solver: how to step.
        guided: the guided denoiser.
        points: noisy points, (N, *event_shape).
        memory: what the solver remembers of each.
        t: their time.
        s: the earlier time.

    Returns:
        The log of the twisting function (N,), the transitions and the memories.
    """

    def one(x_t: jax.Array, memory: Memory) -> tuple:
        x0, shifted, log_twist = guided.outlook(x_t, t)
        step, memory = transition(solver, guided.base, x0, shifted, x_t, memory, t, s)
        return log_twist.astype(x_t.dtype), step, memory

    return jax.vmap(one)(points, memory)
