r"""What the host does between compiled calls: it watches, measures, keeps, and knows when to stop.

Training is in calls of `steps_per_call` steps. After each the host looks at the losses, and about `num_evaluations`
times in a run at the held-out loss: always under the same noises, it falls while the fit generalises and turns where it
starts to memorise. With patience, training ends when it has not fallen for that many evaluations, and what is kept is
the average where it was least. Ctrl-C ends it at the last finished call.

What a call computes is in `steps`, how it is kept on disk in `resume`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.train.steps import TrainState

SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Plan:
    """How long to train and what to look at.

    Args:
        num_steps: gradient steps.
        steps_per_call: steps of one compiled call.
        num_evaluations: held-out losses in a run, about.
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
    """Where a run is: all that is needed to go on."""

    state: TrainState  # what changes from step to step
    best: nnx.State  # the average at the least held-out loss, or the latest one
    losses: np.ndarray  # training loss of every step, (steps,)
    held_out_steps: np.ndarray  # steps made before each held-out loss, (evaluations,)
    held_out_losses: np.ndarray  # held-out losses, (evaluations,)

    @property
    def step(self) -> int:
        """Steps made."""
        return len(self.losses)

    def rounds_without_progress(self) -> int:
        """Evaluations since the least held-out loss."""
        return len(self.held_out_losses) - 1 - int(np.argmin(self.held_out_losses)) if len(self.held_out_losses) else 0


def begin(state: TrainState) -> Progress:
    """A run before its first step."""
    return Progress(state, state.average, np.zeros(0, np.float32), np.zeros(0, int), np.zeros(0, float))


def run(
    plan: Plan,
    progress: Progress,
    advance: Callable[[TrainState, int], tuple[TrainState, jax.Array, int]],
    evaluate: Callable[[TrainState], float] | None,
    save: Callable[[Progress], None] | None,
) -> tuple[Progress, bool]:
    """Trains to the end of a plan, or of the data, or of patience, or to Ctrl-C.

    Args:
        plan: how long, and what to look at.
        progress: where to go on.
        advance: makes at most so many steps; returns the new state, the losses, and how many steps it made.
        evaluate: the held-out loss, or None without held-out data.
        save: keeps a run on disk, or None.

    Returns:
        Where the run ended, and whether by Ctrl-C.

    Raises:
        FloatingPointError: if a loss or a weight is not finite; what is on disk is from before.
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
                    save(progress)
                    saved_at = time.monotonic()
                if made:
                    bar.set_postfix_str(_describe(progress, made), refresh=False)
                    bar.update(made)
                if made < wanted:
                    break
        except KeyboardInterrupt:
            interrupted = True
    for leaf in jax.tree.leaves(progress.state.params):
        _check_finite("weights", np.asarray(leaf), progress.step)
    if save:
        save(progress)
    return progress, interrupted


def _call(
    plan: Plan, progress: Progress, advance: Callable, evaluate: Callable | None, wanted: int
) -> tuple[Progress, int]:
    """One compiled call and what follows from it, and the steps that it made."""
    state, new, made = jax.block_until_ready(advance(progress.state, wanted))
    new = np.asarray(new)[:made]
    _check_finite("loss", new, progress.step)
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


def _check_finite(name: str, values: np.ndarray, first_step: int) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        step = first_step + (bad[0] if name == "loss" else 0)
        raise FloatingPointError(f"{name} not finite at step {step}. Lower the learning rate of the optimizer")
