"""Diffusion without training on problems with a known answer, beside samplers that it must be compared with.

    python benchmarks/designed.py --json OUT

    mog40      forty modes in two dimensions, see mog40.py: total variation of the shares of the modes to equal ones
               (its mean for independent draws is the floor), and E f of the usual f, 1777.9 with deviation 1714
    mog40_50   forty modes in 50 dimensions
    funnel     in 10 dimensions, see evidence.py: the deviation of x0, which is 3
    many_well  in 32 dimensions: the share of x > 0 in the wells, .8443

Methods, each with as many draws as `--draws` says:

    designed   `DesignedDiffusion`: walks from noise to data by the estimated denoiser, with weights
    langevin   the same with 8 Langevin steps of 16 inner particles in place of shared ones
    unweighted draws of a solver of 64 steps with the denoiser of `designed` and 64 particles of its own: reverse
               diffusion without a correction
    trained    `DenoisingDiffusionSampler`: a walk that is trained on the target, with weights; training is in its
               evaluations
    unguided   the same without the gradient in the walk, so that a walk is one evaluation
    tempered   `TemperedSMC` with its default moves

A row has the error of log Z (not for `unweighted`), its own standard error (inf: the run says that it cannot be
trusted), the numbers above, evaluations of the target with its gradient, and seconds of the clock with compilation.
Published rows: on mog40, 10,000 draws by about 1e7 gradients, E f of MALA 560, HMC 215, parallel tempering 1620 and
DiGS 1803; log Z of the funnel by SMC -.209 to -.050 and by DDS -.221 to -.176.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import evidence
import jax
import jax.numpy as jnp
import mog40
import numpy as np

from numpyro_diffusion.infer import DenoisingDiffusionSampler, DesignedDiffusion, TemperedSMC
from numpyro_diffusion.solve import DPMSolverPP, sample

QUIET = {"progress_bar": False}


class Problem(NamedTuple):
    """A model, its log Z, and what else is known of its draws."""

    model: Callable
    args: tuple
    log_evidence: float
    numbers: Callable[[dict], dict]


def of_modes(samples: dict, means: np.ndarray) -> dict:
    found = mog40.row("", samples["x"], means, 0)
    numbers = {name: found[name] for name in ("total_variation", "floor", "missed_modes")}
    if means.shape[1] == 2:
        shift, a, b = (np.asarray(mog40.MODES[f"f_{name}"]) for name in ("shift", "A", "b"))
        x = np.asarray(samples["x"], float) + shift
        numbers["E_f"] = float(np.mean(np.einsum("ni,ij,nj->n", x, a, x) + x @ b))
    return numbers


def mixture(dimensions: int) -> Problem:
    means = mog40.means_in(dimensions)
    args = jnp.asarray(means), mog40.broad(means)
    return Problem(mog40.model, args, 0.0, partial(of_modes, means=means))


def known(name: str, numbers: Callable[[dict], dict]) -> Problem:
    problem = evidence.PROBLEMS[name]
    return Problem(problem.model, problem.args, problem.truth, numbers)


PROBLEMS = {
    "mog40": lambda: mixture(2),
    "mog40_50": lambda: mixture(50),
    "funnel": lambda: known("funnel", lambda s: {"sd_x0": float(s["x0"].std())}),
    "many_well": lambda: known("many_well", lambda s: {"share_above": float((s["x"] > 0).mean())}),
}


def by_particles(make: Callable, problem: Problem, num_draws: int, key: jax.Array) -> tuple[dict, dict, int]:
    """Draws, the evidence, and evaluations of the target."""
    sampler = make(problem.model, num_draws, **QUIET)
    with warnings.catch_warnings():  # what they say is in the table
        warnings.simplefilter("ignore", UserWarning)
        sampler.run(key, *problem.args)
    value, error, _ = sampler.log_evidence
    evidence = {"log_evidence_error": float(value) - problem.log_evidence, "own_error": float(error)}
    if isinstance(sampler, DesignedDiffusion):
        sizes = sampler.levels
        evidence |= {"smallest_size": float(sizes.effective_size.min()), "inner_size": float(sizes.inner_size.min())}
        return sampler.get_samples(), evidence, sampler.num_evaluations
    if isinstance(sampler, DenoisingDiffusionSampler):
        bound = float(sampler.evidence_bound.value) - problem.log_evidence
        evidence |= {"effective_size": sampler.effective_size, "bound_off": bound}
        return sampler.get_samples(), evidence, sampler.num_target_evals
    evidence["own_error"] = np.inf if sampler.problems else evidence["own_error"]
    return sampler.get_samples(), evidence, num_draws * sum(int(t.num_moves) + 2 for t in sampler.temperatures)


def unweighted(problem: Problem, num_draws: int, key: jax.Array) -> tuple[dict, dict, int]:
    solver, num_inner = DPMSolverPP(64, eta=1.0), 64
    designed = DesignedDiffusion(problem.model, num_inner=num_inner, **QUIET)
    key_denoiser, key = jax.random.split(key)
    denoiser = designed.denoiser(key_denoiser, *problem.args)
    draw = jax.jit(lambda keys: jax.lax.map(lambda k: sample(solver, denoiser, k, (100,)), keys))
    w = draw(jax.random.split(key, num_draws // 100))
    samples = designed.constrain(w.reshape(num_draws, -1))
    return samples, {}, num_draws * 64 * num_inner + 64 * num_draws // 100 * 1000


METHODS = {
    "designed": partial(by_particles, DesignedDiffusion),
    "langevin": partial(by_particles, partial(DesignedDiffusion, num_steps=8)),
    "unweighted": unweighted,
    "trained": partial(by_particles, DenoisingDiffusionSampler),
    "unguided": partial(by_particles, partial(DenoisingDiffusionSampler, guided=False)),
    "tempered": partial(by_particles, TemperedSMC),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few draws on two problems by two methods")
    parser.add_argument("--draws", type=int, default=2000, help="a multiple of 400")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    problems, methods, num_draws = options.problems.split(","), options.methods.split(","), options.draws
    if options.fast:
        problems, methods, num_draws = ["mog40"], ["designed", "unweighted"], 400

    print(f"{'problem':10} {'method':10} {'log Z off':>10} {'own error':>9} {'evaluations':>11} {'seconds':>8}")
    results = []
    for name in problems:
        problem = PROBLEMS[name]()
        for method in methods:
            key, started = jax.random.key(options.seed), time.perf_counter()
            samples, found, evaluations = METHODS[method](problem, num_draws, key)
            samples = jax.block_until_ready(samples)
            row = {
                "problem": name,
                "method": method,
                "draws": num_draws,
                **found,
                **problem.numbers(samples),
                "evaluations": evaluations,
                "seconds": time.perf_counter() - started,
            }
            results.append(row)
            off, own = row.get("log_evidence_error", np.nan), row.get("own_error", np.nan)
            rest = {k: round(v, 4) for k, v in {**found, **problem.numbers(samples)}.items() if "error" not in k}
            print(f"{name:10} {method:10} {off:10.3f} {own:9.3f} {evaluations:11.2e} {row['seconds']:8.1f}  {rest}")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
