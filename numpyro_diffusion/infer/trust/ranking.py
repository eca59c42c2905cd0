r"""Ranks of truths among draws, of which some are correlated and some are no draws at all.

Draws of a chain are correlated, and ranks are uniform among independent ones. So only every $k$-th draw of each chain
is ranked, with one $k$ for all: the lag at which an autoregression has a correlation of .05 if its autocorrelation time
is $\tau = C N / \mathrm{ESS}$, for $C$ chains of $N$ draws, that of the ranks of the slowest site or quantity, averaged
over the simulations of the first batch.

A simulation whose draws are not finite, or in which a chain never moves, has no ranks. It is counted, and the reason
named.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy.stats import rankdata

from numpyro_diffusion.diagnostics.calibration import Calibration
from numpyro_diffusion.diagnostics.coverage import distance_ranks

_CORRELATION = 0.05


class Batch(NamedTuple):
    """Simulations and their draws."""

    truths: dict[str, np.ndarray]  # of sites and quantities, (simulations, ...)
    draws: dict[str, np.ndarray]  # (simulations, chains, draws, ...)
    indices: np.ndarray  # which simulations of the run they are


def rank(
    rng: np.random.Generator,
    batches: Iterator[Batch],
    latent: list[str],
    num_simulations: int,
    failures: dict[str, list[int]],
    said: dict[str, list[int]],
) -> Calibration:
    """Ranks truths among draws, batch by batch: no more than one is in memory.

    Args:
        rng: breaks ties.
        batches: simulations, with values of sites and test quantities.
        latent: names of the sites.
        num_simulations: how many were asked for.
        failures: where the sampler has failed so far, by reason.
        said: what the sampler has said, by message.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: if the sampler has failed everywhere.
    """
    every: int | None = None
    scale: dict[str, np.ndarray] = {}
    rows: list[tuple[dict[str, Any], int]] = []
    for batch in batches:
        if not (good := _look(batch, latent, failures)).any():
            continue
        truths, draws = jax.tree.map(lambda leaf, good=good: leaf[good], (batch.truths, batch.draws))
        sizes, r_hat = mixing(draws)
        chains, length = next(iter(draws.values())).shape[1:3]
        if every is None:
            every = spacing(float((chains * length / sizes).mean(0).max()), length)
            scale = {name: np.maximum(truths[name].std(0), 1e-30) for name in latent}
        row: dict[str, Any] = {"ranks": {}, "means": {}, "deviations": {}, "ess": sizes.min(1), "r_hat": r_hat.max(1)}
        thinned = {name: _flat(value[:, :, ::every]) for name, value in draws.items()}
        for name, truth in truths.items():
            below = (thinned[name] < truth[:, None]).sum(1)
            ties = (thinned[name] == truth[:, None]).sum(1)
            row["ranks"][name] = below + rng.integers(0, ties + 1)
        for name in latent:
            row["means"][name] = draws[name].mean((1, 2), dtype=np.float64)
            row["deviations"][name] = draws[name].std((1, 2), dtype=np.float64)
        points = _points(truths, scale, 1)
        # another simulation's truth, which knows nothing of this one's; of a single simulation, the origin
        references = np.roll(points, 1, axis=0) if len(points) > 1 else np.zeros_like(points)
        below, ties = distance_ranks(points, _points(thinned, scale, 2), references)
        row["tarp"] = below + rng.integers(0, ties + 1)
        row["truths"] = {name: truths[name] for name in latent}
        rows.append((row, next(iter(thinned.values())).shape[1]))
    if not rows:
        raise ValueError(f"the sampler failed in all {num_simulations} simulations: {'; '.join(failures)}")
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[row for row, _ in rows])
    by_reason = [{reason: tuple(where) for reason, where in table.items()} for table in (failures, said)]
    return Calibration(
        num_ranks=rows[0][1], num_simulations=num_simulations, failures=by_reason[0], warnings=by_reason[1], **joined
    )


def _look(batch: Batch, latent: list[str], failures: dict[str, list[int]]) -> np.ndarray:
    """Which simulations have draws to look at; the others are noted with their reasons."""
    good = np.ones(len(batch.indices), bool)
    for reason, wrong in {
        "draws that are not finite": [any_of(~np.isfinite(value), 1) for value in batch.draws.values()],
        "a chain that did not move": [any_of(still(batch.draws[name]), 1) for name in latent],
    }.items():
        bad = good & np.any(wrong, axis=0)
        if bad.any():
            failures.setdefault(reason, []).extend(int(i) for i in batch.indices[bad])
        good &= ~bad
    return good


def _flat(draws: np.ndarray) -> np.ndarray:
    """Chains one after the other, (simulations, chains, draws, ...) -> (simulations, chains * draws, ...)."""
    return draws.reshape(len(draws), -1, *draws.shape[3:])


def _points(values: dict[str, np.ndarray], scale: dict[str, np.ndarray], lead: int) -> np.ndarray:
    """All sites as one vector, in units of their priors' standard deviations."""
    parts = [values[name] / scale[name] for name in scale]
    return np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], -1)


def mixing(draws: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Effective sample sizes and R-hats of the ranks of draws, by simulation and entry.

    Args:
        draws: by site and quantity, (simulations, chains, draws, ...).

    Returns:
        Two arrays (simulations, entries); where nothing varies, sizes are the number of draws and R-hats are one.
    """
    sizes, r_hats = [], []
    simulations, chains, length = next(iter(draws.values())).shape[:3]
    for value in draws.values():
        ranks = rankdata(value.reshape(simulations, chains * length, -1), axis=1)
        ranks = np.moveaxis(ranks.reshape(simulations, chains, length, -1), 0, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            sizes.append(effective_sample_size(ranks))
            r_hats.append(split_gelman_rubin(ranks) if chains > 1 else np.full(ranks.shape[2:], np.nan))
    size, r_hat = np.concatenate(sizes, -1), np.concatenate(r_hats, -1)
    known = np.isfinite(size)
    return np.where(known, size, chains * length), np.where(known, r_hat, 1.0)


def spacing(time: float, length: int) -> int:
    """The lag at which an autoregression of some autocorrelation time has a correlation of .05."""
    correlation = max(time - 1.0, 0.0) / (time + 1.0)
    return 1 if correlation < _CORRELATION else min(int(np.ceil(np.log(_CORRELATION) / np.log(correlation))), length)


def still(draws: np.ndarray) -> np.ndarray:
    """Which chains never moved at all in a site of real numbers, (simulations, chains)."""
    if not np.issubdtype(draws.dtype, np.inexact):
        return np.zeros(draws.shape[:2], bool)
    return ~any_of(draws != draws[:, :, :1], 2)


def any_of(values: np.ndarray, lead: int) -> np.ndarray:
    """Whether any is true, over all but the first dimensions."""
    return np.asarray(values.reshape(*values.shape[:lead], -1).any(-1))
