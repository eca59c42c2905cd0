r"""A guided walk down the reverse process, and its weight as a walk of the unguided process.

A solver that steps towards a held clean point draws $x_s \mid x_t$ from a Gaussian $p(x_s \mid x_t)$ of known mean and
deviation. Holding the point that a guidance predicts instead gives another, $q(x_s \mid x_t, y)$, of the same deviation
$\tilde\sigma$ and with the mean moved by $\delta$. As a walk of $p$, a walk drawn from $q$ has for its weight the
product of

$$\log \frac{p(x_s \mid x_t)}{q(x_s \mid x_t, y)} = -\frac{\delta \cdot (x_s - \mu_q)}{\tilde\sigma^2} -
\frac{|\delta|^2}{2 \tilde\sigma^2}, \qquad \delta = \mu_q - \mu_p,$$

so weights correct whatever the guidance gets wrong: it decides how even they are, and nothing else.

The sum $r$ of these logarithms has no upper bound. A walk that the guidance would hardly ever take may have any weight:
a chain might never leave it, or an estimate rest on this one particle. Therefore walks are drawn from a mixture, in
which a share $\epsilon$ goes without the guidance, and the weight of a walk is

$$\log \frac{\prod p}{(1 - \epsilon) \prod q + \epsilon \prod p} =
-\log \left( (1 - \epsilon)\, e^{-r} + \epsilon \right) \le -\log \epsilon.$$

The mixture can be drawn step by step: after a walk with $r$ so far, the next step is by $q$ with the probability that
the walk so far was drawn from $q$, $(1 - \epsilon)\, e^{-r} / ((1 - \epsilon)\, e^{-r} + \epsilon)$.

A shift that is not finite (a likelihood whose gradient is NaN at the predicted point) counts as zero: that step is by
$p$, for every walk through the same point, so that the weights stay right; and it is counted.

`guided_pcn`, `particle_gibbs` and `particles.twisted` use these weights.

References:
    Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995,
    https://doi.org/10.1080/00401706.1995.10484303.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.guidance.guided import Outlook
from numpyro_diffusion.solve import GaussianSolver, Solver
from numpyro_diffusion.solve.base import Memory

_UNGUIDED = 0.1
"""Share of the walks that go without the guidance."""


def log_walk_weight(log_ratio: jax.Array) -> jax.Array:
    """Log-weight of a walk: the prior's density over the mixture's, from that over the guidance's; bounded above."""
    return -jnp.logaddexp(jnp.log1p(-_UNGUIDED) - log_ratio, jnp.log(_UNGUIDED))


class Transition(NamedTuple):
    """The law of the next point of a walk, under the prior and under the guidance."""

    mean: jax.Array  # under the prior, of `event_shape`
    shift: jax.Array  # from there to the mean under the guidance
    deviation: jax.Array  # of both, a scalar
    is_lost: jax.Array  # whether the guidance was not finite, so that the shift is zero

    def draw(self, key: jax.Array, log_ratio: jax.Array) -> jax.Array:
        """A next point of a walk of the mixture whose log-ratio so far is given."""
        key_kind, key_noise = jax.random.split(key)
        noise = jax.random.normal(key_noise, self.mean.shape, self.mean.dtype)
        return self.reach(self.draw_kind(key_kind, log_ratio), noise)

    def draw_kind(self, key: jax.Array, log_ratio: jax.Array) -> jax.Array:
        """Whether the next step of a walk of the mixture, whose log-ratio so far is given, is a guided one."""
        log_odds = jnp.log1p(-_UNGUIDED) - jnp.log(_UNGUIDED) - log_ratio
        return jax.random.bernoulli(key, jax.nn.sigmoid(log_odds))

    def reach(self, is_guided: jax.Array, noise: jax.Array) -> jax.Array:
        """The next point, by standard normal noise."""
        return self.mean + jnp.where(is_guided, self.shift, 0.0) + self.deviation.astype(noise.dtype) * noise

    def log_ratio(self, x_s: jax.Array) -> jax.Array:
        """Log of the prior's density over the guidance's at a next point."""
        gap = x_s - self.mean - self.shift
        return -jnp.sum(self.shift * (gap + 0.5 * self.shift)) / self.deviation**2

    def log_density(self, x_s: jax.Array) -> jax.Array:
        """Log of the prior's density at a next point, up to a constant of the step."""
        return -0.5 * jnp.sum((x_s - self.mean) ** 2) / self.deviation**2


def check_solver(solver: Solver) -> GaussianSolver:
    """The solver, if its steps are Gaussian with known mean and deviation.

    Raises:
        TypeError: if they are not.
    """
    if not (isinstance(solver, GaussianSolver) and solver.law == "reverse"):
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
        denoiser: the model, for its schedule.
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
    shift = (shifted - mean).astype(x_t.dtype)
    is_fine = jnp.isfinite(shift).all()
    return Transition(mean.astype(x_t.dtype), jnp.where(is_fine, shift, 0.0), deviation, ~is_fine), memory


class LooksAhead(Protocol):
    """What can tell how well a noisy point will explain the data: `Guided`, or another formula for the same."""

    @property
    def base(self) -> Denoiser: ...

    def outlook(self, x_t: jax.Array, t: ArrayLike, /) -> Outlook: ...


def outlooks(
    solver: GaussianSolver, guided: LooksAhead, points: jax.Array, memory: Memory, t: ArrayLike, s: ArrayLike
) -> tuple[jax.Array, Transition, Memory]:
    """The twisting function and the transitions of particles, by one call of the network for all of them.

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
