"""Mixture priors with a linear observation: how far is each sampler from the exact posterior?

The prior has 25 Gaussian components in dx dimensions, the likelihood is y = A x + sigma eps with dy rows, and the
posterior is a mixture in closed form (Cardoso et al., Monte Carlo guided diffusion for Bayesian linear inverse
problems, 2024, https://arxiv.org/abs/2308.07983). Every method is given the exact denoiser. The distance is the sliced
W1 of 1000 draws to 10,000 exact ones over 1000 projections; the floor is that of 1000 other exact draws, the mean over
eight such sets.

    python benchmarks/mixture_inverse.py --problems FILE --method TemperedSMC --json OUT
    python benchmarks/mixture_inverse.py --method all --effort 0.25,1,4 --plot docs/concepts/mixture_inverse.png

An effort multiplies what a method spends: steps of the solver for a guided one, particles for TwistedSMC (a thousand of
which are drawn by weight), steps of the moves' solver for TemperedSMC, moves for a kernel. Evaluations are those of the
denoiser; derivatives that a guidance takes of it come on top, a few times an evaluation.

One run is a matter of luck: a thousand exact draws of one of these problems are .09 to .43 away from others, since they
count its modes roughly. `--runs 8` says more.

FILE maps "dx_dy_seed" to {"weights", "A", "y", "sigma"}. Component (i, j), i and j in -2..2, i outer, has mean (8i, 8j)
repeated dx / 2 times, times -1. `--more N` adds N problems a size, drawn as the published ones are.
"""

import argparse
import itertools
import json
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.diagnostics import sliced_wasserstein
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.guidance import Guided, linear
from numpyro_diffusion.infer import (
    AnnealedLangevin,
    DiffusionPCN,
    GuidedPCN,
    GuidedReverse,
    NoiseSpace,
    ParticleGibbs,
    SplitGibbs,
    TemperedSMC,
    TwistedSMC,
)
from numpyro_diffusion.noise import VE, UniformLogSNR
from numpyro_diffusion.solve import Adams, Ancestral, DPMSolverPP, sample

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
    return sliced_wasserstein(few, many, key, NUM_PROJECTIONS)


def model(prior: DiffusionPrior, A: jax.Array, y: jax.Array, sigma: jax.Array) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(A @ x, sigma).to_event(1), obs=y)


SOLVER = DPMSolverPP(64, eta=1.0)
MANY = DPMSolverPP(56, eta=1.0)  # fewer steps, for more moves in as many evaluations
KERNELS = {
    "DiffusionPCN": (partial(DiffusionPCN, num_proposals=4, global_fraction=1.0, solver=None), MANY, 160),
    "DiffusionPCN, 1 proposal": (partial(DiffusionPCN, global_fraction=1.0, solver=None), MANY, 640),
    "DiffusionPCN, ancestral": (
        partial(DiffusionPCN, num_proposals=4, global_fraction=1.0, solver=None),
        Ancestral(56, grid=UniformLogSNR()),
        160,
    ),
    "GuidedPCN": (partial(GuidedPCN, global_fraction=1.0), SOLVER, 160),
    "ParticleGibbs": (ParticleGibbs, SOLVER, 30),
    "NoiseSpace": (NoiseSpace, MANY, 105),
    "AnnealedLangevin": (partial(AnnealedLangevin, step_size=0.16), SOLVER, 2),
    "AnnealedLangevin, small steps": (
        partial(AnnealedLangevin, num_levels=64, steps_per_level=10, step_size=0.05),
        SOLVER,
        2,
    ),
    "GuidedReverse": (GuidedReverse, SOLVER, 2),
    "SplitGibbs": (
        partial(SplitGibbs, rho=0.3, couplings=(30.0, 17.0, 9.5, 5.3, 3.0, 1.7, 0.95, 0.53)),
        SOLVER,
        12,
    ),
}
"""Each kernel, the solver of its prior, which `DiffusionPCN` takes too, and its moves. Levels are log-uniform: what is
hard here is to find the weights of far modes, and these need large moves. Those after `NoiseSpace` are biased, and a
few moves are as good as many."""

GUIDED = {"DPS": "dps", "PiGDM": "pigdm", "TMPD": "tmpd", "MMPS": "mmps"}
"""Guided walks that nothing corrects."""

METHODS = ["TemperedSMC", "TemperedSMC, guided moves", "TwistedSMC", *KERNELS, *GUIDED]

PEERS = {
    "8_1": {"DDRM": 4.07, "DPS": 3.13, "DCPS": 3.43, "MCGDiff-32": 1.60, "MCGDiff-256": 1.21},
    "8_2": {"DDRM": 1.90, "DPS": 0.64, "DCPS": 0.91, "MCGDiff-32": 0.32, "MCGDiff-256": 0.16},
    "8_4": {"DDRM": 0.37, "DPS": 0.72, "DCPS": 1.42, "MCGDiff-32": 0.15, "MCGDiff-256": 0.16},
    "80_1": {"DDRM": 8.04, "DPS": 2.15, "DCPS": 1.35, "MCGDiff-32": 2.12},
    "80_4": {"DDRM": 7.44, "DPS": 0.34, "DCPS": 0.86, "MCGDiff-32": 1.38},
}
"""Mean sliced W1 of the authors' own programs with the exact score, over seeds of which these problems are some."""


@partial(jax.jit, static_argnames=("method", "num_moves"))
def run_kernel(key: jax.Array, problem: Problem, method: str, num_moves: int) -> tuple[jax.Array, jax.Array]:
    """The last draw of each of 1000 chains started from the prior, and mean denoiser evaluations per chain."""
    kernel, sampler, _ = KERNELS[method]
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


@partial(jax.jit, static_argnames=("guidance", "num_steps"))
def run_guided(key: jax.Array, problem: Problem, guidance: str, num_steps: int) -> jax.Array:
    guided = Guided(problem.prior, linear(problem.A, problem.y, jnp.full(problem.y.shape, problem.sigma)), guidance)
    return sample(DPMSolverPP(num_steps, eta=1.0), guided, key, (NUM_DRAWS,))


@cache  # one object a method, so that problems of one size share its programs
def sampler_of(method: str, num_particles: int, num_times: int) -> TemperedSMC | TwistedSMC:
    if method == "TwistedSMC":
        return TwistedSMC(model, num_particles, progress_bar=False)
    kernel = GuidedPCN if "guided" in method else partial(DiffusionPCN, solver=Adams(num_times))
    return TemperedSMC(model, kernel=kernel, progress_bar=False)


def draw(key: jax.Array, problem: Problem, method: str, effort: float) -> tuple[jax.Array, float]:
    """1000 draws by a method, and denoiser evaluations for each; of more particles those drawn count all."""
    if method in GUIDED:
        num_steps = max(4, round(64 * effort))
        return run_guided(key, problem, GUIDED[method], num_steps), num_steps
    if method in KERNELS:
        return run_kernel(key, problem, method, max(2, round(KERNELS[method][-1] * effort)))
    steps = 64 if method == "TwistedSMC" else max(8, round(64 * effort))
    smc = sampler_of(method, 4 * round(NUM_DRAWS * effort / 4), max(8, round(30 * effort)))
    prior = DiffusionPrior(problem.prior, sampler=DPMSolverPP(steps, eta=1.0))
    smc.run(key, prior, problem.A, problem.y, problem.sigma)
    x = smc.get_samples()["x"]
    draws = jnp.resize(jax.random.permutation(key, x), (NUM_DRAWS, x.shape[1]))
    return draws, smc.num_score_evals * len(x) / NUM_DRAWS


def invent(key: jax.Array, size: str) -> dict[str, Any]:
    """Another problem by the published recipe: singular values and noise are uniform, weights squared normals."""
    dimension, rows = map(int, size.split("_"))
    keys = jax.random.split(key, 7)
    weights = jax.random.normal(keys[0], (25,)) ** 2
    left, right = (
        jnp.linalg.qr(jax.random.normal(k, (n, n)))[0] for k, n in zip(keys[1:3], (rows, dimension), strict=True)
    )
    singular = jax.random.uniform(keys[3], (rows,))
    A = (left * singular) @ right[:rows]
    sigma = jax.random.uniform(keys[4]) * singular.max()
    empty = {"weights": weights / weights.sum(), "A": A, "y": jnp.zeros(rows), "sigma": sigma}
    prior = read(f"{size}_", empty).prior
    x = prior.means[jax.random.categorical(keys[5], prior.log_weights)]
    noise = jax.random.normal(keys[6], (dimension + rows,))
    return {**empty, "y": A @ (x + noise[:dimension]) + sigma * noise[dimension:]}


class Reference(NamedTuple):
    """A problem with exact draws, and how far from them as few other exact draws are."""

    problem: Problem
    exact: jax.Array
    floor: float


def refer(name: str, fields: dict[str, Any], seed: int, num_exact: int, num_floors: int) -> Reference:
    problem = read(name, fields)
    keys = jax.random.split(jax.random.key(seed), 3)
    exact = exact_draws(keys[0], problem, num_exact)
    others = [exact_draws(key, problem, NUM_DRAWS) for key in jax.random.split(keys[2], num_floors)]
    return Reference(problem, exact, float(np.mean([sliced_w1(keys[2], draws, exact) for draws in others])))


def evaluate(name: str, reference: Reference, method: str, effort: float, seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 3)
    started = time.perf_counter()
    draws, evaluations = jax.block_until_ready(draw(keys[1], reference.problem, method, effort))
    seconds = time.perf_counter() - started
    return {
        "problem": name,
        "method": method,
        "effort": effort,
        "seed": seed,
        "sliced_w1": float(sliced_w1(keys[2], draws, reference.exact)),
        "floor": reference.floor,
        "score_evaluations_per_draw": float(evaluations),
        "seconds": seconds,
    }


def summarise(results: list[dict[str, Any]]) -> None:
    """Distances over floors, in the mean and in the median of all runs on a size, and the peers' figures."""
    size_of = lambda row: row["problem"].rsplit("_", 1)[0]  # noqa: E731
    for size in dict.fromkeys(map(size_of, results)):
        for method, effort in dict.fromkeys((r["method"], r["effort"]) for r in results):
            rows = [r for r in results if (size_of(r), r["method"], r["effort"]) == (size, method, effort)]
            w1, floor, evaluations = (
                np.array([r[field] for r in rows]) for field in ("sliced_w1", "floor", "score_evaluations_per_draw")
            )
            print(
                f"{size:6} {method:30} x{effort:<5g} mean {w1.mean():6.3f}, floor {floor.mean():.3f}: ratio of means "
                f"{w1.mean() / floor.mean():6.2f}, of medians {np.median(w1) / np.median(floor):6.2f}, "
                f"{evaluations.mean():6.0f} evaluations a draw"
            )
        if size in PEERS:
            print(f"{size:6} peers' own programs, mean: " + ", ".join(f"{k} {v}" for k, v in PEERS[size].items()))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Distance over the floor against evaluations, a line a method, a panel a size; means over problems."""
    import matplotlib.pyplot as plt

    sizes = dict.fromkeys(r["problem"].rsplit("_", 1)[0] for r in results)
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes) + 2.0, 4.0), squeeze=False, sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for i, method in enumerate(dict.fromkeys(r["method"] for r in results)):
            points = []
            for effort in sorted({r["effort"] for r in results}):
                rows = [r for r in results if (r["method"], r["effort"]) == (method, effort)]
                rows = [r for r in rows if r["problem"].rsplit("_", 1)[0] == size]
                w1, floor = (np.mean([r[field] for r in rows]) for field in ("sliced_w1", "floor"))
                points.append((np.mean([r["score_evaluations_per_draw"] for r in rows]), w1 / floor))
            style = {"marker": "osD^vPX"[i % 7], "color": f"C{i % 10}", "markersize": 4}
            axis.plot(*zip(*points, strict=True), label=method, **style)
        axis.axhline(1.0, color="k", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="score evaluations a draw", title=f"({size.replace('_', ', ')})")
    axes[0, 0].set_ylabel("sliced W1 over that of exact draws")
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, default=Path(__file__).parent / "data/mixture_inverse_problems.json")
    parser.add_argument(
        "--method", default="TemperedSMC", help=f'"all", or some of {"; ".join(METHODS)}, by semicolons'
    )
    parser.add_argument("--sizes", default="8_1,8_2,8_4", help='comma-separated "dx_dy", or "all"')
    parser.add_argument("--more", type=int, default=0, help="problems a size to invent besides")
    parser.add_argument("--effort", default="1", help="comma-separated multiples of what a method spends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1, help="runs of each method on each problem")
    parser.add_argument("--fast", action="store_true", help="one problem, little effort")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--plot", type=Path, help="where to draw distances against evaluations")
    options = parser.parse_args()

    problems = json.loads(options.problems.read_text())
    if options.sizes != "all":
        problems = {k: v for k, v in problems.items() if k.rsplit("_", 1)[0] in options.sizes.split(",")}
    for size in dict.fromkeys(name.rsplit("_", 1)[0] for name in problems):
        for i in range(options.more):
            problems[f"{size}_new{i}"] = invent(jax.random.fold_in(jax.random.key(options.seed), i), size)
    methods = METHODS if options.method == "all" else [name.strip() for name in options.method.split(";")]
    unknown = set(methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}; there are {METHODS}")
    efforts = [float(effort) for effort in options.effort.split(",")]
    sizes = NUM_EXACT, NUM_FLOORS
    if options.fast:
        problems, efforts, sizes = dict(list(problems.items())[:1]), [0.02], (1000, 1)
    references = {name: refer(name, fields, options.seed, *sizes) for name, fields in problems.items()}
    results = []
    print(
        f"{'problem':11} {'method':30} {'effort':>6} {'sliced W1':>9} {'floor':>7} {'evaluations':>11} {'seconds':>8}"
    )
    runs = range(options.seed, options.seed + options.runs)
    for method, effort, (name, reference), seed in itertools.product(methods, efforts, references.items(), runs):
        row = evaluate(name, reference, method, effort, seed)
        results.append(row)
        print(
            "{problem:11} {method:30} {effort:6g} {sliced_w1:9.3f} {floor:7.3f} {score_evaluations_per_draw:11.0f} "
            "{seconds:8.1f}".format(**row),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    summarise(results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
