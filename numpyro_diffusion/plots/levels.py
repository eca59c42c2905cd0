"""What happens along noise levels, log-SNR and islands: ladders, acceptance, weightings, evidence."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.plots.calibration import _axes


def plot_levels(schedule: Schedule, times: Any, *, label: str = "", ax: Any = None) -> Any:
    r"""The ladder of noise levels $\sigma_t / \alpha_t$ that a solver or a sampler visits, step by step.

    Args:
        schedule: of the denoiser.
        times: decreasing times, such as `solver.times(denoiser)`, shape (steps,).
        label: for a legend, where several ladders share axes.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    axes = _axes(ax)
    axes.plot(np.asarray(schedule.noise_level(np.asarray(times))), ".-", linewidth=0.8, label=label or None)
    axes.set(xlabel="step", ylabel=r"noise level $\sigma_t / \alpha_t$", yscale="log")
    if label:
        axes.legend(frameon=False, fontsize="small")
    return axes


def plot_acceptance(noise_level: Any, accept_prob: Any, *, num_bins: int = 12, ax: Any = None) -> Any:
    """Mean acceptance by noise level, with errors of independent moves; bars say how many moves are made there.

    Args:
        noise_level: of each move, any shape, or of each level, (..., levels).
        accept_prob: of the same shape, such as the extra fields `noise_level` and `accept_prob` of `MCMC`; NaN is left
            out.
        num_bins: bins of equal width in the logarithm; levels that are fewer have a bin each.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if shapes differ, or no acceptance is finite.
    """
    level, accepted = (np.asarray(value, np.float64) for value in np.broadcast_arrays(noise_level, accept_prob))
    keep = np.isfinite(level) & np.isfinite(accepted) & (level > 0.0)
    if not keep.any():
        raise ValueError("noise_level and accept_prob must have finite entries; got none")
    level, accepted, axes = level[keep], accepted[keep], _axes(ax)
    distinct = np.unique(level)
    if len(distinct) <= num_bins:
        middle = np.sqrt(distinct[1:] * distinct[:-1])
        edges = np.concatenate([[distinct[0] / 1.5], middle, [distinct[-1] * 1.5]])
    else:
        edges = np.geomspace(distinct[0], distinct[-1] * (1.0 + 1e-9), num_bins + 1)
    where = np.clip(np.searchsorted(edges, level, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(where, minlength=len(edges) - 1)
    filled = np.flatnonzero(counts)
    means = np.array([accepted[where == k].mean() for k in filled])
    errors = np.array([accepted[where == k].std() / np.sqrt(counts[k]) for k in filled])
    centres = np.sqrt(edges[1:] * edges[:-1])[filled]
    axes.stairs(0.25 * counts / np.max(counts), edges, fill=True, color="0.8", label="number of moves (its own scale)")
    axes.errorbar(centres, means, errors, fmt="o-", markersize=3, linewidth=1.0, color="C0", label="acceptance")
    axes.set(xscale="log", ylim=(0.0, 1.02), xlabel="noise level of the move", ylabel="acceptance probability")
    axes.legend(frameon=False, fontsize="small")
    return axes


def plot_weightings(
    weightings: Mapping[str, Callable[[np.ndarray], Any]], *, log_snr: Any = None, ax: Any = None
) -> Any:
    r"""Weights of training objectives over the log-SNR, relative to those at zero.

    Args:
        weightings: functions of the log-SNR by name, such as `train.weighting.EDM()`; those that are not `monotonic`
            are dashed.
        log_snr: $\lambda$, increasing; None for -8 to 10.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    log_snr, axes = np.linspace(-8.0, 10.0, 400) if log_snr is None else np.asarray(log_snr), _axes(ax)
    for name, weight in weightings.items():
        values, style = np.asarray(weight(log_snr)), "-" if getattr(weight, "monotonic", True) else "--"
        axes.plot(log_snr, values / np.interp(0.0, log_snr, values), style, label=name, linewidth=1.2)
    axes.set(yscale="log", ylim=(1e-3, 1e3), ylabel=r"$w(\lambda) / w(0)$")
    axes.set_xlabel(r"log-SNR $\lambda$ (noise left, data right)")
    axes.legend(frameon=False, fontsize="x-small")
    return axes


def plot_evidence(evidence: Any, *, truth: float | None = None, label: str = "", ax: Any = None) -> Any:
    """Log evidence of each island, and of all with two standard errors.

    Args:
        evidence: the `log_evidence` of a particle sampler, or (value, standard error, islands).
        truth: the true one, if known.
        label: name of the model on the axis; give several one after the other on the same axes.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    axes = _axes(ax)
    value, error, islands = (np.asarray(part) for part in evidence)
    place = len(axes.containers)
    spread = place + 0.12 * np.linspace(-1.0, 1.0, len(islands)) if len(islands) > 1 else [place]
    axes.plot(spread, islands, ".", color="0.6", label="islands" if place == 0 else None)
    width = None if np.isnan(error) else 2.0 * error
    axes.errorbar([place], [value], width, fmt="o", color="C0", capsize=3, label="all" if place == 0 else None)
    if truth is not None:
        axes.plot([place - 0.3, place + 0.3], [truth, truth], color="C3", label="truth" if place == 0 else None)
    labels = [text.get_text() for text in axes.get_xticklabels()] if place else []
    axes.set_xticks(range(place + 1), [*labels, label or "model"])
    axes.set(ylabel="log evidence", xlim=(-0.6, place + 0.6))
    axes.legend(frameon=False, fontsize="small")
    return axes
