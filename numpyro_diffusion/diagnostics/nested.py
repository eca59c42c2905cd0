r"""Numbers for the agreement of chains: R-hat, effective sample sizes, groups of chains, and the nested R-hat of many.

The numbers of single chains are ArviZ's. R-hat is the larger of that of ranks and that of folded ranks, which sees
chains that differ in spread. The Monte Carlo error of a mean is $1 / \sqrt{\mathrm{ESS}}$ posterior standard
deviations.

Many short chains cannot be judged one by one. Chains on an *island* (a superchain) share what they started from;
islands share nothing. With $K$ islands of $M$ chains of $N$ draws, $\bar x_k$ the mean of island $k$,

$$\hat R = \sqrt{1 + \frac{B}{W}}, \qquad B = \mathrm{var}_k\, \bar x_k, \qquad
W = \frac1K \sum_k \bigl(\mathrm{var}_m\, \bar x_{km} + \mathrm{mean}_m\, \mathrm{var}_n\, x_{kmn}\bigr),$$

which tends to 1 with $M N$, where the R-hat of single chains needs long chains. It says how far means of islands differ
in units of the target's standard deviation: $\hat R = 1.01$ is a standard error of $0.14 / \sqrt K$. It sees where
chains started only if those of an island started at the same point: islands of chains from everywhere agree by their
size.

References:
    Margossian et al., Nested R-hat: assessing the convergence of Markov chain Monte Carlo when running many short
    chains, 2022, https://arxiv.org/abs/2110.13017.
    Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat, 2021,
    https://arxiv.org/abs/1903.08008.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

from numpyro_diffusion import _checks
from numpyro_diffusion.diagnostics.runs import Arrays

LARGEST_RHAT = 1.01
SMALLEST_ESS = 400.0
_FEWEST = 4
"""Draws of a chain, below which R-hat and effective sample size are not defined."""
_GAP = 0.3
"""Between neighbouring means of chains, in standard deviations of a chain, at which they form two groups."""
_SHOWN = 3


def nested_rhat(draws: np.ndarray, method: Literal["identity", "rank"] = "identity") -> np.ndarray:
    """The nested R-hat of islands of chains.

    Args:
        draws: shape (islands, chains, draws, ...), at least two islands and two chains or two draws.
        method: "identity" for draws as they are; "rank" for the larger of that of their ranks and that of their folded
            ranks, both normalised, for any tails and for islands that differ in spread.

    Returns:
        An array of the trailing shape; 1 where nothing varies.

    Raises:
        ValueError: if there is only one island, or one draw of one chain on each; for an unknown method.

    Example:
        >>> import numpy as np
        >>> from numpyro_diffusion.diagnostics import nested_rhat
        >>> draws = np.random.default_rng(0).normal(size=(4, 100, 10))
        >>> bool(nested_rhat(draws) < 1.01)
        True
        >>> draws[0] += 1.0
        >>> bool(nested_rhat(draws) > 1.05)
        True
    """
    _checks.one_of("method", method, ("identity", "rank"))
    if method == "rank":
        folded = np.abs(draws - np.median(draws, (0, 1, 2)))
        return np.maximum(nested_rhat(_normalised(draws)), nested_rhat(_normalised(folded)))
    between, within = variances(draws)
    return np.sqrt(
        1.0 + np.where(within > 0, between / np.where(within > 0, within, 1.0), np.where(between > 0, np.inf, 0.0))
    )


def _normalised(draws: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks among all draws."""
    flat = np.asarray(draws, float).reshape(-1, *draws.shape[3:])
    return norm.ppf((rankdata(flat, axis=0) - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)


def variances(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of means between islands, and of draws within, as in `nested_rhat`."""
    draws = np.asarray(draws, float)
    if draws.ndim < 3 or draws.shape[0] < 2 or draws.shape[1] * draws.shape[2] < 2:
        raise ValueError(
            f"draws must be (islands, chains, draws, ...), two islands or more of two values or more; got {draws.shape}"
        )
    _, chains, length = draws.shape[:3]
    between_chains = draws.mean(2).var(1, ddof=1) if chains > 1 else 0.0
    within_chains = draws.var(2, ddof=1).mean(1) if length > 1 else 0.0
    return draws.mean((1, 2)).var(0, ddof=1), np.asarray(between_chains + within_chains).mean(0)


def early_late_rhat(draws: np.ndarray) -> np.ndarray:
    """The nested R-hat between the first and the second half of all chains: whether they are still on the way.

    Args:
        draws: as for `nested_rhat`, at least two draws.
    """
    half = draws.shape[2] // 2
    halves = np.stack([draws[:, :, :half], draws[:, :, -half:]])
    return nested_rhat(halves.reshape(2, -1, *halves.shape[3:]))


def standard_error(draws: np.ndarray) -> np.ndarray:
    r"""Of the mean over all islands, of the trailing shape.

    The variance of a handful of islands is itself noisy. That of the many chains on an island is not, but chains that
    share ancestors are not independent. So the variance of an entry is, half and half, that between islands, and that
    between the means of the chains times a factor common to all entries: by how much more islands differ than if chains
    were independent.
    """
    islands, chains = draws.shape[:2]
    between, within = variances(draws)
    if chains > 1:
        within = draws.mean(2).var(1, ddof=1).mean(0) / chains
    ratio = between[within > 0] / within[within > 0]
    common = np.mean(ratio) if ratio.size else 0.0
    return np.sqrt(0.5 * (between + (max(common, 1.0) if chains > 1 else common) * within) / islands)


class Finding(NamedTuple):
    """Something that was seen in a run."""

    cause: str  # one of `ADVICE`, or any other word
    text: str  # "" for what is only the cause of something else
    counts: bool = True  # whether it speaks against convergence by itself


class SiteNumbers(NamedTuple):
    """Of one site, each of the shape of its event; NaN for entries that are constant or not finite."""

    r_hat: np.ndarray  # of ranks and folded ranks, the larger; infinite where no chain moves and they differ
    ess_bulk: np.ndarray
    ess_tail: np.ndarray  # of the 5 and 95 % quantiles, the smaller
    mcse: np.ndarray  # Monte Carlo error of the mean, in posterior standard deviations
    nested_r_hat: np.ndarray  # of ranks and folded ranks between islands; NaN without islands


class Numbers(NamedTuple):
    """The numbers of all draws, and what speaks against them."""

    sites: dict[str, SiteNumbers]
    worst: str  # "" if no entry can be judged
    values: np.ndarray | None  # of the worst entry, (chains, draws)
    r_hat: float
    ess: float
    findings: list[Finding]


def numbers_of(draws: Arrays, tails: bool = False, num_islands: int | None = None) -> Numbers:
    """R-hat and effective sample sizes of draws, and what speaks against them.

    Args:
        draws: values by site, (chains, draws, ...).
        tails: whether to look at the tails and the error of means too.
        num_islands: as for `verdict`.
    """
    draws = {name: np.asarray(v) for name, v in draws.items() if _is_number(v) and np.size(v)}
    if not draws:
        raise ValueError("there are no draws of numbers to judge")
    shape = next(iter(draws.values())).shape[:2]
    if num_islands is not None and (num_islands < 2 or shape[0] % num_islands):
        raise ValueError(f"num_islands must be at least 2 and divide the {shape[0]} chains; got {num_islands}")
    if any(value.shape[:2] != shape for value in draws.values()) or len(shape) < 2:
        raise ValueError(f"draws must be (chains, draws, ...), alike at all sites; got {_shapes(draws)}")
    findings, sites = _not_judged(draws), {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, value in draws.items():
            sites[name] = _numbers_of(name, value, tails, num_islands)
    if _is_short(shape) and num_islands is None:
        findings.append(
            Finding("unseen", f"{shape[1]} draws of a chain are too few for R-hat. For short chains give num_islands")
        )
    elif shape[0] == 1:
        findings.append(
            Finding(
                "unseen",
                "there is one chain: R-hat compares its halves with each other, and cannot see what it has missed",
            )
        )
    judged = {n: s.r_hat if num_islands is None else s.nested_r_hat for n, s in sites.items()}
    worst, index, r_hat = _largest(judged)
    values = draws[worst][(slice(None), slice(None), *index)].astype(float) if worst else None
    label = worst + (str([int(i) for i in index]) if index else "")
    if values is not None and not r_hat < LARGEST_RHAT:
        kind = "R-hat" if num_islands is None else "nested R-hat"
        text = f"{kind} of {label} is {r_hat:.3f}, above {LARGEST_RHAT}{name_groups(values)}"
        findings.append(Finding("slow", text))
    ess = extreme(np.nanmin, (site.ess_bulk for site in sites.values()), np.inf)
    if ess <= SMALLEST_ESS:
        text = f"the smallest effective sample size is {ess:.0f}, of at least {SMALLEST_ESS:.0f}"
        findings.append(Finding("short", text))
    tail = extreme(np.nanmin, (site.ess_tail for site in sites.values()), np.inf)
    if tail <= SMALLEST_ESS < ess:
        text = f"the smallest effective sample size of the tails is {tail:.0f}, of at least {SMALLEST_ESS:.0f}"
        findings.append(Finding("short", text))
    r_hat = r_hat if num_islands is None else _largest({name: site.r_hat for name, site in sites.items()})[2]
    return Numbers(sites, label, values, r_hat, ess, findings)


def _numbers_of(name: str, value: np.ndarray, tails: bool, num_islands: int | None) -> SiteNumbers:
    """Of one site."""
    import arviz as az

    value = value.astype(float)
    usable = np.isfinite(value).all((0, 1)) & (np.ptp(value, (0, 1)) > 0)
    nothing = np.full(value.shape[2:], np.nan)
    if not usable.any() or _is_short(value.shape):
        nested = _nested(value, num_islands, usable) if num_islands is not None and usable.any() else nothing
        return SiteNumbers(nothing, nothing, nothing, nothing, nested)
    judged = value[:, :, usable]  # (chains, draws, entries)
    if len(judged) == 1:  # two halves
        half = judged.shape[1] // 2
        judged = judged[:, -2 * half :].reshape(2, half, -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "More chains|Found chain")  # than draws
        dataset = az.convert_to_dataset({name: judged})
    # whole chains that stand still have no variance: their R-hat is what it tends to
    still = (np.ptp(judged, 1) == 0).all(0)

    def spread(values: Any) -> np.ndarray:
        whole = nothing.copy()
        whole[usable] = np.asarray(values[name] if hasattr(values, "data_vars") else values)
        return whole

    r_hat = spread(np.where(still, np.inf, np.asarray(az.rhat(dataset)[name])))
    r_hat[usable & np.isnan(r_hat)] = np.inf  # ArviZ has none where it divides by nothing
    bulk = spread(np.where(still, value.shape[0], np.asarray(az.ess(dataset)[name])))
    if not tails:
        return SiteNumbers(r_hat, bulk, nothing, nothing, nothing)
    mean = spread(np.where(still, value.shape[0], np.asarray(az.ess(dataset, method="mean")[name])))
    nested = nothing if num_islands is None else _nested(value, num_islands, usable)
    return SiteNumbers(r_hat, bulk, spread(az.ess(dataset, method="tail")), 1.0 / np.sqrt(mean), nested)


def _nested(value: np.ndarray, num_islands: int, usable: np.ndarray) -> np.ndarray:
    islands = value.reshape(num_islands, -1, *value.shape[1:])
    return np.where(usable, nested_rhat(np.where(usable, islands, 0.0), method="rank"), np.nan)


def _not_judged(draws: Arrays) -> list[Finding]:
    """Draws that are not finite, and entries that never change."""
    findings, constant = [], {}
    for name, value in draws.items():
        bad = ~np.isfinite(value)
        if bad.any():
            chains = sorted({int(i) for i in np.nonzero(bad)[0]})
            text = f"draws of {name!r} are not finite: {int(bad.sum())} of {bad.size} numbers, in chains {chains[:8]}"
            findings.append(Finding("not finite", text))
        same = np.ptp(value.astype(float), (0, 1)) == 0
        if same.any():
            constant[name] = int(same.sum()), same.size
    if constant and all(some == all_ for some, all_ in constant.values()) and len(constant) == len(draws):
        findings.append(Finding("still", "no draw differs from any other"))
    elif constant:
        told = ", ".join(f"{some} of {all_} in {name!r}" for name, (some, all_) in constant.items())
        findings.append(Finding("constant", f"entries that never change are not judged: {told}", counts=False))
    return findings


def _is_number(value: Any) -> bool:
    return np.issubdtype(value.dtype, np.number) or value.dtype == bool


def _is_short(shape: tuple[int, ...]) -> bool:
    """Whether chains are too short for R-hat and effective sample size."""
    return shape[1] < (2 * _FEWEST if shape[0] == 1 else _FEWEST)


def _shapes(draws: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in draws.items()}


def _largest(values: dict[str, np.ndarray]) -> tuple[str, tuple, float]:
    """The site, the index and the value of the largest entry; "" if all are NaN."""
    where: tuple[str, tuple] = ("", ())
    largest = -np.inf
    for name, value in values.items():
        if not np.isnan(value).all() and np.nanmax(value) > largest:
            index = np.unravel_index(np.nanargmax(value), value.shape)
            where, largest = (name, index), float(value[index])
    return (*where, largest if where[0] else np.nan)


def extreme(of: Any, values: Iterable[np.ndarray], otherwise: float = np.nan) -> float:
    """The least or the largest of all numbers."""
    known = [value[~np.isnan(value)] for value in map(np.atleast_1d, values)]
    known = [value for value in known if value.size]
    return float(of([of(value) for value in known])) if known else otherwise


def groups_of(values: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Groups of chains that agree in their means, from the smallest mean to the largest.

    Args:
        values: (chains, draws), finite.
    """
    means, scale = values.mean(1), np.median(values.std(1))
    gap = scale * max(_GAP, 3.0 / np.sqrt(values.shape[1]))
    order = np.argsort(means)
    cuts = np.flatnonzero(np.diff(means[order]) > gap) + 1
    return tuple(tuple(sorted(int(i) for i in part)) for part in np.split(order, cuts))


def name_groups(values: np.ndarray) -> str:
    """The groups of chains in words; "" if there is only one."""
    groups = groups_of(values)
    if len(groups) < 2:
        return ""

    def tell(group: tuple[int, ...]) -> str:
        named = ", ".join(map(str, group[:_SHOWN])) + (
            f" and {len(group) - _SHOWN} more" if len(group) > _SHOWN else ""
        )
        return f"{named} (mean {values[list(group)].mean():.3g})"

    largest = sorted(groups, key=len, reverse=True)
    told = "; ".join(map(tell, largest[: _SHOWN + 1])) + ("; ..." if len(groups) > _SHOWN + 1 else "")
    return f": {len(values)} chains fall into {len(groups)} groups by their means, {told}"
