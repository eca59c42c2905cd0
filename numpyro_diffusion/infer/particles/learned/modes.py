r"""The modes that chains have found, as a mixture of normal laws.

A local kernel mixes within a mode, and seldom leaves it. So the chains say what the modes are: those whose means agree,
within what their halves differ by, are in one; chains that still move are left out. The mixture starts with a part for
each such group, and is fitted to all draws by expectation and maximisation,

$$r_{ij} \propto w_j N(x_i; \mu_j, S_j), \qquad w_j = \frac{n_j}{n}, \quad
\mu_j = \frac{1}{n_j} \sum_i r_{ij} x_i, \quad
S_j = \frac{1}{n_j} \sum_i r_{ij} (x_i - \mu_j)(x_i - \mu_j)^\top, \quad n_j = \sum_i r_{ij}.$$

A mode in 50 dimensions has 1225 correlations, and may have a few hundred draws. So those of each part are multiplied by
$1 - \gamma_j$, where $\gamma_j = \min(1, \sum (1 - r^2)^2 / (n_j - 1) / \sum r^2)$ is 1 where all look like chance.
Parts are split along their longest axis, all at once, for as long as draws held out gain by it: no mode need be normal.

References:
    Schäfer and Strimmer, A shrinkage approach to large-scale covariance matrix estimation, 2005,
    https://doi.org/10.2202/1544-6115.1175.
"""

import numpy as np

FEWEST = 100
"""Draws below which nothing is learned."""
MOST_PARTS = 96
_ROWS = 12_000
_STEPS, _STEPS_SPLIT = 5, 20
_ROWS_A_DIMENSION = 5
"""Of each part that others are split into."""
_GAIN = 0.03
"""Nats that a draw held out must gain by a split."""
_SETTLED = 1e-3
"""Share of the rows that may still change parts when the steps end."""
_SMALLEST_WEIGHT = 1e-4
_DEFENSIVE, _WIDER = 0.02, 1.5
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weights (J,), means (J, d), covariances (J, d, d)."""


def find(draws: np.ndarray, rng: np.random.Generator) -> Parts:
    """The modes of standardised draws.

    Args:
        draws: of each chain, (chains, n, d).
        rng: random numbers.
    """
    grouped = [draws[group].reshape(-1, draws.shape[-1]) for group in groups(draws)]
    rows = thinned(np.concatenate(grouped), rng)
    held_out, rows = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    counts, means = np.array([float(len(own)) for own in grouped]), np.stack([own.mean(0) for own in grouped])
    squares = np.stack([(own - mean).T @ (own - mean) for own, mean in zip(grouped, means, strict=True)])
    parts = refine(rows, (counts / counts.sum(), means, _covariances(squares, counts)), _STEPS)
    best = score(held_out, parts)
    while 2 * len(parts[0]) <= min(MOST_PARTS, len(rows) // (_ROWS_A_DIMENSION * rows.shape[1])):
        finer = refine(rows, _split(parts), _STEPS_SPLIT)
        gained = score(held_out, finer)
        if not gained > best + _GAIN:
            break
        parts, best = finer, gained
    return parts


def groups(draws: np.ndarray) -> list[list[int]]:
    """Chains that are in one mode, by their means; the largest groups first."""
    half = draws.shape[1] // 2
    variances = draws.var(1)
    variances += 1e-3 * np.median(variances, 0) + 1e-12
    drift = np.sum((draws[:, :half].mean(1) - draws[:, half:].mean(1)) ** 2 / variances, -1) / 4.0
    limit = 9.0 + 8.0 * float(np.median(drift))
    found: list[list[int]] = []
    means, leaders = draws.mean(1), np.zeros(0, int)
    for chain in np.argsort(drift, kind="stable"):
        if drift[chain] > limit and found:
            break
        within = 0.5 * (variances[chain] + variances[leaders])
        distance = np.sum((means[chain] - means[leaders]) ** 2 / within, -1)
        if len(found) and distance.min() < limit:
            found[int(distance.argmin())].append(int(chain))
        else:
            found.append([int(chain)])
            leaders = np.append(leaders, chain)
    return sorted(found, key=len, reverse=True)[:MOST_PARTS]


def refine(rows: np.ndarray, parts: Parts, steps: int) -> Parts:
    """Steps of expectation and maximisation, at most so many, rows (n, d)."""
    before = np.zeros(())
    for _ in range(steps):
        log_parts = _log_parts(rows, parts)
        shares = np.exp(log_parts - log_parts.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        if np.abs(shares - before).sum() < _SETTLED * len(rows):
            break
        before = shares
        counts = shares.sum(0)
        means = np.where(counts[:, None] > 1e-3, shares.T @ rows / np.maximum(counts, 1e-9)[:, None], parts[1])
        squares = np.empty_like(parts[2])
        for j, (mean, share) in enumerate(zip(means, shares.T, strict=True)):
            near = share > 1e-6
            off = rows[near] - mean
            squares[j] = off.T @ (share[near, None] * off)
        weights = np.maximum(counts / len(rows), _SMALLEST_WEIGHT)
        parts = weights / weights.sum(), means, _covariances(squares, counts)
    return parts


def score(rows: np.ndarray, parts: Parts) -> float:
    """Mean log-density of rows."""
    log_parts = _log_parts(rows, parts)
    largest = log_parts.max(1, keepdims=True)
    return float(np.mean(largest[:, 0] + np.log(np.exp(log_parts - largest).sum(1))))


def defended(parts: Parts) -> Parts:
    """With a part that is wider than all, so that no weight is without bound."""
    weights, means, covariances = parts
    d = means.shape[1]
    return (
        np.append((1.0 - _DEFENSIVE) * weights, _DEFENSIVE),
        np.concatenate([means, np.zeros((1, d))]),
        np.concatenate([covariances, _WIDER**2 * np.eye(d)[None]]),
    )


def thinned(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many rows as a fit takes, in random order."""
    return rows[rng.permutation(len(rows))[:_ROWS]]


def _covariances(squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Covariances of parts, (J, d, d), from sums of squares about their means and numbers of draws."""
    d = squares.shape[-1]
    pooled = np.einsum("jii->i", squares) / counts.sum() + 1e-9
    variances = (np.einsum("jii->ji", squares) + pooled) / (counts + 1.0)[:, None]
    scales = np.sqrt(variances)
    found = np.empty_like(squares)
    for j, scale in enumerate(scales):
        r = squares[j] / np.maximum(counts[j], 1.0) / np.outer(scale, scale) * (1.0 - np.eye(d))
        noise = np.sum((1.0 - r**2) ** 2 * (1.0 - np.eye(d))) / max(counts[j] - 1.0, 1e-3)
        kept = max(0.0, 1.0 - noise / max(np.sum(r**2), 1e-12))
        found[j] = (kept * 0.999 * r + np.eye(d)) * np.outer(scale, scale)
    return found


def _log_parts(rows: np.ndarray, parts: Parts) -> np.ndarray:
    """Log-density of each row in each part, with its weight, (n, J)."""
    found = np.empty((len(rows), len(parts[0])))
    for j, (weight, mean, covariance) in enumerate(zip(*parts, strict=True)):
        values, vectors = np.linalg.eigh(covariance)
        values = np.maximum(values, 1e-12)
        standard = (rows - mean) @ (vectors / np.sqrt(values))
        constant = np.log(weight) - 0.5 * np.log(2.0 * np.pi * values).sum()
        found[:, j] = constant - 0.5 * np.square(standard).sum(1)
    return found


def _split(parts: Parts) -> Parts:
    """Each part in two, moved apart along its longest axis."""
    weights, means, covariances = parts
    values, vectors = np.linalg.eigh(covariances)
    move = np.sqrt(values[:, -1:]) * vectors[:, :, -1]
    inner = covariances - 0.5 * np.einsum("ji,jk->jik", move, move)
    return (
        np.tile(weights / 2.0, 2),
        np.concatenate([means + 0.7 * move, means - 0.7 * move]),
        np.tile(inner, (2, 1, 1)),
    )
