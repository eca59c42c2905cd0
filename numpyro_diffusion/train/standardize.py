r"""From raw examples to what a network is trained on, with every check that can be made before compiling.

$$u = \frac{x - m}{c}, \qquad m = \frac1n \sum_i x_i \;\text{(per feature)}, \qquad
c^2 = \frac1{n d} \sum_{i} \| x_i - m \|^2,$$

so that the data have mean zero in every feature and unit variance over all of them. The scale is one number, not one
per feature: the noise stays isotropic in the units of the data, and features that hardly vary stay quiet.

The arithmetic is NumPy's, in double precision, so that an offset far larger than the spread costs no digits; mean and
scale are rounded to the network's precision first, since that is what the denoiser will hold. Where rows come from is
the matter of `feed`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.noise import Schedule


def standardize(
    backbone: nnx.Module | NetworkDenoiser, data: ArrayLike, schedule: Schedule | None, target: str | None
) -> tuple[NetworkDenoiser, jax.Array]:
    """Puts a backbone into the units of the data, and the data into those of the backbone.

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
    """A denoiser as it is, or that of a network."""
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
    """Raises unless the rows can be trained on: real, finite and of the right shape."""
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
