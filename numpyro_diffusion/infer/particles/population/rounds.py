r"""Rounds of a population: what one looks like by itself, and whether it agrees with the one before.

A population that is run again with twice the moves answers a question that no statistic of one run can: whether all its
islands have the same error. Two rounds agree if their means do, in every coordinate, and their log evidences,

$$|\bar x_j - \bar x'_j| \le c\, \sqrt{s_j^2 + s_j'^2}, \qquad
|\log \hat Z - \log \hat Z'| \le c\, \sqrt{s^2 + s'^2},$$

with standard errors from the spread over islands; and so must the mean distances from the centre of both, since walkers
that have not reached the tails may well be centred. The factor $c$ grows with the number of coordinates. With normal
errors rounds that agree would be sent on in one run of a hundred; those of four islands are somewhat rough, and it is
some five.

Draws of rounds that agree are *pooled*: every second one of each, so that there are as many as of one round, and nearly
as many effective ones as of both. Numbers of convergence are theirs then, but for drift; the evidence, and what moves
say, are of the later round.

Where the posterior reaches further than the prior, no walker starts in its tails, and few are there by weight: they
come by moving alone, and rounds of few effective draws for each walker are too short in the same way. So there the
chains themselves must be long.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_diffusion.diagnostics.nested import (
    LARGEST_RHAT,
    Numbers,
    early_late_rhat,
    nested_rhat,
    numbers_of,
    standard_error,
)
from numpyro_diffusion.infer.particles.evidence import Evidence
from numpyro_diffusion.infer.particles.population.walkers import Moves

_CHANCE = 0.01
"""That any mean or spread of two rounds that agree lies outside of the limit, if their errors were known."""
_APART = 4.5
"""Standard errors by which log evidences may differ; theirs are known from a handful of islands only."""
_BLIND = 0.01
CURE = "Raise the budget"
_DIVERGING = 0.2
_GROWTH = 1.3
"""Of the effective size, by chains of twice the length: chains that mix have twice as much, others hardly more."""
_BEYOND = 1.5
"""Times the range of 98 % of the prior's draws, from which on a posterior reaches further than the prior."""
_HARDLY = 0.1
_LONG = 5.0
"""Effective draws for each walker, where chains must be long by themselves."""
_STUCK = 0.015


class Temperature(NamedTuple):
    """What happened at one temperature."""

    temperature: jax.Array  # inverse, after the step
    effective_size: jax.Array  # effective sample size after reweighting, over all islands
    num_moves: jax.Array
    correlation: jax.Array  # left between walkers and their ancestors in the worst coordinate
    worst: jax.Array  # index of that coordinate
    accept_prob: jax.Array  # mean over moves and walkers
    step_size: jax.Array
    num_steps: jax.Array  # leapfrog steps of a move, in the end
    num_gradients: jax.Array  # of the model, of each walker
    num_diverging: jax.Array  # of all walkers and moves
    lag: jax.Array  # by how much the mean log-likelihood may fall short of its equilibrium after the moves, in nats
    num_blind: jax.Array  # walkers at which a coordinate's gradient is not finite, before they move, (D,)


class Round(NamedTuple):
    """One run from the prior to draws of the posterior."""

    values: dict[str, np.ndarray]  # draws by site, constrained, (islands, N / islands, num_draws, ...)
    starts: dict[str, np.ndarray]  # draws of the prior in the same layout, with a draw for each walker
    evidence: Evidence
    history: list[Temperature]
    moves: Moves  # those between draws
    num_gradients: int  # of all walkers together
    seconds: float  # wall time
    seconds_each: float  # wall time of a gradient, without compiling
    num_walkers: int  # on each island
    factor: int  # how many times as many moves as it takes to forget


@dataclass(frozen=True)
class Look:
    """What a round looks like; printed, it is a line.

    Args:
        num_walkers: in all.
        factor: how many times as many moves as it takes to forget.
        nested_r_hat: the largest over sites and entries, between islands.
        drift: the largest R-hat between early and late draws.
        r_hat: the largest of ArviZ, with islands as chains.
        ess: the smallest effective sample size of ArviZ, with islands as chains.
        own_ess: that of this round's draws by themselves.
        is_pooled: whether `nested_r_hat`, `r_hat`, `ess` and `worst` are of draws of this round and the one before.
        worst: the site and entry with the largest nested R-hat.
        distance: by how many standard errors means or spreads differ from the round before, in the worst coordinate;
            NaN for the first.
        diverging: share of the moves between draws that diverged.
        stuck: share of the walkers that accept hardly any move.
        num_gradients: of all walkers together.
        seconds: wall time.
        problems: what keeps it from counting as converged.
        is_short: whether numbers of its draws are among the problems, which more draws of the same chains may mend.
        needs_draws: whether that may be all that it takes: chains are stationary, and rounds agree.
        needs_walkers: whether longer chains have not brought more: each is kept in its mode.
    """

    num_walkers: int
    factor: int
    nested_r_hat: float
    drift: float
    r_hat: float
    ess: float
    own_ess: float
    is_pooled: bool
    worst: str
    distance: float
    diverging: float
    stuck: float
    num_gradients: int
    seconds: float
    problems: tuple[str, ...]
    is_short: bool
    needs_draws: bool
    needs_walkers: bool

    @property
    def converged(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    @property
    def is_apart(self) -> bool:
        """Whether islands disagree although their walkers are stationary."""
        return self.nested_r_hat >= LARGEST_RHAT > self.drift

    def __str__(self) -> str:
        distance = "" if np.isnan(self.distance) else f"distance {self.distance:.1f}, "
        both = " of both rounds" if self.is_pooled else ""
        return (
            f"{self.num_walkers} walkers, {self.factor} x the moves: nested R-hat {self.nested_r_hat:.3f} "
            f"({self.worst}), early/late {self.drift:.3f}, ESS {self.ess:.0f}{both}, {distance}"
            f"{self.diverging:.1%} diverging, {self.stuck:.1%} stuck, {self.num_gradients} gradients, "
            f"{self.seconds:.0f} s"
        )


def look(this: Round, last: Round | None, names: list[str], shorter: Look | None = None) -> Look:
    """Judges a round.

    Args:
        this: the round.
        last: the one before, with fewer moves or walkers; None for the first.
        names: of the coordinates' sites.
        shorter: what this round looked like when its chains were half as long.

    Returns:
        The `Look`.
    """
    distance, where = (np.nan, "") if last is None else _distance(this, last)
    against_last = _of_rounds(this, last, distance, where)
    values, is_pooled = this.values, False
    own = found = _numbers(values)
    if last is not None and not against_last and last.num_walkers == this.num_walkers:
        values, is_pooled = pooled(this, last), True
        found = _numbers(values)
    nested, drift = agreement(values), _worst(this.values, early_late_rhat)
    problems = _of_islands(nested, drift)
    problems += _of_reach(this, own.ess)
    against = [finding for finding in found.findings if finding.counts]
    problems += [f"{f.text}. {CURE}" for f in against if not (f.cause == "slow" and nested[0] >= LARGEST_RHAT)]
    others = against_last + _of_moves(this, names)
    is_locked = shorter is not None and own.ess < _GROWTH * shorter.own_ess
    return Look(
        num_walkers=this.num_walkers * len(this.evidence.islands),
        factor=this.factor,
        nested_r_hat=nested[0],
        drift=drift[0],
        r_hat=found.r_hat,
        ess=found.ess,
        own_ess=own.ess,
        is_pooled=is_pooled,
        worst=nested[1],
        distance=distance,
        diverging=_diverging(this),
        stuck=_stuck(this),
        num_gradients=this.num_gradients,
        seconds=this.seconds,
        problems=(*problems, *others),
        is_short=bool(problems),
        needs_draws=bool(problems) and not is_locked and not others and drift[0] < LARGEST_RHAT,
        needs_walkers=bool(problems) and not others and is_locked,
    )


def pooled(this: Round, last: Round) -> dict[str, np.ndarray]:
    """Draws of two rounds with as many walkers: every second one of the first, then every second one of the other."""

    def halves(name: str) -> np.ndarray:
        before, after = (round.values[name] for round in (last, this))
        return np.concatenate([before[:, :, 1::2], after[:, :, (after.shape[2] + 1) % 2 :: 2]], axis=2)

    return {name: halves(name) for name in this.values}


def _numbers(values: dict[str, np.ndarray]) -> Numbers:
    """R-hat and effective sample sizes, with islands as chains."""
    return numbers_of({name: v.reshape(v.shape[0], -1, *v.shape[3:]) for name, v in values.items()}, tails=True)


def agreement(values: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest nested R-hat over sites and entries, of values as in `Round`, and where."""
    return _worst(values, nested_rhat)


def _of_islands(nested: tuple[float, str], drift: tuple[float, str]) -> list[str]:
    """What islands say of each other, and early draws of late ones."""
    problems = []
    if nested[0] >= LARGEST_RHAT:
        problems.append(
            f"islands disagree: nested R-hat of {nested[1]} is {nested[0]:.3f}, above {LARGEST_RHAT}; "
            + ("modes are kept apart: raise num_walkers" if drift[0] < LARGEST_RHAT else "raise the budget")
        )
    if drift[0] >= LARGEST_RHAT:
        problems.append(
            f"walkers drift: R-hat of {drift[1]} between early and late draws is {drift[0]:.3f}. Raise the budget"
        )
    return problems


def _of_reach(this: Round, ess: float) -> list[str]:
    """What draws say that lie where no walker started."""
    needed = _LONG * this.num_walkers * len(this.evidence.islands)
    ratio, where = _worst({name: (this.starts[name], value) for name, value in this.values.items()}, _wider)
    if ratio < _BEYOND or ess >= needed:
        return []
    return [
        f"{where} reaches {ratio:.1f} times as far as its prior, where walkers come by moving alone: chains must be "
        f"long by themselves, with an effective sample size of {needed:.0f}, not {ess:.0f}. Raise the budget"
    ]


def _wider(pair: Sequence[np.ndarray]) -> np.ndarray:
    """How many times as wide the range of 98 % of the latter is as that of the former; zero if that is no number."""
    flat = (v.reshape(-1, *v.shape[3:]).astype(float) for v in pair)
    start, end = (np.diff(np.quantile(v, [0.01, 0.99], axis=0), axis=0)[0] for v in flat)
    return np.nan_to_num(np.where(start > 0, end / np.where(start > 0, start, 1.0), 0.0), posinf=0.0)


def _of_rounds(this: Round, last: Round | None, distance: float, where: str) -> list[str]:
    """What a round says of the one before."""
    if last is None:
        return ["the budget did not suffice for a second round with twice the moves, which must agree"]
    problems = []
    limit = largest_distance(sum(v[0, 0, 0].size for v in this.values.values()))
    if not distance <= limit:
        problems.append(
            f"two rounds disagree, the second with more moves or walkers: their {where} are {distance:.1f} "
            f"standard errors apart, of at most {limit:.1f}. Raise the budget"
        )
    apart = abs(float(this.evidence.value) - float(last.evidence.value))
    error = float(np.hypot(this.evidence.standard_error, last.evidence.standard_error))
    if not apart <= _APART * error:
        problems.append(
            f"two rounds disagree in the log evidence: {float(last.evidence.value):.2f}, then "
            f"{float(this.evidence.value):.2f}, with a standard error of {error:.2f} for the difference. Raise the "
            "budget"
        )
    return problems


def _worst(values: dict[str, Any], statistic: Callable[[Any], np.ndarray]) -> tuple[float, str]:
    """The largest value of a statistic over sites and entries, and where."""
    largest, where = 0.0, ""
    for name, value in values.items():
        here = np.asarray(statistic(value))
        if here.size and not here.max() <= largest:
            index = np.unravel_index(np.argmax(here), here.shape)
            largest, where = float(here[index]), name + (str([int(i) for i in index]) if index else "")
    return largest, where


def largest_distance(num_entries: int) -> float:
    """By how many standard errors any mean or spread of two rounds may differ."""
    return NormalDist().inv_cdf(1.0 - 0.5 * _CHANCE / (2 * num_entries))


def _distance(this: Round, last: Round) -> tuple[float, str]:
    """The largest distance of means and of spreads, in standard errors, and of what."""
    pairs = {name: [round.values[name].astype(float) for round in (this, last)] for name in this.values}
    centred = {name: [v - 0.5 * sum(w.mean((0, 1, 2)) for w in pair) for v in pair] for name, pair in pairs.items()}
    distant = {name: [np.abs(v) for v in pair] for name, pair in centred.items()}
    (mean, of_mean), (spread, of_spread) = (_worst(values, _apart) for values in (centred, distant))
    return (mean, f"means of {of_mean}") if mean >= spread else (spread, f"spreads of {of_spread}")


def _apart(pair: Sequence[np.ndarray]) -> np.ndarray:
    """By how many standard errors the means of two rounds differ."""
    error = np.hypot(*(standard_error(values) for values in pair))
    apart = np.abs(np.subtract(*(values.mean((0, 1, 2)) for values in pair)))
    return np.where(error > 0, apart / np.where(error > 0, error, 1.0), 0.0)


def _of_moves(this: Round, names: list[str]) -> list[str]:
    """What the moves themselves say."""
    problems, last = [], this.history[-1]
    blind = last.num_blind
    if blind.max() > _BLIND * this.num_walkers * len(this.evidence.islands):
        sites = sorted({names[i] for i in np.flatnonzero(blind == blind.max())})
        problems.append(
            f"the gradient in {', '.join(sites)} is not finite at {int(blind.max())} walkers, although the density is: "
            "they cannot move. Rewrite the likelihood (jnp.where with both branches finite), or use TemperedSMC(model)"
        )
    share = _diverging(this)
    if share > _DIVERGING:
        problems.append(
            f"{share:.0%} of the moves between draws diverged. Look for a likelihood that is not finite, or write the "
            "model without a funnel (x = scale * z instead of x ~ Normal(0, scale))"
        )
    share = _stuck(this)
    if share > _STUCK:
        problems.append(
            f"{share:.1%} of the walkers are stuck in a part of the posterior that is narrower than their steps: "
            "others may not find it, all of them alike. Raise the budget, or write the model without the funnel"
        )
    return problems


def _diverging(this: Round) -> float:
    """The share of the moves between draws that diverged."""
    moves = int(this.moves.num_moves) * this.num_walkers * len(this.evidence.islands)
    return float(this.moves.num_diverging) / moves


def _stuck(this: Round) -> float:
    """The share of the walkers that accept hardly any move."""
    return float(np.mean(np.asarray(this.moves.accept_prob) < _HARDLY))
