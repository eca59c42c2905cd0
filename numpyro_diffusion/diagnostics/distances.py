r"""Distances between two sets of draws, and sums over all pairs of draws, of which they are made.

* sliced Wasserstein: the mean over directions $u$ of $W_1 = \int |F_{u \cdot x} - F_{u \cdot y}|$, in units of data;
* energy distance: $2 E|x - y| - E|x - x'| - E|y - y'|$, in units of the data;
* maximum mean discrepancy: $E k(x, x') + E k(y, y') - 2 E k(x, y)$, with $k$ the mean of Gaussian kernels at a quarter,
  half, one, two and four times a length scale, a pure number.

The last two are estimated without bias, so that they may be negative. None has a meaning without its floor, see
`two_sample`.

A kernel matrix $K$ of $n$ draws has $n^2$ entries. It is formed in square blocks, each used at once for all vectors of
weights $w$ of which $w^\top K w$ is asked (the statistic itself and its resampled versions) and dropped; symmetry saves
half of the blocks. So the memory is that of a few blocks and of the weights. In NumPy and double precision, whatever
JAX is set to, but for sliced Wasserstein, which can be part of a JAX program.

References:
    Rabin et al., Wasserstein barycenter and its application to texture mixing, 2011 (sliced),
    https://doi.org/10.1007/978-3-642-24785-9_37.
    Székely and Rizzo, Energy statistics, 2013, https://doi.org/10.1016/j.jspi.2013.03.018.
    Gretton et al., A kernel two-sample test, 2012, https://jmlr.org/papers/v13/gretton12a.html.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import pdist

from numpyro_diffusion import _checks, _precision

BLOCK_SIZE = 256
"""Draws on a side of a block."""
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


def as_rows(name: str, x: Any, at_least: int = 2) -> np.ndarray:
    """Draws of any event shape as a matrix (draws, dimensions) in double precision.

    Raises:
        ValueError: if there are too few, or one is not finite.
    """
    x = np.asarray(x)
    if x.ndim < 1 or len(x) < at_least:
        raise ValueError(f"{name} must be at least {at_least} draws, shape (draws, ...); got shape {x.shape}")
    x = x.astype(np.float64).reshape(len(x), -1)
    _checks.finite(name, x, "Drop these draws, and find out where they come from")
    return x


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's random numbers from a key of JAX."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1).tolist())


def median_distance(x: np.ndarray, most: int = 1000) -> float:
    """The median distance between pairs, of at most `most` rows, evenly spaced.

    Raises:
        ValueError: if it is zero.
    """
    few = x[np.linspace(0, len(x) - 1, min(len(x), most)).round().astype(int)]
    median = float(np.median(pdist(few)))
    if not median > 0:
        raise ValueError(
            "the median distance between draws is zero: at least half of them are copies. A chain that does not move? "
            "Give length_scale if the draws are meant to be like that"
        )
    return median


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Between rows, shape (len(x), len(y)); centre the rows first, or digits are lost."""
    squared = np.einsum("id,id->i", x, x)[:, None] + np.einsum("jd,jd->j", y, y) - 2.0 * (x @ y.T)
    return np.maximum(squared, 0.0, out=squared)


def quadratic_forms(block: Callable[[slice, slice], np.ndarray], weights: np.ndarray, block_size: int) -> np.ndarray:
    """The form of a symmetric kernel matrix for each of many vectors.

    Args:
        block: gives a block of the matrix for a slice of its rows and one of its columns.
        weights: shape (draws, vectors), of any type of number.
        block_size: rows and columns of a block.

    Returns:
        The forms, shape (vectors,).
    """
    _checks.at_least(1, block_size=block_size)
    total = np.zeros(weights.shape[1])
    starts = range(0, len(weights), block_size)
    for first in starts:
        rows = slice(first, first + block_size)
        left = weights[rows].astype(np.float64)
        for second in range(first, len(weights), block_size):
            columns = slice(second, second + block_size)
            right = weights[columns].astype(np.float64)
            part = np.einsum("ib,ib->b", left, block(rows, columns) @ right)
            total += part if second == first else 2.0 * part
    return total


def sliced_wasserstein(x: jax.Array, y: jax.Array, key: jax.Array, num_projections: int = 1000) -> jax.Array:
    r"""The mean $W_1$ distance between projections onto random directions.

    Args:
        x: draws, shape (n, ...).
        y: other draws, shape (m, ...).
        key: random key of the directions.
        num_projections: number of directions.

    Returns:
        A scalar, in the units of the draws; it can be computed inside `jax.jit`.

    Raises:
        ValueError: if the events differ in size.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.diagnostics import sliced_wasserstein
        >>> x = jax.random.normal(jax.random.key(0), (100, 1))
        >>> round(float(sliced_wasserstein(x, x + 2.0, jax.random.key(1))), 4)
        2.0
    """
    _checks.at_least(1, num_projections=num_projections)
    x, y = (jnp.reshape(a, (len(a), -1)) for a in (x, y))
    same_size(x, y)
    # where quantiles of either sample change, in units of 1 / (n m)
    edges = np.union1d(np.arange(len(x) + 1) * len(y), np.arange(len(y) + 1) * len(x))
    widths = np.diff(edges) / (len(x) * len(y))
    with _precision.highest():
        u = directions(key, num_projections, x.shape[1])
        first, second = (jnp.sort(u @ a.T, 1) for a in (x, y))
        gaps = jnp.abs(first[:, edges[:-1] // len(y)] - second[:, edges[:-1] // len(x)])
        return jnp.mean(gaps @ jnp.asarray(widths, gaps.dtype))


def energy_distance(x: Any, y: Any) -> float:
    r"""$2 E|x - y| - E|x - x'| - E|y - y'|$ without bias, in the units of the draws.

    Args:
        x: draws, shape (n, ...).
        y: other draws, shape (m, ...).

    Returns:
        The estimate, which may be negative.

    Raises:
        ValueError: if there are fewer than two draws, one is not finite, or the events differ in size.
    """
    return float(discrepancy(negative_distance, *both_as_rows(x, y)))


def mmd(x: Any, y: Any, length_scale: float | None = None) -> float:
    """The squared maximum mean discrepancy without bias, by Gaussian kernels at five multiples of a length scale.

    Args:
        x: draws, shape (n, ...).
        y: other draws, shape (m, ...).
        length_scale: in the units of the draws; None for the median distance of all. Results compare at the same one.

    Returns:
        The estimate, which may be negative.

    Raises:
        ValueError: if there are fewer than two draws, one is not finite, the events differ in size, or most draws are
            equal and no length scale is given.
    """
    x, y = both_as_rows(x, y)
    return float(discrepancy(gaussians(np.concatenate([x, y]), length_scale), x, y))


def both_as_rows(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> tuple[np.ndarray, np.ndarray]:
    """Two samples as `as_rows` has them, of events of one size."""
    x, y = as_rows(names[0], x), as_rows(names[1], y)
    same_size(x, y)
    return x, y


def same_size(x: Any, y: Any) -> None:
    """Raises `ValueError` unless rows of two matrices have one size."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"both samples must have events of one size; got {x.shape[1]} and {y.shape[1]} numbers")


def directions(key: jax.Array, num: int, dimension: int) -> jax.Array:
    """Random unit vectors, shape (num, dimension)."""
    u = jax.random.normal(key, (num, dimension))
    return u / jnp.linalg.norm(u, axis=1, keepdims=True)


def sliced(u: np.ndarray, x: np.ndarray, y: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """As `sliced_wasserstein`, by distribution functions: the pooled sample is sorted once for all labellings."""
    z = np.concatenate([x, y]) @ u.T
    order = z.argsort(0)
    gaps = np.diff(np.take_along_axis(z, order, 0), axis=0)
    several = labels is not None
    labels = (np.arange(len(z)) < len(x))[:, None] if labels is None else labels

    def one(label: np.ndarray) -> float:
        steps = np.where(label, 1.0 / len(x), -1.0 / len(y))[order]
        return float(np.mean(np.sum(np.abs(np.cumsum(steps, 0)[:-1]) * gaps, 0)))

    found = np.array([one(label) for label in labels.T])
    return found if several else found[0]


def discrepancy(kernel: Callable, x: np.ndarray, y: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """The unbiased discrepancy of a kernel of squared distances, for each labelling (n + m, number), by True for x."""
    z = np.concatenate([x, y])
    z = z - z.mean(0)
    several = labels is not None
    labels = (np.arange(len(z)) < len(x))[:, None] if labels is None else labels

    def block(rows: slice, columns: slice) -> np.ndarray:
        return kernel(squared_distances(z[rows], z[columns]), rows == columns)

    forms = quadratic_forms(block, np.concatenate([np.ones((len(z), 1), bool), labels, ~labels], 1), BLOCK_SIZE)
    (whole,), (first, second), n, m = forms[:1], np.split(forms[1:], 2), len(x), len(y)
    found = first / (n * (n - 1)) + second / (m * (m - 1)) - (whole - first - second) / (n * m)
    return found if several else found[0]


def negative_distance(squared: np.ndarray, same: bool) -> np.ndarray:
    """The kernel of the energy distance; a draw does not count with itself."""
    distance = -np.sqrt(squared)
    if same:
        np.fill_diagonal(distance, 0.0)
    return distance


def gaussians(x: np.ndarray, length_scale: float | None) -> Callable:
    """The kernel of `mmd`, by the median distance of `x` without a scale; a draw does not count with itself."""
    scale = median_distance(x) if length_scale is None else length_scale
    _checks.positive(length_scale=scale)

    def kernel(squared: np.ndarray, same: bool) -> np.ndarray:
        values = np.asarray(sum(np.exp(squared / (-2.0 * (c * scale) ** 2)) for c in _SCALES) / len(_SCALES))
        if same:
            np.fill_diagonal(values, 0.0)
        return values

    return kernel
