r"""Regression of a map of few evaluations on the images that a solver makes, for `flow` and `given`.

With inputs $a_i$ and images $b_i$, made once, the map $G_\theta$ is trained by

$$\hat\theta = \arg\min_\theta \frac1n \sum_i \frac{\| G_\theta(a_i) - b_i \|^2}{d}.$$

It learns a function, the conditional mean $E[b \mid a]$: whatever is random about an image must be among the inputs.
"""

import functools
from collections.abc import Callable
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.train.run import Plan, begin, train
from numpyro_diffusion.train.steps import TrainState, move_average

BLOCK = 500
"""Points that a teacher maps at once."""


class Learner(Protocol):
    """A map that is trained: a pytree with a network."""

    network: NetworkDenoiser

    def with_network(self, network: NetworkDenoiser, /) -> Self:
        """The same map of another network."""

    @property
    def learned(self) -> Callable[..., jax.Array]:
        """The part of the image of one row that is learned, in units in which all rows count alike."""


def check_numbers(num_pairs: int, batch_size: int, ema_decay: float) -> None:
    """Raises `ValueError` for a number that is out of range, before the pairs are made."""
    _checks.at_least(1, num_pairs=num_pairs, batch_size=batch_size)
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1); got {ema_decay}")


def regress(
    key: jax.Array,
    learner: Learner,
    inputs: tuple[jax.Array, ...],
    images: jax.Array,
    plan: Plan,
    *,
    optimizer: optax.GradientTransformation | None,
    batch_size: int,
    ema_decay: float,
) -> tuple[nnx.State, np.ndarray, bool]:
    """Trains the network of a map.

    Args:
        key: random key of the minibatches.
        learner: the map, with its network unfrozen.
        inputs: of every row, arrays with a leading axis of rows.
        images: what `learner.learned` is to return, rows first.
        plan: how long.
        optimizer: any optax optimiser; None takes Adam, warmed up to 4e-3 and decayed to zero along a cosine.
        batch_size: rows in a minibatch, drawn with replacement.
        ema_decay: decay of the weights' moving average, in [0, 1).

    Returns:
        The averaged weights, the loss of every step, and whether Ctrl-C ended it.

    Raises:
        FloatingPointError: if training diverges.
    """
    optimizer = _default_optimizer(plan.num_steps) if optimizer is None else optimizer
    static = {"optimizer": optimizer, "batch_size": batch_size, "ema_decay": ema_decay}

    def advance(state: TrainState, count: int) -> tuple[TrainState, jax.Array, int]:
        made = _steps(state, learner, key, inputs, images, count, max_count=plan.steps_per_call, **static)
        return *made, count

    params = learner.network.params
    begun = begin(TrainState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32)))
    progress, interrupted = train(plan, begun, advance, None, None)
    return progress.best, progress.losses, interrupted


@functools.partial(jax.jit, static_argnames=("max_count", "optimizer", "batch_size", "ema_decay"))
def _steps(
    state: TrainState,
    learner: Learner,
    key: jax.Array,
    inputs: tuple[jax.Array, ...],
    images: jax.Array,
    count: ArrayLike,
    *,
    max_count: int,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    ema_decay: float,
) -> tuple[TrainState, jax.Array]:
    """`count` gradient steps, and the loss of each, (max_count,), NaN beyond `count`."""

    @_precision.highest()
    def loss(params: nnx.State, rows: jax.Array) -> jax.Array:
        one = learner.with_network(learner.network.with_params(params)).learned
        return jnp.mean((jax.vmap(one)(*(each[rows] for each in inputs)) - images[rows]) ** 2)

    def step(i: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, losses = carry
        rows = jax.random.randint(jax.random.fold_in(key, state.step), (batch_size,), 0, len(images))
        value, gradient = jax.value_and_grad(loss)(state.params, rows)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = move_average(state.average, params, state.step, ema_decay)
        return TrainState(params, average, opt_state, state.step + 1), losses.at[i].set(value)

    return jax.lax.fori_loop(0, count, step, (state, jnp.full(max_count, jnp.nan, images.dtype)))


@functools.lru_cache
def _default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay; the same object for the same length, so that nothing compiles twice."""
    warmup = min(200, num_steps // 10)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0 if warmup else 4e-3, 4e-3, warmup, num_steps))
