"""Forty modes far apart: are they found, and with the right weights?

    python benchmarks/mog40.py --json OUT

Forty Gaussians of equal weight and standard deviation 1.31, in two dimensions with the usual means
(`data/mog40.json`), and in 50 with means drawn once, uniformly from (-40, 40). The model is a prior and a factor, the
target over the prior. The prior is uniform on (-45, 45) in every dimension, or, in the rows of `climbed`, a mixture
about the maxima that climbs from a thousand draws of that one have found: Gaussians of 1.25 times the inverse Hessian,
of equal weights. Each method makes 10,000 draws.

    total_variation   distance of the shares of the modes among the draws to 1/40 each; every draw counts for a mode
                      drawn by its responsibilities, since some modes overlap
    floor             its mean for 10,000 independent draws
    ratio             of the two
    evaluations       of the target, climbs and warm-up included; a value, with its gradient or without, is one
    round_trips       of all chains: points that have come from the prior to temperature 1; null without temperatures
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
from jax.scipy.optimize import minimize
from numpyro.infer import MCMC, NUTS, init_to_sample

from numpyro_diffusion.infer import MALA, ParallelTempering

MODES = json.loads((Path(__file__).parent / "data" / "mog40.json").read_text())
EDGE = 45.0
NUM_DRAWS = 10_000
CLIMBS = 1000
SETTINGS = {  # temperatures, warm-up, thinning
    (2, "ParallelTempering"): (4, 200, 9),
    (50, "ParallelTempering"): (28, 200, 1),
    (50, "climbed"): (4, 200, 9),
}
CHAINS = 10


def means_in(dimensions: int) -> np.ndarray:
    if dimensions == 2:
        return np.asarray(MODES["means"], np.float32)
    return np.random.default_rng(0).uniform(-40.0, 40.0, (40, dimensions)).astype(np.float32)


def log_responsibilities(x: jax.Array, means: jax.Array) -> jax.Array:
    """Logarithms of the components' densities at one point, up to a constant."""
    return -0.5 * jnp.sum((x - means) ** 2, -1) / MODES["sd"] ** 2


def log_target(x: jax.Array, means: jax.Array) -> jax.Array:
    size = math.log(len(means)) + 0.5 * means.shape[1] * math.log(2.0 * math.pi * MODES["sd"] ** 2)
    return jax.nn.logsumexp(log_responsibilities(x, means)) - size


def broad(means: jax.Array) -> dist.Distribution:
    return dist.Uniform(-EDGE, EDGE).expand([means.shape[1]]).to_event(1)


def model(means: jax.Array, prior: dist.Distribution) -> None:
    x = numpyro.sample("x", prior)
    numpyro.factor("target_over_prior", log_target(x, means) - prior.log_prob(x))


def climbed(key: jax.Array, means: jax.Array) -> tuple[dist.Distribution, int]:
    """A mixture about the maxima that are found from draws of the broad prior, and the evaluations that it took."""

    @jax.jit
    @jax.vmap
    def climb(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = minimize(lambda x: -log_target(x, means), start, method="BFGS", options={"maxiter": 50})
        return found.x, found.nfev

    ends, counts = climb(broad(means).sample(key, (CLIMBS,)))
    maxima: list[np.ndarray] = []
    for end in np.asarray(ends):
        if np.isfinite(end).all() and all(np.linalg.norm(end - other) > 1.0 for other in maxima):
            maxima.append(end)
    centres = jnp.asarray(np.stack(maxima))
    precision = jax.lax.map(jax.hessian(lambda x: -log_target(x, means)), centres) / 1.25
    parts = dist.MultivariateNormal(centres, precision_matrix=precision)
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.full(len(maxima), 1.0 / len(maxima))), parts)
    return mixture, int(counts.sum()) + centres.size  # a column of a Hessian is a gradient


def total_variation(counts: np.ndarray) -> np.ndarray:
    """Distance of shares to equal ones, the last axis being that of the modes."""
    return 0.5 * np.abs(counts / counts.sum(-1, keepdims=True) - 1.0 / counts.shape[-1]).sum(-1)


def row(name: str, x: jax.Array, means: jax.Array, evaluations: int, **more: float | None) -> dict:
    logits = jax.lax.map(partial(log_responsibilities, means=means), x)
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


def tempered(means: np.ndarray, seed: int, num_draws: int, name: str = "ParallelTempering") -> dict:
    temperatures, num_warmup, thinning = SETTINGS[means.shape[1], name]
    means, prior, before = jnp.asarray(means), broad(means), 0
    if name == "climbed":
        prior, before = climbed(jax.random.key(100 + seed), means)
    kernel = ParallelTempering(model, MALA, num_temperatures=temperatures)
    steps = num_draws // CHAINS * thinning
    options = {"num_chains": CHAINS, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=steps, thinning=thinning, **options)
    mcmc.run(jax.random.key(seed), means, prior)
    state = mcmc.last_state
    a_step = 1 + 3 * (
        temperatures - 1
    )  # a draw of the prior; of each other point its gradient, its proposal, its value
    return row(
        name,
        mcmc.get_samples()["x"],
        means,
        before + CHAINS * (4 * temperatures + a_step * (num_warmup + steps)),
        round_trips=int(state.round_trips.sum()),
        barrier=float((1.0 - state.swap_rates).sum(-1).mean()),
        log_evidence=float(state.log_evidence.mean()),
    )


def untempered(means: np.ndarray, seed: int, num_draws: int) -> dict:
    means = jnp.asarray(means)
    options = {"num_chains": CHAINS, "chain_method": "vectorized", "progress_bar": False}
    kernel = NUTS(model, init_strategy=init_to_sample)
    mcmc = MCMC(kernel, num_warmup=500, num_samples=num_draws // CHAINS, **options)
    mcmc.warmup(jax.random.key(seed), means, broad(means), collect_warmup=True, extra_fields=("num_steps",))
    evaluations = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(jax.random.key(seed + 1), means, broad(means), extra_fields=("num_steps",))
    evaluations += int(mcmc.get_extra_fields()["num_steps"].sum())
    return row("NUTS", mcmc.get_samples()["x"], means, evaluations, round_trips=None)


METHODS = {
    2: (tempered, untempered),
    50: (tempered, untempered, partial(tempered, name="climbed")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a twentieth of the draws, in two dimensions")
    parser.add_argument("--dimensions", type=lambda text: [int(d) for d in text.split(",")], default=[2, 50])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    dimensions, num_draws = ([2], NUM_DRAWS // 20) if options.fast else (options.dimensions, NUM_DRAWS)
    print("dimensions            method  total variation   floor   ratio  evaluations  round trips  missed modes")
    results = []
    for count in dimensions:
        for method in METHODS[count]:
            found = method(means_in(count), options.seed, num_draws)
            results.append(found)
            print(
                "{dimensions:10} {method:>17} {total_variation:16.4f} {floor:7.4f} {ratio:7.2f}".format(**found),
                f"{found['evaluations']:12} {found['round_trips']!s:>12} {found['missed_modes']:13}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
