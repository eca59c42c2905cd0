"""What particles cost: their moves over the bare network, and memory over their number and the solver's steps.

    python benchmarks/smc.py --json OUT

    moves_over_network   wall time of a temperature of `TemperedSMC` per network evaluation over that of the bare jitted
                         network on the same batch; resampling, likelihoods, adaptation and correlations included
    memory               bytes that XLA plans for one temperature (arguments and temporaries), from 100 to 100,000
                         particles and with two numbers of solver steps; nothing is run for it

Times are medians of interleaved repetitions.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionPCN, TemperedSMC
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.solve import Adams

EVENT = (64,)
STEPS = (16, 128)
"""Solver steps between which memory must not differ."""


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[:32], 1.0).to_event(1), obs=y)


def prior_of(features: int) -> DiffusionPrior:
    backbone = MLP(EVENT, features=features, rngs=nnx.Rngs(0))
    return DiffusionPrior(NetworkDenoiser(backbone), density="none")


def step_of(num_particles: int, num_steps: int, features: int, **options: Any) -> tuple[TemperedSMC, tuple]:
    """A sampler, and the shapes of the arguments of one of its temperatures."""
    kernel = partial(DiffusionPCN, solver=Adams(num_steps))
    smc = TemperedSMC(model, num_particles, kernel=kernel, progress_bar=False, **options)
    args = jnp.zeros(32), prior_of(features)
    population = jax.eval_shape(smc._start, jax.random.key(0), args, {})
    return smc, (jax.random.key(0), population, None, args, {})


def bytes_of(num_particles: int, num_steps: int, features: int) -> dict[str, int]:
    smc, shapes = step_of(num_particles, num_steps, features)
    plan = jax.jit(smc._step).lower(*shapes).compile().memory_analysis()
    return {"arguments": plan.argument_size_in_bytes, "temporaries": plan.temp_size_in_bytes}


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def moves_over_network(num_particles: int, features: int, max_moves: int, repeats: int) -> list[float]:
    """Ratios of the interleaved repetitions."""
    smc, (_, _, _, args, _) = step_of(num_particles, 30, features, correlation=1e-6, max_moves=max_moves)
    population, temperature = jax.jit(smc._start)(jax.random.key(0), args, {}), jax.jit(smc._step)
    denoiser = args[1].denoiser
    graphdef, weights = nnx.split(denoiser.backbone)
    x = population.z["x"]

    @jax.jit
    def network(weights: nnx.State, x: jax.Array, c_noise: float) -> jax.Array:
        return jax.vmap(lambda x: nnx.merge(graphdef, weights)(x, c_noise))(x)

    network(weights, x, 0.1)
    ratios = []
    for key in jax.random.split(jax.random.key(1), repeats + 1):
        arguments = key, population, None, args, {}
        _, happened = jax.block_until_ready(temperature(*arguments))
        count = int(happened.num_score_evals)
        bare = np.median([seconds(lambda: network(weights, x, 0.1)) for _ in range(20)])
        ratios.append(seconds(lambda arguments=arguments: temperature(*arguments)) / count / bare)
    return ratios[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few repetitions of small problems")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    particles, features, max_moves, repeats = (100, 64, 4, 2) if options.fast else (1000, 256, 10, 9)
    ratios = moves_over_network(particles, features, max_moves, repeats)
    counts = (100, 1000) if options.fast else (100, 1000, 10_000, 100_000)
    table = [
        {"particles": count, "solver_steps": steps, **bytes_of(count, steps, features)}
        for count in counts
        for steps in STEPS
    ]
    results = {
        "moves_over_network": float(np.median(ratios)),
        "moves_over_network_each": ratios,
        "memory": table,
        "dimension": EVENT[0],
        "features": features,
        "device": jax.devices()[0].device_kind,
    }
    print(f"moves_over_network {results['moves_over_network']:.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{'particles':>9} {'solver steps':>12} {'arguments':>12} {'temporaries':>12} {'bytes a particle':>17}")
    for row in table:
        print(
            "{particles:9} {solver_steps:12} {arguments:12} {temporaries:12}".format(**row)
            + f" {(row['arguments'] + row['temporaries']) / row['particles']:17.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
