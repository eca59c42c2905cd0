r"""Is the posterior right? Levels $u = (r + U) / (L + 1)$ of ranks of truths, which should be uniform.

All three pictures take the levels of `diagnostics.Calibration`, or any in [0, 1], and show them beside the simultaneous
bands of as many uniform ones. In `plot_ecdf_difference` a curve below zero in the middle means draws that are too low,
as truths rank high, and one that falls first and rises after it draws that are too wide.

References:
    Säilynoja, Bürkner, Vehtari, Graphical test for discrete uniformity and its applications in goodness-of-fit
    evaluation and multiple sample comparison, 2022, https://arxiv.org/abs/2103.10522.
"""

from typing import Any

import numpy as np
from scipy.stats import binom

from numpyro_diffusion.diagnostics.coverage import ecdf_bands


def plot_ecdf_difference(levels: np.ndarray, *, probability: float = 0.95, label: str = "", ax: Any = None) -> Any:
    """The distribution function of levels less that of uniform ones, with simultaneous bands.

    Args:
        levels: shape (simulations, ...); a curve for each entry.
        probability: with which uniform levels stay within the bands everywhere.
        label: name of the site.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes. A curve that leaves the bands is drawn in red.

    Raises:
        ValueError: if there are fewer than two levels, or one is not in [0, 1].
    """
    flat, axes = _flat(levels), _axes(ax)
    points, lower, upper = ecdf_bands(len(flat), probability)
    axes.fill_between(
        points, lower - points, upper - points, color="0.85", linewidth=0, label=f"{probability:.0%} band"
    )
    for curve in (flat[None] <= points[:, None, None]).mean(1).T:
        _curve(axes, points, curve - points, bool(np.any((curve < lower) | (curve > upper))))
    axes.axhline(0.0, color="0.4", linewidth=0.6)
    axes.set(xlabel=_with("level of the truth", label), ylabel="ECDF - uniform", xlim=(0.0, 1.0))
    axes.legend(loc="upper right", frameon=False, fontsize="small")
    return axes


def plot_coverage(levels: np.ndarray, *, probability: float = 0.95, label: str = "", ax: Any = None) -> Any:
    """The share of truths in central intervals over the intervals' probability, with simultaneous bands.

    Args:
        levels: shape (simulations, ...); a curve for each entry.
        probability: with which those of an exact sampler stay within the bands everywhere.
        label: name of the site.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes. Curves below the diagonal are of posteriors that are too narrow, or off.

    Raises:
        ValueError: if there are fewer than two levels, or one is not in [0, 1].
    """
    folded, axes = np.abs(2.0 * _flat(levels) - 1.0), _axes(ax)
    points, lower, upper = ecdf_bands(len(folded), probability)
    axes.fill_between(points, lower, upper, color="0.85", linewidth=0, label=f"{probability:.0%} band")
    axes.plot([0.0, 1.0], [0.0, 1.0], color="0.4", linewidth=0.6)
    for curve in (folded[None] <= points[:, None, None]).mean(1).T:
        _curve(axes, points, curve, bool(np.any((curve < lower) | (curve > upper))))
    axes.set(xlabel="probability of the interval", ylabel=_with("truths inside", label), xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    return axes


def plot_rank_histogram(
    levels: np.ndarray, *, num_bins: int = 20, probability: float = 0.95, label: str = "", ax: Any = None
) -> Any:
    """A histogram of levels, with the interval of each bin.

    Args:
        levels: shape (simulations, ...); entries are drawn over each other.
        num_bins: number of bins.
        probability: of the interval of one bin, without a correction for their number.
        label: name of the site.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if there are fewer than two levels, or one is not in [0, 1].
    """
    flat, axes = _flat(levels), _axes(ax)
    low, high = (binom.ppf(0.5 * (1.0 + side * probability), len(flat), 1.0 / num_bins) for side in (-1.0, 1.0))
    axes.axhspan(low, high, color="0.85", linewidth=0, label=f"{probability:.0%} of each bin")
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    for column in flat.T:
        counts = np.histogram(column, edges)[0]
        if flat.shape[1] == 1:
            axes.stairs(counts, edges, fill=True, color="C0", alpha=0.55)
        axes.stairs(counts, edges, color="C0", linewidth=1.0, alpha=1.0 if flat.shape[1] < 4 else 0.5)
    axes.axhline(len(flat) / num_bins, color="0.4", linewidth=0.6)
    axes.set(xlabel=_with("level of the truth", label), ylabel="simulations", xlim=(0.0, 1.0), ylim=(0.0, None))
    axes.legend(loc="lower right", frameon=False, fontsize="small")
    return axes


def _curve(axes: Any, points: np.ndarray, values: np.ndarray, outside: bool) -> None:
    axes.plot(points, values, color="C3" if outside else "C0", linewidth=1.0, alpha=0.8)


def _with(text: str, label: str) -> str:
    return f"{text}, {label}" if label else text


def _flat(levels: np.ndarray) -> np.ndarray:
    """Levels as (simulations, entries)."""
    levels = np.asarray(levels, np.float64)
    if levels.ndim < 1 or len(levels) < 2 or not np.all((levels >= 0.0) & (levels <= 1.0)):
        raise ValueError(f"levels must be two or more numbers in [0, 1], one for each simulation; got {levels!r}")
    return levels.reshape(len(levels), -1)


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(4.8, 3.4), layout="constrained")[1]
