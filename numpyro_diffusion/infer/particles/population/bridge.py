r"""The evidence of a population, by Bennett's acceptance ratio from each temperature to the next.

Walkers at two temperatures, $x_i \sim \pi_\beta$ and $x'_j \sim \pi_{\beta'}$, both in equilibrium, tell the ratio of
their normalising constants twice: by reweighting the former, which fails where $\pi_{\beta'}$ reaches further than
$\pi_\beta$, and by reweighting the latter, which fails where it does not reach as far. Bennett's $c$, the solution of

$$\frac1N \sum_i \sigma\bigl((\beta' - \beta) \log L(x_i) - c\bigr) =
\frac1M \sum_j \sigma\bigl(c - (\beta' - \beta) \log L(x'_j)\bigr), \qquad \sigma(u) = \frac{1}{1 + e^{-u}},$$

takes bounded functions of both and is the estimate of least variance for as many draws of each (bridge sampling with
the optimal bridge). Unlike the product of mean weights it is not unbiased, and asks that walkers be in equilibrium.

References:
    Bennett, Efficient estimation of free energy differences from Monte Carlo data, 1976,
    https://doi.org/10.1016/0021-9991(76)90078-4.
    Meng, Wong, Simulating ratios of normalizing constants via a simple identity, 1996,
    https://www3.stat.sinica.edu.tw/statistica/oldpdf/A6n44.pdf.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from numpyro_diffusion.infer.particles.evidence import Evidence
from numpyro_diffusion.infer.particles.population.rounds import Temperature

_FAR = 40.0
"""Nats beyond all log-likelihoods, where the logistic function is zero or one."""


def bridged(history: Sequence[Temperature], log_likelihoods: Sequence[np.ndarray]) -> Evidence:
    """The evidence from log-likelihoods in equilibrium.

    Args:
        history: what happened at each temperature.
        log_likelihoods: of draws of the prior and at each temperature, (islands, draws), any number of draws each; not
            finite where the likelihood is zero.

    Returns:
        The `Evidence` of all islands together. Its error is that over islands, and what the log-likelihoods may still
        owe their equilibria.
    """
    steps = np.diff([0.0, *(float(happened.temperature) for happened in history)])
    allowed = [np.where(np.isfinite(v), v, -np.inf).astype(float) for v in log_likelihoods]
    pairs = list(zip(steps, allowed[:-1], allowed[1:], strict=True))
    value = sum(log_ratio(step, before, after) for step, before, after in pairs)
    islands = np.array(
        [
            sum(log_ratio(step, b[k] if np.isfinite(b[k]).any() else b, after[k]) for step, b, after in pairs)
            for k in range(len(allowed[0]))
        ]
    )
    lags = np.array([0.0, *(float(happened.lag) for happened in history[:-1]), 0.0])  # draws of the prior owe nothing
    error = np.hypot(np.std(islands, ddof=1) / np.sqrt(len(islands)), steps @ (lags[1:] + lags[:-1]) / 2.0)
    return Evidence(*map(jnp.asarray, (value, error, islands)))


def log_ratio(step: float, before: np.ndarray, after: np.ndarray) -> float:
    r"""Of the normalising constants of $p L^{\beta + \mathrm{step}}$ and $p L^\beta$.

    Args:
        step: of the inverse temperature, positive.
        before: log-likelihoods at the lower inverse temperature.
        after: log-likelihoods at the higher.

    Returns:
        The logarithm; minus infinity where all likelihoods at the lower one are zero.
    """
    forward, back = step * before.reshape(-1), step * after.reshape(-1)
    if not np.isfinite(forward).any():
        return -np.inf
    finite = np.r_[forward, back][np.isfinite(np.r_[forward, back])]

    def excess(c: float) -> float:
        return float(expit(forward - c).mean() - expit(c - back).mean())

    return float(brentq(excess, finite.min() - _FAR, finite.max() + _FAR))
