r"""Moving a population by a kernel until it has forgotten where it started.

All particles move as one batch by a kernel that leaves their target invariant, so any number of moves is correct; more
moves separate copies of one ancestor better. The moves end when the correlation between particles and their starting
points in the worst coordinate,

$$\max_d\, \bigl|\mathrm{corr}_i\bigl(z_{i d}^{(0)}, z_{i d}^{(m)}\bigr)\bigr|,$$

has fallen far enough, or after a given number. (A mean over coordinates hides the slowest, which is often a scale.) The
largest of D correlations that are zero is about $\sqrt{2 \log D / N}$ for N particles; no less can be asked for.
Meanwhile the kernel adapts to the whole population: PCN adapts the centre of its noise levels, and kernels of NumPyro's
scheme adapt their step size and preconditioner (`adapt.pool_adaptation`). Levels and step sizes begin where the moves
before left them. Each particle has an influence of order $1/N$ on levels and step sizes, so that the law of a finite
population is approximate to that order; the preconditioner of each half of the particles is that of the other.

References:
    Kantas, Beskos, Jasra, Sequential Monte Carlo methods for high-dimensional inverse problems, 2014,
    https://arxiv.org/abs/1307.6127.
    Buchholz, Chopin, Jacob, Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo, 2021,
    https://arxiv.org/abs/1808.07730.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.gradient.langevin import MALA
from numpyro_diffusion.infer.kernel.adapt import pool_adaptation
from numpyro_diffusion.infer.model.handlers import Model

Points = dict[str, jax.Array]
NUM_STEP_SIZES = 8
"""Step sizes that are carried from temperature to temperature; further ones of a kernel begin anew."""

_APART = 0.1
"""Correlation with their ancestors at which copies are separate."""


class Moves(NamedTuple):
    """What happened during the moves."""

    num_moves: jax.Array
    correlation: jax.Array  # left between particles and their starting points, in the worst coordinate
    accept_prob: jax.Array  # mean over moves and particles, NaN if the kernel has none
    noise_level: jax.Array  # at which the kernel's adapted levels are centred at the end, NaN if it has none
    log_growth: jax.Array  # of each step size that the kernel adapts, since it was new; NaN without one, (8,)
    num_score_evals: jax.Array  # denoiser evaluations, per particle
    num_diverging: jax.Array  # of all particles and moves together: what the kernel rejected as not finite


def move(
    kernel: MCMCKernel,
    keys: jax.Array,
    z: Points,
    args: tuple,
    kwargs: dict[str, Any],
    noise_level: jax.Array,
    log_growth: jax.Array,
    *,
    correlation: float,
    max_moves: int,
) -> tuple[Points, Moves]:
    """Moves particles until they have forgotten where they were.

    Args:
        kernel: leaves the particles' target invariant; takes them as its chains.
        keys: random keys, one for each particle, (N,).
        z: unconstrained values by site, (N, ...).
        args: the model's arguments.
        kwargs: its keyword arguments.
        noise_level: where the kernel's levels begin to adapt; NaN leaves that to the kernel.
        log_growth: logarithms of the factors by which step sizes have grown in the moves before, (8,), one for each
            kernel that adapts by NumPyro's scheme; NaN leaves them to the kernel.
        correlation: largest correlation that may be left at the end in any coordinate, in (0, 1).
        max_moves: largest number of moves.

    Returns:
        The particles, and what happened.
    """

    def point(state: Any) -> Points:
        values = getattr(state, kernel.sample_field)
        return {name: values[name] for name in z}

    enough = jnp.maximum(correlation, least_correlation(z))

    def going(carry: tuple) -> jax.Array:
        _, so_far = carry
        return (so_far.num_moves < max_moves) & (so_far.correlation > enough)

    def once(carry: tuple) -> tuple:
        state, so_far = carry
        state = pool_adaptation(kernel.sample(state, args, kwargs))
        return state, Moves(
            num_moves=so_far.num_moves + 1,
            correlation=_most_correlated(z, point(state)),
            accept_prob=so_far.accept_prob + jnp.mean(getattr(state, "accept_prob", jnp.nan)),  # the sum, until the end
            noise_level=_centre(state),
            log_growth=_log_step(state) - log_step,
            num_score_evals=so_far.num_score_evals
            + jnp.max(jnp.asarray(getattr(state, "num_score_evals", 0), count.dtype)),
            num_diverging=so_far.num_diverging
            + jnp.sum(jnp.asarray(getattr(state, "diverging", 0)), dtype=count.dtype),
        )

    zero, one = jnp.zeros(()), jnp.ones(())
    count = jnp.zeros((), jnp.int32)
    none = Moves(count, one, zero, zero, jnp.zeros_like(log_growth), count, count)
    state = kernel.init(keys, max_moves, z, model_args=args, model_kwargs=kwargs)
    log_step = _log_step(state)
    state = pool_adaptation(_grown(log_growth, _centred_at(noise_level, state)))
    state, moves = jax.lax.while_loop(going, once, (state, none))
    return point(state), moves._replace(accept_prob=moves.accept_prob / moves.num_moves)


def separate(
    model: Model, key: jax.Array, z: Points, args: tuple, kwargs: dict[str, Any], max_moves: int
) -> tuple[Points, jax.Array]:
    """Draws of a model, with copies among them, after moves by `MALA`; and the number of moves.

    Args:
        model: whose draws they are.
        key: random key.
        z: unconstrained values by site, (N, ...).
        args: the model's arguments.
        kwargs: its keyword arguments.
        max_moves: largest number of moves, 0 for none.
    """
    if not max_moves:
        return z, jnp.zeros((), int)
    keys, nan = jax.random.split(key, len(jax.tree.leaves(z)[0])), jnp.full((), jnp.nan)
    growth = jnp.full(NUM_STEP_SIZES, nan)
    z, made = move(MALA(model), keys, z, args, kwargs, nan, growth, correlation=_APART, max_moves=max_moves)
    return z, made.num_moves


def _has_levels(node: Any) -> bool:
    return hasattr(node, "log_level")


def _centre(state: Any) -> jax.Array:
    """The noise level about which a kernel draws its own, or the kernels of a composed one; NaN without one."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_has_levels) if _has_levels(node)]
    return jnp.exp(jnp.mean(nodes[0].log_level)) if nodes else jnp.full((), jnp.nan)


def _centred_at(noise_level: jax.Array, state: Any) -> Any:
    """The same state with its levels drawn about another one, unless that is NaN."""

    def centred(node: Any) -> Any:
        if not _has_levels(node):
            return node
        log_level = jnp.where(jnp.isnan(noise_level), node.log_level, jnp.log(noise_level))
        return node._replace(log_level=log_level.astype(node.log_level.dtype))

    return jax.tree.map(centred, state, is_leaf=_has_levels)


def _has_steps(node: Any) -> bool:
    return hasattr(node, "adapt_state")


def _log_step(state: Any) -> jax.Array:
    """Logarithms of the step sizes of the first kernels that adapt by NumPyro's scheme, (8,); NaN without one."""
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_has_steps) if _has_steps(node)][:NUM_STEP_SIZES]
    logs = [jnp.log(node.adapt_state.step_size).reshape(-1)[0] for node in nodes]  # all particles have the same
    return jnp.stack(logs + [jnp.full((), jnp.nan)] * (NUM_STEP_SIZES - len(logs)))


def _grown(log_growth: jax.Array, state: Any) -> Any:
    """The same state with other step sizes, each by its own factor, unless that is NaN.

    Dual averaging, which begins by trying ten times the step of a new kernel, then begins at the step itself.
    """
    factors = iter(log_growth)

    def grown(node: Any) -> Any:
        growth = next(factors, None) if _has_steps(node) else None
        if growth is None:
            return node
        adapt, is_new = node.adapt_state, jnp.isnan(growth)
        step_size = adapt.step_size * jnp.exp(jnp.where(is_new, 0.0, growth)).astype(adapt.step_size.dtype)
        *averages, centre = adapt.ss_state
        averaging = *averages, jnp.where(is_new, centre, jnp.log(step_size)).astype(centre.dtype)
        own = {"step_size": step_size} if "step_size" in node._fields else {}
        return node._replace(adapt_state=adapt._replace(step_size=step_size, ss_state=averaging), **own)

    return jax.tree.map(grown, state, is_leaf=_has_steps)


def least_correlation(z: Any) -> jax.Array:
    """The largest of the correlations of all coordinates, as it is for independent particles, about."""
    leaves = jax.tree.leaves(z)
    size = sum(leaf[0].size for leaf in leaves)
    return jnp.sqrt(2.0 * jnp.log(max(size, 2)) / len(leaves[0]))


def _most_correlated(a: Points, b: Points) -> jax.Array:
    """The largest correlation over all coordinates of two sets of points."""
    return jnp.stack([jnp.max(jnp.abs(correlations(a[name], b[name]))) for name in a]).max()


def correlations(a: jax.Array, b: jax.Array) -> jax.Array:
    """Correlations over the first axis of two arrays of one shape (N, ...); one where either is constant."""
    varies = (a.max(0) > a.min(0)) & (b.max(0) > b.min(0))  # the mean of equal numbers may be off by a rounding
    a, b = a - a.mean(0), b - b.mean(0)
    scale = jnp.sqrt((a**2).mean(0) * (b**2).mean(0))
    varies &= scale > 0
    return jnp.where(varies, (a * b).mean(0) / jnp.where(varies, scale, 1.0), 1.0)
