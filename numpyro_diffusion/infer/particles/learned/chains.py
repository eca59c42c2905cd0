r"""Global moves by a learned law, and local ones by a kernel, of many chains.

A global move draws walks $1 \dots M$ of the law (`law`) and noises the point of the chain anew, for walk 0. All have
weights $W_i = \pi(y_0) f / q$, and Metropolised Gibbs chooses among them, as in `reverse.independence`. On the space of
walks that is a move that leaves $\pi \cdot f$ invariant, and so $\pi$, for every law that does not depend on the chain:
one that has been learned before, and is frozen. Then the local kernel moves.

The law is an argument of the programs: they are compiled once for all fits of as many modes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.combine import Cycle
from numpyro_diffusion.infer.gradient.target import Target
from numpyro_diffusion.infer.kernel.choose import metropolised_gibbs, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.kernel.start import Strategy, start
from numpyro_diffusion.infer.model import record as model_record
from numpyro_diffusion.infer.model.density import LogPrior
from numpyro_diffusion.infer.particles.learned.law import Law


class Jump(NamedTuple):
    """A global move of one chain."""

    q: jax.Array  # where it is then, (d,)
    accept_prob: jax.Array
    diverging: jax.Array  # whether a log-density was NaN or plus infinity
    log_mean_weight: jax.Array  # of the proposals: an estimate of the log-evidence
    squared: jax.Array  # squared length of the move in standard deviations, over 2 d: 1 for independent draws


Leaf = TypeVar("Leaf", jax.Array, np.ndarray)
"""Arrays of JAX in a program, of NumPy outside of it."""


class Record(NamedTuple, Generic[Leaf]):
    """What steps of all chains have to say, each (steps, chains, ...)."""

    q: Leaf  # unconstrained vectors, (..., d)
    accept_prob: Leaf  # of the global move; NaN without one
    local_accept_prob: Leaf
    diverging: Leaf
    log_mean_weight: Leaf
    global_squared: Leaf
    local_squared: Leaf
    local_evals: Leaf  # evaluations of the target in the local move
    num_target_evals: Leaf  # in all


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
    """Of a move, in the units of the law, over 2 d."""
    return jnp.sum((law.units.whitened(new) - law.units.whitened(q)) ** 2, -1) / (2 * q.shape[-1])


class Chains:
    """Programs that move chains.

    Args:
        model: NumPyro model.
        local: a cycle of the local kernel alone.
        density: what stands for the log-densities of diffusion priors.
        init_strategy: where chains start, as in NumPyro.
        num_chains: how many there are.
        num_proposals: of a global move.
        most: the largest number of steps that a program is asked for.
    """

    def __init__(
        self,
        model: Any,
        local: Cycle,
        density: LogPrior,
        init_strategy: Strategy,
        num_chains: int,
        num_proposals: int,
        most: int,
    ) -> None:
        self._model, self._local, self._density = model, local, density
        self._init_strategy, self._most = init_strategy, most
        self._num_chains, self._num_proposals = num_chains, num_proposals
        self._compiled = Compiled(model, self._starts, self._walk, self._mix, self._report)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> "Programs":
        """The programs at the model's arguments."""
        return Programs(*self._compiled.bind(args, kwargs))

    def _reading(self, args: tuple, kwargs: dict[str, Any]) -> model_record.Reading:
        return model_record.Record(self._model).at(args, kwargs)

    def _starts(self, keys: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        """Where chains start, unconstrained."""
        reading = self._reading(args, kwargs)

        def valid(z: dict[str, jax.Array]) -> jax.Array:
            target = Target(reading, self._density, z)
            return jnp.isfinite(target.log_target(target.flat))

        return jax.vmap(lambda key: start(key, reading, None, self._init_strategy, valid))(keys)

    def _walk(self, count: jax.Array, state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Record[jax.Array]]:
        """Local moves alone."""

        def step(_: jax.Array, state: Any) -> tuple[Any, Record[jax.Array]]:
            state, (q, accept_prob, diverging, evaluations) = self._local_move(state, args, kwargs)
            nothing = jnp.full_like(accept_prob, jnp.nan)
            return state, Record(
                q, nothing, accept_prob, diverging, nothing, nothing, nothing, evaluations, evaluations
            )

        return self._steps(step, count, state)

    def _mix(
        self, key: jax.Array, count: jax.Array, state: Any, law: Law, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, Record[jax.Array]]:
        """A global move and a local one, in every step."""
        target = Target(self._reading(args, kwargs), self._density, jax.tree.map(lambda leaf: leaf[0], state.z))
        move = partial(jump, law=law, log_target=target.log_target, num_proposals=self._num_proposals)

        def step(i: jax.Array, state: Any) -> tuple[Any, Record[jax.Array]]:
            keys = jax.random.split(jax.random.fold_in(key, i), self._num_chains)
            jumps = jax.vmap(move)(keys, _flat(state.z))
            state = self._local.refresh(state._replace(z=jax.vmap(target.unflatten)(jumps.q)), args, kwargs)
            state, (q, accept_prob, diverging, evaluations) = self._local_move(state, args, kwargs)
            return state, Record(
                q,
                jumps.accept_prob,
                accept_prob,
                diverging | jumps.diverging,
                jumps.log_mean_weight,
                jumps.squared,
                squared_length(law, jumps.q, q),
                evaluations,
                evaluations + self._num_proposals + 2,
            )

        return self._steps(step, count, state)

    def _local_move(self, state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple]:
        state, kernel = self._local.sample(state, args, kwargs), self._local.kernels[0]
        steps = getattr(state.kernel_states[0], "num_steps", getattr(kernel, "_num_steps", 1))
        evaluations = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), state.i.shape)
        return state, (_flat(state.z), state.accept_prob[:, 0], state.diverging, evaluations)

    def _steps(self, step: Callable, count: jax.Array, state: Any) -> tuple[Any, Record[jax.Array]]:
        """Some steps, and what they have to say, in the first rows of arrays for the largest number."""
        shapes = jax.eval_shape(step, jnp.zeros((), jnp.int32), state)[1]
        records = jax.tree.map(lambda leaf: jnp.zeros((self._most, *leaf.shape), leaf.dtype), shapes)

        def one(i: jax.Array, carry: tuple) -> tuple:
            state, records = carry
            state, new = step(i, state)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), records, new)

        return jax.lax.fori_loop(0, count, one, (state, records))

    def _report(self, q: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        """Values by site, constrained."""
        reading = self._reading(args, kwargs)
        unflatten = ravel_pytree(reading.origin())[1]
        return jax.vmap(lambda q: reading.constrain(unflatten(q), deterministic=True))(q)


class Programs(NamedTuple):
    """What is compiled."""

    start: Callable[..., dict[str, jax.Array]]
    walk: Callable[..., tuple[Any, Record[jax.Array]]]
    mix: Callable[..., tuple[Any, Record[jax.Array]]]
    report: Callable[..., dict[str, jax.Array]]

    def local(self, count: int, state: Any) -> tuple[Any, Record[np.ndarray]]:
        """That many local moves of each chain."""
        return self._cut(count, *self.walk(np.int32(count), state))

    def both(self, key: jax.Array, count: int, state: Any, law: Law) -> tuple[Any, Record[np.ndarray]]:
        """That many global moves, and as many local ones."""
        return self._cut(count, *self.mix(key, np.int32(count), state, law))

    def _cut(self, count: int, state: Any, records: Record[jax.Array]) -> tuple[Any, Record[np.ndarray]]:
        return state, Record(*(np.asarray(leaf)[:count] for leaf in records))


def _flat(z: dict[str, jax.Array]) -> jax.Array:
    return jax.vmap(lambda z: ravel_pytree(z)[0])(z)
