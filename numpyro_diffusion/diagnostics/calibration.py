r"""What the ranks of simulated truths say of a sampler: `Calibration`, the result of `SBC`.

A truth drawn from the prior, data drawn given it, and draws of the posterior: under an exact posterior the truth is one
draw among the others, and its rank is uniform. Three tests look at each site and each test quantity. Is the
distribution of the ranks uniform (bands that hold at all points at once)? Are posteriors shifted (the mean of the
normal scores)? Are they too wide or too narrow (their variance, over all entries of a site together)? One more, TARP,
looks at all sites together. A run is called miscalibrated where the smallest p-value, times the number of tests, is
below 1 %.

A verdict without power says little, so it names the smallest errors that a run of this size would have seen. Ranks of
sites alone do not see everything: a sampler that ignores the data and returns the prior has uniform ranks. The rank of
the log-likelihood, which depends on the data, sees it, and is always among the test quantities (Modrák et al. 2023).

`coverage` has the mathematics; `simulate` runs a sampler.

References:
    Modrák et al., Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes
    sensitivity, 2023, https://arxiv.org/abs/2211.02383.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import norm

from numpyro_diffusion.diagnostics.coverage import (
    Ratio,
    highest_density_coverage,
    interval_coverage,
    pointwise,
    share,
    shift_p_value,
    simulations_needed,
    spread_p_value,
    spread_skill,
    uniformity_p_value,
)

LEVEL = 0.01
"""Probability with which a calibrated sampler is called miscalibrated, over all tests together."""
LOG_JOINT = "log_joint"
TARP = "tarp"
_FEWEST = 100
_FEWEST_RANKS = 20
_LARGEST_RHAT = 1.1
_MANY = 0.05


class Test(NamedTuple):
    """One test of one site or test quantity."""

    name: str  # of the site or quantity, with the worst entry
    kind: str  # "shape", "shift" or "spread"
    p_value: float  # corrected for the entries of the site, not for the number of tests
    estimate: float  # shift in posterior standard deviations, or variance of the draws over the posterior's


@dataclass(frozen=True)
class Calibration:
    """Ranks of simulated truths among the draws of their posteriors; printed, it is a few lines of text.

    Args:
        ranks: how many of the thinned draws are below the truth, ties at random, by site and test quantity, shape
            (simulations, ...) each. Simulations in which the sampler failed are not among them.
        num_ranks: number of thinned draws L; ranks are 0 to L.
        tarp: ranks of the distances from a random point, shape (simulations,).
        truths: values of the sites, (simulations, ...).
        means: of the draws, all of them.
        deviations: standard deviations of the draws.
        num_simulations: how many were asked for.
        failures: reasons for which the sampler failed, and in which simulations.
        warnings: what samplers said of their own runs, and in which simulations.
        r_hat: the largest R-hat of ranks in each simulation, NaN for a sampler without chains.
        ess: the smallest effective sample size of ranks in each simulation.
    """

    ranks: Mapping[str, np.ndarray]
    num_ranks: int
    tarp: np.ndarray
    truths: Mapping[str, np.ndarray]
    means: Mapping[str, np.ndarray]
    deviations: Mapping[str, np.ndarray]
    num_simulations: int
    failures: Mapping[str, tuple[int, ...]]
    warnings: Mapping[str, tuple[int, ...]]
    r_hat: np.ndarray
    ess: np.ndarray

    @cached_property
    def levels(self) -> dict[str, np.ndarray]:
        """Ranks made continuous, (r + U) / (L + 1): uniform on (0, 1) under an exact posterior; those of TARP too."""
        rng, levels = np.random.default_rng(0), {}
        for name, ranks in {**self.ranks, TARP: self.tarp}.items():
            levels[name] = (ranks + rng.uniform(1e-6, 1.0 - 1e-6, np.shape(ranks))) / (self.num_ranks + 1)
        return levels

    @cached_property
    def tests(self) -> tuple[Test, ...]:
        """All tests, the smallest p-value first."""
        return tuple(sorted((t for n, u in self.levels.items() for t in self._tests(n, u)), key=lambda t: t.p_value))

    def _tests(self, name: str, levels: np.ndarray) -> list[Test]:
        if len(levels) < 2:
            return []
        flat = levels.reshape(len(levels), -1)

        def entry(index: int) -> str:
            where = np.unravel_index(index, levels.shape[1:])
            return name + (str([int(i) for i in where]) if where else "")

        extreme = pointwise(flat)
        worst = int(np.argmin(extreme))
        shape = uniformity_p_value(flat[:, worst])
        tests = [Test(entry(worst), "shape", min(1.0, float(shape) * len(extreme)), np.nan)]
        if name == TARP:  # only its shape has a meaning
            return tests
        shifts, means = shift_p_value(flat), -ndtri(flat).mean(0)
        worst = int(np.argmin(shifts))
        tests.append(Test(entry(worst), "shift", min(1.0, float(shifts[worst]) * len(shifts)), float(means[worst])))
        if name in self.truths:
            variance = np.square(self.deviations[name]).mean() / np.square(self.truths[name] - self.means[name]).mean()
        else:
            variance = 1.0 / np.square(ndtri(flat)).mean()
        return [*tests, Test(name, "spread", spread_p_value(flat), float(variance))]

    @property
    def p_value(self) -> float:
        """That a calibrated sampler does as badly in any test, corrected for their number."""
        return min(1.0, self.tests[0].p_value * len(self.tests)) if self.tests else np.nan

    @property
    def miscalibrated(self) -> bool:
        """Whether the ranks say that posteriors are wrong."""
        return self.p_value < LEVEL

    @property
    def calibrated(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What is wrong or not to be trusted, each with its cure; empty if `calibrated`."""
        return (*self._wrong(), *self._untrusted())

    def _wrong(self) -> list[str]:
        said: dict[tuple[str, str], str] = {}
        for test in self.tests:
            p = min(1.0, test.p_value * len(self.tests))
            if p < LEVEL:
                said.setdefault((test.name.split("[")[0], test.kind), f"{_sentence(test)} (p = {_short(p)})")
        slow = np.mean(self.r_hat > _LARGEST_RHAT) > _MANY
        return [line + (". Chains had not converged: run longer first" if slow else "") for line in said.values()]

    def _untrusted(self) -> list[str]:
        problems, size = [], len(self.tarp)
        for reason, where in self.failures.items():
            problems.append(f"the sampler failed in {_which(where, self.num_simulations)}: {reason}")
        for reason, where in self.warnings.items():
            problems.append(f"the sampler said in {_which(where, self.num_simulations)}: {reason}")
        if size < _FEWEST:
            problems.append(
                f"too few simulations: {size}, of at least {_FEWEST}; a shift of .2 standard deviations needs "
                f"{self.simulations_needed(shift=0.2)}"
            )
        if self.num_ranks < _FEWEST_RANKS:
            problems.append(
                f"too few effective draws: ranks are among {self.num_ranks}, of at least {_FEWEST_RANKS}. Raise "
                "num_samples"
            )
        unconverged = np.flatnonzero(self.r_hat > _LARGEST_RHAT)
        if len(unconverged) > _MANY * max(size, 1):
            problems.append(
                f"R-hat is above {_LARGEST_RHAT} in {len(unconverged)} of {size} simulations. Raise num_warmup and "
                "num_samples"
            )
        return problems

    def __str__(self) -> str:
        head = "calibrated" if self.calibrated else "NOT CALIBRATED" if self.miscalibrated else "NOT TO BE TRUSTED"
        size = len(self.tarp)
        if not self.tests:
            return "\n".join([f"{head}: no simulation to look at", *(f"- {line}" for line in self.problems)])
        worst, (shift, inflation) = self.tests[0], self.smallest_seen()
        lines = [
            f"{head}: smallest of {len(self.tests)} p-values, corrected, {_short(self.p_value)} ({worst.kind} of "
            f"{worst.name}); {size} simulations, ranks among {self.num_ranks} draws",
            f"{size} simulations show, 19 times in 20, a mean that is {shift:.2g} standard deviations off, or a "
            f"variance that is {inflation - 1.0:.0%} too large, in one entry",
        ]
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])

    def smallest_seen(self, power: float = 0.95) -> tuple[float, float]:
        """The shift, in standard deviations, and the factor of the variance, of one entry that this run would show."""
        size, strength = len(self.tarp), norm.isf(0.5 * self._level) + norm.ppf(power)
        return float(strength / np.sqrt(size)), float(np.exp(strength * np.sqrt(2.0 / size)))

    def simulations_needed(self, *, shift: float | None = None, inflation: float | None = None) -> int:
        """How many simulations, with as many tests, show an error of one entry; see `coverage.simulations_needed`."""
        return simulations_needed(shift=shift, inflation=inflation, level=self._level)

    @property
    def _level(self) -> float:
        """Of the test of one entry."""
        entries = max((int(np.prod(np.shape(ranks)[1:])) for ranks in self.ranks.values()), default=1)
        return LEVEL / max(1, len(self.tests)) / entries

    def coverage(self, probability: float = 0.9) -> dict[str, Ratio]:
        """Shares of truths in central posterior intervals, by site and quantity, with their standard errors."""
        return {name: interval_coverage(self.levels[name], probability) for name in self.ranks}

    def highest_density_coverage(self, probability: float = 0.9) -> Ratio:
        """The share of truths in the posterior's region of highest density, all sites together.

        Raises:
            ValueError: if the run has not ranked the log-density.
        """
        if LOG_JOINT not in self.ranks:
            raise ValueError("regions of highest density need ranks of the density: SBC(..., log_joint=True)")
        return highest_density_coverage(self.levels[LOG_JOINT], probability)

    def expected_coverage(self, probability: float = 0.9) -> Ratio:
        """The share of truths in balls about random points that hold as much of the posterior (TARP)."""
        return share(self.levels[TARP] <= probability)

    def spread_skill(self) -> dict[str, Ratio]:
        """The posterior's spread over the error of its mean, by site: one for an exact posterior."""
        return {n: spread_skill(self.truths[n], self.means[n], self.deviations[n]) for n in self.truths}

    def to_arviz(self) -> Any:
        """ArviZ data with a group `prior_sbc`, as `arviz_plots.plot_ecdf_pit(data, group="prior_sbc")` reads it.

        The values are `levels`, with a chain of one and the simulations as draws.
        """
        import arviz as az

        values = {name: self.levels[name][None] for name in self.ranks}
        if "posterior" in inspect.signature(az.from_dict).parameters:  # ArviZ 0.23; 1.x takes one dictionary
            data = az.InferenceData(warn_on_custom_groups=False, prior_sbc=az.convert_to_dataset(values))
        else:
            data = az.from_dict({"prior_sbc": values})
        data["prior_sbc"].attrs.update(num_ranks=self.num_ranks, num_simulations=self.num_simulations)
        return data


def _sentence(test: Test) -> str:
    """What a failed test says."""
    if test.kind == "shift":
        side = "high" if test.estimate > 0.0 else "low"
        return f"draws of {test.name} are too {side}, by {abs(test.estimate):.2g} standard deviations"
    if test.kind == "spread":
        side = "large" if test.estimate > 1.0 else "small"
        return f"the posterior variance of {test.name} is too {side}, by a factor of {test.estimate:.2g}"
    if test.name == TARP:
        return "distances from random points (TARP) do not have the ranks of an exact posterior"
    return f"ranks of {test.name} are not uniform"


def _short(p: float) -> str:
    return f"{p:.2g}" if p > 1e-6 else "below 1e-6"


def _which(where: tuple[int, ...], total: int) -> str:
    shown = ", ".join(map(str, where[:3])) + (", ..." if len(where) > 3 else "")
    return f"{len(where)} of {total} simulations ({shown})"
