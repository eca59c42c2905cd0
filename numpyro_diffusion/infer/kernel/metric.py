r"""A metric from a population: one preconditioner for all walkers, dense or of low rank beside a diagonal.

A metric is a positive definite matrix, an estimate of the covariance of the target,

$$C = S \bigl(I + U (\Lambda - I) U^\top\bigr) S,$$

with scales $S$, orthonormal columns $U$ of shape (D, k) and eigenvalues $\Lambda$. Its symmetric root in units of the
scales takes a momentum $p \sim N(0, I)$ to a displacement, $S (I + U (\Lambda^{1/2} - I) U^\top) p$, and a gradient to
the momentum's coordinates.

Up to some two hundred dimensions the sample covariance of the walkers is used whole, $k = D$, shrunk towards its
diagonal in proportion to $D / (D + 2 N)$. Beyond that it says too little: what matters in noise space is the few
directions that the data narrow, the smallest of its eigenvalues, which $N < D$ walkers do not show. Their gradients do:
for a Gaussian target $\mathrm{Cov}[\nabla \log \pi] = C^{-1}$, so the narrow directions are the *largest* eigenvalues
there. Those beyond the edge $(1 + \sqrt{D / N})^2$ of noise are kept, and divided by it: a narrow direction is taken to
be wider than it is.

References:
    Marchenko and Pastur, Distribution of eigenvalues for some sets of random matrices, 1967,
    https://doi.org/10.1070/SM1967v001n04ABEH001994.
    Seyboldt, Carlson, Carpenter, Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence, 2026
    (scales and directions from draws and gradients), https://arxiv.org/abs/2603.18845.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DENSE_UP_TO = 200
"""Dimensions up to which the covariance is used whole."""
_RANK = 32
_SMALLEST = 1e-12


class Metric(NamedTuple):
    """A preconditioner of D dimensions."""

    scale: jax.Array  # (D,)
    vectors: jax.Array  # orthonormal columns, (D, k)
    roots: jax.Array  # square roots of their eigenvalues, in units of the scales, (k,)

    def push(self, momentum: jax.Array) -> jax.Array:
        """From momenta (..., D) to displacements."""
        return self.scale * self._root(momentum)

    def pull(self, gradient: jax.Array) -> jax.Array:
        """From gradients (..., D) to the coordinates of momenta."""
        return self._root(self.scale * gradient)

    def _root(self, v: jax.Array) -> jax.Array:
        return v + ((v @ self.vectors) * (self.roots - 1.0)) @ self.vectors.T


def estimate(q: jax.Array, gradient: jax.Array) -> Metric:
    """The metric of a population.

    Args:
        q: points, (N, D).
        gradient: of the target's log-density there, (N, D); where it is not finite it counts as zero.

    Returns:
        The metric; that of the identity in directions in which nothing varies.
    """
    number, size = q.shape
    gradient = jnp.where(jnp.isfinite(gradient).all(1, keepdims=True), gradient, 0.0)
    spread, steepness = jnp.var(q, 0), jnp.var(gradient, 0)
    if size <= DENSE_UP_TO:
        scale = jnp.sqrt(jnp.where(spread > _SMALLEST, spread, 1.0))
        standardised = (q - q.mean(0)) / scale
        own = number / (number + 0.5 * size)
        correlation = own * standardised.T @ standardised / number + (1.0 - own) * jnp.eye(size)
        values, vectors = jnp.linalg.eigh(correlation)
        return Metric(scale, vectors, jnp.sqrt(jnp.maximum(values, _SMALLEST)))
    known = (spread > _SMALLEST) & (steepness > _SMALLEST)
    scale = jnp.where(known, jnp.where(known, spread / steepness, 1.0) ** 0.25, 1.0)
    standardised = (gradient - gradient.mean(0)) * scale
    values, rows = jnp.linalg.eigh(standardised @ standardised.T / number)  # of the N x N matrix: N < D or nearly so
    rank = min(_RANK, number)
    values, rows = values[-rank:], rows[:, -rank:]
    vectors = standardised.T @ rows / jnp.sqrt(number * jnp.maximum(values, _SMALLEST))
    edge = (1.0 + jnp.sqrt(size / number)) ** 2 * jnp.mean((standardised**2).mean(0))
    roots = jnp.where(values > edge, jnp.sqrt(edge / jnp.maximum(values, edge)), 1.0)
    return Metric(scale, vectors, roots)
