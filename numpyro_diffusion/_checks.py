"""Argument errors in one voice: the name, the rule, what was given and, where there is one, the cure.

Every public constructor checks its arguments with these few functions, so that a mistake is reported where it was
made and not from inside a compiled loop. This file knows nothing of diffusion.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def positive(**values: float | np.ndarray) -> None:
    """Raises `ValueError` unless every named value is a finite number above zero."""
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite; got {value}")


def at_least(minimum: int, **values: int) -> None:
    """Raises unless every named value is a whole number of at least `minimum`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be a whole number; got {value!r}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}; got {value}")


def exceeds(upper_name: str, upper: float, lower_name: str, lower: float) -> None:
    """Raises `ValueError` unless `upper > lower`."""
    if not upper > lower:
        raise ValueError(f"{upper_name} must exceed {lower_name}={lower}; got {upper}")


def fraction(**values: float) -> None:
    """Raises `ValueError` unless every named value lies in [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1]; got {value}")


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raises `ValueError` unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def shape(name: str, value: ArrayLike, expected: tuple[int, ...], cure: str = "") -> None:
    """Raises `ValueError` unless the trailing dimensions of `value` are `expected`."""
    got = jnp.shape(value)
    if len(got) < len(expected) or got[len(got) - len(expected) :] != tuple(expected):
        raise ValueError(f"{name} must end with shape {tuple(expected)}; got {got}{'. ' + cure if cure else ''}")


def finite(name: str, value: Any, cure: str = "") -> None:
    """Raises `ValueError` if a concrete array holds NaN or infinity, saying how many and where the first one is."""
    value = np.asarray(value)
    bad = ~np.isfinite(value)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite; got {int(bad.sum())} non-finite values, the first at index {first}"
            f"{'. ' + cure if cure else ''}"
        )
