"""Do chains on a learned prior get there, and does the sampler say so if not?

Held-out 8x8 digits under the quickstart's prior, seen in four patterns with noise of unknown standard deviation.
`PopulationHMC` with its defaults, and NUTS in noise space beside it. A row for each digit, pattern, noise and method:

    worst_rhat              largest R-hat of ArviZ over pixels and noise level (islands as chains)
    smallest_ess            smallest bulk effective sample size of ArviZ
    converged               what the sampler says, by `diagnostics.verdict`
    seconds                 wall time; compilation only in the first problem of a shape
    gradients               of the model, all chains together
    mean_shift_to_reference largest distance of a mean from the reference, in posterior standard deviations

    python benchmarks/chains.py --json OUT
    python benchmarks/chains.py --digits 0,7 --patterns upper --noise 0.3 --reference  # writes the references

References are means and standard deviations in benchmarks/data/chains_references.json, of two long runs by different
methods that agree within 0.1: a population of 1024 walkers until it has converged, and sixteen chains of NUTS in noise
space that begin at its draws. Problems without one have a shift of NaN. Silent failures are told first: rows that say
converged and are not, by R-hat, size or a shift above 0.1.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_diffusion import checkpoint
from numpyro_diffusion.data import digits
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import NoiseSpace, PopulationHMC
from numpyro_diffusion.solve import DPMSolverPP

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import trained

REFERENCES = Path(__file__).parent / "data" / "chains_references.json"
GRID = np.arange(64).reshape(8, 8)
MASKS = {"upper": GRID < 32, "left": GRID % 8 < 4, "second": GRID % 2 == 0}


def observer(pattern: str, mask: np.ndarray | None):
    """What is seen of an image (8, 8), as a vector."""
    if mask is None and pattern == "blocks":
        return lambda x: x.reshape(4, 2, 4, 2).sum((1, 3)).reshape(-1)
    index = np.flatnonzero(MASKS[pattern] if mask is None else mask)
    return lambda x: x.reshape(-1)[index]


def model(y: jax.Array, prior: DiffusionPrior, observe) -> None:
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(observe(x), noise).to_event(1), obs=y)


def population(posterior, **options: object):
    """What runs the population: compiled once for a pattern."""
    sampler = PopulationHMC(posterior, progress_bar=False, **options)
    return lambda key, args: sampler.run(key, *args)


def nuts(posterior, num_draws: int, num_chains: int, method: str | Callable = "vectorized"):
    """What runs NUTS in noise space, from starts of its own or from draws of another run."""
    counts = {"num_warmup": num_draws, "num_samples": num_draws, "num_chains": num_chains}
    how = {"chain_method": method, "jit_model_args": True, "progress_bar": False}
    mcmc = MCMC(NoiseSpace(posterior, max_tree_depth=5), **counts, **how)

    def run(key: jax.Array, args: tuple, other: PopulationHMC | None = None) -> MCMC:
        starts = None if other is None else other.init_params(num_chains)
        mcmc.run(key, *args, extra_fields=("num_score_evals",), init_params=starts)
        jax.block_until_ready(mcmc.get_samples())
        return mcmc

    return run


def moments(draws: dict[str, np.ndarray]) -> dict[str, dict[str, list]]:
    """Mean and standard deviation of every site, whose draws have the shape (chains, draws, ...)."""
    return {n: {"mean": np.mean(v, (0, 1)).tolist(), "sd": np.std(v, (0, 1)).tolist()} for n, v in draws.items()}


def distance(found: dict, reference: dict) -> float:
    """The largest distance of a mean, in standard deviations of the reference."""
    pairs = [(np.asarray(found[n]["mean"]), {k: np.asarray(v) for k, v in reference[n].items()}) for n in found]
    return float(max(np.max(np.abs(mean - there["mean"]) / there["sd"]) for mean, there in pairs))


def row(run, seconds: float, reference: dict | None, evaluations: int) -> dict[str, object]:
    draws = {name: np.asarray(value) for name, value in run.get_samples(group_by_chain=True).items()}
    data, said = az.convert_to_dataset(draws), verdict(run)
    shift = np.nan if reference is None else distance(moments(draws), reference)
    is_population = isinstance(run, PopulationHMC)
    steps = 0 if is_population else int(np.sum(np.asarray(run.get_extra_fields()["num_score_evals"]))) // evaluations
    return {
        "worst_rhat": max(float(np.max(np.asarray(value))) for value in az.rhat(data).values()),
        "smallest_ess": min(float(np.min(np.asarray(value))) for value in az.ess(data).values()),
        "converged": said.converged,
        "seconds": round(seconds, 1),
        "gradients": run.num_gradients if is_population else steps,
        "mean_shift_to_reference": shift,
        "problems": list(said.problems),
        "rounds": [str(look) for look in run.rounds] if is_population else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, help="a saved denoiser instead of the quickstart's")
    parser.add_argument("--digits", default=",".join(map(str, range(12))), help="indices of held-out digits")
    parser.add_argument("--patterns", default="upper,left,second,blocks")
    parser.add_argument("--noise", default="0.3,1,3")
    parser.add_argument("--mask", type=Path, help="a boolean 8x8 array (.npy), true where observed, as the pattern")
    parser.add_argument("--methods", default="population,nuts")
    parser.add_argument("--walkers", type=int, default=256, help="of the population")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="budget of the population")
    parser.add_argument("--chains", type=int, default=4, help="of NUTS")
    parser.add_argument("--draws", type=int, default=300, help="draws, and warm-up steps, of each chain of NUTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="long runs, written to the references")
    parser.add_argument("--reference-draws", type=int, default=2000, help="and warm-up steps, of the second method")
    parser.add_argument("--fast", action="store_true", help="one problem, few walkers, little training")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    is_usual = options.mask is None and options.prior is None and not options.fast  # as the references are
    if options.reference and not is_usual:
        parser.error("references are of the usual patterns and the quickstart's prior: no --mask, --prior or --fast")

    images, held_out = digits(jax.random.key(42))
    denoiser = checkpoint.load(options.prior) if options.prior else trained(images, options.fast)
    solver = DPMSolverPP(10)
    prior = DiffusionPrior(denoiser, flow_solver=solver)
    mask = None if options.mask is None else np.load(options.mask)
    patterns = options.patterns.split(",") if mask is None else [options.mask.stem]
    problems = [(i, p, float(s)) for p in patterns for s in options.noise.split(",") for i in options.digits.split(",")]
    if options.fast:
        problems = problems[:1]
    names = ["reference", "second reference"] if options.reference else options.methods.split(",")

    def runner(pattern: str, method: str):
        posterior = partial(model, observe=observer(pattern, mask))
        if method == "nuts":
            return nuts(posterior, 5 if options.fast else options.draws, options.chains)
        if method == "second reference":
            return nuts(posterior, options.reference_draws, 16, jax.vmap)  # each adapts for itself
        if method == "reference":
            return population(posterior, num_walkers=1024, max_gradients=50_000_000)
        fewer = {"num_walkers": 16, "num_draws": 4, "max_seconds": 1.0}
        usual = {"num_walkers": options.walkers, "max_seconds": seconds}
        return population(posterior, **(fewer if options.fast else usual))

    seconds = options.max_seconds
    runners = {(pattern, method): runner(pattern, method) for pattern in patterns for method in names}
    references, rows = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}, []
    for digit, pattern, noise in problems:
        truth = observer(pattern, mask)(held_out[int(digit)])
        y = truth + noise * jax.random.normal(jax.random.fold_in(jax.random.key(3), int(digit)), truth.shape)
        name = f"{digit} {pattern} {noise:g}"
        known = references.get(name) if is_usual and not options.reference else None
        first: PopulationHMC | None = None
        for method in names:
            started, begin = time.perf_counter(), {"other": first} if method == "second reference" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                key = jax.random.fold_in(jax.random.key(options.seed), int(digit))
                run = runners[pattern, method](key, (y, prior), **begin)
            found = row(run, time.perf_counter() - started, known, solver.evaluations())
            rows.append({"digit": int(digit), "pattern": pattern, "noise": noise, "method": method, **found})
            print({k: v for k, v in rows[-1].items() if k not in ("rounds", "problems")}, flush=True)
            for line in (*found["rounds"], *found["problems"]):
                print(f"    {line}")
            if method == "reference":
                first = run
                known = moments(run.get_samples(group_by_chain=True)) if found["converged"] else None
                if known is None:
                    break
        if options.reference and known is not None and found["mean_shift_to_reference"] < 0.1:
            told = {k: found[k] for k in ("worst_rhat", "mean_shift_to_reference")}
            references[name] = {**known, "second_run": told}
            REFERENCES.write_text(json.dumps(references))
    summarise(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def summarise(rows: list[dict]) -> None:
    """Silent failures first, then shares."""
    for method in {r["method"]: None for r in rows}:
        mine = [r for r in rows if r["method"] == method]
        silent = [
            r
            for r in mine
            if r["converged"]
            and (r["worst_rhat"] >= 1.01 or r["smallest_ess"] <= 400 or r["mean_shift_to_reference"] > 0.1)
        ]
        print(f"\n{method}: {len(silent)} of {len(mine)} runs say converged and are not")
        for r in silent:
            print(
                f"    {r['digit']} {r['pattern']} {r['noise']}: {r['worst_rhat']:.3f}, {r['mean_shift_to_reference']}"
            )
        for noise in sorted({r["noise"] for r in mine}):
            there = [r for r in mine if r["noise"] == noise]
            good = np.mean([r["worst_rhat"] < 1.01 and r["smallest_ess"] > 400 for r in there])
            said = np.mean([r["converged"] for r in there])
            seconds = np.median([r["seconds"] for r in there])
            print(f"    noise {noise:g}: good {good:.0%}, converged {said:.0%}, median {seconds:.0f} s")


if __name__ == "__main__":
    main()
