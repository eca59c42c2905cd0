r"""A metric from a population: one preconditioner for all walkers, dense or of low rank beside a diagonal.

A metric is a positive definite matrix, an estimate of the covariance of the target,

$$C = S \bigl(I + U (\Lambda - I) U^\top\bigr) S,$$

with scales $S$, orthonormal columns $U$ of shape (D, k) and eigenvalues $\Lambda$. Its symmetric root in units of the
scales takes a momentum $p \sim N(0, I)$ to a displacement, $S (I + U (\Lambda^{1/2} - I) U^\top) p$, and a gradient to
the momentum's coordinates.

Both draws and gradients speak of it: for a Gaussian target $\mathrm{Cov}[q] = C$ and
$\mathrm{Cov}[\nabla \log \pi] = C^{-1}$. Draws say how far the target reaches, gradients how narrow it is where it is.
On a curved target the two differ, and what bounds the steps is the second. Up to some two hundred dimensions the metric
is the geometric mean of the two estimates,

$$C = A \mathbin{\#} B^{-1} = A^{1/2} (A^{1/2} B A^{1/2})^{-1/2} A^{1/2},$$

which minimises the Fisher divergence from the target to a Gaussian law. For a Gaussian target it is exact whatever the
draws, since $B = C^{-1} A C^{-1}$ then. With fewer than two walkers a dimension both are shrunk towards their diagonal.
Gradients beyond some times their median count as that: the neck of a funnel is not to set the metric of all.

Beyond two hundred dimensions draws say too little: what matters in noise space is the few directions that the data
narrow, the smallest eigenvalues of $C$, which $N < D$ walkers do not show. Their gradients do: the narrow directions
are the *largest* eigenvalues there. Those beyond the edge $(1 + \sqrt{D / N})^2$ of noise are kept, and divided by it:
a narrow direction is taken to be wider than it is.

References:
    Marchenko and Pastur, Distribution of eigenvalues for some sets of random matrices, 1967,
    https://doi.org/10.1070/SM1967v001n04ABEH001994.
    Seyboldt, Carlson, Carpenter, Preconditioning Hamiltonian Monte Carlo by minimizing Fisher divergence, 2026
    (the geometric mean of the covariances of draws and gradients), https://arxiv.org/abs/2603.18845.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

DENSE_UP_TO = 200
"""Dimensions up to which the covariance is used whole."""
_FLOOR = 1e-6
"""Smallest eigenvalue of a correlation, as a share of the largest."""
_RANK = 32
_SMALLEST = 1e-12
_STEEPEST = 4.0
"""Length of a gradient, in medians, beyond which it is shortened to that."""


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
    if size <= DENSE_UP_TO:
        return _dense(q, gradient)
    spread, steepness = jnp.var(q, 0), jnp.var(gradient, 0)
    _, scale = _scale(spread, steepness)
    standardised = (gradient - gradient.mean(0)) * scale
    _, singular, rows = jnp.linalg.svd(standardised, full_matrices=False)  # of the smaller side, whichever it is
    values, vectors = singular[:_RANK] ** 2 / number, rows[:_RANK].T
    edge = (1.0 + jnp.sqrt(size / number)) ** 2 * jnp.mean((standardised**2).mean(0))
    roots = jnp.where(values > edge, jnp.sqrt(edge / jnp.maximum(values, edge)), 1.0)
    return Metric(scale, vectors, roots)


def _dense(q: jax.Array, gradient: jax.Array) -> Metric:
    """The geometric mean of what draws and gradients say."""
    number, size = q.shape
    spread = jnp.var(q, 0)
    steep = jnp.linalg.norm(gradient * jnp.sqrt(spread), axis=1, keepdims=True)
    gradient = gradient * jnp.minimum(1.0, _STEEPEST * jnp.median(steep) / jnp.maximum(steep, _SMALLEST))
    known, scale = _scale(spread, jnp.var(gradient, 0))

    def correlation(points: jax.Array) -> jax.Array:
        points = points - points.mean(0)
        own = 1.0 if number >= 2 * size else number / (number + 0.5 * size)
        whole = points.T @ points / number
        return own * whole + jnp.diag(jnp.where(known, (1.0 - own) * jnp.diag(whole), 1.0))

    root = _power(correlation(q / scale), 0.5)
    values, vectors = jnp.linalg.eigh(root @ _power(root @ correlation(gradient * scale) @ root, -0.5) @ root)
    return Metric(scale, vectors, jnp.sqrt(jnp.maximum(values, _SMALLEST)))


def _scale(spread: jax.Array, steepness: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where something varies, and the scales by which draws and gradients vary alike."""
    known = (spread > _SMALLEST) & (steepness > _SMALLEST)
    return known, jnp.where(known, jnp.where(known, spread / steepness, 1.0) ** 0.25, 1.0)


def _power(matrix: jax.Array, exponent: float) -> jax.Array:
    """A power of a positive definite matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors * jnp.maximum(values, _FLOOR * values[-1]) ** exponent @ vectors.T
