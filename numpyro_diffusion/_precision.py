r"""Two precisions of matrix products: the model's own, and the network's.

On NVIDIA GPUs JAX multiplies float32 matrices in TF32 unless told otherwise: ten bits of mantissa. For a network, whose
error is larger anyway, that is a fair price for its speed. For a likelihood, a ratio of densities or a law in closed
form the answer would be wrong. So everything but the network runs under `highest`, and the network under `network`,
which restores what the user had set outside, or takes a precision of its own.

The settings act while a program is traced, as `jax.default_matmul_precision` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

PRECISIONS = ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32")
_NOT_INSIDE = object()
_outside: ContextVar = ContextVar("numpyro_diffusion_matmul_precision", default=_NOT_INSIDE)


def setting() -> str | None:
    """JAX's own setting of the precision of matrix products."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # defined as the program runs


@contextmanager
def highest() -> Iterator[None]:
    """Matrix products in full float32, except those of networks."""
    inside = _outside.get() is not _NOT_INSIDE
    token = _outside.set(_outside.get() if inside else setting())
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        _outside.reset(token)


@contextmanager
def network(precision: str | None = None) -> Iterator[None]:
    """Matrix products of a network: in a precision of its own, or in the one set outside of `highest`."""
    if precision is None:
        outside = _outside.get()
        precision = setting() if outside is _NOT_INSIDE else outside
    # "default" and not None: with None, products derived from these would take the setting of where they are derived
    with jax.default_matmul_precision("default" if precision is None else precision):
        yield
