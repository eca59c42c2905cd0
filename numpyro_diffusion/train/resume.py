r"""Keeping a run on disk, and going on exactly where it was.

A run is its `Progress` and its configuration. The first is arrays, written to one safetensors file under the paths that
they have in the tree; the second is a table of names and values in the same file, against which the run that goes on is
compared. Each step draws from `fold_in(key, step)`, so that

$$\text{state}_{k} \;\to\; \text{file} \;\to\; \text{state}_{k} \;\to\; \text{state}_n$$

is, on one machine, bit for bit the run that was never stopped. A file is replaced in one move; whoever dies while
writing leaves the one before.

Nothing is unpickled. This file is not for using a model: that is the matter of `checkpoint`.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from numpyro_diffusion.train.loop import Progress

_KEY = "numpyro_diffusion_training"  # one metadata key only: with more, their order in the file would be random


def save(path: str | os.PathLike, progress: Progress, configuration: dict[str, str]) -> None:
    """Writes a run to a file, replacing what was there in one move.

    Args:
        path: file to write, in a folder that exists.
        progress: the run.
        configuration: what the run is of, by name.
    """
    tensors = {name: _to_storable(leaf) for name, leaf in _named_leaves(progress).items()}
    metadata = {_KEY: json.dumps({"configuration": configuration, "sha256": _digest(tensors)}, sort_keys=True)}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike, template: Progress, configuration: dict[str, str]) -> Progress:
    """Reads a run that `save` wrote.

    Args:
        path: file to read.
        template: a run of the same structure, such as one before its first step.
        configuration: what the run must be of.

    Returns:
        The run.

    Raises:
        ValueError: if the file is damaged or not one of this library's, or the configuration is another one; the
            message says what differs.
    """
    try:
        return _load(path, template, configuration)
    except ValueError as error:
        raise ValueError(f"cannot resume from {os.fspath(path)}: {error}") from error


def _load(path: str | os.PathLike, template: Progress, configuration: dict[str, str]) -> Progress:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged or no safetensors file ({error})") from error
    if not isinstance(found, dict):
        raise ValueError("it is a safetensors file, but not of a run of train.fit")
    _check_configuration(found["configuration"], configuration)
    expected = _named_leaves(template)
    if found["sha256"] != _digest(tensors) or expected.keys() != tensors.keys():
        raise ValueError("the content is not what was saved: the file is corrupt. Delete it to start anew")
    leaves = [_from_storable(tensors[name], leaf) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_configuration(saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises unless both runs are of the same."""
    names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if names:
        each = "; ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in names)
        raise ValueError(f"it is of a run with another configuration: {each}. Give the same, or another path")


def fingerprint(function: Callable, *args: Any) -> str:
    """A hash of the program that a function of arrays is, constants such as a learning rate included."""
    program = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))  # addresses change from run to run
    return hashlib.sha256(program.encode()).hexdigest()[:16]


def name_of(value: Any) -> str:
    """A setting in words: the representation of a dataclass, the name of a function."""
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, str) else repr(value)


def _named_leaves(progress: Progress) -> dict[str, Any]:
    """Every array of a run under its path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(progress)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _to_storable(leaf: Any) -> np.ndarray:
    """An array of a type that the format knows: keys as numbers, and small floats by their bits."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    return value.view(f"u{value.dtype.itemsize}") if value.dtype.kind == "V" else value


def _from_storable(value: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return value
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like))
    return jnp.asarray(value.view(like.dtype) if np.dtype(like.dtype).kind == "V" else value)


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """A hash of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
