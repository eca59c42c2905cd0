r"""Agreement of groups of short chains: nested R-hat, and what two runs owe each other.

Many short chains cannot be judged one by one. Chains on an *island* (a superchain) share what they started from;
islands share nothing. With $K$ islands of $M$ chains of $N$ draws, $\bar x_k$ the mean of island $k$,

$$\hat R = \sqrt{1 + \frac{B}{W}}, \qquad B = \mathrm{var}_k\, \bar x_k, \qquad
W = \frac1K \sum_k \bigl(\mathrm{var}_m\, \bar x_{km} + \mathrm{mean}_m\, \mathrm{var}_n\, x_{kmn}\bigr),$$

which tends to 1 with $M N$, where the R-hat of single chains needs long chains. It says how far means of islands differ
in units of the target's standard deviation: $\hat R = 1.01$ is a standard error of $0.14 / \sqrt K$.

References:
    Margossian et al., Nested R-hat: assessing the convergence of Markov chain Monte Carlo when running many short
    chains, 2022, https://arxiv.org/abs/2110.13017.
"""

import numpy as np


def nested_rhat(draws: np.ndarray) -> np.ndarray:
    """The nested R-hat of islands of chains.

    Args:
        draws: shape (islands, chains, draws, ...), at least two islands and two chains or two draws.

    Returns:
        An array of the trailing shape; 1 where nothing varies.

    Raises:
        ValueError: if there is only one island, or one draw of one chain on each.

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
    between, within = variances(draws)
    return np.sqrt(
        1.0 + np.where(within > 0, between / np.where(within > 0, within, 1.0), np.where(between > 0, np.inf, 0.0))
    )


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
    """Of the mean over all islands, from their spread, of the trailing shape.

    The variance of a handful of islands is itself noisy, so that of each coordinate counts half, and the mean over
    coordinates, in units of their variance, counts half.
    """
    between, within = variances(draws)
    common = np.mean(between[within > 0] / within[within > 0]) if np.any(within > 0) else 0.0
    return np.sqrt(0.5 * (between + common * within) / draws.shape[0])
