r"""Units in which every posterior looks alike: whitened coordinates.

With the mean $m$, standard deviations $D$ and correlations $P$ of the vectors $u$,

$$u = m + D P^{1/2} w, \qquad E\, w = 0, \quad \mathrm{Cov}\, w = I,$$

where of all square roots the symmetric one keeps $w_i$ nearest to $u_i$ in its own units. Noise that is the same in all
directions then suits directions of any width: an elongated posterior, of correlation .99, is a round one. And a network
whose output is still zero is, under the target "edm", the exact denoiser of $N(0, I)$ in $w$: training starts *at* the
multivariate normal with the mean and covariance of the draws, and learns what differs from it.

References:
    Kessy, Lewin, Strimmer, Optimal whitening and decorrelation, 2018 (ZCA-cor), https://arxiv.org/abs/1512.00809.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SMALLEST = 1e-7
"""Eigenvalues of the correlations below which a direction is said to be constant."""


class Units(NamedTuple):
    """Location and factor of u = location + factor w."""

    location: jax.Array  # (d,)
    factor: jax.Array  # (d, d)

    def vector(self, w: jax.Array) -> jax.Array:
        """The vectors u, (..., d), of whitened ones."""
        return self.location + w @ self.factor.T

    def whitened(self, u: jax.Array) -> jax.Array:
        """The whitened vectors, (..., d), of others."""
        centred = jnp.reshape(u - self.location, (-1, len(self.location)))
        return jnp.linalg.solve(self.factor, centred.T).T.reshape(jnp.shape(u))

    @property
    def log_det(self) -> jax.Array:
        """Of the factor, a scalar."""
        return jnp.linalg.slogdet(self.factor)[1]


def measure(u: np.ndarray, weights: np.ndarray | None, entries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Location and factor of draws (n, d) in double precision.

    Args:
        u: draws.
        weights: of the draws, which sum to one; None for equal ones.
        entries: a name for each column.

    Raises:
        ValueError: if an entry does not vary, or some vary only together.
    """
    mean = np.average(u, axis=0, weights=weights)
    deviation = np.sqrt(np.average((u - mean) ** 2, axis=0, weights=weights))
    constant = [entry for entry, d, m in zip(entries, deviation, mean, strict=True) if not d > 1e-12 * abs(m)]
    if constant:
        raise ValueError(f"draws must vary; those of {', '.join(constant[:5])} are constant. Leave them out")
    standard = (u - mean) / deviation
    rows = standard if weights is None else standard * np.sqrt(weights * len(u))[:, None]
    values, vectors = np.linalg.eigh(rows.T @ rows / len(u))
    if values[0] < _SMALLEST:
        tied = [entry for entry, v in zip(entries, vectors[:, 0], strict=True) if abs(v) > 0.1]
        raise ValueError(
            f"draws must vary in all directions; {', '.join(tied[:5])} determine each other. Leave out what is "
            "computed from the others, such as deterministic sites, or give the support that ties them"
        )
    root = (vectors * np.sqrt(values)) @ vectors.T
    return mean, deviation[:, None] * root
