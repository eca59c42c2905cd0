r"""Do two sets of draws have one law? Distances beside their floor, tests, and whether a sampler copies its data.

A distance between two finite samples of one law is not zero. So `compare` gives, beside the distance of draws to data,
that of data to other data at the same sizes, its floor, and the p-value of a permutation test, which is exact for
independent draws. The distances (energy, sliced Wasserstein, MMD) are in `distances`; the fourth way is a classifier:
the share of held-out points that it puts on the right side is .5 for equal laws.

None is best for all laws: energy and sliced Wasserstein see locations and scales first, MMD and classifiers structure
too, and all lose power with the dimension. A sampler that returns its training data passes any of them; `memorisation`
finds it.

References:
    Lopez-Paz and Oquab, Revisiting classifier two-sample tests, 2017, https://arxiv.org/abs/1610.06545.
    Meehan, Chaudhuri, Dasgupta, A non-parametric test to detect data-copying in generative models, 2020,
    https://arxiv.org/abs/2004.05675.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import binomtest

from numpyro_diffusion import _checks
from numpyro_diffusion.diagnostics.distances import (
    as_rows,
    both_as_rows,
    directions,
    discrepancy,
    gaussians,
    generator,
    negative_distance,
    same_size,
    sliced,
)

Distance = Literal["energy", "sliced_wasserstein", "mmd"]
_SPLITS = 8
_FEW = 50
"""Rows in a half of the data below which the floor is said to be rough."""


@dataclass(frozen=True)
class Comparison:
    """Draws against data.

    Args:
        value: the distance between draws and data.
        floor: the root mean square of the same between halves of the data.
        p_value: the probability of a distance as large if both have one law.
        problems: what is not to be trusted; empty if nothing speaks against it.
    """

    value: float
    floor: float
    p_value: float
    problems: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """The distance over its floor: about one, or below, where the draws cannot be told from data."""
        return self.value / self.floor if self.floor > 0 else float("inf")

    def __str__(self) -> str:
        head = f"distance {self.value:.3g}, floor {self.floor:.3g} (ratio {self.ratio:.2f}), p = {self.p_value:.2g}"
        return "\n".join([head, *(f"- {problem}" for problem in self.problems)])


def compare(
    draws: Any,
    data: Any,
    key: jax.Array,
    distance: Distance = "energy",
    *,
    num_permutations: int = 200,
    num_projections: int = 200,
    length_scale: float | None = None,
) -> Comparison:
    """A distance of draws to data, its floor, and a permutation test of their difference.

    Value and floor are of samples of one size, the smaller of the draws and half of the data: means over random
    splits. The p-value is that of all draws against all data.

    Args:
        draws: of a model, shape (n, ...), independent of each other.
        data: shape (m, ...); not those that the model was trained on, if it is to be judged.
        key: random key.
        distance: "energy", "sliced_wasserstein" or "mmd"; for a classifier see `classifier_test`.
        num_permutations: the smallest p-value is one over their number plus one.
        num_projections: directions of "sliced_wasserstein".
        length_scale: of "mmd"; None for the median distance of the data.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: if the distance is unknown, there are fewer than two draws or four data, one is not finite, or the
            events differ in size.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.diagnostics import compare
        >>> data = jax.random.normal(jax.random.key(0), (400, 2))
        >>> compare(data[:200] + 0.5, data[200:], jax.random.key(1)).p_value < 0.01
        True
    """
    _checks.one_of("distance", distance, get_args(Distance))
    _checks.at_least(1, num_permutations=num_permutations, num_projections=num_projections)
    draws, data, problems = _draws_and_data(draws, data)
    rng = generator(key)
    if distance == "sliced_wasserstein":
        statistic = partial(sliced, np.asarray(directions(key, num_projections, data.shape[1]), np.float64))
    else:
        kernel = negative_distance
        if distance == "mmd":
            kernel = gaussians(data, length_scale)
        statistic = partial(discrepancy, kernel)

    def apart(x: np.ndarray, y: np.ndarray) -> float:
        return float(statistic(x, y))

    value, floor = _value_and_floor(apart, rng, draws, data)
    labels = np.arange(len(draws) + len(data)) < len(draws)
    shuffled = np.stack([labels, *(rng.permutation(labels) for _ in range(num_permutations))], 1)
    found = statistic(draws, data, shuffled)
    slack = 1e-12 * np.abs(found).max()  # equal but for rounding
    p_value = (1 + np.sum(found[1:] >= found[0] - slack)) / (num_permutations + 1)
    return Comparison(value, floor, float(p_value), problems)


def classifier_test(draws: Any, data: Any, key: jax.Array, classifier: Any = None) -> Comparison:
    """How well a classifier tells draws from data that it was not trained on: .5 if it cannot.

    Args:
        draws: of a model, shape (n, ...), independent of each other.
        data: shape (m, ...).
        key: random key of the splits.
        classifier: with the `fit` and `predict` of scikit-learn; None for its gradient-boosted trees.

    Returns:
        A `Comparison` of accuracies on held-out halves, and the p-value of the binomial law.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there are fewer than four draws or data, one is not finite, or the events differ in size.
    """
    try:
        from sklearn.base import clone
        from sklearn.ensemble import HistGradientBoostingClassifier
        from threadpoolctl import threadpool_limits  # which scikit-learn brings
    except ImportError as error:
        raise ImportError(
            'classifier_test needs scikit-learn: pip install "numpyro-diffusion[classifier]", or use compare'
        ) from error

    draws, data, problems = _draws_and_data(draws, data, 4)
    if classifier is None:
        # fewer leaves, and fewer trees, than by default: the samples are small and the noise large
        classifier = HistGradientBoostingClassifier(max_iter=50, max_leaf_nodes=15, random_state=0)

    def hits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which of the held-out points are put right, after training on as many others."""
        size = min(len(x), len(y)) // 2
        train, test = (np.concatenate([x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]]) for i in (0, 1))
        side = np.repeat([0, 1], size)
        with threadpool_limits(1, "openmp"):  # for small samples threads only wait for each other
            return clone(classifier).fit(train, side).predict(test) == side

    rng = generator(key)
    value, floor = _value_and_floor(lambda x, y: float(hits(x, y).mean()), rng, draws, data, num_splits=3)
    right = hits(rng.permutation(draws), rng.permutation(data))
    p_value = binomtest(int(right.sum()), right.size, 0.5, alternative="greater").pvalue
    return Comparison(value, floor, float(p_value), problems)


@dataclass(frozen=True)
class Memorisation:
    """What `memorisation` finds.

    Args:
        share: of the draws, those that are nearer to a training point than to any held-out one.
        expected: that share for draws that know neither: the share of training points among all.
        ratio: the median distance of draws to the nearest training point over that of held-out points: 1 for draws of
            the data's law, 0 for copies; below 1 also for draws that are less spread than the data.
        p_value: of the share, by shuffling the names of the points; exact for draws that know neither.
        problems: what is not to be trusted; empty if nothing speaks against it.
    """

    share: float
    expected: float
    ratio: float
    p_value: float
    problems: tuple[str, ...] = ()


def memorisation(draws: Any, train: Any, held_out: Any, key: jax.Array, *, num_permutations: int = 200) -> Memorisation:
    """Whether draws are nearer to the training data than to data from the same source that were held out.

    For a model that has learned the law and not the points, training and held-out points are alike.

    Args:
        draws: of the model, shape (n, ...).
        train: what it was trained on, shape (m, ...).
        held_out: other data, shape (k, ...).
        key: random key of the shuffles.
        num_permutations: the smallest p-value is one over their number plus one.

    Returns:
        A `Memorisation`.

    Raises:
        ValueError: if there are fewer than two draws or points, one is not finite, or the events differ in size.
    """
    _checks.at_least(1, num_permutations=num_permutations)
    (draws, train), held_out = both_as_rows(draws, train, ("draws", "train")), as_rows("held_out", held_out)
    same_size(train, held_out)
    points, rng = np.concatenate([train, held_out]), generator(key)
    labels = np.arange(len(points)) < len(train)
    nearest, _ = _nearest(draws, points)
    counts = np.bincount(nearest, minlength=len(points))
    shuffled = np.stack([labels, *(rng.permutation(labels) for _ in range(num_permutations))])
    shares = shuffled @ counts / len(draws)
    typical, usual = (float(np.median(_nearest(x, train)[1])) for x in (draws, held_out))
    problems = _too_few({"draws": len(draws), "held-out points": len(held_out)})
    if usual == 0:
        problems += ("held-out points are copies of training points: nothing can be seen",)
    p_value = (1 + np.sum(shares[1:] >= shares[0])) / (num_permutations + 1)
    ratio = typical / usual if usual > 0 else float("nan")
    return Memorisation(float(shares[0]), float(labels.mean()), ratio, float(p_value), problems)


def _nearest(x: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the points is nearest to each row, and how far it is."""
    found = [cdist(part, points) for part in np.array_split(x, len(x) // 512 + 1)]
    return np.concatenate([d.argmin(1) for d in found]), np.concatenate([d.min(1) for d in found])


def _draws_and_data(draws: Any, data: Any, fewest: int = 2) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    draws, data = as_rows("draws", draws, fewest), as_rows("data", data, 4)
    same_size(draws, data)
    problems = _too_few({"draws": len(draws), "rows in half of the data": len(data) // 2})
    constant = [name for name, x in (("draws", draws), ("data", data)) if not np.any(x.std(0) > 0)]
    return draws, data, (*problems, *(f"all {name} are equal" for name in constant))


def _too_few(counts: dict[str, int]) -> tuple[str, ...]:
    few = [f"{count} {name}" for name, count in counts.items() if count < _FEW]
    return (f"only {' and '.join(few)}, of at least {_FEW}: distances are rough and little can be seen",) if few else ()


def _value_and_floor(
    distance: Callable[[np.ndarray, np.ndarray], float],
    rng: np.random.Generator,
    draws: np.ndarray,
    data: np.ndarray,
    num_splits: int = _SPLITS,
) -> tuple[float, float]:
    size, values, floors = min(len(draws), len(data) // 2), [], []
    for _ in range(num_splits):
        one, other = np.split(rng.permutation(data)[: 2 * size], 2)
        values.append(distance(rng.permutation(draws)[:size], one))
        floors.append(distance(other, one))
    return float(np.mean(values)), float(np.sqrt(np.mean(np.square(floors))))
