"""What the library costs on top of what it runs: ratios measured in one process, and compilations counted.

    python benchmarks/overhead.py --json OUT

    solver_over_network   wall time of a solver per network evaluation over the bare jitted network, same batch
    fit_over_scan         steps per second of `fit` over a hand-written scan of the same loss and optimiser
    recompilations        programs compiled by a second `mcmc.run` on new data and weights, all kernels together
    compile_25m_over_1m   compile time of a run with 25 million weights as a model argument over one with a million
    model_runs_max        executions of the model's Python before the first draw of a first run, most over all kernels
    start_over_inner      cold start of NoiseSpace(NUTS) over that of NumPyro's NUTS on the reparameterised model

Times are medians of interleaved repetitions.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    ULA,
    AnnealedLangevin,
    Cycle,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    GuidedPCN,
    GuidedReverse,
    Independence,
    LineIntegral,
    Mixture,
    NoiseSpace,
    ParticleGibbs,
    ScoreHMC,
    SplitGibbs,
    with_density,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, Heun, Solver, StochasticHeun, solve, terminal_point
from numpyro_diffusion.train import denoising_loss, fit

EVENT = (64,)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def median_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> float:
    """Median over interleaved repetitions of the time of `first` over that of `second`, after a warm-up."""
    first(), second()
    return float(np.median([seconds(first) / seconds(second) for _ in range(repeats)]))


def solver_over_network(batch: int, features: int, repeats: int) -> dict[str, float]:
    denoiser = NetworkDenoiser(MLP(EVENT, features=features, rngs=nnx.Rngs(0)))
    z = jax.random.normal(jax.random.key(0), (batch, *EVENT))
    keys = jax.random.split(jax.random.key(1), batch)
    graphdef, weights = nnx.split(denoiser.backbone)

    @jax.jit
    def network(weights: nnx.State, x: jax.Array, c_noise: float) -> jax.Array:
        return jax.vmap(lambda x: nnx.merge(graphdef, weights)(x, c_noise))(x)

    @partial(jax.jit, static_argnums=0)
    def walk(solver: Solver, denoiser: NetworkDenoiser, z: jax.Array) -> jax.Array:
        def one(z: jax.Array, key: jax.Array) -> jax.Array:
            return solve(solver, denoiser, terminal_point(denoiser, z), key if solver.stochastic else None)

        return jax.vmap(one)(z, keys)

    ratios = {}
    for solver in (DPMSolverPP(33, eta=1.0), Ancestral(33), Ancestral(33, eta=0.0), Heun(17), StochasticHeun(17)):
        ratio = median_ratio(lambda s=solver: walk(s, denoiser, z), lambda: network(weights, z, 0.1), repeats)
        name = type(solver).__name__ + (", eta=0" if solver == Ancestral(33, eta=0.0) else "")
        ratios[name] = ratio / solver.evaluations()
    return ratios


def fit_over_scan(num_steps: int, features: int, repeats: int) -> float:
    data = np.asarray(jax.random.normal(jax.random.key(0), (2000, *EVENT)))
    backbone = MLP(EVENT, features=features, rngs=nnx.Rngs(0))
    optimizer, batch_size = optax.adam(1e-3), 128
    denoiser = NetworkDenoiser(backbone).unfreeze()
    rows = jnp.asarray(data)

    @jax.jit
    def scan(denoiser: NetworkDenoiser) -> jax.Array:
        def loss(params: nnx.State, key: jax.Array) -> jax.Array:
            key_rows, key_noise = jax.random.split(key)
            x = rows[jax.random.randint(key_rows, (batch_size,), 0, len(rows))]
            keys = jax.random.split(key_noise, batch_size)
            trained = denoiser.with_params(params)
            return jnp.mean(jax.vmap(lambda k, x: denoising_loss(trained, k, x))(keys, x))

        def step(carry: tuple, key: jax.Array) -> tuple:
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(1), num_steps)
        return jax.lax.scan(step, (denoiser.params, optimizer.init(denoiser.params)), keys)[1]

    def fitted() -> np.ndarray:
        options = {"num_steps": num_steps, "batch_size": batch_size, "optimizer": optimizer, "progress_bar": False}
        return fit(jax.random.key(1), backbone, data, **options).losses

    return median_ratio(lambda: scan(denoiser), fitted, repeats)


def joint(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def alone(y: jax.Array, prior: DiffusionPrior) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0).to_event(1), obs=y)


@contextmanager
def compilations() -> Iterator[dict[str, float]]:
    """Counts the programs that XLA compiles and adds up the seconds of tracing, lowering and compiling."""
    found = {"programs": 0, "seconds": 0.0}

    def listen(event: str, duration: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            found["programs"] += event.endswith("backend_compile_duration")
            found["seconds"] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def prior_of(features: int, seed: int) -> DiffusionPrior:
    denoiser = NetworkDenoiser(MLP(EVENT, features=features, rngs=nnx.Rngs(seed)))
    return DiffusionPrior(denoiser, sampler=DPMSolverPP(6, eta=1.0), flow_solver=Ancestral(6, eta=0.0))


def recompilations() -> dict[str, int]:
    counts = {}
    os.environ.pop("CI", None)  # there NumPyro turns the progress bar off, and without one it compiles in every run
    for make, model in ((NoiseSpace, joint), (DiffusionPCN, alone), (DiffusionGibbs, joint)):
        options = {"num_warmup": 5, "num_samples": 5, "num_chains": 4, "chain_method": "vectorized"}
        mcmc = MCMC(make(model), **options, jit_model_args=True, progress_bar=True)
        mcmc.run(jax.random.key(0), jnp.zeros(EVENT), prior_of(16, 0))
        y, prior, key = jnp.ones(EVENT), prior_of(16, 1), jax.random.key(1)
        with compilations() as found:
            mcmc.run(key, y, prior)
        counts[make.__name__] = int(found["programs"])
    return counts


def many_kernels(fast: bool) -> dict[str, tuple[Callable, Callable]]:
    """What makes each kernel, and the model it is made for."""
    few = {"NUTS": (NUTS, joint), "DiffusionPCN": (DiffusionPCN, alone), "NoiseSpace": (NoiseSpace, joint)}
    if fast:
        return few
    return few | {
        "GuidedPCN": (GuidedPCN, alone),
        "ParticleGibbs": (ParticleGibbs, alone),
        "DiffusionGibbs": (DiffusionGibbs, joint),
        "MALA": (partial(MALA, density=LineIntegral()), joint),
        "ScoreHMC": (partial(ScoreHMC, density=LineIntegral()), joint),
        "ULA": (ULA, joint),
        "AnnealedLangevin": (AnnealedLangevin, alone),
        "GuidedReverse": (GuidedReverse, alone),
        "DiffusiveGibbs": (DiffusiveGibbs, joint),
        "SplitGibbs": (partial(SplitGibbs, rho=0.5), joint),
        "Independence": (Independence, joint),
        "Cycle": (lambda model: Cycle([DiffusionPCN, Independence], model=model), alone),
        "Mixture": (lambda model: Mixture([DiffusionPCN, Independence], model=model), alone),
        "Mixture with NUTS": (lambda model: Mixture([NUTS, DiffusionPCN], model=with_density(model)), alone),
    }


def model_runs(fast: bool) -> dict[str, int]:
    """Executions of the model up to the first draw."""
    counts = {}
    for name, (make, model) in many_kernels(fast).items():
        runs = [0]

        def counted(*args: object, model: Callable = model, runs: list[int] = runs) -> None:
            runs[0] += 1
            model(*args)

        mcmc = MCMC(make(counted), num_warmup=0, num_samples=1, num_chains=2, chain_method="vectorized")
        mcmc.run(jax.random.key(0), jnp.zeros(EVENT), prior_of(8, 0))
        counts[name] = runs[0]
    return counts


def start_over_inner(repeats: int) -> float:
    """Cold starts, in turn."""
    in_noise_space = reparam(joint, config={"x": NoiseReparam()})

    def start(kernel: MCMCKernel) -> object:
        jax.clear_caches()
        keys = jax.random.split(jax.random.key(0), 4)
        args = jnp.zeros(EVENT), prior_of(16, 0)
        return kernel.init(keys, 100, None, model_args=args, model_kwargs={})

    def ratio() -> float:
        return seconds(lambda: start(NoiseSpace(joint))) / seconds(lambda: start(NUTS(in_noise_space)))

    return float(np.median([ratio() for _ in range(repeats)]))


def compile_seconds(features: int) -> tuple[float, int]:
    """Compile time of a first run with the prior as a model argument, and its number of weights."""
    jax.clear_caches()
    prior = prior_of(features, 0)
    mcmc = MCMC(NoiseSpace(joint, max_tree_depth=2), num_warmup=1, num_samples=1, jit_model_args=True)
    with compilations() as found:
        mcmc.run(jax.random.key(0), jnp.zeros(EVENT), prior)
    return found["seconds"], sum(leaf.size for leaf in jax.tree.leaves(prior))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few repetitions of small problems")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    repeats = 3 if options.fast else 15

    solvers = solver_over_network(64 if options.fast else 512, 64 if options.fast else 256, repeats)
    counts = recompilations()
    runs = model_runs(options.fast)
    small, small_size = compile_seconds(100 if options.fast else 400)
    large, large_size = compile_seconds(200 if options.fast else 2000)
    results = {
        "solver_over_network": max(solvers.values()),
        "solver_over_network_each": solvers,
        "fit_over_scan": fit_over_scan(100 if options.fast else 1000, 128, 3 if options.fast else 5),
        "recompilations": sum(counts.values()),
        "recompilations_each": counts,
        "compile_25m_over_1m": large / small,
        "model_runs_max": max(count for name, count in runs.items() if name != "NUTS"),
        "model_runs_each": runs,
        "start_over_inner": start_over_inner(1 if options.fast else 5),
        "weights": [small_size, large_size],
        "device": jax.devices()[0].device_kind,
    }
    for name, value in results.items():
        print(f"{name:26} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
