"""What the Langevin kernels cost: against BlackJAX's MALA, against the bare gradient, and compilations counted.

    python benchmarks/kernels.py --json OUT        # needs blackjax: pip install blackjax

A logistic regression with 25 coefficients and 1000 rows, 64 chains at once.

    mala_ess_per_second_over_blackjax   smallest ESS per second of `MALA` in `MCMC` over that of BlackJAX's in a scan
    mala_step_over_gradient             time of a step over that of one value with its gradient, same chains
    recompilations                      programs compiled by a second `mcmc.run` on new data, all kernels together

Both samplers make the same number of steps from the same start, warm-up included, with compilation left out; BlackJAX,
which has no adaptation for MALA, is given the step size that ours found. Ratios are medians of interleaved repetitions.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_diffusion.infer import MALA, ULA, ScoreHMC

DIMENSION, ROWS = 25, 1000


def model(rows: jax.Array, labels: jax.Array) -> None:
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([DIMENSION]).to_event(1))
    numpyro.sample("labels", dist.Bernoulli(logits=rows @ weights).to_event(1), obs=labels)


def problem(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    key_rows, key_weights, key_labels = jax.random.split(key, 3)
    rows = jax.random.normal(key_rows, (ROWS, DIMENSION))
    logits = rows @ (0.5 * jax.random.normal(key_weights, (DIMENSION,)))
    return rows, jax.random.bernoulli(key_labels, jax.nn.sigmoid(logits)).astype(float)


def log_density(weights: jax.Array, rows: jax.Array, labels: jax.Array) -> jax.Array:
    logits = rows @ weights
    return jnp.sum(labels * logits - jax.nn.softplus(logits)) - 0.5 * weights @ weights


def smallest_ess(draws: jax.Array) -> float:
    """Of (chains, draws, dimensions)."""
    return float(np.min(effective_sample_size(np.asarray(draws))))


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def ours(chains: int, num_warmup: int, num_draws: int) -> Callable:
    @jax.jit
    def run(key: jax.Array, rows: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        sizes = {"num_warmup": num_warmup, "num_samples": num_draws, "num_chains": chains}
        kernel = MALA(model, step_size=0.01, adapt_mass_matrix=False)
        mcmc = MCMC(kernel, **sizes, chain_method="vectorized", progress_bar=False)
        mcmc.run(key, rows, labels)
        return mcmc.get_samples(group_by_chain=True)["weights"], mcmc.last_state.step_size

    return run


def blackjax_mala(chains: int, num_warmup: int, num_draws: int) -> Callable:
    import blackjax

    @jax.jit
    def run(key: jax.Array, rows: jax.Array, labels: jax.Array, step_sizes: jax.Array) -> jax.Array:
        kernel = blackjax.mala.build_kernel()
        target = lambda weights: log_density(weights, rows, labels)  # noqa: E731
        key_start, key_run = jax.random.split(key)
        start = jax.random.uniform(key_start, (chains, DIMENSION), minval=-2.0, maxval=2.0)
        states = jax.vmap(lambda w: blackjax.mala.init(w, target))(start)

        def step(states: tuple, key: jax.Array) -> tuple:
            keys = jax.random.split(key, chains)
            states, _ = jax.vmap(lambda k, s, h: kernel(k, s, target, h))(keys, states, step_sizes)
            return states, states.position

        states, _ = jax.lax.scan(lambda s, k: (step(s, k)[0], None), states, jax.random.split(key_run, num_warmup))
        return jax.lax.scan(step, states, jax.random.split(key, num_draws))[1].swapaxes(0, 1)

    return run


def gradients(chains: int, num_steps: int) -> Callable:
    """As many values with their gradients as a run makes, one after the other."""

    @jax.jit
    def run(weights: jax.Array, rows: jax.Array, labels: jax.Array) -> jax.Array:
        def step(weights: jax.Array, _: None) -> tuple[jax.Array, None]:
            value, slope = jax.vmap(lambda w: jax.value_and_grad(log_density)(w, rows, labels))(weights)
            return weights + 1e-6 * slope + 1e-12 * value[:, None], None

        return jax.lax.scan(step, weights, None, num_steps)[0]

    return run


def against_others(chains: int, num_warmup: int, num_draws: int, repeats: int) -> dict[str, float]:
    rows, labels = problem(jax.random.key(0))
    run, peer = ours(chains, num_warmup, num_draws), blackjax_mala(chains, num_warmup, num_draws)
    draws, step_sizes = run(jax.random.key(1), rows, labels)
    peer_draws = peer(jax.random.key(1), rows, labels, step_sizes)
    gap = jnp.abs(draws.mean((0, 1)) - peer_draws.mean((0, 1))) / draws.std((0, 1))
    if float(gap.max()) > 0.2:
        raise RuntimeError(f"the two samplers disagree by {float(gap.max()):.2f} standard deviations")
    bare, weights = gradients(chains, num_warmup + num_draws), draws[:, -1]
    jax.block_until_ready(bare(weights, rows, labels))
    over_peer, over_gradient = [], []
    for i in range(repeats):
        key = jax.random.key(i + 2)
        mine = seconds(lambda key=key: run(key, rows, labels))
        theirs = seconds(lambda key=key: peer(key, rows, labels, step_sizes))
        over_peer.append(theirs / mine)
        over_gradient.append(mine / seconds(lambda: bare(weights, rows, labels)))
    ess, peer_ess = smallest_ess(draws), smallest_ess(peer_draws)
    return {
        "mala_ess_per_second_over_blackjax": float(np.median(over_peer)) * ess / peer_ess,
        "mala_step_over_gradient": float(np.median(over_gradient)),
        "seconds_blackjax_over_mala": float(np.median(over_peer)),
        "smallest_ess": ess,
        "smallest_ess_blackjax": peer_ess,
        "mala_ess_per_second": ess / mine,
    }


def recompilations() -> dict[str, int]:
    os.environ.pop("CI", None)  # there NumPyro turns the progress bar off, and without one it compiles in every run
    counts = {}
    for make in (MALA, ULA, ScoreHMC):
        sizes = {"num_warmup": 5, "num_samples": 5, "num_chains": 4}
        mcmc = MCMC(make(model), **sizes, chain_method="vectorized", jit_model_args=True)
        mcmc.run(jax.random.key(0), *problem(jax.random.key(0)))
        data, key = problem(jax.random.key(1)), jax.random.key(1)
        counts[make.__name__] = compilations(lambda mcmc=mcmc, key=key, data=data: mcmc.run(key, *data))
    return counts


def compilations(function: Callable[[], object]) -> int:
    """Number of programs that XLA compiles while a function runs."""
    compiled = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, nargs="+", default=[64], help="numbers of chains; the first is reported")
    parser.add_argument("--fast", action="store_true", help="few steps and repetitions")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    num_warmup, num_draws, repeats = (100, 200, 1) if options.fast else (500, 2000, 7)

    counts = recompilations()
    results = {"recompilations": sum(counts.values()), "recompilations_each": counts}
    try:
        import blackjax  # noqa: F401
    except ImportError:
        print("blackjax is not installed: the ratios to it are left out")
    else:
        each = {chains: against_others(chains, num_warmup, num_draws, repeats) for chains in options.chains}
        results |= each[options.chains[0]] | {"each_number_of_chains": each}
    results["device"] = jax.devices()[0].device_kind
    for name, value in results.items():
        print(f"{name:36} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
