r"""From raw examples to what a network is trained on, with every check that can be made before compiling.

$$u = \frac{x - m}{c}, \qquad m = \frac1n \sum_i x_i \;\text{(per feature)}, \qquad
c^2 = \frac1{n d} \sum_{i} \| x_i - m \|^2,$$

so that the data have mean zero in every feature and unit variance over all of them. The scale is one number, not one
per feature: the noise stays isotropic in the units of the data, and features that hardly vary stay quiet.

The arithmetic is NumPy's, in double precision, so that an offset far larger than the spread costs no digits; mean and
scale are rounded to the network's precision first, since that is what the denoiser will hold. Training itself is in
`fit` and `steps`.
"""

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
    data = np.asarray(data)
    if isinstance(backbone, NetworkDenoiser):
        if schedule is not None or target is not None:
            raise ValueError("schedule and target must be left out when a NetworkDenoiser is given: it has its own")
        check_data(data, backbone.event_shape)
        denoiser = backbone
    else:
        denoiser = NetworkDenoiser(backbone, schedule=schedule, target="edm" if target is None else target)
        check_data(data, denoiser.event_shape)
        location = data.mean(axis=0, dtype=np.float64)
        denoiser = denoiser.with_units(location, np.sqrt(np.mean((data - location) ** 2)))
    location, scale = np.asarray(denoiser.location, np.float64), float(denoiser.scale)
    return denoiser, jnp.asarray((data - location) / scale, denoiser.dtype)


def check_data(data: np.ndarray, event_shape: tuple[int, ...]) -> None:
    """Raises unless the data can be trained on: real, finite, of the right shape, with two different rows."""
    if not (np.issubdtype(data.dtype, np.floating) or np.issubdtype(data.dtype, np.integer)):
        raise TypeError(f"data must be real numbers; got an array of {data.dtype}")
    if data.ndim != 1 + len(event_shape) or data.shape[1:] != event_shape:
        expected = ", ".join(["rows", *map(str, event_shape)])
        raise ValueError(f"data must have shape ({expected}), after the event_shape of the backbone; got {data.shape}")
    if len(data) < 2:
        raise ValueError(f"data must have at least 2 rows; got {len(data)}")
    _checks.finite("data", data, "Drop or impute those rows")
    if (data == data[0]).all():
        raise ValueError(f"data must vary; got {len(data)} rows that are all the same")
