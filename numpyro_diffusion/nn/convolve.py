r"""Convolutions whose derivatives are quick on a CPU too.

XLA's compiler for CPUs hands a convolution to a library of fast ones only in a certain order of its axes. JAX's
gradients of a convolution have another order, and inside of a loop, such as the steps of training or of a trajectory,
the compiler does not put it right: there they take ten to twenty times as long as they should. A convolution is
bilinear, so its derivative is

$$d(x * w) = dx * w + x * dw,$$

and each term is a product of matrices: of the patches around all places with the kernel. The transpose of a product is
a product, which is quick in any order. Values are still convolutions; elsewhere derivatives are JAX's.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, *, precision: Any = None, **options: Any
) -> jax.Array:
    """Takes the place of `lax.conv_general_dilated` in an `nnx.Conv` without dilation or groups.

    Args:
        x: channels last, (batch, *sizes, inward).
        kernel: (*taps, inward, outward).
        strides: of each size.
        padding: "SAME" or "VALID".
        precision: of the products.
        **options: as `nnx.Conv` hands them on.

    Returns:
        An array (batch, *sizes, outward).
    """
    if jax.default_backend() == "cpu":
        return _on_cpu(x, kernel, tuple(strides), padding, precision)
    return lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _on_cpu(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: str, precision: Any) -> jax.Array:
    places = "DHW"[-len(strides) :]
    order = f"N{places}C", f"{places}IO", f"N{places}C"
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=order, precision=precision)


@_on_cpu.defjvp
def _derivative(
    strides: tuple[int, ...], padding: str, precision: Any, point: tuple, direction: tuple
) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (dx, d_kernel) = point, direction
    product = partial(_as_product, strides=strides, padding=padding, precision=precision)
    return _on_cpu(x, kernel, strides, padding, precision), product(dx, kernel) + product(x, d_kernel)


def _as_product(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: str, precision: Any) -> jax.Array:
    """The convolution as one product of the patches around all places, (batch, *sizes, taps x inward)."""
    taps, outward = kernel.shape[:-2], kernel.shape[-1]
    pads = lax.padtype_to_pads(x.shape[1:-1], taps, strides, padding)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    last = [size - tap for size, tap in zip(x.shape[1:-1], taps, strict=True)]
    patches = [
        lax.slice(
            x,
            (0, *first, 0),
            (len(x), *(i + end + 1 for i, end in zip(first, last, strict=True)), x.shape[-1]),
            (1, *strides, 1),
        )
        for first in itertools.product(*map(range, taps))
    ]
    return jnp.matmul(jnp.concatenate(patches, -1), kernel.reshape(-1, outward), precision=precision)
