r"""A run on the host, between compiled calls: measuring the loss, stopping, keeping the run on disk.

Training is in calls of `steps_per_call` steps (`steps`). After each the host checks the losses, and about
`num_evaluations` times in a run it measures the held-out loss, always under the same noises: it falls while the fit
generalises and rises once it memorises. With patience, training ends when it has not fallen for that many evaluations,
and the average at the smallest one is kept. Ctrl-C ends training at the last finished call.

On disk a run is its `Progress` and its configuration: arrays under their paths in the tree, and a table of names and
values with which a resumed run is compared. Each step draws from `fold_in(key, step)`, so that

$$\text{state}_{k} \;\to\; \text{file} \;\to\; \text{state}_{k} \;\to\; \text{state}_n$$

is, on one machine, bit for bit the run that was never stopped. To save a model for use, see `checkpoint`.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from numpyro_diffusion import _checks, _files
from numpyro_diffusion.train.steps import TrainState

SECONDS_BETWEEN_SAVES = 60.0
_CURE = "Lower the learning rate of the optimizer"
_KEY = "numpyro_diffusion_training"


@dataclass(frozen=True)
class Plan:
    """How long to train, and how often to measure.

    Args:
        num_steps: gradient steps.
        steps_per_call: steps of one compiled call.
        num_evaluations: approximate number of held-out losses in a run.
        patience: evaluations without a smaller held-out loss after which training ends; None for never.
        progress_bar: whether to show the running loss.

    Raises:
        ValueError: if a number is below one.
    """

    num_steps: int
    steps_per_call: int = 100
    num_evaluations: int = 10
    patience: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        _checks.at_least(1, num_steps=self.num_steps, steps_per_call=self.steps_per_call)
        _checks.at_least(1, num_evaluations=self.num_evaluations)
        if self.patience is not None:
            _checks.at_least(1, patience=self.patience)

    @property
    def steps_per_evaluation(self) -> int:
        """A multiple of the steps of a call."""
        calls = -(-self.num_steps // self.steps_per_call)
        return self.steps_per_call * -(-calls // self.num_evaluations)


class Progress(NamedTuple):
    """The state of a run: all that is needed to continue it."""

    state: TrainState  # what changes from step to step
    best: nnx.State  # the average at the smallest held-out loss, or the latest one
    losses: np.ndarray  # training loss of every step, (steps,)
    held_out_steps: np.ndarray  # steps made before each held-out loss, (evaluations,)
    held_out_losses: np.ndarray  # held-out losses, (evaluations,)

    @property
    def step(self) -> int:
        """Steps made."""
        return len(self.losses)

    def rounds_without_progress(self) -> int:
        """Evaluations since the smallest held-out loss."""
        return len(self.held_out_losses) - 1 - int(np.argmin(self.held_out_losses)) if len(self.held_out_losses) else 0


def begin(state: TrainState) -> Progress:
    """A run before its first step."""
    return Progress(state, state.average, np.zeros(0, np.float32), np.zeros(0, int), np.zeros(0, float))


def train(
    plan: Plan,
    progress: Progress,
    advance: Callable[[TrainState, int], tuple[TrainState, jax.Array | np.ndarray, int]],
    evaluate: Callable[[TrainState], float] | None,
    save: Callable[[Progress], None] | None,
) -> tuple[Progress, bool]:
    """Trains to the end of a plan, or of the data, or of patience, or to Ctrl-C.

    Args:
        plan: how long, and how often to measure.
        progress: where to continue.
        advance: makes at most the given number of steps; returns the new state, the losses, and the number made.
        evaluate: the held-out loss, or None without held-out data.
        save: keeps a run on disk, or None.

    Returns:
        Where the run ended, and whether by Ctrl-C.

    Raises:
        FloatingPointError: if a loss or a weight is not finite; the file on disk is then from before.
    """
    interrupted, saved_at = False, time.monotonic()
    with tqdm(total=plan.num_steps, disable=not plan.progress_bar, desc="fit") as bar:
        if progress.step:
            bar.update(progress.step)
        try:
            while progress.step < plan.num_steps and not _is_patience_over(plan, progress):
                wanted = min(plan.steps_per_call, plan.num_steps - progress.step)
                moved, made = _call(plan, progress, advance, evaluate, wanted)
                due = moved.step % plan.steps_per_evaluation == 0 or time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES
                progress = moved
                if save and due:
                    _check_weights(progress)
                    save(progress)
                    saved_at = time.monotonic()
                if made:
                    bar.set_postfix_str(_describe(progress, made), refresh=False)
                    bar.update(made)
                if made < wanted:
                    break
        except KeyboardInterrupt:
            interrupted = True
    _check_weights(progress)
    if save:
        save(progress)
    return progress, interrupted


def _call(
    plan: Plan, progress: Progress, advance: Callable, evaluate: Callable | None, wanted: int
) -> tuple[Progress, int]:
    """One compiled call and what follows from it, and the steps that it made."""
    state, new, made = jax.block_until_ready(advance(progress.state, wanted))
    new = np.asarray(new)[:made]
    if not np.isfinite(new).all():
        step = progress.step + int(np.flatnonzero(~np.isfinite(new))[0])
        raise FloatingPointError(f"the loss is not finite at step {step}. {_CURE}")
    moved = progress._replace(state=state, best=state.average, losses=np.concatenate([progress.losses, new]))
    last = moved.step == plan.num_steps or made < wanted
    if evaluate is None or not made or not (last or moved.step % plan.steps_per_evaluation == 0):
        return moved if plan.patience is None else moved._replace(best=progress.best), made
    moved = moved._replace(
        held_out_steps=np.append(progress.held_out_steps, moved.step),
        held_out_losses=np.append(progress.held_out_losses, evaluate(state)),
    )
    behind = plan.patience is not None and moved.rounds_without_progress() > 0
    return moved._replace(best=progress.best) if behind else moved, made


def _is_patience_over(plan: Plan, progress: Progress) -> bool:
    return plan.patience is not None and progress.rounds_without_progress() >= plan.patience


def _describe(progress: Progress, made: int) -> str:
    held_out = "".join(f", held out {loss:.4f}" for loss in progress.held_out_losses[-1:])
    return f"loss {progress.losses[-made:].mean():.4f}{held_out}"


def _check_weights(progress: Progress) -> None:
    """Raises `FloatingPointError` unless all weights are finite: the last step of a call may spoil them."""
    for path, leaf in nnx.to_flat_state(progress.state.params):
        count = int((~np.isfinite(np.asarray(leaf[...]))).sum())
        if count:
            name = "/".join(map(str, path))
            raise FloatingPointError(f"{name} has {count} weights that are not finite at step {progress.step}. {_CURE}")


def save(path: str | os.PathLike, progress: Progress, configuration: dict[str, str]) -> None:
    """Writes a run to a file, replacing what was there in one move.

    Args:
        path: file to write, in a folder that exists.
        progress: the run.
        configuration: what the run depends on, by name.
    """
    arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in _named(progress).items()}
    _files.write(path, _KEY, {"configuration": configuration}, arrays)


def load(path: str | os.PathLike, template: Progress, configuration: dict[str, str]) -> Progress:
    """Reads a run that `save` wrote.

    Args:
        path: file to read.
        template: a run of the same structure, such as one before its first step.
        configuration: what the run must have been started with.

    Returns:
        The run.

    Raises:
        ValueError: if the file is damaged, not that of a run, or that of a run with another configuration; the message
            says what differs.
    """
    try:
        description, arrays = _files.read(path, _KEY)
        if description is None:
            raise ValueError("it is a safetensors file, but not of a run of train.fit")
        _check_configuration(description.get("configuration", {}), configuration)
        try:
            _files.check(description, arrays)
        except ValueError as error:
            raise ValueError(f"{error}. Delete it to start anew") from error
        if _named(template).keys() != arrays.keys():
            raise ValueError("its arrays are not those of this run. Delete it to start anew")
    except ValueError as error:
        raise ValueError(f"cannot resume from {os.fspath(path)}: {error}") from error
    leaves = [_as_was(arrays[name], leaf) for name, leaf in _named(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_configuration(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises unless both runs have the same configuration."""
    names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if names:
        each = "; ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in names)
        raise ValueError(f"it is of a run with another configuration: {each}. Give the same, or another path")


def fingerprint(function: Callable, *args: Any) -> str:
    """A hash of the program of a function of arrays, including constants such as a learning rate."""
    return fingerprint_of_text(str(jax.make_jaxpr(function)(*args)))


def fingerprint_of_text(text: str) -> str:
    """A hash of a text, leaving out memory addresses, which change from process to process."""
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", text).encode()).hexdigest()[:16]


def name_of(value: Any) -> str:
    """A setting as text: the representation of a dataclass, the name of a function."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, str) else repr(value)


def _named(progress: Progress) -> dict[str, Any]:
    """Every array of a run under its path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(progress)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_was(value: np.ndarray, like: Any) -> Any:
    """A stored array as what it was: an array on the host, a random key, or an array on the device."""
    if isinstance(like, np.ndarray):
        return value
    return (
        jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
        if _is_key(like)
        else jnp.asarray(value)
    )
