r"""Global moves by a learned law, and local ones by a kernel, of many chains: pure functions.

A global move draws walks $1 \dots M$ of the law (`law`) and noises the point of the chain anew, for walk 0. All have
weights $W_i = \pi(y_0) f / q$, and Metropolised Gibbs chooses among them, as in `reverse.independence`. On the space of
walks that is a move that leaves $\pi \cdot f$ invariant, and so $\pi$, for every law that does not depend on the chain:
one that has been learned before, and is frozen. Then the local kernel moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion.infer.kernel.choose import metropolised_gibbs, without_improper
from numpyro_diffusion.infer.particles.learned.law import Law


class Jump(NamedTuple):
    """A global move of one chain."""

    q: jax.Array  # where it is then, (d,)
    accept_prob: jax.Array
    diverging: jax.Array  # whether a log-density was NaN or plus infinity
    log_mean_weight: jax.Array  # of the proposals: an estimate of the log-evidence
    squared: jax.Array  # squared length of the move in whitened units, over 2 d: 1 for independent draws


class Record(NamedTuple):
    """What a step of all chains has to say, each (chains, ...)."""

    q: jax.Array  # unconstrained vectors, (chains, d)
    accept_prob: jax.Array  # of the global move; NaN without one
    local_accept_prob: jax.Array
    diverging: jax.Array
    log_mean_weight: jax.Array
    global_squared: jax.Array
    local_squared: jax.Array
    local_evals: jax.Array  # evaluations of the target in the local move
    num_target_evals: jax.Array  # in all


def jump(key: jax.Array, q: jax.Array, law: Law, log_target: Callable, num_proposals: int) -> Jump:
    """A global move from an unconstrained vector.

    Args:
        key: random key.
        q: where the chain is, (d,).
        law: the learned law.
        log_target: unnormalised log-density of the posterior at a vector.
        num_proposals: walks to choose from.
    """
    key_noise, key_draw, key_choice = jax.random.split(key, 3)
    walks = jax.vmap(law.draw)(jax.random.split(key_draw, num_proposals))
    proposals = jax.vmap(law.units.vector)(walks[:, 0])
    log_weights = jax.vmap(log_target)(proposals) - jax.vmap(law.log_density)(walks)
    w = law.units.whitened(q)
    current = without_improper(log_target(q)) - law.log_density(law.noised(key_noise, w))
    choice = metropolised_gibbs(key_choice, log_weights, current, proposals, q)
    mean = jax.nn.logsumexp(without_improper(log_weights)) - jnp.log(num_proposals)
    return Jump(choice.point, choice.accept_prob, choice.diverging, mean, squared_length(law, q, choice.point))


def squared_length(law: Law, q: jax.Array, new: jax.Array) -> jax.Array:
    """Of a move, in whitened units, over 2 d."""
    return jnp.sum((law.units.whitened(new) - law.units.whitened(q)) ** 2, -1) / (2 * q.shape[-1])


def local_cost(state: Any, kernel: Any) -> jax.Array:
    """Evaluations of the target in the last move of a kernel, of each chain."""
    found = getattr(state, "num_steps", None)
    found = getattr(kernel, "_num_steps", 1) if found is None else found
    return jnp.broadcast_to(jnp.asarray(found, jnp.int32), state.rng_key.shape)
