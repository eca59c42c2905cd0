r"""The compiled part of training: many gradient steps in one call, and the held-out loss.

Step $n$ draws a minibatch and one noise for each of its rows from `fold_in(key, n)`, and moves

$$\theta_{n+1} = \theta_n + \mathrm{optimiser}\!\left( \nabla_\theta \tfrac1B \sum_{b} L(\theta_n; u_b) \right), \qquad
\bar\theta_{n+1} = \mathrm{ema}(\bar\theta_n, \theta_{n+1}).$$

Since the key of a step depends on its number alone, how steps are grouped into calls changes nothing. The number of
steps of a call is not compiled in, so that a shorter last call costs nothing. Data are an argument and stay on the
device; the optimiser and the sizes are static: a second run of the same shapes compiles nothing. Nothing here touches
the host: checks, the bar and Ctrl-C are in `fit`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.train import ema
from numpyro_diffusion.train.losses import NoiseLevels, denoising_loss

HELD_OUT_NOISES = 1024  # noised points in a held-out loss; fewer rows are used several times, under different noises


class TrainState(NamedTuple):
    """What changes from step to step."""

    params: nnx.State  # the trained weights
    average: nnx.State  # their moving average
    opt_state: optax.OptState  # state of the optimiser
    step: jax.Array  # steps made, a scalar


def init(denoiser: NetworkDenoiser, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, at the denoiser's weights."""
    params = denoiser.params
    return TrainState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("max_count", "optimizer", "batch_size", "ema_decay", "noise_levels"))
def train_steps(
    state: TrainState,
    denoiser: NetworkDenoiser,
    key: jax.Array,
    rows: jax.Array,
    count: ArrayLike,
    *,
    max_count: int,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    ema_decay: float,
    noise_levels: NoiseLevels,
) -> tuple[TrainState, jax.Array]:
    """Makes `count` gradient steps in one compiled loop.

    Args:
        state: where to start.
        denoiser: the denoiser whose weights are trained; unfrozen, in the units of the rows.
        key: random key of the whole run; each step folds in its number.
        rows: training data on the device, shape (rows, *event_shape).
        count: number of steps, at most `max_count`; another number compiles nothing anew.
        max_count: room for the losses.
        optimizer: the optax optimiser that made `state.opt_state`.
        batch_size: rows in a minibatch, drawn with replacement.
        ema_decay: limit of the moving average's decay.
        noise_levels: law of the training noise.

    Returns:
        The new state and the loss of each step, shape (max_count,), NaN beyond `count`.
    """

    def batch_loss(params: nnx.State, keys: jax.Array, x: jax.Array) -> jax.Array:
        trained = denoiser.with_params(params)
        return jnp.mean(jax.vmap(lambda key, x: denoising_loss(trained, key, x, noise_levels))(keys, x))

    def step(i: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, losses = carry
        key_rows, key_noise = jax.random.split(jax.random.fold_in(key, state.step))
        x = rows[jax.random.randint(key_rows, (batch_size,), 0, len(rows))]
        loss, gradient = jax.value_and_grad(batch_loss)(state.params, jax.random.split(key_noise, batch_size), x)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.average, params, state.step, ema_decay)
        return TrainState(params, average, opt_state, state.step + 1), losses.at[i].set(loss)

    return jax.lax.fori_loop(0, count, step, (state, jnp.full(max_count, jnp.nan, denoiser.dtype)))


@functools.partial(jax.jit, static_argnames=("batch_size", "noise_levels"))
def held_out_loss(
    denoiser: NetworkDenoiser, key: jax.Array, rows: jax.Array, *, batch_size: int, noise_levels: NoiseLevels
) -> jax.Array:
    """The mean loss on held-out rows, under noises that depend on the key alone.

    Args:
        denoiser: the denoiser, in the units of the rows.
        key: random key; the same key gives the same noises.
        rows: held-out data, shape (rows, *event_shape); all are used equally often, within one.
        batch_size: rows evaluated at once.
        noise_levels: law of the noise.

    Returns:
        A scalar.
    """
    num_batches = -(-HELD_OUT_NOISES // batch_size)
    x = rows[jnp.arange(num_batches * batch_size) % len(rows)].reshape(num_batches, batch_size, *rows.shape[1:])
    keys = jax.random.split(key, (num_batches, batch_size))
    loss = jax.vmap(lambda key, x: denoising_loss(denoiser, key, x, noise_levels))
    return jnp.mean(jax.lax.map(lambda batch: loss(*batch), (keys, x)))
