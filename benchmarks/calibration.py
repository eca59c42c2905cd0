"""Which samplers have the right posterior? Simulation-based calibration of all of them, and the power to see it.

    python benchmarks/calibration.py --json OUT                # the table of docs/concepts/calibration.md
    python benchmarks/calibration.py --power --json OUT

The table has a row for each sampler and model. The models are a Gaussian prior in 8 dimensions, a mixture in 2, and a
learned prior in 2 dimensions with a nonlinear likelihood and an unknown scale; data are simulated from the prior's own
law. A row:

    p_value             of the worst test, corrected for their number; below .01 the sampler is miscalibrated there
    coverage_50, _90    share of the truths in central intervals, mean over entries
    ksd                 kernel Stein discrepancy of one posterior's draws, of models with a score
    r_hat, ess          medians over simulations, of the worst entry
    ess_per_evaluation  smallest effective sample size over evaluations of the denoiser, where the kernel counts them
    expected            what theory says: "exact", or why it is not
    seconds             wall time of the row, compilation included

`--power` plants errors: a mean .2 posterior standard deviations off, a variance 15 % too large, NUTS on a distribution
whose `log_prob` is a constant with the gradient of a Gaussian, a log-likelihood in half precision. Each is looked for with
the defaults of `SBC`, by `miscalibrated`, in many seeds:

    caught_bias, caught_variance, caught_fake_density, caught_half_precision     of `seeds`
    false_alarms        MALA with nothing wrong, and not `calibrated`, of `seeds`
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.diagnostics import Calibration
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    SBC,
    ULA,
    AnnealedLangevin,
    Cycle,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    GuidedPCN,
    GuidedReverse,
    Independence,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    PopulationHMC,
    ScoreHMC,
    SplitGibbs,
    TemperedSMC,
    TwistedSMC,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP
from numpyro_diffusion.train import fit

DIMENSION = 8
SCHEDULE = VE(0.01, 40.0)
KELVIN = 300.0


# Planted errors: a posterior N(y / 2, 1/2) in each dimension, unless it is said otherwise.

PRIOR = DiffusionPrior(Gaussian(jnp.zeros(DIMENSION), 1.0, SCHEDULE))


def right(y: jax.Array) -> None:
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def biased(y: jax.Array) -> None:
    """Posterior means .2 standard deviations too high."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x - 0.2 * 2.0**0.5, 1.0).to_event(1), obs=y)


def inflated(y: jax.Array) -> None:
    """Posterior variances 15 % too large."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.15**0.5).expand([DIMENSION]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.15**0.5).to_event(1), obs=y)


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape[:-1])


@_constant.defjvp
def _score_alone(primals: tuple, tangents: tuple) -> tuple:
    (x,), (step,) = primals, tangents
    return _constant(x), -jnp.sum(x * step, -1)


class FakeDensity(dist.Distribution):
    """N(0, I) whose log_prob is a constant with the right gradient."""

    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__((), (DIMENSION,))

    def sample(self, key: jax.Array, sample_shape: tuple = ()) -> jax.Array:
        return jax.random.normal(key, (*sample_shape, DIMENSION))

    def log_prob(self, value: jax.Array) -> jax.Array:
        return _constant(value)


def fake(y: jax.Array) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", FakeDensity()), 1.0).to_event(1), obs=y)


class HalfPrecision(dist.Normal):
    """A normal law that is evaluated in 16 bits."""

    def log_prob(self, value: jax.Array) -> jax.Array:
        value, loc, scale = (jnp.asarray(a, jnp.float16) for a in (value, self.loc, self.scale))
        return (-0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale)).astype(jnp.float32)


def temperature(y: jax.Array, law: type = dist.Normal) -> None:
    """Temperatures in kelvin, to two tenths; numbers of 16 bits there are a quarter apart."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", law(KELVIN + x, 0.2).to_event(1), obs=y)


half = partial(temperature, law=HalfPrecision)
PLANTED = {
    "caught_bias": (MALA, biased, right),
    "caught_variance": (MALA, inflated, right),
    "caught_fake_density": (partial(NUTS, max_tree_depth=5), fake, right),
    "caught_half_precision": (MALA, half, temperature),
}


def power(seeds: int, **options: Any) -> dict[str, Any]:
    """How often planted errors are seen, and errors where there are none."""
    results: dict[str, Any] = {"seeds": seeds}
    for name, (sampler, model, simulator) in {**PLANTED, "false_alarms": (MALA, right, right)}.items():
        started, sbc = time.process_time(), SBC(sampler, model, simulator=simulator, **options)
        found = [sbc.run(jax.random.key(seed), None) for seed in range(seeds)]
        flagged = [not each.calibrated if name == "false_alarms" else each.miscalibrated for each in found]
        results[name] = int(np.sum(flagged))
        p_values = sorted(each.p_value for each in found)
        print(f"{name:24} {results[name]:3} of {seeds}   p from {p_values[0]:.1e} to {p_values[-1]:.1e}", flush=True)
        print(f"    first seed, {time.process_time() - started:.0f} CPU s in all: {found[0]}".replace("\n", "\n    "))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--power", action="store_true", help="planted errors instead of the table")
    parser.add_argument("--seeds", type=int, default=20, help="of each planted error")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    results = power(options.seeds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
