r"""Saving a trained denoiser, or a flow distilled from one, to one file, and getting back exactly the same one.

A denoiser is more than its weights: the same numbers under another schedule, target or scale are a different, wrong
denoiser, and nothing would say so. So one safetensors file carries the whole definition,

$$\text{file} = \{\text{weights}, m, c\} \;+\; \mathrm{JSON}\{\text{schedule and its constants},\ \text{target},\
\text{network and its sizes},\ \text{event shape},\ \text{precision},\ \text{versions},\ \text{digest}\},$$

and loading rebuilds the network from the JSON, checks the name, shape and precision of every tensor against it, and
the digest against all that was read. What loads is what was saved, bit for bit, and saving it again gives the same
bytes. Weights that are not finite are refused in both directions, before they can cause errors elsewhere.

What is made of a denoiser and more, a `FlowMap`, a `GivenMap` or a `LearnedPrior`, is saved with its own arrays and
plain values in the same file; its class says how (`Holder`).

Files may come from strangers: nothing is unpickled, and no class is imported by a name from a file. Names of networks
and schedules are looked up among this library's own; a user's network is given by its class. States of optimisers are
not saved (see `fit(checkpoint=)` for a run that goes on), nor are exact denoisers: those are a line of code.

References:
    The safetensors format, https://huggingface.co/docs/safetensors.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_diffusion import _checks, _files, nn, noise
from numpyro_diffusion._version import __version__
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.solve import FlowMap, GivenMap

__all__ = ["load", "save"]

FORMAT = 2
"""The newest format that this version reads: a denoiser's is 1, that of what is made of one 2."""
_KEY = "numpyro_diffusion"
_SCHEDULES = {
    cls.__name__: cls for cls in (noise.VP, noise.SubVP, noise.VE, noise.Cosine, noise.Rectified, noise.Tabulated)
}
_BACKBONES = {cls.__name__: cls for cls in (nn.MLP, nn.UNet)}
_HELD = "held/"
_PRECISIONS = ("bfloat16", "float16", "float32", "float64")


class Holder(Protocol):
    """What is made of a denoiser and more."""

    def to_saved(self) -> tuple[NetworkDenoiser, dict[str, Any], dict[str, Any]]:
        """Its denoiser, plain JSON values, and arrays by name."""

    @classmethod
    def from_saved(cls, denoiser: NetworkDenoiser, described: dict[str, Any], arrays: dict[str, np.ndarray], /) -> Any:
        """The same again of its three parts; `ValueError`, `KeyError` or `TypeError` if they do not agree."""


_HOLDERS: dict[str, type[Holder]] = {"FlowMap": FlowMap, "GivenMap": GivenMap}
Class = TypeVar("Class", bound=type)

Held = TypeVar("Held", bound=type[Holder])


def saved_with_denoiser(cls: Held) -> Held:
    """Class decorator: `save` and `load` know this class of the library, a `Holder`, by its name."""
    _HOLDERS[cls.__name__] = cls
    return cls


def save(path: str | os.PathLike, denoiser: NetworkDenoiser | FlowMap | GivenMap | Holder) -> None:
    """Writes a learned denoiser, flow map or prior to a safetensors file, replacing what was there in one move.

    Args:
        path: file to write, in a folder that exists.
        denoiser: a `NetworkDenoiser`, or a `FlowMap`, `GivenMap` or `LearnedPrior`, which have one. Its backbone
            is one of `numpyro_diffusion.nn`, or has a `config` of plain JSON values from which
            `type(backbone)(**config, rngs=...)` rebuilds it.

    Raises:
        TypeError: if `denoiser` is none of these, or its backbone has no `config`.
        ValueError: if a weight is not finite or of an unknown precision, the schedule is not one of `noise`, or the
            backbone cannot be rebuilt from its `config`.

    Example:
        >>> import pathlib, tempfile
        >>> from flax import nnx
        >>> from numpyro_diffusion import checkpoint
        >>> from numpyro_diffusion.denoise import NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> denoiser = NetworkDenoiser(MLP((2,), rngs=nnx.Rngs(0)), scale=3.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "denoiser.safetensors"
        ...     checkpoint.save(path, denoiser)
        ...     float(checkpoint.load(path).scale)
        3.0
    """
    holder, held, config = type(denoiser), {}, None
    is_held = _HOLDERS.get(holder.__name__) is holder
    if is_held:
        denoiser, config, held = denoiser.to_saved()  # type: ignore[union-attr]  # as `is_held` says
    if not isinstance(denoiser, NetworkDenoiser):
        known = ", ".join(["NetworkDenoiser", *_HOLDERS])
        raise TypeError(f"denoiser must be one of {known} to be saved; got {type(denoiser).__name__}")
    tensors = {name: np.asarray(leaf) for name, leaf in _named_leaves(denoiser).items()}
    held = {_HELD + name: np.asarray(leaf) for name, leaf in held.items()}
    for name, tensor in (tensors | held).items():
        if str(tensor.dtype) not in _PRECISIONS:
            raise ValueError(f"{name} must be one of {', '.join(_PRECISIONS)} to be saved; got {tensor.dtype}")
        _checks.finite(name, tensor, "The training diverged: train again with a lower learning rate")
    description = _describe(denoiser, tensors)
    try:
        _check_tensors(tensors, _rebuild(description, type(denoiser.backbone)), description["dtype"])
    except ValueError as error:
        raise ValueError(f"denoiser could not be loaded again: {error}") from error
    if is_held:
        description |= {"format": 2, "holder": {"class": holder.__name__, "config": config}}
    _files.write(path, _KEY, description, tensors | held)


def load(path: str | os.PathLike, *, backbone_class: type[nnx.Module] | None = None) -> Any:
    """Reads a denoiser, a flow map or a learned prior that `save` wrote.

    Args:
        path: file to read.
        backbone_class: class of the network, for one that is not in `numpyro_diffusion.nn`.

    Returns:
        The denoiser or the flow map, frozen, or the `LearnedPrior`: what was saved.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, not one of this library's, of a newer format, does not agree with the
            network that it describes, or has a weight that is not finite; the message says which.
    """
    try:
        description, everything = _read(path)
        held = {name: tensor for name, tensor in everything.items() if name.startswith(_HELD)}
        tensors = {name: tensor for name, tensor in everything.items() if name not in held}
        template = _rebuild(description, backbone_class or _look_up("network", description, _BACKBONES))
        _check_tensors(tensors, template, description["dtype"])
        try:
            _files.check(description, everything)
        except ValueError as error:
            raise ValueError(f"{error}. Copy or save it again") from error
        for name, tensor in everything.items():
            _checks.finite(name, tensor, "The training diverged before it was saved")
        denoiser = _fill(template, tensors)
        return denoiser if "holder" not in description else _restore(denoiser, description, held)
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


def _restore(denoiser: NetworkDenoiser, description: dict[str, Any], held: dict[str, np.ndarray]) -> Any:
    """What was saved with the denoiser that it is made of."""
    cls = _look_up("holder", description, _HOLDERS)
    arrays = {name.removeprefix(_HELD): tensor for name, tensor in held.items()}
    try:
        return cls.from_saved(denoiser, description["holder"]["config"], arrays)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its description of a {cls.__name__} is damaged ({error!r})") from error


def _describe(denoiser: NetworkDenoiser, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything but the tensors, as plain JSON values."""
    backbone, schedule = denoiser.backbone, denoiser.schedule.base
    name = type(schedule).__name__
    if _SCHEDULES.get(name) is not type(schedule):
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)} to be saved; got {name}")
    config = getattr(backbone, "config", None)
    if not isinstance(config, dict):
        raise TypeError(f"backbone must have a dict `config` to be saved; {type(backbone).__name__} has none")
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    description = {
        "format": 1,
        "version": __version__,
        "network": {"class": type(backbone).__name__, "config": config},
        "schedule": {
            "class": name,
            "config": {k: np.asarray(v, float).tolist() for k, v in dataclasses.asdict(schedule).items()},
        },
        "target": denoiser.target,
        "event_shape": list(denoiser.event_shape),
        "dtype": next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else dtypes,
    }
    return json.loads(_files.canonical(description))


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and tensors of a file of this library, of a format that this version knows."""
    description, tensors = _files.read(path, _KEY)
    if description is None:
        raise ValueError("it is a safetensors file, but numpyro_diffusion did not write it")
    try:
        if description["format"] > FORMAT:
            raise ValueError(
                f"it has format {description['format']}; this version reads up to {FORMAT}. Upgrade numpyro_diffusion"
            )
        _check_fields(description)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its description is damaged ({error!r})") from error
    return description, tensors


def _check_fields(description: dict[str, Any]) -> None:
    """Raises `TypeError` unless everything is there and of the right kind."""
    named = {
        f"{kind}.{part}": description[kind][part] for kind in ("network", "schedule") for part in ("class", "config")
    }
    if "holder" in description:
        named |= {f"holder.{part}": description["holder"][part] for part in ("class", "config")}
    expected: dict[str, Any] = {
        "network.class": str,
        "network.config": dict,
        "schedule.class": str,
        "schedule.config": dict,
    }
    expected |= {"target": str, "event_shape": list, "dtype": str | dict}
    expected |= {"holder.class": str, "holder.config": dict} if "holder" in description else {}
    for name, kind in expected.items():
        value = (named | description)[name]
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


def _look_up(kind: str, description: dict[str, Any], known: Mapping[str, Class]) -> Class:
    name = description[kind]["class"]
    if name not in known:
        cure = "Give it as backbone_class=" if kind == "network" else "Upgrade numpyro_diffusion"
        raise ValueError(f"its {kind} class {name!r} is none of {', '.join(known)}. {cure}")
    return known[name]


def _rebuild(description: dict[str, Any], backbone_class: type[nnx.Module]) -> NetworkDenoiser:
    """The denoiser described, with shapes in place of arrays: nothing is initialised."""
    schedule_class = _look_up("schedule", description, _SCHEDULES)
    network = description["network"]
    if backbone_class.__name__ != network["class"]:
        raise ValueError(f"its network is a {network['class']}; backbone_class is {backbone_class.__name__}")
    if "float64" in _dtypes(description["dtype"]) and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError("its weights are float64, which JAX would round. Set jax_enable_x64")

    def build() -> NetworkDenoiser:
        backbone = backbone_class(**network["config"], rngs=nnx.Rngs(0))  # type: ignore[call-arg]  # no base has them
        schedule = schedule_class(**description["schedule"]["config"])
        return NetworkDenoiser(backbone, schedule=schedule, target=description["target"])

    try:
        template = jax.eval_shape(build)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its network cannot be rebuilt from its config ({error})") from error
    if list(template.event_shape) != description["event_shape"]:
        raise ValueError(f"its event_shape is {description['event_shape']}; its network's is {template.event_shape}")
    return template


def _named_leaves(denoiser: NetworkDenoiser) -> dict[str, Any]:
    """Every array of a denoiser under a name: the path of a weight, joined by slashes, or `location` or `scale`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(denoiser.weights))
    named = {"/".join(["weights", *(str(key.key) for key in path)]): leaf for path, leaf in paths}
    return named | {"location": denoiser.location, "scale": denoiser.scale}


def _dtypes(dtype: str | dict[str, str]) -> set[str]:
    """The precisions that a file has: one for all tensors, or one for each by name."""
    return {dtype} if isinstance(dtype, str) else set(dtype.values())


def _check_tensors(tensors: dict[str, np.ndarray], template: NetworkDenoiser, dtype: str | dict[str, str]) -> None:
    """Raises unless names, shapes and precision are those of the network described."""
    expected = _named_leaves(template)
    if different := expected.keys() ^ tensors.keys():
        missing, unknown = sorted(expected.keys() & different), sorted(tensors.keys() & different)
        raise ValueError(f"its tensors are not those of its network: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, leaf in expected.items():
        got, said = tensors[name], dtype if isinstance(dtype, str) else dtype.get(name)
        if got.shape != leaf.shape or str(got.dtype) != said:
            raise ValueError(f"{name} must be {said} of shape {leaf.shape}; got {got.dtype} of shape {got.shape}")


def _fill(template: NetworkDenoiser, tensors: dict[str, np.ndarray]) -> NetworkDenoiser:
    """The template with arrays in place of shapes."""
    names = iter(_named_leaves(template))
    weights = jax.tree.map(lambda _: jnp.asarray(tensors[next(names)]), nnx.to_pure_dict(template.weights))
    nnx.replace_by_pure_dict(template.weights, weights)
    units = {"_location": jnp.asarray(tensors["location"]), "_scale": jnp.asarray(tensors["scale"])}
    return template._replace(**units)
