r"""Moves that are summed over one scalar site, such as an unknown noise level, on a lattice of its values.

A scale $\sigma$ of precise data and what the data are of form a funnel: the smaller $\sigma$, the narrower the rest,
and no step size serves all of it. With $u$ the unconstrained coordinate of the site and $w$ all others, the lattice
through $u$ is

$$A(u) = \{u + j \Delta : j \in \mathbb Z\} \cap [a, a + K \Delta),$$

the same for all its members. With a second one, moved by a uniform shift, $B = A(u) \cup A(u + \delta)$: every member
has the same chance of it. Moves of $w$ that leave $Z_B(w) = \sum_{v \in B} \pi(w, v)$ invariant, and then a draw of $u$
from $B$ in proportion to $\pi(w, \cdot)$, leave $\pi$ invariant: it is Gibbs sampling with $u$ collapsed, given $B$. So
nothing is approximated, however coarse the lattices are; coarse ones only help less, and by the shift $u$ takes all
values. Where $u$ lies outside of the interval, it is its own lattice.

The flow is solved once for all values: where nothing but the likelihood and the priors of other sites depend on the
site, a sum costs as many evaluations of those.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.structure import LatentSite, Structure
from numpyro_diffusion.infer.noise.vector import NoiseVector

NUM_NODES = 32
"""Of each of the two lattices."""
_DEAREST = 1.5
"""Cost of a sum over the lattice, in evaluations at one value, up to which it is worth it."""
_LINEAR_ALGEBRA = dict.fromkeys(["cholesky", "triangular_solve", "lu", "qr", "eigh", "svd", "householder_product"], 1e3)
"""What a number takes that a library is called for, many small calls on a lattice."""
_MARGIN = 0.1


class Lattice(NamedTuple):
    """An interval of a site's unconstrained coordinate, cut into `NUM_NODES` cells."""

    low: jax.Array
    spacing: jax.Array

    def around(self, u: jax.Array, shift: jax.Array) -> jax.Array:
        """The nodes of a value's lattice and of one that is moved by a share of the spacing, (2 NUM_NODES,)."""
        return jnp.concatenate([self.through(u), self.through(self.shifted(u, shift))])

    def through(self, u: jax.Array) -> jax.Array:
        """The nodes of the lattice of a value, (NUM_NODES,); copies of it where it lies outside."""
        cell = (u - self.low) / self.spacing
        nodes = self.low + (cell - jnp.floor(cell) + jnp.arange(NUM_NODES)) * self.spacing
        return jnp.where((cell >= 0) & (cell < NUM_NODES), nodes, u)

    def shifted(self, u: jax.Array, shift: jax.Array) -> jax.Array:
        """A value whose lattice is that of another moved by a share of the spacing; the same where it lies outside."""
        cell = (u - self.low) / self.spacing
        moved = jnp.floor(cell) + (cell + shift) % 1.0
        return jnp.where((cell >= 0) & (cell < NUM_NODES), self.low + moved * self.spacing, u)


def lattice_of(u: jax.Array) -> Lattice:
    """A lattice that covers a population's values, (N,)."""
    low, high = u.min(), u.max()
    margin = _MARGIN * jnp.maximum(high - low, 1e-3)
    return Lattice(low - margin, (high - low + 2.0 * margin) / NUM_NODES)


def site_to_sum(reading: Reading) -> str | None:
    """The site that moves had better be summed over; None if there is none.

    It is a scalar on which no diffusion prior depends, and a sum over it must cost little beside the flow. Scales of
    Gaussian observations come first, then other positive sites, then any.
    """
    structure = reading.structure
    fits = [name for name in structure.others if can_be_summed(structure, name)]
    scales = set().union(*(law.spread_depends_on for law in structure.observed.values() if law.is_normal))
    fits.sort(key=lambda name: (name not in scales, not _is_positive(structure.latent[name])))
    return fits[0] if fits and _relative_cost(NoiseVector(reading), fits[0]) < _DEAREST else None


def can_be_summed(structure: Structure, name: str) -> bool:
    """Whether a site is a scalar on which no diffusion prior depends, in a model that has some."""
    site = structure.latent[name]
    is_scalar = site.unconstrained_shape == () and not (site.is_diffusion or site.is_discrete)
    return is_scalar and bool(structure.diffusion) and not structure.dependent


def _is_positive(site: LatentSite) -> bool:
    return site.support in (constraints.positive, constraints.nonnegative)


def _relative_cost(coordinates: NoiseVector, name: str) -> float:
    """How many times as many operations the model takes on a lattice as at one value."""
    q, nodes = jnp.zeros(coordinates.size), jnp.zeros(2 * NUM_NODES)
    one = jax.make_jaxpr(lambda q: sum(coordinates.log_density(q)))(q)
    on_lattice = jax.make_jaxpr(lambda q, nodes: sum(coordinates.along(q, name, nodes)))(q, nodes)
    return _operations(on_lattice.jaxpr) / _operations(one.jaxpr)


def _operations(program: Any) -> float:
    """Roughly: numbers that are computed, times what a number of such a kind takes."""
    total = 1.0
    for equation in program.eqns:
        name, size = equation.primitive.name, sum(getattr(out.aval, "size", 1) for out in equation.outvars)
        inner = [leaf for leaf in jax.tree.leaves(equation.params, is_leaf=_is_program) if _is_program(leaf)]
        if inner:
            each = max if name == "cond" else sum
            total += equation.params.get("length", 1) * each(_operations(getattr(p, "jaxpr", p)) for p in inner)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2.0 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        else:
            total += _LINEAR_ALGEBRA.get(name, 1.0) * size
    return total


def _is_program(leaf: Any) -> bool:
    return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
