r"""Many conditions at once: one law $p(x_i \mid c_i)$ for each, and the map over them.

A denoiser is written for one point, and `Conditioned` for one condition. If the arrays of a condition have leading
dimensions, there is one denoiser for each entry, and all share the network. They are never built one by one: a
function of one point and its denoiser is mapped over points and conditions together (`over_points`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.network import NetworkDenoiser
from numpyro_diffusion.denoise.prediction import Denoiser
from numpyro_diffusion.denoise.wrapped import Conditioned, inside
from numpyro_diffusion.nn.condition import Condition


def with_batch(denoiser: Denoiser, batch_dims: int | None = None) -> tuple[Denoiser, tuple[int, ...]]:
    """Finds the batch dimensions of a denoiser's condition.

    Args:
        denoiser: any denoiser; only a `Conditioned` one can have batch dimensions.
        batch_dims: how many leading dimensions of the condition's arrays are batch dimensions. None asks the network
            for its `cond_shape`; without one, there are no batch dimensions.

    Returns:
        The denoiser, all arrays of its condition with the same leading dimensions, and these dimensions.

    Raises:
        ValueError: if the condition is not of the network's `cond_shape`, or has fewer dimensions than `batch_dims`; or
            if there is none and the network was always trained with one.
    """
    if not isinstance(denoiser, Conditioned):
        network = inside(denoiser)
        if isinstance(network, NetworkDenoiser) and network.needs_condition:
            raise ValueError(
                "cond must be given: the network was always trained with a condition, and stands for no law without "
                "one. Train it with cond_dropout= to have both"
            )
        return denoiser, ()
    leaves = jax.tree.leaves(denoiser.cond)
    if batch_dims is None:
        batch_dims = _dims_beyond_one(denoiser)
    else:
        _checks.at_least(0, cond_batch_dims=batch_dims)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if batch_dims > max(map(len, shapes), default=0):
        raise ValueError(f"cond must have cond_batch_dims={batch_dims} leading dimensions; got shapes {shapes}")
    if batch_dims == 0:
        return denoiser, ()
    batch_shape = jnp.broadcast_shapes(*(shape[:batch_dims] for shape in shapes))
    cond = jax.tree.map(lambda leaf: _to_batch(leaf, batch_dims, batch_shape), denoiser.cond)
    return Conditioned(denoiser.base, cond), batch_shape


def over_points(function: Callable, denoiser: Denoiser, batch_dims: int, shape: tuple[int, ...], *arrays: Any) -> Any:
    """Maps a function of one point and its denoiser over all points.

    Args:
        function: called as `function(denoiser, *arrays)`, with what belongs to one point.
        denoiser: as `with_batch` returns it.
        batch_dims: number of batch dimensions of its condition.
        shape: shape of the points, with whose last dimensions those of the condition broadcast.
        *arrays: arrays, or pytrees of arrays, that all begin with `shape`; at least one.

    Returns:
        What the function returns, with `shape` in front.

    Raises:
        ValueError: if the batch dimensions of the condition do not broadcast to `shape`.
    """
    if batch_dims == 0:
        return _mapped(lambda *arrays: function(denoiser, *arrays), len(shape))(*arrays)
    outer, inner = shape[: len(shape) - batch_dims], shape[len(shape) - batch_dims :]
    base, cond = denoiser.base, denoiser.cond  # type: ignore[attr-defined]  # a Conditioned one, as its batch says
    cond = jax.tree.map(lambda leaf: _to_batch(leaf, batch_dims, inner), cond)
    one = _mapped(lambda cond, *arrays: function(Conditioned(base, cond), *arrays), len(inner))
    return _mapped(lambda *arrays: one(cond, *arrays), len(outer))(*arrays)


def _mapped(function: Callable, times: int) -> Callable:
    for _ in range(times):
        function = jax.vmap(function)
    return function


def _to_batch(leaf: jax.Array, batch_dims: int, batch_shape: tuple[int, ...]) -> jax.Array:
    """An array with its leading dimensions broadcast; one with fewer of them is shared by the whole batch."""
    return jnp.broadcast_to(leaf, (*batch_shape, *jnp.shape(leaf)[batch_dims:]))


def _dims_beyond_one(denoiser: Conditioned) -> int:
    """Leading dimensions of a condition beyond those of one, for a network that says what one is like."""
    network, cond = inside(denoiser), denoiser.cond
    one = getattr(network, "cond_shape", getattr(getattr(network, "backbone", None), "cond_shape", None))
    value = cond.value if isinstance(cond, Condition) else cond
    if one is None or not jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
        return 0
    got, one = jnp.shape(value), tuple(one)
    if got[max(len(got) - len(one), 0) :] != one:
        raise ValueError(f"cond must end with shape {one}, that of one condition; got {got}")
    return len(got) - len(one)
