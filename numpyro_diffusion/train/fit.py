r"""Fitting a denoiser to examples: standardise, regress, average.

Data $x_1, \ldots, x_n$ are standardised once, $u = (x - m) / c$ (`data`), and a network is trained on

$$\hat\theta = \arg\min_\theta \; \frac1n \sum_i \int w(\lambda)\, E\, L(\theta; u_i, \lambda)\, \mathrm{d}\lambda$$

with the parts of an `objective`: a loss $L$, a weighting $w$ and a law of the noise levels, by Adam with a warm-up and
a cosine decay. The denoiser that comes back holds $m$ and $c$, so that its user stays in the units of the data, and the
moving average of the weights, frozen.

This file puts the pieces together: batches come from `data`, compiled calls of many steps from `steps`, and `run` has
the work of the host between them and keeps and resumes runs. The same key and the same backbone give the same weights,
bit for bit.

Only `nnx.Param` is trained. Dropout acts in training, with a fresh mask for each example and step, and nowhere else:
held-out losses and the denoiser that comes back have none. Batch statistics (`nnx.BatchNorm`) are refused: a denoiser
is a function of one point, and with them the training loss would depend on a whole batch. For backbones see `nn`, for
the meaning of their output `denoise.network`.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
"""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _files
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.nn import modes
from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.train import run
from numpyro_diffusion.train.data import Data, open_data
from numpyro_diffusion.train.levels import NoiseLaw, State
from numpyro_diffusion.train.losses import Loss
from numpyro_diffusion.train.objective import Objective
from numpyro_diffusion.train.steps import TrainState, held_out_loss, init, train_steps
from numpyro_diffusion.train.weighting import Weighting


class FitResult(NamedTuple):
    """The result of training."""

    denoiser: NetworkDenoiser  # the averaged weights, frozen, in the units of the data
    losses: np.ndarray  # training loss of every step, (num_steps,)
    held_out_losses: np.ndarray  # held-out loss of the averaged weights, (evaluations,); empty without held-out data
    held_out_steps: np.ndarray  # number of steps made before each held-out loss, (evaluations,)
    num_steps: int  # steps made
    interrupted: bool  # whether Ctrl-C ended it
    levels: State = ()  # what the law of the noise levels has learned


def fit(
    key: jax.Array,
    backbone: nnx.Module | NetworkDenoiser,
    data: ArrayLike | Iterable[Any],
    *,
    cond: ArrayLike | None = None,
    cond_dropout: float = 0.0,
    schedule: Schedule | None = None,
    target: str | None = None,
    loss: Loss | None = None,
    weighting: Weighting | None = None,
    noise_levels: NoiseLaw | None = None,
    num_steps: int = 10_000,
    batch_size: int = 128,
    optimizer: optax.GradientTransformation | None = None,
    clip_norm: float | None = None,
    ema_decay: float = 0.999,
    held_out: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    validation_fraction: float = 0.1,
    num_evaluations: int = 10,
    patience: int | None = None,
    steps_per_call: int = 100,
    checkpoint: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    progress_bar: bool = True,
) -> FitResult:
    r"""Trains a denoiser on examples.

    Minimises $\int w(\lambda)\, E\, L\, \mathrm{d}\lambda$ over the backbone's parameters; with the defaults the
    denoising loss under the EDM weighting, $E[(1 + \mathrm{SNR})\, \| \hat x_0(x_t, t) - x \|^2] / d c^2$ at log-normal
    levels.

    Args:
        key: random key for the split, the minibatches and the noise.
        backbone: the network, without batch statistics, which is copied and left as it is; or a `NetworkDenoiser`,
            whose training is continued with its own schedule, target, location and scale.
        data: examples, shape (rows, *event_shape), finite, at least two rows. Or, for data larger than memory, an
            iterable of batches of `batch_size` rows (but no list), or of pairs of a batch and its conditions; location
            and scale are those of the batches of the first call.
        cond: conditions of the rows, shape (rows, *cond_shape).
        cond_dropout: probability that a row's condition is withheld in a step, in [0, 1); for classifier-free guidance.
        schedule: the noising process in standardised units; `VE()` by default.
        target: what the network's output means; "edm" by default.
        loss: function `loss(denoiser, key, x, t, cond)` of one point; `losses.DenoisingScoreMatching()` by default.
        weighting: how much each log-SNR counts; `weighting.EDM()` by default.
        noise_levels: where levels are drawn; by default the law that belongs to the weighting, `levels.suited_to`.
        num_steps: number of gradient steps.
        batch_size: rows in a minibatch, drawn with replacement.
        optimizer: any optax optimiser; by default Adam, its rate warmed up to 5e-3 and decayed to zero along a cosine.
        clip_norm: largest norm of a gradient, longer ones are shortened to it; None for no bound.
        ema_decay: decay of the weights' moving average, in [0, 1); 0 keeps the last iterate.
        held_out: rows to measure the held-out loss on, or a pair of rows and conditions, instead of a share of `data`.
        validation_fraction: share of the rows held out, in [0, 1), but at most 1024 rows; 0 holds nothing out.
        num_evaluations: approximate number of measurements of the held-out loss in a run.
        patience: measurements without a smaller held-out loss after which training ends; the average at the smallest
            one is kept.
        steps_per_call: steps of one compiled call, after which the bar moves and Ctrl-C takes effect.
        checkpoint: file that keeps the run, written at each measurement, each minute and at the end. If it exists,
            training goes on from it, and ends with what an uninterrupted run would have given, bit for bit on one
            machine. A stream must give the same batches again. A loss of your own is compared only by its name.
        mesh: devices over whose first axis each batch is shared out.
        progress_bar: whether to show the running loss.

    Returns:
        A `FitResult`. After Ctrl-C it holds what was trained so far.

    Raises:
        ValueError: for data that are not finite, too few, constant or of the wrong shape, a setting out of range, or a
            checkpoint of a run with another configuration.
        TypeError: for data that are not real numbers, a setting of another kind, or a backbone with batch statistics or
            with dropout that has no `rngs`.
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
    plan = run.Plan(num_steps, steps_per_call, num_evaluations, patience, progress_bar)
    _check_settings(batch_size, ema_decay, validation_fraction, optimizer, clip_norm, mesh)
    given: dict[str, Any] = {"loss": loss, "weighting": weighting, "noise_levels": noise_levels}
    objective = Objective(**{k: v for k, v in given.items() if v is not None}, cond_dropout=cond_dropout)
    optimizer = _clipped(_default_optimizer(num_steps) if optimizer is None else optimizer, clip_norm)
    key_split, key_steps, key_held_out = jax.random.split(key, 3)
    batches: dict[str, Any] = {"batch_size": batch_size, "steps_per_call": steps_per_call, "mesh": mesh}
    rows = data, cond, held_out, validation_fraction
    opened = open_data(key_split, backbone, *rows, schedule=schedule, target=target, **batches)
    _check_uses(opened, patience, cond_dropout)
    _check_layers(opened.denoiser)
    denoiser = opened.denoiser.with_units(0.0, 1.0).unfreeze()
    settings: dict[str, Any] = {"batch_size": batch_size, "mesh": mesh}

    def advance(state: TrainState, count: int) -> tuple[TrainState, jax.Array | np.ndarray, int]:
        rows, count = opened.source.take(count)
        if rows is None or not count:
            return state, np.zeros(0, np.float32), 0
        options = {
            "objective": objective,
            "max_count": steps_per_call,
            "optimizer": optimizer,
            "ema_decay": ema_decay,
            **settings,
        }
        in_order = opened.source.in_order
        return *train_steps(state, denoiser, key_steps, rows, count, in_order=in_order, **options), count

    def evaluate(state: TrainState) -> float:
        average = denoiser.with_params(state.average)
        measured = objective.held_out()
        return float(held_out_loss(average, key_held_out, opened.held_out, objective=measured, **settings))

    progress, save = run.begin(init(denoiser, optimizer, objective)), None
    if checkpoint is not None:
        configuration = _configuration(key, opened, plan, objective, batch_size, ema_decay, optimizer)
        save = functools.partial(run.save, checkpoint, configuration=configuration)
        if Path(checkpoint).exists():
            progress = run.load(checkpoint, progress, configuration)
            opened.source.skip(progress.step)
    progress, interrupted = run.train(plan, progress, advance, None if opened.held_out is None else evaluate, save)
    return _result(opened.denoiser, progress, interrupted)


def _result(initial: NetworkDenoiser, progress: run.Progress, interrupted: bool) -> FitResult:
    """The result of a run, on one device whatever the mesh was."""
    best, levels = jax.tree.map(
        lambda leaf: jax.numpy.asarray(np.asarray(leaf)), (progress.best, progress.state.levels)
    )
    curves = progress.losses, progress.held_out_losses, progress.held_out_steps
    return FitResult(initial.with_params(best).freeze(), *curves, progress.step, interrupted, levels)


def _configuration(
    key: jax.Array,
    opened: Data,
    plan: run.Plan,
    objective: Objective,
    batch_size: int,
    ema_decay: float,
    optimizer: optax.GradientTransformation,
) -> dict[str, str]:
    """Everything that a run depends on, by name, for comparison with one that is resumed."""
    denoiser = opened.denoiser
    params = denoiser.params
    parts = {
        "key": jax.random.key_data(key).tolist()
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        else key.tolist(),
        "data": opened.source.digest[:16],
        "held_out": _files.digest(opened.held_out)[:16],
        "backbone": f"{type(denoiser.backbone).__name__} {_files.digest(denoiser)[:16]}",
        "training_mode": run.fingerprint_of_text(repr(denoiser.training_mode)),
        "schedule": denoiser.schedule.base,
        "target": denoiser.target,
        "loss": objective.loss,
        "weighting": objective.weighting,
        "noise_levels": objective.noise_levels,
        "cond_dropout": objective.cond_dropout,
        "num_steps": plan.num_steps,
        "steps_per_call": plan.steps_per_call,
        "num_evaluations": plan.num_evaluations,
        "patience": plan.patience,
        "batch_size": batch_size,
        "ema_decay": ema_decay,
        "optimizer": run.fingerprint(optimizer.update, params, optimizer.init(params), params),
    }
    return {name: run.name_of(value) for name, value in parts.items()}


@functools.lru_cache
def _default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with warm-up and cosine decay; the same object for the same length, so that nothing compiles twice."""
    warmup = min(1000, num_steps // 10)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0 if warmup else 5e-3, 5e-3, warmup, num_steps))


@functools.lru_cache
def _clipped(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """The optimiser with a bound on the gradient's norm; the same object for the same arguments."""
    return optimizer if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def _check_settings(
    batch_size: int,
    ema_decay: float,
    validation_fraction: float,
    optimizer: optax.GradientTransformation | None,
    clip_norm: float | None,
    mesh: Mesh | None,
) -> None:
    _checks.at_least(1, batch_size=batch_size)
    for name, value in {"ema_decay": ema_decay, "validation_fraction": validation_fraction}.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1); got {value}")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation; got {type(optimizer).__name__}")
    if clip_norm is not None:
        _checks.positive(clip_norm=clip_norm)
    if mesh is not None:
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}")
        axis = mesh.axis_names[0]
        if batch_size % mesh.shape[axis]:
            raise ValueError(
                f"batch_size must be divisible by the {mesh.shape[axis]} devices of the mesh's axis {axis!r}; "
                f"got {batch_size}"
            )


def _check_uses(opened: Data, patience: int | None, cond_dropout: float) -> None:
    if patience is not None and opened.held_out is None:
        raise ValueError("patience needs held-out data: give held_out=, or a validation_fraction above 0")
    if cond_dropout and not opened.source.conditional:
        raise ValueError(f"cond_dropout={cond_dropout} needs conditions to drop: give cond=")


def _check_layers(denoiser: NetworkDenoiser) -> None:
    if found := modes.batch_statistics(denoiser.weights):
        raise TypeError(
            f"backbone must not have batch statistics; got {found[0]}. A denoiser is a function of one point: use "
            "nnx.LayerNorm, nnx.GroupNorm or nnx.RMSNorm instead of nnx.BatchNorm"
        )
    if found := modes.without_stream(denoiser.backbone):
        raise TypeError(f"dropout must have random keys to act; {found[0]} has none. Give it rngs=")
