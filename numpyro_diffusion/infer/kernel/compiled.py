r"""Compiled functions of a model, compiled anew when what the model reads has changed.

A program compiled once for all data of one shape must take the data as arguments. A NumPyro model can also read arrays
and numbers that are not arguments: a variable of the notebook, the data of a closure, the weights of a prior defined
above it. `jax.jit` freezes these at their first values. Compiling anew for every run would be right, but slow.

The way between is to trace the model before every run. Its sites at symbolic arguments are a small program $P$ with
constants $c$, and the constants are exactly what the model has closed over. Functions compiled for $(P, c)$ are used
again only if the model still gives $(P, c)$. This costs one trace of the model, milliseconds, where tracing a sampler
costs seconds.

Arguments are treated as `MCMC` treats them: arrays and floats are arguments of the program; strings, booleans, integers
and None stay Python values, so that a model may branch on them. A model that branches on a float or on a NumPy array
gets these as Python values too, at the price of a compilation for new ones.

Matrix products are in full precision, except those of networks: what a sampler compiles here is its weights, its moves
and its ratios.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from numpyro_diffusion import _precision
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.sites import traced

_TAKEN = (jax.Array, np.ndarray, np.inexact, float)
"""What a program takes; whole numbers may be shapes."""
_KEPT = 4
"""Number of readings of a model whose compiled functions are kept."""


class Compiled:
    """Functions of a model's arguments, compiled once for as long as the model reads the same.

    Args:
        model: NumPyro model.
        *functions: each a pure function of its own operands, then `args` and `kwargs`, the model's.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer.kernel.compiled import Compiled
        >>> offset = 1.0
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(0.0, offset), obs=y)
        >>> compiled = Compiled(model, lambda x, args, kwargs: x + offset * args[0])
        >>> (add,) = compiled.bind((jnp.ones(()),), {})
        >>> float(add(1.0))
        2.0
        >>> offset = 5.0
        >>> (add,) = compiled.bind((jnp.ones(()),), {})
        >>> float(add(1.0))
        6.0
    """

    def __init__(self, model: Model, *functions: Callable[..., Any]) -> None:
        self._model, self._functions = model, functions
        self._kept: list[tuple[_Reading, tuple[Callable[..., Any], ...]]] = []

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> tuple[partial[Any], ...]:
        """The functions at given arguments of the model, compiled when first called.

        Args:
            args: the model's arguments: arrays, pytrees of arrays, and Python values.
            kwargs: its keyword arguments.

        Returns:
            For each function one of its own operands, which must be arrays, pytrees of them, or None.
        """
        arguments = _Arguments(args, kwargs)
        try:
            reading = _Reading(self._model, arguments)
        except (
            TypeError,
            jax.errors.JAXTypeError,
            jax.errors.JAXIndexError,
        ):
            # the model asks for the value of a symbol, or is wrong, which shows again
            arguments = _Arguments(args, kwargs, all_static=True)
            reading = _Reading(self._model, arguments)
        programs = next((programs for kept, programs in self._kept if kept.is_same(reading)), None)
        if programs is None:
            programs = tuple(jax.jit(partial(_call, function, arguments.restore)) for function in self._functions)
            self._kept = [*self._kept[1 - _KEPT :], (reading, programs)]
        return tuple(partial(program, arguments.arrays) for program in programs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": []}


@_precision.highest()
def _call(function: Callable[..., Any], restore: Callable, arrays: list[Any], *operands: Any) -> Any:
    return function(*operands, *restore(arrays))


class _Arguments:
    """A model's arguments, split into arguments of a program and what the program is compiled for.

    Attributes:
        arrays: arguments of the program.
        static: what it is compiled for: the Python values, and the structure of all.
        restore: a function from the arrays back to `args` and `kwargs`, which holds no array of its own.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], all_static: bool = False) -> None:
        leaves, structure = jax.tree.flatten((args, kwargs))
        taken = [not all_static and isinstance(leaf, _TAKEN) for leaf in leaves]
        static = [None if is_taken else leaf for leaf, is_taken in zip(leaves, taken, strict=True)]
        self.arrays = [leaf for leaf, is_taken in zip(leaves, taken, strict=True) if is_taken]
        self.static = structure, tuple(taken), () if all_static else tuple(static)  # else constants of the reading
        self.restore = partial(_restore, structure, taken, static)


def _restore(structure: Any, taken: list[bool], static: list[Any], arrays: list[Any]) -> tuple[tuple, dict]:
    given = iter(arrays)
    return structure.unflatten(
        [next(given) if is_taken else leaf for is_taken, leaf in zip(taken, static, strict=True)]
    )


class _Reading:
    """A model as a program of its arguments: its text, its constants, and the rest."""

    def __init__(self, model: Model, arguments: _Arguments) -> None:
        static: list[Any] = [arguments.static]

        def read(arrays: list[Any]) -> list[Any]:
            found = []
            for name, site in traced(model, *arguments.restore(arrays), {}).items():
                parts = site.get("fn"), site["value"], site.get("scale")
                leaves, structure = jax.tree.flatten(parts)
                are_arrays = [isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int) for leaf in leaves]
                rest = tuple(leaf for leaf, is_array in zip(leaves, are_arrays, strict=True) if not is_array)
                static.append((name, site["type"], site.get("is_observed"), structure, rest))
                found += [leaf for leaf, is_array in zip(leaves, are_arrays, strict=True) if is_array]
            return found

        self._static = static
        try:
            program = jax.make_jaxpr(read)(arguments.arrays)
        except NotImplementedError:  # a site that cannot be drawn; who runs the model says so
            self._text = None
            return
        self._text = re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr))
        self._constants = [leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in program.consts]

    def is_same(self, other: "_Reading") -> bool:
        """Whether functions compiled for one are right for the other."""
        if self._text is None or self._text != other._text or len(self._constants) != len(other._constants):
            return False
        try:
            if self._static != other._static:
                return False
        except (TypeError, ValueError):  # something that cannot be compared
            return False
        return all(map(_is_same, self._constants, other._constants))


def _is_same(a: Any, b: Any) -> bool:
    """Whether two constants have the same bits; an array of JAX cannot change, one of NumPy is a copy here."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
