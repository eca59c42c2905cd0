r"""Named sites with supports as one real vector, and back.

Each site $\theta_k$ has a support, to which NumPyro's bijection $T_k$ maps real numbers. The vector is

$$u = \left( T_1^{-1}(\theta_1), \ldots, T_K^{-1}(\theta_K) \right) \in \mathbb R^d,$$

each part flattened, in the order of the sites. A simplex of three entries takes two of the $d$ numbers. Whatever the
vector is, what it is mapped to lies in the supports.

A `Layout` also writes itself as plain JSON values, for checkpoints: supports by names of NumPyro's own constraints, of
which only those with a bijection are known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost

from numpyro_diffusion import _files, _precision

_ROUND_TRIP = 1e-3
"""By how much a value may differ from what its support makes of it: single precision, sums to one."""
_SUPPORTS = {
    type(support).__name__.strip("_"): type(support)
    for support in (
        *(constraints.real, constraints.real_vector, constraints.real_matrix),
        *(constraints.positive, constraints.nonnegative, constraints.softplus_positive),
        *(constraints.unit_interval, constraints.interval(0.0, 1.0), constraints.open_interval(0.0, 1.0)),
        *(constraints.greater_than(0.0), constraints.greater_than_eq(0.0)),
        *(constraints.less_than(0.0), constraints.less_than_eq(0.0)),
        *(constraints.simplex, constraints.ordered_vector, constraints.positive_ordered_vector, constraints.l1_ball),
        *(constraints.corr_cholesky, constraints.corr_matrix, constraints.positive_definite),
        *(constraints.lower_cholesky, constraints.scaled_unit_lower_cholesky, constraints.softplus_lower_cholesky),
    )
}
"""By name: all that can be bijected to and has no other parameters than bounds."""


@dataclass(frozen=True, eq=False)
class Site:
    """A site: its name, its shape in one draw, and the support of a value of that shape.

    Args:
        name: of the site.
        shape: of one value.
        support: of each event in it; leading dimensions are independent.
    """

    name: str
    shape: tuple[int, ...]
    support: Constraint

    @property
    def bijection(self) -> Transform:
        """From real numbers to the support."""
        return biject_to(self.support)

    @property
    def real_shape(self) -> tuple[int, ...]:
        """Shape of one value in unconstrained coordinates."""
        return tuple(self.bijection.inverse_shape(self.shape))

    @property
    def size(self) -> int:
        """Real numbers behind one value."""
        return math.prod(self.real_shape)

    @property
    def is_real(self) -> bool:
        """Whether the value is its own unconstrained coordinates."""
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support == constraints.real

    @property
    def entries(self) -> list[str]:
        """A name for each real number: that of the site, and the index of the entry, if there are several."""
        return [
            self.name + (f"[{','.join(map(str, index))}]" if index else "") for index in np.ndindex(self.real_shape)
        ]

    def describe(self) -> dict[str, Any]:
        """The site as plain JSON values."""
        return {"name": self.name, "shape": list(self.shape), "support": _describe(self.support)}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> "Site":
        """The site that `describe` described.

        Raises:
            KeyError: if its support is not known.
        """
        return cls(str(described["name"]), tuple(map(int, described["shape"])), _read(described["support"]))

    @cached_property
    def _text(self) -> str:
        return _files.canonical(self.describe())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True)
class Layout:
    """Sites in the order in which they make one vector.

    Args:
        sites: at least one.
    """

    sites: tuple[Site, ...]

    @property
    def size(self) -> int:
        """Real numbers in all."""
        return sum(site.size for site in self.sites)

    @property
    def names(self) -> list[str]:
        """Of the sites."""
        return [site.name for site in self.sites]

    @property
    def entries(self) -> list[str]:
        """A name for each real number."""
        return [entry for site in self.sites for entry in site.entries]

    def constrain(self, u: jax.Array) -> dict[str, jax.Array]:
        """Values by site, (..., *shape), of vectors (..., size)."""
        return {site.name: site.bijection(part) for site, part in self._parts(u)}

    def log_det(self, u: jax.Array) -> jax.Array:
        """The logarithm of the Jacobian determinant of `constrain`, (...), of vectors (..., size)."""
        total = jnp.zeros(jnp.shape(u)[:-1])
        for site, part in self._parts(u):
            found = site.bijection.log_abs_det_jacobian(part, site.bijection(part))
            total += sum_rightmost(found, jnp.ndim(found) - jnp.ndim(total))
        return total

    def unconstrain(self, values: Mapping[str, ArrayLike]) -> jax.Array:
        """Vectors (..., size) of values by site, (..., *shape)."""
        parts = []
        for site in self.sites:
            part = site.bijection.inv(jnp.asarray(values[site.name]))
            parts.append(part.reshape(*part.shape[: part.ndim - len(site.real_shape)], site.size))
        return jnp.concatenate(parts, -1)

    def rows(self, draws: Mapping[str, np.ndarray]) -> np.ndarray:
        """Draws (n, *shape) as vectors (n, size) in double precision, checked to lie in their supports.

        Raises:
            ValueError: if they do not.
        """
        return np.concatenate([_unconstrained(site, draws[site.name]) for site in self.sites], 1)

    def _parts(self, u: jax.Array) -> list[tuple[Site, jax.Array]]:
        sizes = np.cumsum([site.size for site in self.sites])[:-1]
        parts = jnp.split(u, sizes, axis=-1)
        return [
            (site, part.reshape(*u.shape[:-1], *site.real_shape)) for site, part in zip(self.sites, parts, strict=True)
        ]


def support_of(name: str, given: Any, shape: tuple[int, ...]) -> Constraint:
    """A support that `given` stands for, checked to suit a site.

    Args:
        name: of the site.
        given: a constraint, or a distribution, whose support is meant.
        shape: of one value.

    Raises:
        TypeError: if it is neither, discrete, or not one of those that real numbers can be mapped to.
        ValueError: if the shape is too short for it.
    """
    if isinstance(given, dist.Distribution):
        given = given.support
    if not isinstance(given, Constraint):
        raise TypeError(
            f"the support of site {name!r} must be a constraint of numpyro.distributions, or a distribution that has "
            f"it; got {given!r}"
        )
    if given.is_discrete:
        raise TypeError(f"site {name!r} is discrete ({given}); a diffusion learns continuous ones. Leave it out")
    try:
        _describe(given)
    except KeyError as error:
        raise TypeError(f"the support {given} of site {name!r} is none of {', '.join(_SUPPORTS)}") from error
    if given.event_dim > len(shape):
        raise ValueError(f"the support {given} of site {name!r} is of {given.event_dim} dimensions; draws have {shape}")
    return given


def _describe(support: Constraint) -> dict[str, Any]:
    if type(support) is constraints.independent:
        return {"of": _describe(support.base_constraint), "dims": support.reinterpreted_batch_ndims}
    kind = type(support).__name__.strip("_")
    if _SUPPORTS.get(kind) is not type(support):
        raise KeyError(kind)
    if isinstance(support, constraints.independent):  # vectors and matrices of real numbers
        return {"kind": kind}
    values, (names, _) = support.tree_flatten()
    bounds = {name: np.asarray(value, float).tolist() for name, value in zip(names, values, strict=True)}
    return {"kind": kind, **bounds}


def _read(described: Mapping[str, Any]) -> Constraint:
    if "of" in described:
        return constraints.independent(_read(described["of"]), int(described["dims"]))
    kind = _SUPPORTS[described["kind"]]
    if issubclass(kind, constraints.independent):
        return kind()
    bounds = {name: value for name, value in described.items() if name != "kind"}
    bounds = {
        name: np.asarray(value, np.float32) if isinstance(value, list) else value for name, value in bounds.items()
    }
    return kind.tree_unflatten((tuple(bounds), {}), tuple(bounds.values()))


def _unconstrained(site: Site, values: np.ndarray) -> np.ndarray:
    """Draws of one site as vectors, (n, size)."""
    if site.is_real:  # in double precision: an offset costs no digits
        return values.reshape(len(values), -1).astype(np.float64)
    bijection = site.bijection
    with np.errstate(all="ignore"), _precision.highest():
        u = bijection.inv(jnp.asarray(values))
        back = np.asarray(bijection(u), np.float64)
    inside = np.isfinite(np.asarray(u)).reshape(len(values), -1).all(1)
    near = np.abs(back - values) <= _ROUND_TRIP * (1e-3 + np.abs(values))
    inside &= near.reshape(len(values), -1).all(1)
    if not inside.all():
        first = int(np.flatnonzero(~inside)[0])
        raise ValueError(
            f"draws of site {site.name!r} must lie inside of its support {site.support}; {int((~inside).sum())} of "
            f"{len(values)} do not, the first is draw {first}, {np.array2string(values[first], threshold=8)}. Give the "
            "support that they have, or drop those on its boundary"
        )
    return np.asarray(u, np.float64).reshape(len(values), -1)
