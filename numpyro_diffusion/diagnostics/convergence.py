r"""Whether a run has converged, what is worst in it, and the one thing to change.

A chain of a valid kernel says nothing false, but it may not have said anything yet. `verdict` reads a finished run,
of `MCMC` with any kernel or of a particle sampler, or data of ArviZ, and answers yes or no: every R-hat below 1.01,
every effective sample size, of the bulk and of the tails, above 400, no divergence, and nothing that the sampler itself
has found. If no, it names the site and entry that is worst, the chains that disagree there, and, of all causes that it
sees, the change to try first.

A large R-hat is a symptom. Chains that stand still, moves that are never accepted at a noise level, trees that end
before they turn, divergences and modes far apart each ask for another change, and the first of them in that order is
the one to make: what moves badly looks like modes from afar.

For the numbers see `nested`; they can be fooled by what all chains have in common, and those of a single chain by
anything that it has not seen. For what is read of a run see `runs`.

References:
    Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat, 2021,
    https://arxiv.org/abs/1903.08008.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpyro.infer import MCMC

from numpyro_diffusion.diagnostics.nested import SMALLEST_ESS, Finding, SiteNumbers, extreme, groups_of, numbers_of
from numpyro_diffusion.diagnostics.runs import Arrays, Run, by_level, has_acceptance, mean_of, read_run

_FAR = 1.0
"""Between means of groups of chains, in standard deviations of a chain, where each group may be in a mode."""
_STATIONARY = 0.5
"""By how much the two halves of a chain may differ in the same units if it is in a mode."""
_DRIFT = 0.3
"""By how much all of them may differ in one direction, in the same units."""
_SATURATED = 0.05
_NEVER = 0.01
_LOW, _HIGH = 0.1, 0.99
_FEW_TRIPS = 100
ADVICE = {
    "not finite": "find where the model is not finite, by the draws before the first of these, and constrain the site",
    "still": "give the chains other starts (init_params) and smaller moves: nothing has been accepted",
    "trips": "raise num_temperatures if swap_rates are far below 1/2; otherwise run longer, or write the model with a "
    "prior that is nearer to the posterior",
    "levels": "lower the largest noise level",
    "low": "warm up longer, with a larger target_accept_prob",
    "high": "lower target_accept_prob, or raise the step size: the moves are too short",
    "saturated": "raise max_tree_depth, or give NUTS dense_mass=True",
    "diverging": "raise target_accept_prob; if divergences stay, look for a funnel or a likelihood that is not finite",
    "modes": "take ParallelTempering(model, kernel), or PopulationHMC(model) with more walkers",
    "drift": "warm up longer: raise num_warmup",
    "slow": "run longer, or take PopulationHMC(model)",
    "short": "run longer",
    "unseen": "run four chains or more, from different starts",
}
"""By cause, in the order in which they are to be tried."""


@dataclass(frozen=True)
class Verdict:
    """What `verdict` says of a run; printed, it is a few lines of text.

    Args:
        converged: whether nothing speaks against it.
        worst: the site and entry with the largest R-hat, such as "x[3, 4]".
        r_hat: its R-hat.
        ess: the smallest bulk effective sample size of all sites.
        problems: what speaks against it; empty if `converged`.
        advice: the one change to try next; empty if `converged`.
        notes: what to know besides, such as entries that cannot be judged.
        ess_tail: the smallest effective sample size of the tails.
        mcse: the largest Monte Carlo error of a mean, in posterior standard deviations.
        nested_r_hat: the largest nested R-hat; NaN without islands.
        groups: chains that agree in the mean of the worst entry, from the smallest mean to the largest; a single group
            if all do.
        divergences: how many transitions diverged.
        acceptance: mean acceptance; NaN if it was not collected.
        levels: statistics by noise level or temperature, arrays of one length, see `by_level`.
        sites: the numbers of every entry.
        shown: False if nothing speaks against it but that it cannot be seen, as in a single chain.
    """

    converged: bool
    worst: str
    r_hat: float
    ess: float
    problems: tuple[str, ...]
    advice: str = ""
    notes: tuple[str, ...] = ()
    ess_tail: float = np.nan
    mcse: float = np.nan
    nested_r_hat: float = np.nan
    groups: tuple[tuple[int, ...], ...] = ()
    divergences: int = 0
    acceptance: float = np.nan
    levels: Arrays = field(default_factory=dict, repr=False)
    sites: dict[str, SiteNumbers] = field(default_factory=dict, repr=False)
    shown: bool = True

    def __str__(self) -> str:
        head = "converged" if self.converged else "NOT CONVERGED" if self.shown else "CONVERGENCE NOT SHOWN"
        nested = "" if np.isnan(self.nested_r_hat) else f"largest nested R-hat {self.nested_r_hat:.3f}, "
        at = f" ({self.worst})" if self.worst else ""
        tail = "" if np.isnan(self.ess_tail) else f", tail ESS {self.ess_tail:.0f}"
        error = "" if np.isnan(self.mcse) else f", Monte Carlo error of means up to {self.mcse:.2g} sd"
        lines = [f"{head}: {nested}largest R-hat {self.r_hat:.3f}{at}, smallest bulk ESS {self.ess:.0f}{tail}{error}"]
        lines += [f"- {problem}" for problem in self.problems]
        lines += [f"  {note}" for note in self.notes]
        lines += print_levels(self.levels)
        return "\n".join([*lines, *([f"Try next: {self.advice}"] if self.advice else [])])


def verdict(run: MCMC | Any, *, num_islands: int | None = None) -> Verdict:
    """Says whether a run has converged.

    Args:
        run: a run of `numpyro.infer.MCMC` with any kernel, a particle sampler that has run, data of ArviZ
            (`InferenceData`, `DataTree`) with a posterior, or arrays (chains, draws, ...) by site. Statistics that were
            collected are read: divergences always, `num_steps` for saturated trees (`NoiseSpace` has it always, of NUTS
            ask for it), `accept_prob`, with `noise_level` by level, `round_trips` of `ParallelTempering`.
        num_islands: for many short chains, how many islands they are on, each with as many consecutive chains. Chains
            of an island share where they started, see `nested_rhat`. Their nested R-hat is judged in place of R-hat.

    Returns:
        A `Verdict`. ArviZ needs about 5 ms for each entry of a site, with 4 chains of 1000 draws.

    Raises:
        TypeError: for something that is not a run.
        ValueError: if there are no draws, or chains cannot be on as many islands.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_diffusion.diagnostics import verdict
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_warmup=5, num_samples=20, num_chains=4,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> verdict(mcmc).converged
        False
    """
    this = read_run(run)
    found = numbers_of(this.draws, tails=True, num_islands=num_islands)
    findings = [*found.findings, *of_chains(this), *of_statistics(this)]
    if found.values is not None and any(finding.cause == "slow" for finding in findings):
        findings.append(why_apart(found.values))
    against = [finding for finding in findings if finding.counts]
    soft = [finding for finding in findings if not finding.counts]
    if against:  # then they may be the reason
        against, soft = [*against, *(f for f in soft if f.cause in ADVICE)], [f for f in soft if f.cause not in ADVICE]
    new = (f.text for f in against if f.text and not any(own.startswith(f.text) for own in this.problems))
    problems = tuple(dict.fromkeys((*this.problems, *new)))
    statistics = this.statistics
    return Verdict(
        converged=not problems,
        worst=found.worst,
        r_hat=found.r_hat,
        ess=found.ess,
        problems=problems,
        advice=advise(against, this, found.ess / SMALLEST_ESS) if problems else "",
        notes=tuple(finding.text for finding in soft),
        ess_tail=extreme(np.nanmin, (site.ess_tail for site in found.sites.values())),
        mcse=extreme(np.nanmax, (site.mcse for site in found.sites.values())),
        nested_r_hat=extreme(np.nanmax, (site.nested_r_hat for site in found.sites.values())),
        groups=() if found.values is None else groups_of(found.values),
        divergences=int(np.sum(statistics.get("diverging", 0))),
        acceptance=mean_of(np.asarray(statistics.get("acceptance_rate", np.nan))),
        levels=by_level(this),
        sites=found.sites,
        shown=bool(this.problems) or any(finding.cause != "unseen" for finding in against),
    )


def advise(findings: list[Finding], run: Run, achieved: float) -> str:
    """The one change to try next.

    Args:
        findings: what was found.
        run: where.
        achieved: the share of the effective draws needed that there is.
    """
    own, kernel = run.attributes.get("cure"), run.attributes.get("kernel", "")
    found = [finding.cause for finding in findings]
    cause = next((cause for cause in ADVICE if cause in found), None)
    if cause is None or (run.problems and own is None):
        return own or "what the first problem says"
    if own is not None and cause in ("modes", "drift", "slow", "short"):
        return own
    if run.annealing and cause in ("modes", "drift", "slow", "short"):
        return "take more particles"
    if cause == "low" and "noise_level" in run.statistics:
        return ADVICE["levels"]
    if cause == "saturated" and kernel == "NoiseSpace":
        return (
            'run some 64 chains of NoiseSpace(model) at once, chain_method="vectorized", which share one mass matrix, '
            "or take PopulationHMC(model)"
        )
    if cause in ("slow", "short") and 0.0 < achieved < 1.0:
        return ADVICE[cause].replace("run longer", f"run {np.ceil(1.2 / achieved):.0f} times as long")
    return ADVICE[cause]


def why_apart(values: np.ndarray) -> Finding:
    """Whether chains that disagree are in modes, or still on their way, or merely slow."""
    half, scale = values.shape[1] // 2, np.median(values.std(1))
    moved = values[:, -half:].mean(1) - values[:, :half].mean(1)
    groups = [values[list(group)].mean() for group in groups_of(values)]
    if len(groups) > 1 and np.diff(groups).max() > _FAR * scale and np.abs(moved).max() < _STATIONARY * scale:
        return Finding("modes", "each group stays where it is: modes that no chain leaves")
    error = moved.std(ddof=1) / np.sqrt(len(moved)) if len(moved) > 1 else np.inf
    if abs(moved.mean()) > max(_DRIFT * scale, 4.0 * error):
        return Finding("drift", "all chains move in one direction: they are still on their way")
    return Finding("slow", "")


def of_chains(run: Run) -> list[Finding]:
    """Chains that stand still while others move, or all of them where they began."""
    values = [v for v in run.draws.values() if np.issubdtype(v.dtype, np.floating) and v.ndim > 1 and v.size]
    if not values or values[0].shape[1] < 2:
        return []
    still = np.all([(np.ptp(v, 1) == 0).reshape(len(v), -1).all(1) for v in values], axis=0)
    if not still.any() or all(np.ptp(v, (0, 1)).max() == 0 for v in values):
        return []
    chains = np.flatnonzero(still)
    return [Finding("still", f"{len(chains)} of {len(still)} chains have not moved: {chains[:8].tolist()}")]


def of_statistics(run: Run) -> list[Finding]:
    """What the statistics of the moves say."""
    statistics, findings = run.statistics, []
    count = int(np.sum(statistics.get("diverging", 0)))
    if count:
        findings.append(Finding("diverging", f"{count} transitions diverged"))
    trips = statistics.get("round_trips")
    if trips is not None and (total := int(np.sum(trips[:, -1]))) < _FEW_TRIPS:
        text = (
            f"only {total} points have come from the prior to the posterior, of at least {_FEW_TRIPS}: modes may be "
            "missing, and weights of modes are noise"
        )
        findings.append(Finding("trips", text))
    reached = statistics.get("reached_max_tree_depth")
    if reached is not None and (share := float(np.mean(reached))) > _SATURATED:
        limit = int(np.max(statistics["n_steps"])) if "n_steps" in statistics else None
        findings.append(
            Finding("saturated", f"{share:.0%} of the trees are saturated" + (f" at {limit} steps" if limit else ""))
        )
    return [*findings, *_of_levels(by_level(run)), *_of_acceptance(run)]


def _of_levels(levels: Arrays) -> list[Finding]:
    """Noise levels at which nothing is accepted."""
    rate = levels.get("acceptance_rate")
    if rate is None or "lowest" not in levels or len(rate) < 2 or not np.nanmin(rate) < _NEVER:
        return []
    k = int(np.nanargmin(rate))
    span = f"{levels['lowest'][k]:.2g} to {levels['highest'][k]:.2g}"
    return [Finding("levels", f"moves at noise levels of {span} are never accepted")]


def _of_acceptance(run: Run) -> list[Finding]:
    """Acceptance out of range, which by itself says nothing against a run."""
    if not has_acceptance(run):
        return []
    by_chain = np.array([mean_of(rate) for rate in run.statistics["acceptance_rate"]])
    lowest = max(_LOW, 0.5 * float(run.attributes.get("target_accept_prob", 0.0)))
    low = np.flatnonzero(by_chain < lowest)
    if len(low):
        where = "" if len(low) == len(by_chain) else f" in chains {low[:8].tolist()}"
        text = f"{np.mean(by_chain[low]):.1%} of the moves are accepted{where}, below {lowest:.0%}"
        return [Finding("low", text, counts=False)]
    mean = mean_of(by_chain)
    if mean > _HIGH and "step_size" in run.statistics and "reached_max_tree_depth" not in run.statistics:
        return [Finding("high", f"{mean:.1%} of the moves are accepted: they are short", counts=False)]
    return []


def print_levels(levels: Arrays) -> list[str]:
    """A line for each group of noise levels, of kernels that draw the level of each move."""
    if "lowest" not in levels:
        return []
    rows = zip(*(levels[name] for name in ("lowest", "highest", "acceptance_rate", "jump")), strict=True)
    return [
        f"  noise levels {low:.2g} to {high:.2g}: {rate:.0%} accepted"
        + ("" if np.isnan(jump) else f", jump {jump:.2g}")
        for low, high, rate, jump in rows
    ]
