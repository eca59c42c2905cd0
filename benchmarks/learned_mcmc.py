"""Modes far apart: does what is learned from local chains bring them together, and what does it cost?

    python benchmarks/learned_mcmc.py --json OUT

Three targets, each a prior that is easily drawn and a factor, the target over the prior:

    forty modes in 2 dimensions    of `mog40.py`, with its prior, uniform on a box
    forty modes in 50 dimensions   of `mog40.py`; the prior is normal, of standard deviation 25, in every dimension
    two modes in 10 dimensions     of weights .3 and .7, bent (x2 + (x1^2 - 1) / 2 is normal, given x1), twelve standard
                                   deviations apart in x1 and in x2; the prior is normal, of standard deviation 6

`LearnedMCMC` makes 10,000 draws, in 50 dimensions of 50,000 that are counted, and NUTS as many, with ten chains that
start at draws of the prior, too.

    r_hat             the largest, of all chains
    total_variation   distance of the shares of the modes among the draws to those of the target
    floor             its mean for as many independent draws
    ratio             of the two; for two modes exact draws are above 1.5 in one run of four
    evaluations       of the target, warm-up and what is learned from included; a value, with its gradient or without,
                      is one
    seconds           wall time, compilation and training included; `cpu_seconds` likewise
    accept_prob       of the global moves; `num_modes` normal laws behind them, `network`: whether one was kept
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mog40
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import HMC, MCMC, NUTS, init_to_sample

from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import MALA, LearnedMCMC

BENT_WEIGHTS, BENT_CENTRES = np.array([0.3, 0.7]), np.array([-6.0, 6.0])
BENT_DIMENSIONS = 10


class Target(NamedTuple):
    """A law with modes, as a model of its arguments."""

    prior: dist.Distribution
    log_density: Callable[[jax.Array], jax.Array]
    log_parts: Callable[[jax.Array], jax.Array]  # of each mode
    weights: np.ndarray
    options: dict  # of `LearnedMCMC`


def model(target: Target) -> None:
    x = numpyro.sample("x", target.prior)
    numpyro.factor("target_over_prior", target.log_density(x) - target.prior.log_prob(x))


def normal(scale: float, dimensions: int) -> dist.Distribution:
    return dist.Normal(0.0, scale).expand([dimensions]).to_event(1)


def bent_parts(x: jax.Array) -> jax.Array:
    """Log-densities of the two bent modes, with their weights."""
    centre = jnp.asarray(BENT_CENTRES)
    first, second = x[0] - centre, x[1] - centre
    squares = first**2 + (second + 0.5 * (first**2 - 1.0)) ** 2 + jnp.sum(x[2:] ** 2)
    return jnp.log(jnp.asarray(BENT_WEIGHTS)) - 0.5 * squares - 0.5 * BENT_DIMENSIONS * jnp.log(2.0 * jnp.pi)


def forty(dimensions: int) -> Target:
    means = jnp.asarray(mog40.means_in(dimensions))
    prior = mog40.broad(means) if dimensions == 2 else normal(25.0, dimensions)
    if dimensions == 2:
        options = {"local_kernel": MALA, "num_chains": 200, "num_warmup": 300}
    else:
        leapfrog = partial(HMC, num_steps=4, trajectory_length=None)
        options = {"local_kernel": leapfrog, "num_chains": 500, "num_warmup": 100, "refit_steps": 30}
        options["thinning"] = 5
    parts = partial(mog40.log_responsibilities, means=means)
    return Target(prior, partial(mog40.log_target, means=means), parts, np.full(40, 1 / 40), options)


def bent() -> Target:
    options = {"local_kernel": MALA, "num_chains": 200, "num_warmup": 300}
    log_density = lambda x: jax.nn.logsumexp(bent_parts(x))  # noqa: E731
    return Target(normal(6.0, BENT_DIMENSIONS), log_density, bent_parts, BENT_WEIGHTS, options)


TARGETS = {
    "forty modes in 2 dimensions": partial(forty, 2),
    "forty modes in 50 dimensions": partial(forty, 50),
    "two modes in 10 dimensions": bent,
}


def learned(target: Target, seed: int, num_draws: int) -> tuple[LearnedMCMC, int, dict]:
    chains = target.options["num_chains"]
    sampler = LearnedMCMC(partial(model, target), **target.options, num_draws=num_draws // chains, progress_bar=False)
    sampler.run(jax.random.key(seed))
    moves, law = sampler.global_moves, sampler.law
    more = {"accept_prob": 0.0, "num_modes": 0, "network": False, "pays": False}
    if law is not None:
        more = {
            "accept_prob": moves.accept_prob,
            "num_modes": law.num_modes,
            "network": law.denoiser is not None,
            "pays": moves.pay,
        }
    return sampler, sampler.num_target_evals, {**more, "log_evidence": float(sampler.log_evidence.value)}


def untaught(target: Target, seed: int, num_draws: int) -> tuple[MCMC, int, dict]:
    kernel = NUTS(partial(model, target), init_strategy=init_to_sample)
    options = {"num_chains": 10, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=500, num_samples=num_draws // 10, **options)
    mcmc.warmup(jax.random.key(seed), collect_warmup=True, extra_fields=("num_steps",))
    evaluations = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(jax.random.key(seed + 1), extra_fields=("num_steps",))
    return mcmc, evaluations + int(mcmc.get_extra_fields()["num_steps"].sum()), {}


def row(name: str, method: Callable, target: Target, seed: int, num_draws: int) -> dict:
    begun, cpu = time.perf_counter(), time.process_time()
    run, evaluations, more = method(target, seed, num_draws)
    x = jax.block_until_ready(jnp.asarray(run.get_samples()["x"]))
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    label = jax.random.categorical(jax.random.key(9), jax.lax.map(target.log_parts, x), axis=-1)
    counts = np.bincount(np.asarray(label), minlength=len(target.weights))
    exact = np.random.default_rng(0).multinomial(len(x), target.weights, 1000)
    off = lambda counts: 0.5 * np.abs(counts / len(x) - target.weights).sum(-1)  # noqa: E731
    found, floor = float(off(counts)), float(off(exact).mean())
    return {
        "target": name,
        "method": type(run).__name__ if more else "NUTS",
        "seed": seed,
        "draws": len(x),
        "r_hat": float(verdict(run).r_hat),
        "total_variation": found,
        "floor": floor,
        "ratio": found / floor,
        "missed_modes": int((counts == 0).sum()),
        "evaluations": evaluations,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a fifth of the draws, in two dimensions")
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, or parts of them, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    wanted = ["2 dimensions"] if options.fast else options.targets.split(",")
    names = [name for name in TARGETS if any(part in name for part in wanted)]
    print(f"{'':28}      method  R-hat  over the floor  missed  evaluations  seconds (CPU)  acceptance")
    results = []
    for name in names:
        for method in (untaught, learned):
            found = row(name, method, TARGETS[name](), options.seed, 2000 if options.fast else 10_000)
            results.append(found)
            print(
                "{target:28} {method:>11} {r_hat:6.3f} {ratio:15.2f} {missed_modes:7} {evaluations:12}".format(**found),
                "{seconds:8.0f} ({cpu_seconds:3.0f})".format(**found),
                f"{found.get('accept_prob', float('nan')):11.2f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
