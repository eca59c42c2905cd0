r"""Fitting a denoiser to examples: standardise, regress, average.

Data $x_1, \ldots, x_n$ are standardised once, $u = (x - m) / c$ (`standardize`), and a network is trained on

$$\hat\theta = \arg\min_\theta \; \frac1n \sum_i E_{t, \varepsilon} \, L(\theta; u_i, t, \varepsilon)$$

with $L$ of `losses`, by Adam with a warm-up and a cosine decay. The denoiser that comes back holds $m$ and $c$, so that
its user stays in the units of the data, and the moving average of the weights (`ema`), frozen.

The loop is in compiled calls of `steps_per_call` steps (`steps`). Between two calls the host shows the loss and can be
interrupted. The same key and the same backbone give the same weights, bit for bit. A share of the data is held out,
and its loss, always under the same noises, is measured about ten times: it falls while the fit generalises and
turns where it starts to memorise.

Only `nnx.Param` is trained, in evaluation mode, without dropout. What a backbone is belongs to `nn`; what its output
means, to `denoise.network`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.train.losses import NoiseLevels
from numpyro_diffusion.train.standardize import standardize
from numpyro_diffusion.train.steps import HELD_OUT_NOISES, TrainState, held_out_loss, init, train_steps


class FitResult(NamedTuple):
    """What training leaves behind."""

    denoiser: NetworkDenoiser  # the averaged weights, frozen, in the units of the data
    losses: np.ndarray  # training loss of every step, (num_steps,)
    held_out_losses: np.ndarray  # held-out loss of the averaged weights, (evaluations,); empty without held-out data
    held_out_steps: np.ndarray  # number of steps made before each held-out loss, (evaluations,)
    num_steps: int  # steps made
    interrupted: bool  # whether Ctrl-C ended it


def fit(
    key: jax.Array,
    backbone: nnx.Module | NetworkDenoiser,
    data: ArrayLike,
    *,
    schedule: Schedule | None = None,
    target: str | None = None,
    num_steps: int = 10_000,
    batch_size: int = 128,
    optimizer: optax.GradientTransformation | None = None,
    ema_decay: float = 0.999,
    validation_fraction: float = 0.1,
    steps_per_call: int = 100,
    noise_levels: NoiseLevels | None = None,
    progress_bar: bool = True,
) -> FitResult:
    r"""Trains a denoiser on examples.

    Minimises the denoising loss $E[w \, \| \hat x_0(x_t, t) - x \|^2]$ over the backbone's parameters.

    Args:
        key: random key for the split, the minibatches and the noise.
        backbone: the network, which is copied and left as it is; or a `NetworkDenoiser`, whose training is continued
            with its own schedule, target, location and scale.
        data: examples, shape (rows, *event_shape), finite, at least two rows.
        schedule: the noising process in standardised units; `VE()` by default.
        target: what the network's output means; "edm" by default.
        num_steps: number of gradient steps.
        batch_size: rows in a minibatch, drawn with replacement.
        optimizer: any optax optimiser; by default Adam, its rate warmed up to 5e-3 and decayed to zero along a cosine.
        ema_decay: decay of the weights' moving average, in [0, 1); 0 keeps the last iterate.
        validation_fraction: share of the rows held out, in [0, 1), but at most 1024 rows; 0 holds nothing out.
        steps_per_call: steps of one compiled call, after which the bar moves and Ctrl-C is heard.
        noise_levels: law of the training noise; `NoiseLevels()` by default.
        progress_bar: whether to show the running loss.

    Returns:
        A `FitResult`. After Ctrl-C it holds what was trained so far.

    Raises:
        ValueError: for data that are not finite, too few, constant or of the wrong shape, or a setting out of range.
        TypeError: for data that are not real numbers, or an optimiser that is not one.
        FloatingPointError: if training diverges.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from numpyro_diffusion.nn import MLP
        >>> from numpyro_diffusion.train import fit
        >>> data = 3.0 + jax.random.normal(jax.random.key(0), (500, 2))
        >>> backbone = MLP((2,), features=16, rngs=nnx.Rngs(0))
        >>> result = fit(jax.random.key(1), backbone, data, num_steps=20, progress_bar=False)
        >>> result.losses.shape, result.interrupted
        ((20,), False)
    """
    _check_settings(num_steps, batch_size, steps_per_call, ema_decay, validation_fraction, optimizer)
    initial, rows = standardize(backbone, data, schedule, target)
    denoiser = initial.with_units(0.0, 1.0).unfreeze()
    key_split, key_steps, key_held_out = jax.random.split(key, 3)
    train_rows, held_out_rows = _split_rows(key_split, rows, validation_fraction)
    optimizer = _default_optimizer(num_steps) if optimizer is None else optimizer
    noise = {"batch_size": batch_size, "noise_levels": NoiseLevels() if noise_levels is None else noise_levels}

    def advance(state: TrainState, count: int) -> tuple[TrainState, jax.Array]:
        settings = {"max_count": steps_per_call, "optimizer": optimizer, "ema_decay": ema_decay, **noise}
        return train_steps(state, denoiser, key_steps, train_rows, count, **settings)

    def evaluate(state: TrainState) -> dict[int, float]:
        if not len(held_out_rows):
            return {}
        average = denoiser.with_params(state.average)
        return {int(state.step): float(held_out_loss(average, key_held_out, held_out_rows, **noise))}

    calls = [min(steps_per_call, num_steps - done) for done in range(0, num_steps, steps_per_call)]
    state, losses, held_out, interrupted = _loop(init(denoiser, optimizer), advance, evaluate, calls, progress_bar)
    trained = initial.with_params(state.average).freeze()
    steps, values = np.array(list(held_out), int), np.array(list(held_out.values()), float)
    return FitResult(trained, losses, values, steps, int(state.step), interrupted)


def _loop(state: TrainState, advance: Callable, evaluate: Callable, calls: list[int], progress_bar: bool) -> tuple:
    """Alternates compiled calls with what the host has to do; Ctrl-C leaves the state of the last finished call."""
    every = -(-len(calls) // 10)
    losses, held_out, interrupted = [], {}, False
    with tqdm(total=sum(calls), disable=not progress_bar, desc="fit") as bar:
        try:
            for call, count in enumerate(calls, start=1):
                moved, new = jax.block_until_ready(advance(state, count))
                state, losses = moved, [*losses, np.asarray(new)[:count]]
                _check_finite("loss", losses[-1], int(state.step) - count)
                if call % every == 0 or call == len(calls):
                    held_out |= evaluate(state)
                last = "".join(f", held out {loss:.4f}" for loss in [*held_out.values()][-1:])
                bar.set_postfix_str(f"loss {losses[-1].mean():.4f}{last}", refresh=False)
                bar.update(count)
        except KeyboardInterrupt:
            interrupted = True
    for leaf in jax.tree.leaves(state.params):
        _check_finite("weights", np.asarray(leaf), int(state.step))
    return state, np.concatenate([np.zeros(0, np.float32), *losses]), held_out, interrupted


def _split_rows(key: jax.Array, rows: jax.Array, fraction: float) -> tuple[jax.Array, jax.Array]:
    """Training and held-out rows: at least one of each unless nothing is held out, and no more than are used."""
    if fraction == 0.0:
        return rows, rows[:0]
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1, HELD_OUT_NOISES)
    order = jax.random.permutation(key, len(rows))
    return rows[order[count:]], rows[order[:count]]


@functools.lru_cache
def _default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay; the same object for the same length, so that nothing compiles twice."""
    warmup = min(1000, num_steps // 10)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0 if warmup else 5e-3, 5e-3, warmup, num_steps))


def _check_settings(num_steps, batch_size, steps_per_call, ema_decay, validation_fraction, optimizer) -> None:
    _checks.at_least(1, num_steps=num_steps, batch_size=batch_size, steps_per_call=steps_per_call)
    for name, value in {"ema_decay": ema_decay, "validation_fraction": validation_fraction}.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1); got {value}")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation; got {type(optimizer).__name__}")


def _check_finite(name: str, values: np.ndarray, first_step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        step = first_step + (bad[0] if name == "loss" else 0)
        raise FloatingPointError(f"{name} not finite at step {step}. Lower the learning rate of the optimizer")
