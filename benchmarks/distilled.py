"""Flows distilled into one to four evaluations: in noise space on the quickstart's digits, and given a noisy point.

    python benchmarks/distilled.py --json OUT
    python benchmarks/distilled.py --part moves --json OUT

*Maps*: for each number of evaluations and training seed, how far the map is from its teacher. *Chains*, for each
held-out digit (the upper half observed with noise of deviation 1, the deviation unknown too): NUTS in noise space with
the teacher's flow, DPM-Solver++ in ten evaluations, and with the map's; and `DelayedAcceptance`, which moves by the map
and has the teacher's law. All start at draws of one round of a population under the first map, and have the same number
of chains, warm-up and depth of trees. Rows have the smallest effective sample size of all pixels and the noise, the
largest split R-hat, CPU seconds of warm-up and draws without compilation, and how far the means and standard deviations
of the hidden pixels are from those of the teacher's chains, in posterior standard deviations (rms). *Populations*:
`PopulationHMC` under both flows, to its own verdict: CPU seconds (with compilation in the first run of each), effective
sample size, and coverage of 90 % intervals of the hidden pixels, for runs that converged.

The keys of the JSON: `noise_space_ess_ratio` (median over digits of effective samples per CPU second of chains, map
over teacher; of the best map), `delayed_ess_ratio` (the same of delayed acceptance), `population_ess_ratio` (of
populations after their first run), `coverage`, `coverage_error`, `teacher_coverage`, `maps`, `runs`, `populations`.

*Moves*: the draw of x given x_t distilled into two evaluations, on the digits and on a mixture of 25 modes in two and
in eight dimensions (T1-like: means on a grid of spacing 8, unit variances, Dirichlet weights; one unit combination of
the entries seen with unit noise). On the digits, moves of `DiffusionPCN` per CPU second by the map and by `Adams(62)`,
64 evaluations. On the mixtures, chains start at exact draws of three posteriors and make moves at log-uniform levels;
after the first half their pooled variances are compared with the truth: by the map, by the map with a second look (four
evaluations), by `Adams(30)`, and by the map as a screen before `Adams(30)`. Keys: `moves_ratio`; `variance_error`, of
the map, the largest relative error of the variance of a coordinate over all these posteriors; both with
`_second_look`; `variance_error_dear` and `variance_error_screened`; `variance_floor`, of exact draws of the same number
of chains; `given`, `mixtures`.
"""

import argparse
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_diffusion import checkpoint
from numpyro_diffusion.data import digits
from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DelayedAcceptance, DiffusionPCN, NoiseSpace, PopulationHMC
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Adams, DPMSolverPP, FlowMap, GivenMap
from numpyro_diffusion.solve.given import joined_shape
from numpyro_diffusion.train import distill, distill_given, given_quality, map_quality

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import OUTPUT, ROWS, model, trained

TEACHER = DPMSolverPP(10)
DEAR = Adams(30)
MODES_TRAINING = {"num_pairs": 200_000, "num_steps": 12_000, "batch_size": 256}
SECOND_LOOK = {2: 0.1, 8: 0.15}
"""Levels, in units of the scale, below the one at which the map is worst, by number of dimensions."""


def maps_of(denoiser: Any, evaluations: list[int], seeds: int, fast: bool) -> tuple[dict[int, FlowMap], list[dict]]:
    """A map for each number of evaluations, of the first seed, kept on disk; and a row for each of all."""
    made, rows = {}, []
    short = {"num_pairs": 500, "num_steps": 50, "num_test_draws": 100} if fast else {}
    for k in evaluations:
        for seed in range(seeds):
            path, started = OUTPUT / f"flow-map-{k}-{seed}{'-fast' if fast else ''}.safetensors", time.process_time()
            seconds = None
            if path.exists() and not fast:
                flow_map = checkpoint.load(path)
                quality = map_quality(jax.random.key(seed), flow_map, denoiser, TEACHER)
            else:
                options = {"num_evaluations": k, "progress_bar": False, **short}
                flow_map, quality, *_ = distill(jax.random.key(seed), denoiser, TEACHER, **options)
                seconds = time.process_time() - started
                checkpoint.save(path, flow_map)
            made.setdefault(k, flow_map)
            rows.append({"evaluations": k, "seed": seed, "cpu_seconds": seconds, **quality._asdict()})
            print(f"{k} evaluations, seed {seed}, trained in {seconds} CPU s: {quality}", flush=True)
    return made, rows


def run(make: Any, key: jax.Array, start: dict, y: jax.Array, prior: DiffusionPrior, sizes: dict) -> dict[str, Any]:
    """Chains of a kernel, compiled before they are timed."""

    def sampled(key: jax.Array, start: dict, y: jax.Array, prior: DiffusionPrior) -> tuple:
        mcmc = MCMC(make(model), **sizes, chain_method="vectorized", progress_bar=False)
        mcmc.run(key, y, prior, init_params=start)
        return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)

    program = jax.jit(sampled).lower(key, start, y, prior).compile()
    started = time.process_time()
    draws, fields = jax.block_until_ready(program(key, start, y, prior))
    seconds = time.process_time() - started
    flat = np.concatenate([np.asarray(v).reshape(*v.shape[:2], -1) for v in draws.values()], -1)
    hidden = np.asarray(draws["x"])[:, :, ROWS:].reshape(-1, ROWS * 8)
    ess = float(np.nanmin(effective_sample_size(flat)))
    return {
        "ess": ess,
        "r_hat": float(np.nanmax(split_gelman_rubin(flat))),
        "cpu_seconds": seconds,
        "ess_per_second": ess / seconds,
        "accept_prob": float(np.mean(fields["accept_prob"])),
        "steps_per_draw": float(np.mean(fields["num_steps"])),
        "mean": hidden.mean(0),
        "deviation": hidden.std(0),
    }


def compare(
    denoiser: Any, maps: dict[int, FlowMap], start: dict, y: jax.Array, key: jax.Array, options: Any
) -> list[dict]:
    """The rows of chains on one observation: the teacher first."""
    prior = DiffusionPrior(denoiser, flow_solver=TEACHER)
    sizes = {"num_warmup": options.warmup, "num_samples": options.draws, "num_chains": options.chains}
    nuts = {"inner": NUTS, "max_tree_depth": options.depth}
    rows = [{"method": "teacher", **run(partial(NoiseSpace, **nuts), key, start, y, prior, sizes)}]
    for k, flow_map in maps.items():
        found = run(partial(NoiseSpace, **nuts), key, start, y, prior.with_flow(flow_map), sizes)
        rows.append({"method": f"map of {k}", **found})
        for moves in options.moves:
            make = partial(DelayedAcceptance, surrogate=flow_map, num_moves=moves, **nuts)
            rows.append({"method": f"delayed, map of {k}, {moves} moves", **run(make, key, start, y, prior, sizes)})
    first = rows[0]
    for row in rows:
        row["mean_off"] = float(np.sqrt(np.mean(((row["mean"] - first["mean"]) / first["deviation"]) ** 2)))
        row["log_deviation_off"] = float(np.sqrt(np.mean(np.log(row["deviation"] / first["deviation"]) ** 2)))
    for row in rows:
        del row["mean"], row["deviation"]
        row["ratio"] = row["ess_per_second"] / first["ess_per_second"]
        print({name: v if isinstance(v, str) else round(v, 3) for name, v in row.items()}, flush=True)
    return rows


def observation(held_out: jax.Array, i: int) -> tuple[jax.Array, jax.Array]:
    """What is seen of a digit, and a key for its sampler."""
    key_noise, key_run = jax.random.split(jax.random.fold_in(jax.random.key(7), i))
    return held_out[i][:ROWS] + jax.random.normal(key_noise, (ROWS, 8)), key_run


def population(sampler: PopulationHMC, prior: DiffusionPrior, held_out: jax.Array, i: int) -> dict[str, Any]:
    """The row of a population on one digit."""
    y, key = observation(held_out, i)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict is in the row
        sampler.run(key, y, prior)
    seconds, said, truth = time.process_time() - started, verdict(sampler), held_out[i][ROWS:]
    low, high = np.quantile(np.asarray(sampler.get_samples()["x"])[:, ROWS:], [0.05, 0.95], axis=0)
    return {
        "digit": i,
        "converged": said.converged,
        "r_hat": said.r_hat,
        "ess": said.ess,
        "gradients": sampler.num_gradients,
        "cpu_seconds": seconds,
        "coverage": float(np.mean((low <= truth) & (truth <= high))),
    }


def given_map(name: str, denoiser: Any, options: Any, **size: int) -> tuple[GivenMap, dict]:
    """The draw given a noisy point, distilled and kept on disk, and its row."""
    path, started = OUTPUT / f"given-map-{name}{'-fast' if options.fast else ''}.safetensors", time.process_time()
    seconds = None
    if path.exists() and not options.fast:
        made = checkpoint.load(path)
        quality = given_quality(jax.random.key(1), made, denoiser, DEAR)
    else:
        short = {"num_pairs": 500, "num_steps": 50, "num_test_draws": 100} if options.fast else {}
        student = MLP(joined_shape(denoiser.event_shape), features=32 if options.fast else 128, rngs=nnx.Rngs(0))
        training = {**size, **short, "student": student, "progress_bar": False}
        made, quality, *_ = distill_given(jax.random.key(0), denoiser, DEAR, **training)
        seconds = time.process_time() - started
        checkpoint.save(path, made)
    print(f"{name}, trained in {seconds} CPU s: {quality}", flush=True)
    return made, {"name": name, "cpu_seconds": seconds, **{k: v.tolist() for k, v in quality._asdict().items()}}


def moves_per_second(denoiser: Any, solver: Any, y: jax.Array, count: int, chains: int) -> float:
    """Of `DiffusionPCN` on one digit with known noise, all chains together, compiled before they are timed."""
    prior = DiffusionPrior(denoiser, density="none")

    def upper_half(y: jax.Array) -> None:
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior)[:ROWS], 1.0).to_event(2), obs=y)

    kernel = DiffusionPCN(upper_half, solver=solver)
    state = kernel.init(jax.random.split(jax.random.key(0), chains), 0, None, (y,), {})
    step = jax.jit(lambda state: jax.lax.fori_loop(0, count, lambda _, s: kernel.sample(s, (y,), {}), state))
    program = step.lower(state).compile()
    jax.block_until_ready(program(state))
    started = time.process_time()
    jax.block_until_ready(program(state))
    return count * chains / (time.process_time() - started)


def modes(dimensions: int) -> GaussianMixture:
    """25 modes on a grid in a plane."""
    grid = 8.0 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), -1).reshape(25, 2)
    weights = np.random.default_rng(dimensions).dirichlet(np.ones(25))
    return GaussianMixture(weights, np.tile(grid, dimensions // 2), 1.0, VE(0.02, 80.0))


def posterior(law: GaussianMixture, row: np.ndarray, y: float) -> GaussianMixture:
    """The law given one combination of the entries, seen with unit noise."""
    means, spread = np.asarray(law.means, np.float64), row @ row + 1.0
    gap = y - means @ row
    log_weights = np.asarray(law.log_weights) - 0.5 * gap**2 / spread
    weights = np.exp(log_weights - log_weights.max())
    covariance = np.broadcast_to(np.eye(len(row)) - np.outer(row, row) / spread, (25, len(row), len(row)))
    return GaussianMixture(weights / weights.sum(), means + gap[:, None] * row / spread, covariance)


def observations(law: GaussianMixture, count: int) -> list[tuple[np.ndarray, float]]:
    """Random unit combinations of the entries, and what is seen of them."""
    rng, made = np.random.default_rng(1), []
    for x in np.asarray(law.sample(jax.random.key(2), (count,)), np.float64):
        row = rng.normal(size=len(x))
        row /= np.linalg.norm(row)
        made.append((row, float(row @ x + rng.normal())))
    return made


def spread_after(law: GaussianMixture, problems: list, kernel_options: dict, moves: int, chains: int) -> dict[str, Any]:
    """Worst relative error of a coordinate's variance, by moves from exact draws, over some posteriors."""
    prior = DiffusionPrior(law, density="none")

    def seen(row: jax.Array, y: jax.Array) -> None:
        numpyro.sample("y", dist.Normal(jnp.vdot(row, numpyro.sample("x", prior)), 1.0), obs=y)

    kernel = DiffusionPCN(seen, global_fraction=1.0, **kernel_options)

    def run(state: Any, row: jax.Array, y: jax.Array) -> tuple[Any, ...]:
        def move(state: Any, _: None) -> tuple[Any, tuple]:
            state = kernel.sample(state, (row, y), {})
            x = state.z["x"]
            return state, (x.mean(0), (x**2).mean(0), state.accept_prob.mean())

        return jax.lax.scan(move, state, length=moves)[1]

    program, worst, floor, accepted = jax.jit(run), [], [], []
    for row, y in problems:
        truth = posterior(law, row, y)
        exact = truth.sample(jax.random.key(3), (chains,))
        args = jnp.asarray(row, jnp.float32), jnp.asarray(y, jnp.float32)
        state = kernel.init(jax.random.split(jax.random.key(4), chains), 0, {"x": exact}, args, {})
        mean, square, accept_prob = (np.asarray(v, np.float64) for v in program(state, *args))
        weights, means = np.exp(np.asarray(truth.log_weights, np.float64)), np.asarray(truth.means, np.float64)
        centre = weights @ means
        variance = weights @ (means - centre) ** 2 + 1.0 - row**2 / (row @ row + 1.0)
        late = slice(moves // 2, None)
        found = square[late].mean(0) - mean[late].mean(0) ** 2
        worst.append(np.abs(found / variance - 1.0).max())
        floor.append(np.abs(np.var(np.asarray(exact, np.float64), 0) / variance - 1.0).max())
        accepted.append(accept_prob.mean())
    return {
        "worst": float(max(worst)),
        "each": worst,
        "floor": float(max(floor)),
        "accept_prob": float(np.mean(accepted)),
    }


def moves_part(denoiser: Any, held_out: jax.Array, options: Any) -> dict[str, Any]:
    """Noise-denoise moves by a map of two evaluations: how fast, and how right."""
    made, row = given_map("digits", denoiser, options)
    y, _ = observation(held_out, options.first)
    solvers = {"map": (200, made), "second look": (100, made.with_second_look(0.2)), "64 calls": (8, Adams(62))}
    chains = 4 if options.fast else 100
    speeds = {
        name: moves_per_second(denoiser, s, y, 2 if options.fast else n, chains) for name, (n, s) in solvers.items()
    }
    print({name: round(v, 1) for name, v in speeds.items()}, flush=True)
    given, mixtures = [row], []
    for dimensions in options.dimensions:
        law = modes(dimensions)
        screen, row = given_map(f"modes-{dimensions}", law, options, **MODES_TRAINING)
        given.append(row)
        problems = observations(law, 1 if options.fast else 3)
        kinds = {
            "map": ({"solver": screen}, 300),
            "second look": ({"solver": screen.with_second_look(SECOND_LOOK[dimensions])}, 300),
            "dear": ({"solver": DEAR}, 60),
            "screened": ({"solver": DEAR, "screen": screen, "num_proposals": 4}, 60),
        }
        for name, (kernel_options, moves) in kinds.items():
            moves, chains = (4, 10) if options.fast else (moves, 2000)
            started = time.process_time()
            found = spread_after(law, problems, kernel_options, moves, chains)
            seconds = time.process_time() - started
            mixtures.append({"dimensions": dimensions, "method": name, "cpu_seconds": seconds, **found})
            print(mixtures[-1], flush=True)

    def worst(name: str, key: str = "worst") -> float:
        return max(each[key] for each in mixtures if each["method"] == name)

    return {
        "moves_ratio": speeds["map"] / speeds["64 calls"],
        "moves_ratio_second_look": speeds["second look"] / speeds["64 calls"],
        "variance_error": worst("map"),
        "variance_error_second_look": worst("second look"),
        "variance_error_dear": worst("dear"),
        "variance_error_screened": worst("screened"),
        "variance_floor": worst("map", "floor"),
        "moves_per_second": speeds,
        "given": given,
        "mixtures": mixtures,
    }


def noise_part(denoiser: Any, held_out: jax.Array, options: Any) -> dict[str, Any]:
    """Chains and populations in noise space."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        maps, trained_maps = maps_of(denoiser, options.evaluations, options.seeds, options.fast)
    prior = DiffusionPrior(denoiser, flow_solver=TEACHER)
    flows = {"teacher": prior, "map": prior.with_flow(maps[options.evaluations[0]])}
    short = {"num_walkers": 16, "num_draws": 4, "max_gradients": 1} if options.fast else {}
    samplers = {name: PopulationHMC(model, **short, progress_bar=False) for name in flows}
    starter = samplers["map"] if options.fast else PopulationHMC(model, max_gradients=1, progress_bar=False)
    runs, populations = [], []
    for i in range(options.first, options.first + max(options.digits, options.teacher, options.coverage)):
        wanted = {"teacher": i < options.first + options.teacher, "map": i < options.first + options.coverage}
        for name in filter(wanted.get, flows):
            populations.append({"flow": name, **population(samplers[name], flows[name], held_out, i)})
            print({k: v if isinstance(v, str) else round(v, 3) for k, v in populations[-1].items()}, flush=True)
        if i < options.first + options.digits:
            y, key = observation(held_out, i)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one round, which has not converged
                starter.run(key, y, flows["map"])
            start = starter.init_params(options.chains)
            runs += [{"digit": i, **row} for row in compare(denoiser, maps, start, y, key, options)]

    def best(kind: str) -> float | None:
        by_method: dict[str, list[float]] = {}
        for row in runs:
            if row["method"].startswith(kind):
                by_method.setdefault(row["method"], []).append(row["ratio"])
        return max((float(np.median(v)) for v in by_method.values()), default=None)

    def shares(flow: str) -> list[float]:
        return [p["coverage"] for p in populations if p["flow"] == flow and (p["converged"] or options.fast)]

    def speed(flow: str) -> float:
        later = [p["ess"] / p["cpu_seconds"] for p in populations if p["flow"] == flow][1:]
        return float(np.median(later)) if later else float("nan")

    covered, population_ratio = shares("map"), speed("map") / speed("teacher")
    return {
        "noise_space_ess_ratio": best("map"),
        "delayed_ess_ratio": best("delayed"),
        "population_ess_ratio": population_ratio if np.isfinite(population_ratio) else None,
        "coverage": float(np.mean(covered)) if covered else None,
        "coverage_error": float(np.std(covered, ddof=1) / np.sqrt(len(covered))) if len(covered) > 1 else None,
        "teacher_coverage": float(np.mean(shares("teacher"))) if shares("teacher") else None,
        "not_converged": sum(not p["converged"] for p in populations),
        "maps": trained_maps,
        "runs": runs,
        "populations": populations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("noise", "moves", "all"), default="all")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of each map; chains use the first")
    parser.add_argument("--digits", type=int, default=3, help="how many held-out digits for the chains")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these digits")
    parser.add_argument("--coverage", type=int, default=20, help="how many for populations under the map")
    parser.add_argument("--teacher", type=int, default=3, help="how many for populations under the teacher's flow")
    parser.add_argument("--moves", type=int, nargs="*", default=[1], help="moves between tests of delayed acceptance")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--draws", type=int, default=120)
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--depth", type=int, default=4, help="largest depth of NUTS's trees")
    parser.add_argument("--dimensions", type=int, nargs="+", choices=(2, 8), default=[2, 8], help="of the mixtures")
    parser.add_argument("--fast", action="store_true", help="everything tiny, to test that it runs")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if options.fast:
        options.digits = options.coverage = options.teacher = options.seeds = 1
        options.warmup = options.draws = 4
        options.evaluations, options.chains, options.depth, options.dimensions = [1], 2, 2, [2]

    images, held_out = digits(jax.random.key(42))
    denoiser = trained(images, options.fast)
    results = noise_part(denoiser, held_out, options) if options.part != "moves" else {}
    if options.part != "noise":
        results |= moves_part(denoiser, held_out, options)
    print({name: value for name, value in results.items() if not isinstance(value, list)})
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
