r"""The network of a learned law: what its mixture of normal laws lacks.

A backbone that has the mixture inside: under the target "edm" its output is

$$F = \frac{D_{\mathrm{mix}} - c_{\mathrm{skip}}\, y}{c_{\mathrm{out}}} + F_\theta ,$$

with $F_\theta$ zero before training, so that training (`train.fit`) starts at the mixture, and ends with it if nothing
is better: the network is kept where draws held out gain log-density by it, which is the bound on their density that the
walks of `law` give, beyond its error.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_diffusion import _precision
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.infer.particles.learned.law import Law, Modes
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.train.fit import fit

SCHEDULE = VE(0.005, 40.0)
_LOWEST, _HIGHEST = 0.2, 3.0
"""The lowest level, in deviations of the narrowest direction of a mode, and the highest, in deviations of all."""
_ERRORS = 3.0


class Corrected(nnx.Module):
    """A backbone on top of a mixture of normal laws.

    Args:
        modes: the mixture, of vectors in units in which all have unit variance.
        backbone: for vectors of that size, its output zero before training.
    """

    def __init__(self, modes: Modes, backbone: nnx.Module) -> None:
        self.modes = nnx.data(jax.tree.map(nnx.Variable, modes))
        self.backbone = backbone
        self.event_shape = (modes.means.shape[1],)

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: None = None) -> jax.Array:
        """The output for a scaled noisy point and the noise coordinate."""
        modes = Modes(*(leaf[...] for leaf in self.modes))
        level = jnp.exp(4.0 * c_noise).astype(x.dtype)
        spread = jnp.hypot(1.0, level)
        y = spread * x
        base = (modes.denoise(y, level) - y / spread**2) * spread / level
        return base + self.backbone(x, c_noise)


def corrected(
    key: jax.Array, law: Law, rows: np.ndarray, backbone: nnx.Module | None, num_levels: int, **options: Any
) -> Law:
    """The law with a network, trained on whitened draws (n, d), if that is nearer to draws held out; else as it is.

    Raises:
        FloatingPointError: if training diverges.
    """
    keys = jax.random.split(key, 3)
    d = rows.shape[1]
    backbone = MLP((d,), 64 if d <= 16 else 128, rngs=nnx.Rngs(keys[0])) if backbone is None else backbone
    rows = rows.astype(np.float32)
    held_out, rows = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    start = NetworkDenoiser(Corrected(law.modes, backbone), schedule=SCHEDULE)
    given = {"num_evaluations": 5, "batch_size": 256, "progress_bar": False, **options}
    denoiser = fit(keys[1], start, rows, held_out=held_out, **given).denoiser
    lowest = _LOWEST * float(jnp.sqrt(law.modes.variances.min()))
    levels = jnp.geomspace(max(lowest, 0.01), _HIGHEST, num_levels).astype(jnp.float32)
    trained = law._replace(denoiser=denoiser, levels=levels)
    gained = np.asarray(_bound(keys[2], trained, held_out) - _bound(keys[2], law, held_out), float)
    if not np.isfinite(gained).all():
        raise FloatingPointError("the density of the learned law is not finite at draws held out")
    return trained if gained.mean() > _ERRORS * gained.std() / np.sqrt(len(gained)) else law


@jax.jit
@_precision.highest()
def _bound(key: jax.Array, law: Law, rows: jax.Array) -> jax.Array:
    """A bound on the log-density of each row, from one walk."""
    keys = jax.random.split(key, len(rows))
    return jax.vmap(lambda key, w: law.log_density(law.noised(key, w)))(keys, jnp.asarray(rows))
