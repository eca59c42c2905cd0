"""Arrays and a description in one safetensors file, written in one move and read with a check of every byte.

    file = {tensors} + JSON{description, sha256 of both}

The description is one metadata entry, because with several their order in the file would be random. Types that the
format's NumPy reader does not know (bfloat16, float8) are stored as float32, which holds them exactly, and are narrowed
again when they are read. If the process dies while writing, the previous file stays. Nothing is unpickled.

This file knows nothing of denoisers or of training: see `checkpoint` and `train.run`.

References:
    The safetensors format, https://huggingface.co/docs/safetensors.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

_NARROW = "stored_as_float32"


def canonical(description: dict[str, Any]) -> str:
    """The one JSON text of a description."""
    return json.dumps(description, sort_keys=True, separators=(",", ":"))


def digest(arrays: Any, description: dict[str, Any] | None = None) -> str:
    """A hash of a pytree of arrays, with their types, shapes and paths, and of a description."""
    found = hashlib.sha256(canonical(description or {}).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        leaf = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(leaf.tobytes())
    return found.hexdigest()


def write(path: str | os.PathLike, key: str, description: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Writes arrays and a description to a safetensors file, replacing what was there in one move.

    Args:
        path: file to write, in a folder that exists.
        key: name of the description in the file's metadata.
        description: plain JSON values.
        arrays: arrays by name.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    description = {**description, "sha256": digest(arrays, description)}
    narrow = {name: leaf.dtype.name for name, leaf in arrays.items() if leaf.dtype.kind == "V"}
    if narrow:
        description[_NARROW] = narrow
    # the format's writer misreads arrays that are not in row order
    stored = {
        name: np.array(leaf, np.float32 if name in narrow else leaf.dtype, order="C") for name, leaf in arrays.items()
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(safetensors.numpy.save(stored, {key: canonical(description)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike, key: str) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """Reads a file that `write` wrote; `check` then compares the content with its digest.

    Args:
        path: file to read.
        key: name of the description in the file's metadata.

    Returns:
        The description and the arrays; None and an empty dict if the file has no description of this name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file, or its description is not JSON.
    """
    with open(path, "rb"):  # a missing file is Python's own FileNotFoundError
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if key not in metadata:
                return None, {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"it is truncated, corrupt or not a safetensors file ({error})") from error
    try:
        description = dict(json.loads(metadata[key]))
        narrow = {name: jnp.dtype(dtype) for name, dtype in description.pop(_NARROW, {}).items()}
        return description, arrays | {name: arrays[name].astype(dtype) for name, dtype in narrow.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its description is damaged ({error!r})") from error


def check(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Raises `ValueError` unless a description and arrays from `read` are what was written."""
    said = {name: value for name, value in description.items() if name != "sha256"}
    if description.get("sha256") != digest(arrays, said):
        raise ValueError("the content is not what was saved: the file is corrupt")
