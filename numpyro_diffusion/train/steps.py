r"""The compiled part of training: many gradient steps in one call, and the held-out loss.

Step $n$ draws a minibatch and one noise for each of its rows from `fold_in(key, n)`, and moves

$$\theta_{n+1} = \theta_n + \mathrm{optimiser}\!\left( \nabla_\theta \tfrac1B \sum_{b} L(\theta_n; u_b) \right), \qquad
\bar\theta_{n+1} = \beta_n \bar\theta_n + (1 - \beta_n)\, \theta_{n+1}, \qquad
\beta_n = \min\!\left( \beta, \frac{1 + n}{10 + n} \right).$$

The result is the moving average: the last iterate of a stochastic optimiser jitters around the solution, an average
over its recent past does not. It starts at the initial weights, which are useless. With a constant $\beta$ their share
would be $\beta^n$; with the growing $\beta_n$ it falls like $n^{-9}$, and the average always spans about the last tenth
of the run until $\beta$ takes over. So short runs need the same setting as long ones.

Since the key of a step depends only on its number, it does not matter how steps are grouped into calls. The number of
steps of a call is not compiled in, so that a shorter last call costs nothing. Data are an argument and stay on the
device; the optimiser and the sizes are static: a second run of the same shapes compiles nothing. On several devices the
rows of a batch are divided, and everything else is on all of them (`mesh`). For the work of the host see `run`, for
batches `data`.

References:
    Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046.
    Song and Ermon, Improved techniques for training score-based generative models, 2020 (averaging for score models),
    https://arxiv.org/abs/2006.09011.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.train.levels import State
from numpyro_diffusion.train.objective import Objective

STEPS_PER_GRADIENT_SEEN = 8  # between measurements of its size for adaptive noise levels, each the cost of half a step
HELD_OUT_NOISES = 1024  # least number of noised points in a held-out loss; fewer rows are repeated with other noises

Rows = tuple[jax.Array, jax.Array | None]  # points and their conditions
Tree = TypeVar("Tree")


class TrainState(NamedTuple):
    """What changes from step to step."""

    params: nnx.State  # the trained weights
    average: nnx.State  # their moving average
    opt_state: optax.OptState  # state of the optimiser
    step: jax.Array  # steps made, a scalar
    levels: State = ()  # what the law of the noise levels has learned


def init(
    denoiser: NetworkDenoiser, optimizer: optax.GradientTransformation, objective: Objective | None = None
) -> TrainState:
    """The state before the first step, at the denoiser's weights."""
    params = denoiser.params
    levels = (objective or Objective()).start(denoiser)
    return TrainState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32), levels)


@functools.partial(
    jax.jit, static_argnames=("max_count", "optimizer", "batch_size", "ema_decay", "objective", "in_order", "mesh")
)
def train_steps(
    state: TrainState,
    denoiser: NetworkDenoiser,
    key: jax.Array,
    rows: Rows,
    count: ArrayLike,
    *,
    max_count: int,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    ema_decay: float,
    objective: Objective,
    in_order: bool = False,
    mesh: Mesh | None = None,
) -> tuple[TrainState, jax.Array]:
    """Makes `count` gradient steps in one compiled loop.

    Args:
        state: where to start.
        denoiser: the denoiser whose weights are trained; unfrozen, in the units of the rows.
        key: random key of the whole run; each step folds in its number.
        rows: points on the device and their conditions or None: shapes (rows, ...), or (max_count, batch_size, ...).
        count: number of steps, at most `max_count`; another number compiles nothing anew.
        max_count: room for the losses.
        optimizer: the optax optimiser that made `state.opt_state`.
        batch_size: rows in a minibatch.
        ema_decay: limit of the moving average's decay.
        objective: what is minimised.
        in_order: whether `rows` are the batches of these steps; else each step draws its own, with replacement.
        mesh: devices over whose first axis a batch is shared out.

    Returns:
        The new state and the loss of each step, shape (max_count,), NaN beyond `count`.
    """

    def batch_loss(params: nnx.State, key: jax.Array, batch: Rows, levels: State) -> tuple[jax.Array, State]:
        losses, levels = objective(denoiser.with_params(params), key, *batch, levels, training=True)
        return jnp.mean(_share_out(losses, mesh)), levels

    def follow(state: TrainState, key: jax.Array, batch: Rows, gradient: nnx.State) -> State:
        trained = denoiser.with_params(state.params)
        due = state.step % STEPS_PER_GRADIENT_SEEN == 0
        look = functools.partial(objective.follow_gradient, trained, key, *batch, state.levels, gradient)
        return jax.lax.cond(due, look, lambda: state.levels)

    def step(i: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, losses = carry
        key_rows, key_noise = jax.random.split(jax.random.fold_in(key, state.step))
        index = i if in_order else jax.random.randint(key_rows, (batch_size,), 0, len(rows[0]))
        batch = _share_out(jax.tree.map(lambda leaf: leaf[index], rows), mesh)
        value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
        (loss, levels), gradient = value_and_grad(state.params, key_noise, batch, state.levels)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        if objective.noise_levels.follows == "gradient":
            levels = follow(state, jax.random.fold_in(key_rows, 1), batch, gradient)
        params = optax.apply_updates(state.params, updates)
        average = move_average(state.average, params, state.step, ema_decay)
        return TrainState(params, average, opt_state, state.step + 1, levels), losses.at[i].set(loss)

    return jax.lax.fori_loop(0, count, step, (state, jnp.full(max_count, jnp.nan, denoiser.dtype)))


@functools.partial(jax.jit, static_argnames=("batch_size", "objective", "mesh"))
def held_out_loss(
    denoiser: NetworkDenoiser,
    key: jax.Array,
    rows: Rows,
    *,
    batch_size: int,
    objective: Objective,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The mean loss on held-out rows, under levels and noises that depend on the key alone.

    Random layers do not act. With `Objective.held_out`, held-out losses of the same loss and weighting can be compared.

    Args:
        denoiser: the denoiser, in the units of the rows.
        key: random key; the same key gives the same noises.
        rows: held-out points, shape (rows, *event_shape), and their conditions; all are used equally often, within one.
        batch_size: rows evaluated at once.
        objective: what is measured, at levels whose law learns nothing.
        mesh: devices over whose first axis a batch is shared out.

    Returns:
        A scalar.
    """
    count = len(rows[0])
    num_batches = -(-max(HELD_OUT_NOISES, count) // batch_size)
    index = (jnp.arange(num_batches * batch_size) % count).reshape(num_batches, batch_size)
    levels = objective.start(denoiser)

    def loss(keyed: tuple[jax.Array, jax.Array]) -> jax.Array:
        key, index = keyed
        x, cond = _share_out(jax.tree.map(lambda leaf: leaf[index], rows), mesh)
        return _share_out(objective(denoiser, key, x, cond, levels)[0], mesh)

    return jnp.mean(jax.lax.map(loss, (jax.random.split(key, num_batches), index)))


def average_decay(num_updates: ArrayLike, decay: float) -> jax.Array:
    r"""The decay $\beta_n$ of update number $n$: small at the start, `decay` in the end.

    Args:
        num_updates: number of updates made before this one, a scalar.
        decay: its limit $\beta$, in [0, 1].

    Returns:
        A scalar in [0.1, `decay`], or `decay` if that is smaller.
    """
    n = jnp.asarray(num_updates, jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def move_average(average: Tree, weights: Tree, num_updates: ArrayLike, decay: float) -> Tree:
    """The average after one more iterate.

    Args:
        average: the average so far; before the first update, the initial weights.
        weights: the new iterate, of the same structure.
        num_updates: number of updates made before this one, a scalar.
        decay: limit of the decay, in [0, 1].

    Returns:
        The new average, every leaf in its own precision.
    """
    beta = average_decay(num_updates, decay)
    return jax.tree.map(lambda a, w: a + ((1.0 - beta) * (w - a)).astype(a.dtype), average, weights)


def _share_out(batch: Tree, mesh: Mesh | None) -> Tree:
    """The rows of a batch, divided among the devices of a mesh's first axis."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
