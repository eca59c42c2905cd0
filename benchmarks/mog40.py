"""Forty modes far apart: are they found, and with the right weights?

    python benchmarks/mog40.py --json OUT

Forty Gaussians of equal weight and standard deviation 1.31, in two dimensions with the usual means
(`data/mog40.json`), and in 50 with means drawn uniformly from (-40, 40) once. The model is a prior N(0, 25^2) in every
dimension and a factor, the target over the prior. Each method makes 10,000 draws.

    total_variation   distance of the shares of the modes among the draws to 1/40 each; every draw counts for a mode
                      drawn by its responsibilities, since some modes overlap
    floor             its mean for 10,000 independent draws
    ratio             of the two
    evaluations       of the target, warm-up included; a value, with its gradient or without, is one
    round_trips       of all chains: points that have come from the prior to temperature 1
    num_temperatures, smallest_swap_rate, missed_modes
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_sample

from numpyro_diffusion.infer import MALA, ParallelTempering

MODES = json.loads((Path(__file__).parent / "data" / "mog40.json").read_text())
WIDTH = 25.0
NUM_DRAWS = 10_000
SETTINGS = {  # dimensions: temperatures, chains, warm-up, thinning
    2: (5, 20, 250, 6),
    50: (28, 20, 600, 1),
}


def means_in(dimensions: int) -> np.ndarray:
    if dimensions == 2:
        return np.asarray(MODES["means"], np.float32)
    return np.random.default_rng(0).uniform(-40.0, 40.0, (40, dimensions)).astype(np.float32)


def log_responsibilities(x: jax.Array, means: jax.Array) -> jax.Array:
    """Logarithms of the components' densities at one point, up to a constant."""
    return -0.5 * jnp.sum((x - means) ** 2, -1) / MODES["sd"] ** 2


def model(means: jax.Array) -> None:
    dimensions = means.shape[1]
    x = numpyro.sample("x", dist.Normal(0.0, WIDTH).expand([dimensions]).to_event(1))
    log_target = jax.nn.logsumexp(log_responsibilities(x, means)) - math.log(len(means))
    log_target -= dimensions * math.log(MODES["sd"])
    numpyro.factor("target_over_prior", log_target + 0.5 * jnp.sum(x**2) / WIDTH**2 + dimensions * math.log(WIDTH))


def total_variation(counts: np.ndarray) -> np.ndarray:
    """Distance of shares to equal ones, the last axis being that of the modes."""
    return 0.5 * np.abs(counts / counts.sum(-1, keepdims=True) - 1.0 / counts.shape[-1]).sum(-1)


def row(name: str, x: np.ndarray, means: np.ndarray, evaluations: int, **more: float) -> dict:
    x = jnp.asarray(x).reshape(-1, means.shape[1])
    logits = jax.lax.map(partial(log_responsibilities, means=jnp.asarray(means)), x)
    label = jax.random.categorical(jax.random.key(9), logits, axis=-1)
    counts = np.bincount(np.asarray(label), minlength=len(means))
    exact = np.random.default_rng(0).multinomial(len(x), np.full(len(means), 1.0 / len(means)), 1000)
    found, floor = float(total_variation(counts)), float(total_variation(exact).mean())
    return {
        "dimensions": means.shape[1],
        "method": name,
        "draws": len(x),
        "total_variation": found,
        "floor": floor,
        "ratio": found / floor,
        "evaluations": evaluations,
        "missed_modes": int((counts == 0).sum()),
        **more,
    }


def tempered(means: np.ndarray, seed: int, num_draws: int) -> dict:
    temperatures, chains, num_warmup, thinning = SETTINGS[means.shape[1]]
    kernel = ParallelTempering(model, MALA, num_temperatures=temperatures)
    steps = num_draws // chains * thinning
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=steps,
        thinning=thinning,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), jnp.asarray(means))
    a_step = 1 + 3 * (temperatures - 1)  # a draw of the prior; above it where a point came to, where it goes, and there
    start = 3 * temperatures
    state = mcmc.last_state
    return row(
        "ParallelTempering",
        mcmc.get_samples()["x"],
        means,
        chains * (start + a_step * (num_warmup + steps)),
        round_trips=int(state.round_trips.sum()),
        num_temperatures=temperatures,
        smallest_swap_rate=float(state.swap_rates.min()),
        barrier=float((1.0 - state.swap_rates).sum(-1).mean()),
        log_evidence=float(state.log_evidence.mean()),
    )


def untempered(means: np.ndarray, seed: int, num_draws: int) -> dict:
    chains = 20
    options = {"num_chains": chains, "chain_method": "vectorized", "progress_bar": False}
    kernel = NUTS(model, init_strategy=init_to_sample)
    mcmc = MCMC(kernel, num_warmup=250, num_samples=num_draws // chains, **options)
    mcmc.warmup(jax.random.key(seed), jnp.asarray(means), collect_warmup=True, extra_fields=("num_steps",))
    evaluations = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(jax.random.key(seed + 1), jnp.asarray(means), extra_fields=("num_steps",))
    evaluations += int(mcmc.get_extra_fields()["num_steps"].sum())
    return row("NUTS", mcmc.get_samples()["x"], means, evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a twentieth of the draws, in two dimensions")
    parser.add_argument("--dimensions", type=lambda text: [int(d) for d in text.split(",")], default=[2, 50])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    dimensions, num_draws = ([2], NUM_DRAWS // 20) if options.fast else (options.dimensions, NUM_DRAWS)
    print(f"{'dimensions':>10} {'method':>17} {'total variation':>15} {'floor':>6} {'ratio':>6} {'evaluations':>11}")
    results = []
    for count in dimensions:
        for method in (tempered, untempered):
            started = __import__("time").process_time()
            found = method(means_in(count), options.seed, num_draws)
            results.append(found)
            print(__import__("time").process_time() - started)
            print(
                "{dimensions:10} {method:>17} {total_variation:15.4f} {floor:6.4f}".format(**found),
                "{ratio:6.2f} {evaluations:11}".format(**found),
                {name: value for name, value in found.items() if name in ("round_trips", "missed_modes", "barrier")},
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
