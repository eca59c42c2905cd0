r"""Do draws have the law of a score? Kernel Stein discrepancies, a test by them, and thinning.

A law $p$ is known by its score $s = \nabla \log p$ alone, without a constant and without draws. With the inverse
multiquadric kernel $k(x, y) = (1 + |x - y|^2)^\beta$, $-1 < \beta < 0$, Stein's identity makes of it a kernel

$$k_p(x, y) = k\, s(x)^\top s(y) + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k + \nabla_x \cdot \nabla_y k$$

whose mean is zero if $x$ or $y$ has the law $p$. Hence the discrepancy of the law $q$ of some draws,

$$\mathrm{KSD}^2 = E_{x, y \sim q}\, k_p(x, y) \ge 0,$$

zero if and only if $q = p$. Its V-statistic is the mean over all pairs of draws, its U-statistic that over pairs of two
different ones, without bias for independent draws. Draws are measured in units of a length scale $\ell$, their median
distance unless it is given: $x / \ell$ has the score $\ell s$, and the discrepancy no unit. Discrepancies compare at
the same $\ell$ only.

What it cannot see: a score does not tell the weights of modes that are far apart, so neither does any discrepancy made
of it. Draws of one of two such modes have a discrepancy near zero. Its power falls with the dimension.

References:
    Liu, Lee, Jordan, A kernelized Stein discrepancy for goodness-of-fit tests, 2016, https://arxiv.org/abs/1602.03253.
    Chwialkowski, Strathmann, Gretton, A kernel test of goodness of fit, 2016 (the wild bootstrap for chains),
    https://arxiv.org/abs/1602.02964.
    Gorham and Mackey, Measuring sample quality with kernels, 2017 (why this kernel), https://arxiv.org/abs/1703.01717.
    Riabiz et al., Optimal thinning of MCMC output, 2022, https://arxiv.org/abs/2005.03952.
    Wenliang and Kanagawa, Blindness of score-based methods to isolated components and mixing proportions, 2020,
    https://arxiv.org/abs/2008.10087.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, require_denoiser
from numpyro_diffusion.diagnostics.distances import (
    BLOCK_SIZE,
    as_rows,
    generator,
    median_distance,
    quadratic_forms,
    squared_distances,
)

Scores = Callable[[jax.Array], jax.Array] | Any
_CHUNK = 4096
_BLOCKS = 20
"""Blocks of multipliers below which the bootstrap is said to be rough."""


class Discrepancy(NamedTuple):
    """A squared kernel Stein discrepancy, estimated in two ways."""

    u_statistic: float  # without bias, may be negative
    v_statistic: float  # never negative; of exact draws, it is mean k_p(x, x) / draws on average
    length_scale: float  # the unit of the draws


@dataclass(frozen=True)
class SteinTest:
    """What `stein_test` finds.

    Args:
        discrepancy: the statistics.
        p_value: the share of bootstrapped statistics that are as large, or more than that.
        block_length: draws over which multipliers were correlated; 1 for independent ones.
        null: bootstrapped V-statistics, which the observed one was compared with.
        problems: why the p-value is not to be trusted; empty if nothing speaks against it.
    """

    discrepancy: Discrepancy
    p_value: float
    block_length: float
    null: np.ndarray
    problems: tuple[str, ...]

    def __str__(self) -> str:
        u, v, scale = self.discrepancy
        head = f"KSD^2 {u:.3g} (V {v:.3g}) at length scale {scale:.3g}, p = {self.p_value:.2g}"
        return "\n".join([head, *(f"- {problem}" for problem in self.problems)])


def stein_discrepancy(
    x: Any, scores: Scores, *, length_scale: float | None = None, beta: float = -0.5, block_size: int = BLOCK_SIZE
) -> Discrepancy:
    r"""The squared kernel Stein discrepancy of draws from the law of a score.

    Args:
        x: draws, shape (draws, ...).
        scores: $\nabla \log p$ at the draws, of the shape of `x`, or a function that gives it at one point.
        length_scale: the kernel's, in the units of the draws; None for their median distance.
        beta: exponent of the kernel, in (-1, 0).
        block_size: draws on a side of a block of the kernel matrix.

    Returns:
        A `Discrepancy`.

    Raises:
        ValueError: if a draw or a score is not finite, shapes differ, there are fewer than two draws, `beta` is not in
            (-1, 0), the length scale is not positive, or it is None and most draws are equal.

    Example:
        >>> import numpy as np
        >>> from numpyro_diffusion.diagnostics import stein_discrepancy
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> found = stein_discrepancy(x, -x)  # the score of N(0, I)
        >>> abs(found.u_statistic) < 0.02 < stein_discrepancy(x + 0.5, -(x + 0.5)).u_statistic
        True
    """
    points = _Points.of(x, scores, length_scale, beta)
    return points.discrepancy(quadratic_forms(points.block, np.ones((points.num_draws, 1)), block_size)[0])


def stein_test(
    x: Any,
    scores: Scores,
    key: jax.Array,
    *,
    num_chains: int = 1,
    block_length: float | None = None,
    num_bootstrap: int = 500,
    length_scale: float | None = None,
    beta: float = -0.5,
    block_size: int = BLOCK_SIZE,
) -> SteinTest:
    r"""Tests whether draws, independent or of chains, have the law of a score, by the wild bootstrap.

    The V-statistic is compared with $n^{-2} \sum_{ij} W_i W_j k_p(x_i, x_j)$, where the signs $W$ of a chain flip now
    and then: their autocorrelation after $k$ draws is $e^{-k / L}$ with $L$ the block length, which must exceed the
    time in which draws forget each other. Chains have signs of their own.

    Args:
        x: draws, shape (draws, ...); of several chains one after the other, as `MCMC.get_samples()` has them.
        scores: as in `stein_discrepancy`.
        key: random key of the signs.
        num_chains: how many chains of one length the draws are.
        block_length: $L$ above, in draws; 1 for independent signs. None takes five times the integrated autocorrelation
            time of the slowest entry of draws and scores, and 1 if all entries look independent.
        num_bootstrap: bootstrapped statistics; the smallest p-value is one over their number plus one.
        length_scale: as in `stein_discrepancy`.
        beta: as in `stein_discrepancy`.
        block_size: as in `stein_discrepancy`.

    Returns:
        A `SteinTest`.

    Raises:
        ValueError: as `stein_discrepancy`, and if the draws cannot be split into that many chains, or `block_length` is
            below one.

    Example:
        >>> import jax, numpy as np
        >>> from numpyro_diffusion.diagnostics import stein_test
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> stein_test(1.2 * x, -1.2 * x, jax.random.key(0)).p_value < 0.01  # of N(0, 1.44), against N(0, 1)
        True
    """
    _checks.at_least(1, num_chains=num_chains, num_bootstrap=num_bootstrap)
    points = _Points.of(x, scores, length_scale, beta)
    if points.num_draws % num_chains or points.num_draws < 4 * num_chains:
        raise ValueError(
            f"x must hold num_chains={num_chains} chains of one length, of at least 4 draws; "
            f"got {points.num_draws} draws"
        )
    chains = np.concatenate([points.x, points.scores], 1).reshape(num_chains, points.num_draws // num_chains, -1)
    problems: list[str] = []
    if block_length is None:
        block_length = _block_length(chains, problems)
    elif not block_length >= 1:
        raise ValueError(f"block_length must be at least 1, the number for independent draws; got {block_length}")
    if points.num_draws < _BLOCKS * block_length:
        problems.append(
            f"{points.num_draws} draws are {points.num_draws / block_length:.0f} blocks of {block_length:.0f}, of at "
            f"least {_BLOCKS}: the p-value is rough. Run longer"
        )
    signs = _signs(generator(key), chains.shape[:2], num_bootstrap, block_length)
    forms = quadratic_forms(
        points.block, np.concatenate([np.ones((points.num_draws, 1), np.int8), signs], 1), block_size
    )
    null = forms[1:] / points.num_draws**2
    p_value = (1 + np.sum(forms[1:] >= forms[0])) / (num_bootstrap + 1)
    return SteinTest(points.discrepancy(forms[0]), float(p_value), float(block_length), null, tuple(problems))


def stein_thin(
    x: Any, scores: Scores, num_points: int, *, length_scale: float | None = None, beta: float = -0.5
) -> np.ndarray:
    r"""Chooses draws that together stand for the law of a score, one by one.

    The next draw is the one that makes the discrepancy of those chosen so far least: the minimum over $i$ of
    $k_p(x_i, x_i) / 2 + \sum_{j\ \mathrm{chosen}} k_p(x_j, x_i)$. A draw may be chosen again. So draws of a biased
    chain or of a warmup are left out; weights of modes that are far apart are not restored. The time is that of
    `num_points` passes over the draws.

    Args:
        x: draws, shape (draws, ...).
        scores: as in `stein_discrepancy`.
        num_points: how many to choose.
        length_scale: as in `stein_discrepancy`.
        beta: as in `stein_discrepancy`.

    Returns:
        Indices of the chosen draws in the order of choice, shape (num_points,).

    Raises:
        ValueError: as `stein_discrepancy`, and if `num_points` is below one.

    References:
        Riabiz et al., Optimal thinning of MCMC output, 2022, https://arxiv.org/abs/2005.03952.
    """
    _checks.at_least(1, num_points=num_points)
    points = _Points.of(x, scores, length_scale, beta)
    objective = 0.5 * points.diagonal()
    chosen = np.empty(num_points, int)
    for i in range(num_points):
        chosen[i] = np.argmin(objective)
        objective += points.block(slice(chosen[i], chosen[i] + 1), slice(None))[0]
    return chosen


def score_function(denoiser: Denoiser, noise_level: float | None = None) -> Callable[[jax.Array], jax.Array]:
    r"""The score of a denoiser's law under a little noise, as a function of one point.

    It is the score of $x + \lambda \varepsilon$ with $x$ of the law and $\lambda$ the noise level, so that clean draws
    have a discrepancy from it even if they are exact: for $N(0, s^2)$ the score is that of $s^2 + \lambda^2$. There is
    no such bias if draws are given the same noise: `x + noise_level * normal`.

    Args:
        denoiser: the model, learned or exact. Of a NumPyro model or a prior, see `infer.joint_scores`.
        noise_level: $\lambda$, in the units of the data; None for the smallest of the schedule.

    Returns:
        A function from a point of `event_shape` to its score.

    Raises:
        TypeError: if `denoiser` is not one.
        ValueError: if the noise level is not among those of the schedule.
    """
    schedule = require_denoiser(denoiser).schedule
    t = schedule.t_min if noise_level is None else float(schedule.inverse_noise_level(noise_level))
    if not schedule.t_min - 1e-6 <= t <= schedule.t_max + 1e-6:
        lowest, highest = (float(schedule.noise_level(t)) for t in (schedule.t_min, schedule.t_max))
        raise ValueError(f"noise_level must lie in [{lowest:.3g}, {highest:.3g}], the schedule's; got {noise_level}")
    alpha = schedule.alpha(t)
    return lambda x: alpha * denoiser(alpha * x, t).score


class _Points(NamedTuple):
    """Draws with their scores in units of the length scale, and the Stein kernel between them."""

    x: np.ndarray  # (draws, d), centred
    scores: np.ndarray  # (draws, d)
    beta: float
    length_scale: float

    @classmethod
    def of(cls, x: Any, scores: Scores, length_scale: float | None, beta: float) -> "_Points":
        if not -1.0 < beta < 0.0:
            raise ValueError(f"beta must lie in (-1, 0), or the discrepancy does not tell laws apart; got {beta}")
        rows = as_rows("x", x)
        if callable(scores):
            at_points, x = jax.jit(jax.vmap(scores)), jnp.asarray(x, jnp.result_type(float))
            scores = np.concatenate([at_points(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])
        if np.shape(scores) != np.shape(x):
            raise ValueError(f"scores must have the shape of x, {np.shape(x)}; got {np.shape(scores)}")
        scores = as_rows("scores", scores)
        if length_scale is None:
            length_scale = median_distance(rows)
        _checks.positive(length_scale=length_scale)
        return cls((rows - rows.mean(0)) / length_scale, scores * length_scale, beta, length_scale)

    @property
    def num_draws(self) -> int:
        return len(self.x)

    def diagonal(self) -> np.ndarray:
        """The kernel of each draw with itself, (draws,)."""
        return np.einsum("id,id->i", self.scores, self.scores) - 2.0 * self.beta * self.x.shape[1]

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """The kernel between two slices of the draws."""
        x, y, s, r = self.x[rows], self.x[columns], self.scores[rows], self.scores[columns]
        inverse = 1.0 / (1.0 + squared_distances(x, y))
        kernel = inverse ** (-self.beta)
        along = np.einsum("id,id->i", s, x)[:, None] + np.einsum("jd,jd->j", r, y)  # (s - r) . (x - y), and d
        along -= s @ y.T
        along -= x @ r.T
        along += x.shape[1]
        along -= 2.0 * (1.0 - self.beta) * (1.0 - inverse)
        along *= -2.0 * self.beta * inverse
        along += s @ r.T
        along *= kernel
        return along

    def discrepancy(self, total: float) -> Discrepancy:
        count = self.num_draws
        u = (total - self.diagonal().sum()) / (count * (count - 1))
        return Discrepancy(float(u), float(total / count**2), float(self.length_scale))


def _block_length(chains: np.ndarray, problems: list[str]) -> float:
    """From the effective sample size of the worst entry of draws (chains, draws, entries)."""
    moving = chains[:, :, chains.std((0, 1)) > 0]
    if moving.shape[2] == 0:
        problems.append("all draws are equal: nothing is known of their dependence. Give block_length")
        return 1.0
    sizes = effective_sample_size(moving)
    size, count = float(np.min(sizes)) if np.all(np.isfinite(sizes)) else 1.0, chains.shape[0] * chains.shape[1]
    # the estimate has an error of its own: independent draws may look a little dependent
    return 1.0 if size > 0.8 * count else 5.0 * count / max(size, 1.0)


def _signs(rng: np.random.Generator, shape: tuple[int, int], num: int, block_length: float) -> np.ndarray:
    """Signs of chains, shape (chains * draws, num), whose autocorrelation falls to 1 / e in a block."""
    flips = 0.5 if block_length == 1 else -0.5 * np.expm1(-1.0 / block_length)
    changes = rng.random((*shape, num), np.float32) < flips
    changes[:, 0] = rng.random((shape[0], num)) < 0.5
    odd = np.logical_xor.accumulate(changes, 1)
    return (1 - 2 * odd.astype(np.int8)).reshape(-1, num)
