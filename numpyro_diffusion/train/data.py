r"""From raw examples to batches: checked, standardised once, and on the device.

$$u = \frac{x - m}{c}, \qquad m = \frac1n \sum_i x_i \;\text{(per feature)}, \qquad
c^2 = \frac1{n d} \sum_{i} \| x_i - m \|^2,$$

so that the data have mean zero in every feature and unit variance over all of them. The scale is one number, not one
per feature: the noise stays isotropic in the units of the data, and features that hardly vary stay small. The
arithmetic is NumPy's, in double precision, so that an offset far larger than the spread costs no digits; mean and scale
are rounded to the network's precision first, since that is what the denoiser will hold. Conditions are not noised: each
of their entries has a location and a scale of its own, which the network holds (`nn.condition`).

Rows stay on the device; each step draws its own from them, with replacement. A stream is any iterable of batches, for
data larger than memory: each call takes the next ones, standardises them on the host and puts them on the device. Its
location and scale are those of the batches of the first call. An iterable that can be restarted, such as a data loader,
is restarted; an iterator is used up, and then training ends. Every batch is checked like rows.

For what a step does with a batch see `steps`.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _files
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.train.steps import HELD_OUT_NOISES, Rows


class Feed(Protocol):
    """Where the batches of a call come from.

    Attributes:
        in_order: whether the rows of a call are its batches.
        conditional: whether there are conditions.
        digest: a hash of the data, or of the first batches of a stream.
    """

    in_order: bool
    conditional: bool
    digest: str

    def take(self, count: int) -> tuple[Rows | None, int]:
        """Rows for at most `count` steps, and the number of steps that they are for; None and zero at the end."""

    def skip(self, count: int) -> None:
        """Skips the batches of the first `count` steps, which a resumed run has seen."""


class Resident:
    """Rows that stay on the device.

    Args:
        rows: standardised points, (rows, *event_shape), and their conditions or None.
        mesh: devices that each get a copy.
    """

    in_order = False

    def __init__(self, rows: Rows, mesh: Mesh | None) -> None:
        self.digest, self.conditional = _files.digest(rows), rows[1] is not None
        self._rows = _place(rows, mesh, PartitionSpec())

    def take(self, count: int) -> tuple[Rows, int]:
        return self._rows, count

    def skip(self, count: int) -> None:
        pass


class Stream:
    """Batches from an iterable, in its order.

    Args:
        batches: arrays (batch_size, *event_shape), or pairs of such and conditions (batch_size, *cond_shape).
        denoiser: the model, whose location and scale are measured unless they are `given`.
        given: whether the denoiser already has its location and scale.
        batch_size: rows that each batch must have.
        steps_per_call: batches of a full call.
        mesh: devices over whose first axis a batch is shared out.

    Raises:
        TypeError: if a batch is not of real numbers.
        ValueError: if a batch is not finite or of the wrong shape, or there is none.
    """

    in_order = True

    def __init__(
        self,
        batches: Iterable[Any],
        denoiser: NetworkDenoiser,
        given: bool,
        batch_size: int,
        steps_per_call: int,
        mesh: Mesh | None,
    ) -> None:
        self._source, self._batches = batches, iter(batches)
        self._backbone: Any = denoiser.backbone
        self._batch_size, self._mesh = batch_size, mesh
        self._room, self._read = steps_per_call, 0
        first = list(itertools.islice(self._walk(), steps_per_call))
        if not first:
            raise ValueError("data must have at least one batch; got an iterable of none")
        if not given:
            points, conds = zip(*first, strict=True)
            denoiser = measure_units(denoiser, np.concatenate(points))
            denoiser = measure_condition(denoiser, None if conds[0] is None else np.concatenate(conds))
        self.denoiser = denoiser
        self.digest, self.conditional = _files.digest(first), first[0][1] is not None
        self._rest = itertools.chain(first, self._walk())

    def _walk(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Checked batches, again and again if the iterable can be restarted."""
        while True:
            before = self._read
            for batch in self._batches:
                checked = self._check(batch)
                self._read += 1
                yield checked
            self._batches = iter(self._source)
            if self._batches is self._source or self._read == before:
                return

    def _check(self, batch: Any) -> tuple[np.ndarray, np.ndarray | None]:
        x, cond = batch if isinstance(batch, tuple) else (batch, None)
        name = f"batch {self._read} of data"
        x = check_rows(name, x, self._backbone.event_shape)
        if len(x) != self._batch_size:
            raise ValueError(
                f"{name} must have batch_size={self._batch_size} rows; got {len(x)}. Leave out an incomplete last one"
            )
        return x, check_cond(f"the condition of {name}", cond, len(x), self._backbone)

    def take(self, count: int) -> tuple[Rows | None, int]:
        batches = list(itertools.islice(self._rest, count))
        if len(batches) < count:
            warnings.warn(f"data ended after {self._read} batches, and training with it", stacklevel=2)
        if not batches:
            return None, 0
        points = [apply_units(self.denoiser, x) for x, _ in batches]
        conds = [cond for _, cond in batches if cond is not None]
        rows = _padded(points, self._room), _padded(conds, self._room) if conds else None
        axes = self._mesh.axis_names[:1] if self._mesh else ()
        return _place(rows, self._mesh, PartitionSpec(None, *axes)), len(batches)

    def skip(self, count: int) -> None:
        next(itertools.islice(self._rest, count, count), None)


class Data(NamedTuple):
    """A denoiser and the data that it is trained on."""

    denoiser: NetworkDenoiser  # before training, in the units of the data
    source: Feed  # of batches
    held_out: Rows | None  # standardised points and conditions that training does not use


def open_data(
    key: jax.Array,
    backbone: nnx.Module | NetworkDenoiser,
    data: Any,
    cond: Any,
    held_out: Any,
    fraction: float,
    *,
    schedule: Schedule | None,
    target: str | None,
    batch_size: int,
    steps_per_call: int,
    mesh: Mesh | None,
) -> Data:
    """Makes a denoiser in the units of its data, and splits off held-out rows; arguments are those of `fit`."""
    source: Feed
    rest: Rows | None
    if is_stream(data):
        if cond is not None:
            raise ValueError("cond must come with the batches of a stream: let data give pairs (batch, cond)")
        given, denoiser = isinstance(backbone, NetworkDenoiser), denoiser_of(backbone, schedule, target)
        stream = Stream(data, denoiser, given, batch_size, steps_per_call, mesh)
        source, denoiser, rest = stream, stream.denoiser, None
    else:
        denoiser, x = standardize(backbone, data, schedule, target)
        cond = check_cond("cond", cond, len(x), denoiser.backbone)
        if not isinstance(backbone, NetworkDenoiser):
            denoiser = measure_condition(denoiser, cond)
        rows = x, None if cond is None else jnp.asarray(cond)
        rows, rest = split_rows(key, rows, fraction if held_out is None else 0.0)
        source = Resident(rows, mesh)
    if held_out is not None:
        others, given_cond = held_out if isinstance(held_out, tuple) else (held_out, None)
        others = check_rows("held_out", others, denoiser.event_shape)
        given_cond = check_cond("the condition of held_out", given_cond, len(others), denoiser.backbone)
        if (given_cond is not None) != source.conditional:
            raise ValueError("held_out must be a pair of rows and conditions if, and only if, data have conditions")
        rest = jnp.asarray(apply_units(denoiser, others)), None if given_cond is None else jnp.asarray(given_cond)
    return Data(denoiser, source, rest if rest is None else _place(rest, mesh, PartitionSpec()))


def standardize(
    backbone: nnx.Module | NetworkDenoiser, data: ArrayLike, schedule: Schedule | None, target: str | None
) -> tuple[NetworkDenoiser, jax.Array]:
    """Makes a denoiser of a backbone in the units of the data, and standardises the data.

    Args:
        backbone: a network, or a denoiser that keeps its own location, scale, schedule and target.
        data: examples, shape (rows, *event_shape).
        schedule: the noising process in standardised units, None for the default.
        target: what the network's output means, None for the default.

    Returns:
        The denoiser before training, in the units of the data, and the standardised rows, shape (rows, *event_shape),
        in the precision of the weights.

    Raises:
        ValueError: if the data are not finite, too few, constant or of the wrong shape, or `schedule` or `target` are
            given with a denoiser that has its own.
        TypeError: if the data are not real numbers.
    """
    denoiser = denoiser_of(backbone, schedule, target)
    data = check_rows("data", data, denoiser.event_shape)
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 rows; got {len(data)}")
    check_varies(data)
    denoiser = denoiser if isinstance(backbone, NetworkDenoiser) else measure_units(denoiser, data)
    return denoiser, jnp.asarray(apply_units(denoiser, data))


def denoiser_of(
    backbone: nnx.Module | NetworkDenoiser, schedule: Schedule | None, target: str | None
) -> NetworkDenoiser:
    """The denoiser given, or one made of a network."""
    if not isinstance(backbone, NetworkDenoiser):
        return NetworkDenoiser(backbone, schedule=schedule, target="edm" if target is None else target)
    if schedule is not None or target is not None:
        raise ValueError("schedule and target must be left out when a NetworkDenoiser is given: it has its own")
    return backbone


def measure_units(denoiser: NetworkDenoiser, data: np.ndarray) -> NetworkDenoiser:
    """The denoiser with the location and scale of these rows."""
    check_varies(data)
    location = data.mean(axis=0, dtype=np.float64)
    return denoiser.with_units(location, np.sqrt(np.mean((data - location) ** 2)))


def apply_units(denoiser: NetworkDenoiser, data: np.ndarray) -> np.ndarray:
    """Rows in the units of the network, in the precision of its weights."""
    location, scale = np.asarray(denoiser.location, np.float64), float(denoiser.scale)
    return ((data - location) / scale).astype(denoiser.dtype)


def check_rows(name: str, data: Any, event_shape: tuple[int, ...]) -> np.ndarray:
    """Raises unless the rows are real, finite and of the right shape."""
    data = np.asarray(data)
    if not (np.issubdtype(data.dtype, np.floating) or np.issubdtype(data.dtype, np.integer)):
        raise TypeError(f"{name} must be real numbers; got an array of {data.dtype}")
    if data.ndim != 1 + len(event_shape) or data.shape[1:] != event_shape:
        expected = ", ".join(["rows", *map(str, event_shape)])
        raise ValueError(
            f"{name} must have shape ({expected}), after the event_shape of the backbone; got {data.shape}"
        )
    _checks.finite(name, data, "Drop or impute those rows")
    return data


def check_varies(data: np.ndarray) -> None:
    """Raises if all rows are the same: they have no scale."""
    if (data == data[0]).all():
        raise ValueError(f"data must vary; got {len(data)} rows that are all the same")


def split_rows(key: jax.Array, rows: Rows, fraction: float) -> tuple[Rows, Rows | None]:
    """Training and held-out rows: at least one of each unless nothing is held out, and no more held out than used."""
    num_rows = len(rows[0])
    if fraction == 0.0:
        return rows, None
    count = min(max(1, round(fraction * num_rows)), num_rows - 1, HELD_OUT_NOISES)
    order = jax.random.permutation(key, num_rows)
    train, held_out = order[count:], order[:count]
    return jax.tree.map(lambda leaf: leaf[train], rows), jax.tree.map(lambda leaf: leaf[held_out], rows)


def is_stream(data: Any) -> bool:
    """Whether data are a stream of batches: an iterable that is neither an array nor a list of numbers."""
    return isinstance(data, Iterable) and not (hasattr(data, "__array__") or isinstance(data, list | tuple))


def check_cond(name: str, cond: Any, num_rows: int, backbone: nnx.Module) -> np.ndarray | None:
    """Raises unless there is one finite condition for each row, of the network's `cond_shape` where it has one."""
    says, one = hasattr(backbone, "cond_shape"), getattr(backbone, "cond_shape", None)
    kind = type(backbone).__name__
    if cond is None:
        if one is not None:
            raise ValueError(f"{name} must be given: this {kind} has cond_shape={one}. Or make it without cond_shape=")
        return None
    cond = np.asarray(cond)
    if not np.issubdtype(cond.dtype, np.number) and cond.dtype != bool:
        raise TypeError(f"{name} must be numbers; got an array of {cond.dtype}")
    if cond.ndim == 0 or len(cond) != num_rows:
        raise ValueError(f"{name} must have one entry for each of the {num_rows} rows; got shape {cond.shape}")
    if says and one is None:
        raise ValueError(f"{name} must be None: this {kind} is unconditional. Make it with cond_shape={cond.shape[1:]}")
    if says and cond.shape[1:] != one:
        expected = ", ".join(["rows", *map(str, one or ())])
        raise ValueError(f"{name} must have shape ({expected}), after the cond_shape of the {kind}; got {cond.shape}")
    _checks.finite(name, cond, "Drop or impute those rows")
    return cond


def measure_condition(denoiser: NetworkDenoiser, cond: np.ndarray | None) -> NetworkDenoiser:
    """The denoiser with location and scale of each entry of these conditions; an entry that is constant has scale 1."""
    if getattr(denoiser.backbone, "cond_shape", None) is None or cond is None:
        return denoiser
    scale = cond.std(axis=0, dtype=np.float64)
    return denoiser.with_condition_units(cond.mean(axis=0, dtype=np.float64), np.where(scale > 0.0, scale, 1.0))


def _padded(batches: list[np.ndarray], room: int) -> np.ndarray:
    """Batches in one array with room for more, so that a shorter call has the shape of the others."""
    return np.concatenate([np.stack(batches), np.zeros((room - len(batches), *batches[0].shape), batches[0].dtype)])


def _place(rows: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
    if mesh is None:
        return jax.tree.map(jnp.asarray, rows)
    return jax.device_put(rows, NamedSharding(mesh, spec))
