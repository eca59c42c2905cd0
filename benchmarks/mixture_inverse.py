"""Mixture priors with a linear observation: how far is each sampler from the exact posterior?

The prior has 25 Gaussian components in dx dimensions, the likelihood is y = A x + sigma eps with dy rows, and the
posterior is a mixture in closed form (Cardoso et al., Monte Carlo guided diffusion for Bayesian linear inverse
problems, 2024, https://arxiv.org/abs/2308.07983). Every method is given the exact denoiser. The distance is the sliced
W1 of 1000 draws to 10,000 exact ones over 1000 projections; the floor is that of 1000 other exact draws, the mean over
eight such sets.

    python benchmarks/mixture_inverse.py --problems FILE --method DiffusionPCN --json OUT

FILE maps "dx_dy_seed" to {"weights", "A", "y", "sigma"}. Component (i, j), i and j in -2..2, i outer, has mean (8i, 8j)
repeated dx / 2 times, times -1.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import AnnealedLangevin, DiffusionPCN, NoiseSpace, PredictorCorrector, SplitGibbs
from numpyro_diffusion.noise import VE, UniformLogSNR
from numpyro_diffusion.solve import Ancestral, DPMSolverPP

NUM_DRAWS, NUM_EXACT, NUM_PROJECTIONS, NUM_FLOORS = 1000, 10_000, 1000, 8


class Problem(NamedTuple):
    """One linear inverse problem, and its exact posterior as a mixture with common covariance."""

    prior: GaussianMixture
    A: jax.Array
    y: jax.Array
    sigma: jax.Array


def read(name: str, fields: dict[str, Any]) -> Problem:
    dimension = int(name.split("_")[0])
    corners = [(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = jnp.array([np.tile(corner, dimension // 2) for corner in corners])
    schedule = VE(sigma_min=0.02, sigma_max=80.0)
    prior = GaussianMixture(jnp.array(fields["weights"]).reshape(-1), means, 1.0, schedule)
    y = jnp.array(fields["y"], float).reshape(-1)
    return Problem(
        prior, jnp.array(fields["A"], float).reshape(len(y), dimension), y, jnp.array(float(fields["sigma"]))
    )


def exact_draws(key: jax.Array, problem: Problem, count: int) -> jax.Array:
    prior, A, y, sigma = problem
    dimension = prior.means.shape[1]
    covariance = jnp.linalg.inv(jnp.eye(dimension) + A.T @ A / sigma**2)
    means = (A.T @ y / sigma**2 + prior.means) @ covariance
    evidence = dist.MultivariateNormal(prior.means @ A.T, A @ A.T + sigma**2 * jnp.eye(len(y)))
    key_component, key_noise = jax.random.split(key)
    k = jax.random.categorical(key_component, prior.log_weights + evidence.log_prob(y), shape=(count,))
    noise = jax.random.normal(key_noise, (count, dimension)) @ jnp.linalg.cholesky(covariance).T
    return means[k] + noise


@jax.jit
def sliced_w1(key: jax.Array, few: jax.Array, many: jax.Array) -> jax.Array:
    """Mean over projections of the W1 distance; the larger sample's size is a multiple of the smaller's."""
    directions = jax.random.normal(key, (NUM_PROJECTIONS, few.shape[1]))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    few, many = (jnp.sort(directions @ sample.T, axis=1) for sample in (few, many))
    return jnp.abs(few[:, :, None] - many.reshape(*few.shape, -1)).mean()


def model(prior: DiffusionPrior, A: jax.Array, y: jax.Array, sigma: jax.Array) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(A @ x, sigma).to_event(1), obs=y)


KERNELS = {
    "DiffusionPCN": (partial(DiffusionPCN, num_proposals=4, global_fraction=1.0), DPMSolverPP(80, eta=1.0)),
    "DiffusionPCN, 1 proposal": (partial(DiffusionPCN, global_fraction=1.0), DPMSolverPP(80, eta=1.0)),
    "DiffusionPCN, ancestral": (
        partial(DiffusionPCN, num_proposals=4, global_fraction=1.0),
        Ancestral(80, grid=UniformLogSNR()),
    ),
    "NoiseSpace": (NoiseSpace, DPMSolverPP(80, eta=1.0)),
    "AnnealedLangevin": (partial(AnnealedLangevin, step_size=0.16), DPMSolverPP(64, eta=1.0)),
    "AnnealedLangevin, small steps": (
        partial(AnnealedLangevin, num_levels=64, steps_per_level=10, step_size=0.05),
        DPMSolverPP(64, eta=1.0),
    ),
    "PredictorCorrector": (PredictorCorrector, DPMSolverPP(64, eta=1.0)),
    "SplitGibbs": (
        partial(SplitGibbs, rho=0.3, schedule=(30.0, 17.0, 9.5, 5.3, 3.0, 1.7, 0.95, 0.53)),
        DPMSolverPP(64, eta=1.0),
    ),
}
"""Each method's kernel and the solver of its prior; a walk down the whole ladder is 80 evaluations for all. Levels are
log-uniform: what is hard here is to find the weights of far modes, and these need large moves. The kernels after
`NoiseSpace` are biased, and a few moves are as good as many: --moves 2, for `SplitGibbs` 12."""


@partial(jax.jit, static_argnames=("method", "num_moves"))
def run(key: jax.Array, problem: Problem, method: str, num_moves: int) -> tuple[jax.Array, jax.Array]:
    """The last draw of each of 1000 chains started from the prior, and mean denoiser evaluations per chain."""
    kernel, sampler = KERNELS[method]
    prior = DiffusionPrior(problem.prior, sampler=sampler)
    fields = ("num_score_evals",)
    mcmc = MCMC(
        kernel(model),
        num_warmup=num_moves // 2,
        num_samples=num_moves - num_moves // 2,
        num_chains=NUM_DRAWS,
        chain_method="vectorized",
        progress_bar=False,
    )
    key_warmup, key_run = jax.random.split(key)
    args = prior, problem.A, problem.y, problem.sigma
    mcmc.warmup(key_warmup, *args, extra_fields=fields, collect_warmup=True)
    evaluations = mcmc.get_extra_fields()["num_score_evals"].sum()
    mcmc.run(jax.random.split(key_run, NUM_DRAWS), *args, extra_fields=fields)
    evaluations += mcmc.get_extra_fields()["num_score_evals"].sum()
    return mcmc.get_samples(group_by_chain=True)["x"][:, -1], evaluations / NUM_DRAWS


def evaluate(name: str, fields: dict[str, Any], method: str, num_moves: int, seed: int) -> dict[str, Any]:
    problem = read(name, fields)
    keys = jax.random.split(jax.random.key(seed), 3)
    keys_floor = jax.random.split(keys[2], NUM_FLOORS)
    exact = exact_draws(keys[0], problem, NUM_EXACT)
    started = time.perf_counter()
    draws, evaluations = jax.block_until_ready(run(keys[1], problem, method, num_moves))
    return {
        "problem": name,
        "method": method,
        "sliced_w1": float(sliced_w1(keys[2], draws, exact)),
        "floor": float(np.mean([sliced_w1(keys[2], exact_draws(k, problem, NUM_DRAWS), exact) for k in keys_floor])),
        "score_evaluations_per_draw": float(evaluations),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, default=Path(__file__).parent / "data/mixture_inverse_problems.json")
    parser.add_argument("--method", choices=[*KERNELS, "all"], default="DiffusionPCN")
    parser.add_argument("--sizes", default="8_1,8_2,8_4", help='comma-separated "dx_dy", or "all"')
    parser.add_argument("--moves", type=int, default=105, help="MCMC steps of each chain, half of them warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="one problem, few moves")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    problems = json.loads(options.problems.read_text())
    if options.sizes != "all":
        problems = {k: v for k, v in problems.items() if k.rsplit("_", 1)[0] in options.sizes.split(",")}
    if options.fast:
        problems = dict(list(problems.items())[:1])
    num_moves = 10 if options.fast else options.moves
    results = []
    print(f"{'problem':10} {'method':26} {'sliced W1':>9} {'floor':>7} {'evaluations':>11} {'seconds':>8}")
    for method in KERNELS if options.method == "all" else [options.method]:
        for name, fields in problems.items():
            row = evaluate(name, fields, method, num_moves, options.seed)
            results.append(row)
            print(
                "{problem:10} {method:26} {sliced_w1:9.3f} {floor:7.3f} {score_evaluations_per_draw:11.0f} "
                "{seconds:8.1f}".format(**row),
                flush=True,
            )
    for method in dict.fromkeys(row["method"] for row in results):
        for size in dict.fromkeys(row["problem"].rsplit("_", 1)[0] for row in results):
            rows = [r for r in results if r["method"] == method and r["problem"].rsplit("_", 1)[0] == size]
            w1, floor = (np.mean([r[field] for r in rows]) for field in ("sliced_w1", "floor"))
            print(f"{size:10} {method:26} mean {w1:.3f}, floor {floor:.3f}, ratio {w1 / floor:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
