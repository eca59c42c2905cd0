r"""Uniform or not: tests and intervals for ranks of known truths among draws.

If a truth and draws are exchangeable, as they are under an exact posterior, the rank of any function of the truth among
the draws is uniform. With $r$ of $L$ draws below it, $u = (r + U) / (L + 1)$, $U \sim \mathcal U(0, 1)$, is uniform on
(0, 1), exactly, and everything here is a statement about such *levels* $u$, one for each of $n$ simulations:

* its distribution function, at $k / K$, within **bands** that hold all points at once with a given probability
  (Säilynoja, Bürkner, Vehtari 2022). The probability that uniform levels stay within is computed exactly, by recursion
  over the points, and so is the p-value;
* **coverage**: a central interval of probability $p$ holds the truth where $|u - 1/2| \le p / 2$. Of the rank of the
  log-density, $u \ge 1 - p$ is the region of highest density;
* **TARP**: the rank of the distance from a point that knows nothing of the truth, which sees all dimensions together;
* **shift and spread**: $w = \Phi^{-1}(u)$ is standard normal. Its mean is the shift of the posterior in posterior
  standard deviations, with the sign changed, and $\mathrm{var}\, w$ is near one over the variance's inflation.

References:
    Säilynoja, Bürkner, Vehtari, Graphical test for discrete uniformity and its applications in goodness-of-fit
    evaluation and multiple sample comparison, 2022, https://arxiv.org/abs/2103.10522.
    Lemos et al., Sampling-based accuracy testing of posterior estimators for general inference, 2023,
    https://arxiv.org/abs/2302.03026.
    Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018,
    https://arxiv.org/abs/1804.06788.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, bdtrc, gammaln, ndtri
from scipy.stats import chi2, norm

from numpyro_diffusion import _checks

MOST_POINTS = 100
_SURELY_OUTSIDE = 1e-8
"""A pointwise probability below which the bound of Bonferroni is as good as the recursion."""


class Bands(NamedTuple):
    """Where the distribution function of uniform levels stays, at all points at once."""

    points: np.ndarray  # of (0, 1), shape (points,)
    lower: np.ndarray  # of the distribution function, shape (points,)
    upper: np.ndarray


class Ratio(NamedTuple):
    """A ratio and its standard error."""

    value: np.ndarray
    standard_error: np.ndarray


@lru_cache(maxsize=32)
def ecdf_bands(size: int, level: float = 0.95) -> Bands:
    """Simultaneous bands of the empirical distribution function of uniform levels.

    Args:
        size: number of levels, at least 2.
        level: probability that uniform levels stay inside at all points, in (0, 1).

    Returns:
        `Bands` at `min(size, 100) - 1` points; that probability is at least `level`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    _checks.at_least(2, size=size)
    _inside_unit(level=level)
    points, (low, high) = _points(size), (0.0, 1.0)
    for _ in range(30):
        middle = 0.5 * (low + high)
        inside = _probability(size, *_counts(size, middle)) >= level
        low, high = (middle, high) if inside else (low, middle)
    lower, upper = _counts(size, low)
    return Bands(points, lower / size, upper / size)


def uniformity_p_value(levels: np.ndarray) -> np.ndarray:
    """How often uniform levels leave their bands as far as these do.

    Args:
        levels: in [0, 1], shape (simulations, ...).

    Returns:
        p-values of the trailing shape; below 1e-6, an upper bound.

    Raises:
        ValueError: if there are fewer than two levels, or one is not in [0, 1].
    """
    levels = np.asarray(levels, np.float64)
    _checks.at_least(2, simulations=len(levels))
    if not np.all((levels >= 0.0) & (levels <= 1.0)):
        raise ValueError("levels must be ranks over their number, in [0, 1]; got NaN or values outside")
    extreme = pointwise(levels)
    return np.vectorize(lambda value: _p_value(len(levels), float(value)), otypes=[float])(extreme)


def pointwise(levels: np.ndarray) -> np.ndarray:
    """The smallest two-sided binomial probability over the points, before any correction for their number."""
    size = len(levels)
    points = _points(size).reshape(-1, *[1] * (levels.ndim - 1))
    cells = np.minimum((levels * (len(points) + 1)).astype(int), len(points))
    counts = np.stack([(cells < k).sum(0) for k in range(1, len(points) + 1)])
    below, above = bdtr(counts, size, points), bdtrc(counts - 1, size, points)
    return np.minimum(2.0 * np.minimum(below, np.where(counts > 0, above, 1.0)).min(0), 1.0)


def _inside_unit(**values: float) -> None:
    for name, value in values.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie strictly between 0 and 1; got {value}")


def _points(size: int) -> np.ndarray:
    number = min(size, MOST_POINTS)
    return np.arange(1, number) / number


@lru_cache(maxsize=4096)
def _p_value(size: int, extreme: float) -> float:
    if extreme < _SURELY_OUTSIDE:
        return float(len(_points(size)) * extreme)
    return float(min(max(1.0 - _probability(size, *_counts(size, extreme * (1.0 + 1e-9))), 0.0), 1.0))


def _counts(size: int, extreme: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest count at each point whose two-sided binomial probability exceeds `extreme`."""
    counts, points = np.arange(size + 1), _points(size)[:, None]
    above = np.where(counts > 0, bdtrc(np.maximum(counts - 1, 0), size, points), 1.0)
    allowed = 2.0 * np.minimum(bdtr(counts, size, points), above) > extreme
    return allowed.argmax(1), size - allowed[:, ::-1].argmax(1)


def _probability(size: int, lower: np.ndarray, upper: np.ndarray) -> float:
    """That the counts of uniform levels below all points are within bounds: a Markov chain over the points."""
    log_factorial = gammaln(np.arange(size + 1) + 1.0)
    counts, weight, last = np.zeros(1, int), np.ones(1), 0.0
    for point, low, high in zip(_points(size), lower, upper, strict=True):
        chance = (point - last) / (1.0 - last)
        new = np.arange(low, high + 1)
        more, left = new[:, None] - counts, size - counts
        safe = np.clip(more, 0, left)
        log_chance = log_factorial[left] - log_factorial[safe] - log_factorial[left - safe]
        log_chance = log_chance + safe * np.log(chance) + (left - safe) * np.log1p(-chance)
        weight = np.where(more == safe, np.exp(log_chance), 0.0) @ weight
        counts, last = new, point
    return float(weight.sum())


def interval_coverage(levels: np.ndarray, probability: float) -> Ratio:
    """The share of truths inside central intervals.

    Args:
        levels: of the truths, shape (simulations, ...).
        probability: of the intervals, in (0, 1).

    Returns:
        A `Ratio` of the trailing shape.
    """
    return share(np.abs(np.asarray(levels) - 0.5) <= 0.5 * probability)


def highest_density_coverage(levels: np.ndarray, probability: float) -> Ratio:
    """The share of truths inside regions of highest density.

    Args:
        levels: of the truths' log-densities among those of the draws, shape (simulations, ...).
        probability: of the regions, in (0, 1).

    Returns:
        A `Ratio` of the trailing shape.
    """
    return share(np.asarray(levels) >= 1.0 - probability)


def share(inside: np.ndarray) -> Ratio:
    """The share of what is inside, over the first dimension, with its standard error."""
    value = inside.mean(0)
    return Ratio(value, np.sqrt(value * (1.0 - value) / len(inside)))


def distance_ranks(truths: np.ndarray, draws: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TARP: how many draws are nearer to a reference point than the truth.

    Args:
        truths: shape (simulations, dimensions).
        draws: shape (simulations, draws, dimensions).
        references: points that do not depend on the truths, though they may on the data, (simulations, dimensions).

    Returns:
        How many are nearer, and how many as near, shape (simulations,) each.
    """
    distance, truth = np.square(draws - references[:, None]).sum(-1), np.square(truths - references).sum(-1)[:, None]
    return (distance < truth).sum(1), (distance == truth).sum(1)


def spread_skill(truths: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> Ratio:
    r"""The posterior's spread over the error of its mean, $\sqrt{\sum_i s_i^2 / \sum_i (\theta_i - m_i)^2}$.

    It is one for an exact posterior, above one where posteriors are too wide.

    Args:
        truths: shape (simulations, ...).
        means: of the draws, of the same shape.
        deviations: standard deviations of the draws, of the same shape.

    Returns:
        A `Ratio` of the trailing shape.
    """
    spread, error = np.square(deviations), np.square(truths - means)
    ratio = np.sqrt(spread.mean(0) / error.mean(0))
    relative = spread / spread.mean(0) - error / error.mean(0)
    return Ratio(ratio, 0.5 * ratio * relative.std(0) / np.sqrt(len(truths)))


def shift_p_value(levels: np.ndarray) -> np.ndarray:
    """Of the mean of normal scores, two-sided, shape (simulations, ...) -> (...)."""
    scores = ndtri(levels)
    return 2.0 * norm.sf(np.abs(scores.mean(0)) * np.sqrt(len(scores)))


def spread_p_value(levels: np.ndarray) -> float:
    """Of the variance of normal scores, two-sided, over all entries together, (simulations, ...) -> a number."""
    squares = np.square(ndtri(levels)).reshape(len(levels), -1)
    if squares.shape[1] == 1:
        below = chi2.cdf(squares.sum(), len(squares))
        return float(min(1.0, 2.0 * min(below, chi2.sf(squares.sum(), len(squares)))))
    each = squares.mean(1)
    error = each.std(ddof=1) / (each.mean() * np.sqrt(len(each)))
    return float(2.0 * norm.sf(abs(np.log(each.mean())) / error))


def simulations_needed(
    *, shift: float | None = None, inflation: float | None = None, level: float = 0.01, power: float = 0.95
) -> int:
    """How many simulations show a miscalibration of one number.

    Args:
        shift: of the posterior mean, in posterior standard deviations; or
        inflation: the factor by which the posterior's variance is wrong.
        level: of the test, corrected for the number of tests, in (0, 1).
        power: the probability of seeing it, in (0, 1).

    Returns:
        Their number, for an exact normal posterior.

    Raises:
        ValueError: unless exactly one of `shift`, which must not be 0, and `inflation`, not 1, is given.

    Example:
        >>> from numpyro_diffusion.diagnostics import simulations_needed
        >>> simulations_needed(shift=0.2), simulations_needed(inflation=1.15)
        (446, 1824)
    """
    if (shift is None) == (inflation is None):
        raise ValueError(f"give either shift or inflation; got shift={shift} and inflation={inflation}")
    _inside_unit(level=level, power=power)
    effect = 0.0 if shift is None else abs(shift)
    if inflation is not None:
        _checks.positive(inflation=inflation)
        effect = abs(np.log(inflation)) / np.sqrt(2.0)
    if not effect > 0.0:
        raise ValueError(f"shift must not be 0 and inflation not 1; got shift={shift} and inflation={inflation}")
    return int(np.ceil(((norm.isf(0.5 * level) + norm.ppf(power)) / effect) ** 2))
