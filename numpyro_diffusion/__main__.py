r"""`python -m numpyro_diffusion`: versions, devices, precision, and a self-check of a few seconds.

The check is a posterior that is known. With the prior N(0, 1), a unit-noise datum at 3 and the exact denoiser the
posterior is N(1.5, 0.5), and four chains of `DiffusionPCN` must have its mean and variance within five standard errors.
"""

import importlib.metadata
import platform
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_diffusion import DiffusionPrior, __version__, _precision
from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.infer import DiffusionPCN

LIBRARIES = ("numpyro", "jax", "jaxlib", "flax", "optax", "arviz")


def main() -> int:
    """Prints the report.

    Returns:
        What the process exits with: 0 if the self-check succeeds, 1 if not.
    """
    rows = {"numpyro_diffusion": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    rows |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    rows["devices"] = ", ".join(f"{device.device_kind} ({device.platform})" for device in jax.devices())
    rows["matmul precision"] = f"{_precision.setting() or 'default'}: {_rounding()}"
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    started = time.perf_counter()
    good, found = _check()
    seconds = time.perf_counter() - started
    print(f"{'self-check':<18}{'ok' if good else 'FAILED'}: {found}, {seconds:.1f} s with compilation")
    return 0 if good else 1


def _rounding() -> str:
    """How far a product of matrices is from its value in double precision."""
    a, b = (np.asarray(jax.random.normal(key, (256, 256))) for key in jax.random.split(jax.random.key(0)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = np.abs(np.asarray(jnp.asarray(a) @ jnp.asarray(b)) - exact).max() / np.abs(exact).max()
    rounded = "" if error < 1e-5 else ", rounded: see docs/gpu.md"
    return f"relative error {error:.0e} in a product of 256 x 256 matrices{rounded}"


def _model(y: float) -> None:
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


def _check() -> tuple[bool, str]:
    """Whether chains have the mean and the variance of N(1.5, 0.5), and a sentence about it."""
    options = {"num_warmup": 200, "num_samples": 500, "num_chains": 4, "chain_method": "vectorized"}
    mcmc = MCMC(DiffusionPCN(_model), **options, progress_bar=False)
    mcmc.run(jax.random.key(0), 3.0)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"][..., 0], np.float64)
    squares = (x - 1.5) ** 2
    off = [
        abs(draws.mean() - truth) / (draws.std() / np.sqrt(effective_sample_size(draws)))
        for draws, truth in ((x, 1.5), (squares, 0.5))
    ]
    found = f"posterior mean {x.mean():.3f} for 1.5, variance {squares.mean():.3f} for 0.5"
    return bool(max(off) < 5.0), found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
