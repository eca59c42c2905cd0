r"""How near a learned law is to the draws it was learned from: three looks, each beside its floor.

Draws of the law are compared with draws that were held out of its training, in standardised unconstrained coordinates:

* all at once, by a classifier that is right half of the time if it cannot tell them apart (without scikit-learn, by the
  energy distance);
* each entry: the $W_1$ distance of the marginals, in standard deviations; the worst one is named;
* each pair of entries: the mean $W_1$ of their projections onto eight directions of the plane; the worst is named.

A floor is what the same number is for data against other data at the same sizes: for the distances, the training draws
against those held out, in random splits of both, and again the worst of all entries or pairs. Draws count as
independent: a chain that moves slowly is a sample of fewer than it seems, and the law learned is that of the chain.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np

from numpyro_diffusion.diagnostics import Comparison, classifier_test, compare
from numpyro_diffusion.diagnostics.distances import generator

POOR_ACCURACY = 0.6
"""Share of draws that a classifier puts on the right side above which a law is called poor, if it is not chance."""
POOR_DISTANCE = 0.1
"""Standard deviations above the floor from which on a marginal or a pair is called poor."""
_P_VALUE = 0.01
_ANGLES = np.pi * np.arange(8) / 8
_SPLITS = 4
_MOST = 5000
"""Draws of a side that distances are taken of."""


@dataclass(frozen=True)
class Worst:
    """The largest of many distances.

    Args:
        where: the entry, or the two entries.
        value: the distance there, in standard deviations.
        floor: the largest of all for data against data.
    """

    where: tuple[str, ...]
    value: float
    floor: float

    def __str__(self) -> str:
        return f"{' and '.join(self.where)}: {self.value:.3f} sd, floor {self.floor:.3f}"


@dataclass(frozen=True)
class Faithfulness:
    """A learned law against draws that it was not trained on; printed, it is a few lines of text.

    Args:
        joint: all entries at once: accuracy of a classifier, or the energy distance, as `measure` says.
        measure: "classifier" or "energy".
        marginal: the worst entry.
        pairwise: the worst pair of entries; None if there is only one entry.
        num_draws: effective number of draws that it was learned from: the number, if they have equal weights.
        num_held_out: draws that it was compared with.
        problems: what is not to be trusted, each with its cure; empty if nothing speaks against the law.
    """

    joint: Comparison
    measure: str
    marginal: Worst
    pairwise: Worst | None
    num_draws: int
    num_held_out: int
    problems: tuple[str, ...]

    @property
    def faithful(self) -> bool:
        """Whether nothing speaks against the learned law."""
        return not self.problems

    def describe(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "Faithfulness":
        """The report that `describe` described."""
        parts = dict(described)
        parts["joint"] = Comparison(**{**parts["joint"], "problems": tuple(parts["joint"]["problems"])})
        for name in ("marginal", "pairwise"):
            parts[name] = parts[name] and Worst(**{**parts[name], "where": tuple(parts[name]["where"])})
        return cls(**{**parts, "problems": tuple(parts["problems"])})

    def __str__(self) -> str:
        joint = self.joint
        names = {"classifier": "classifier, right in a share of", "energy": "energy distance"}
        lines = [
            f"learned from {self.num_draws} draws, compared with {self.num_held_out} others: "
            + ("nothing speaks against it" if self.faithful else "poor"),
            f"  {names[self.measure]} {joint.value:.3f}, floor {joint.floor:.3f}, p = {joint.p_value:.2g}",
            f"  worst marginal, {self.marginal}",
        ]
        if self.pairwise is not None:
            lines.append(f"  worst pair, {self.pairwise}")
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])


def faithfulness(
    draw: Callable[[jax.Array, int], np.ndarray],
    train: np.ndarray,
    held_out: np.ndarray,
    entries: Sequence[str],
    key: jax.Array,
    num_draws: int,
    problems: tuple[str, ...] = (),
) -> Faithfulness:
    """Compares a law with draws.

    Args:
        draw: gives that many vectors of the law, (n, d), for a key.
        train: vectors that it was learned from, (m, d), in standardised coordinates.
        held_out: others, (k, d).
        entries: a name for each of the d columns.
        key: random key.
        num_draws: effective number of all draws, for the record.
        problems: what else is known to be wrong.

    Returns:
        A `Faithfulness`.

    Raises:
        FloatingPointError: if a draw of the law is not finite.
    """
    keys = jax.random.split(key, 3)
    rng, train = generator(keys[2]), train[:_MOST]
    drawn = draw(keys[0], len(train) + len(held_out))
    if not np.isfinite(drawn).all():
        raise FloatingPointError("draws of the learned law are not finite: the training diverged. Lower its rate")
    ours, more = drawn[: len(train)], drawn[len(train) :]
    measure = "classifier" if find_spec("sklearn") else "energy"
    joint = (classifier_test if measure == "classifier" else compare)(more, held_out, keys[1])
    pooled = np.concatenate([train, held_out])
    marginal = _worst(_marginals, entries, 1, ours, held_out, pooled, rng)
    pairwise = _worst(_pairs, entries, 2, ours, held_out, pooled, rng) if len(entries) > 1 else None
    problems += _problems(joint, measure, marginal, pairwise, len(held_out))
    return Faithfulness(joint, measure, marginal, pairwise, num_draws, len(held_out), problems)


def warn_if_poor(found: Faithfulness) -> Faithfulness:
    """Warns of the problems that were found."""
    if found.problems:
        warnings.warn(
            f"the learned prior is not that of the draws: {'; '.join(found.problems)}. Its `report` has the numbers",
            stacklevel=3,
        )
    return found


def _problems(
    joint: Comparison, measure: str, marginal: Worst, pairwise: Worst | None, num_held_out: int
) -> tuple[str, ...]:
    found = []
    cure = "train longer (num_steps), with a larger backbone, or on more draws"
    if joint.p_value < _P_VALUE and (measure == "energy" or joint.value > POOR_ACCURACY):
        energy = f"the energy distance is {joint.ratio:.1f} times its floor"
        found.append(f"{energy if measure == 'energy' else f'a classifier is right in {joint.value:.0%}'}: {cure}")
    for worst in (marginal, pairwise):
        if worst is not None and worst.value > worst.floor + POOR_DISTANCE:
            found.append(f"{worst}: {cure}")
    if num_held_out < 100:
        found.append(f"only {num_held_out} draws to compare with: little can be seen")
    return tuple(found)


def _worst(
    distances: Callable[[np.ndarray, np.ndarray], np.ndarray],
    entries: Sequence[str],
    of: int,
    ours: np.ndarray,
    held_out: np.ndarray,
    pooled: np.ndarray,
    rng: np.random.Generator,
) -> Worst:
    values = distances(ours, held_out)
    k, floors = int(np.argmax(values)), []
    for _ in range(_SPLITS):
        shuffled = rng.permutation(pooled)
        floors.append(distances(shuffled[len(held_out) :], shuffled[: len(held_out)]).max())
    where = list(itertools.combinations(entries, of))[k]
    return Worst(where, float(values[k]), float(np.sqrt(np.mean(np.square(floors)))))


def _marginals(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """W_1 of each column of two samples, by their quantile functions on a fine common grid."""
    levels = (np.arange(512) + 0.5) / 512
    return np.abs(np.quantile(x, levels, 0) - np.quantile(y, levels, 0)).mean(0)


def _pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean over directions of W_1 of projections of each pair of columns."""
    first, second = np.array(list(itertools.combinations(range(x.shape[1]), 2))).T
    total = np.zeros(len(first))
    for angle in _ANGLES:
        c, s = np.cos(angle), np.sin(angle)
        total += _marginals(*(c * z[:, first] + s * z[:, second] for z in (x, y)))
    return total / len(_ANGLES)
