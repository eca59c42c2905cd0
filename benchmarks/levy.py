r"""Lévy processes, whose posteriors are known: how far is each sampler from the best estimate, and is it calibrated?

A signal x of 64 entries is the cumulative sum of independent increments u of one of six laws; y = A x + noise at 25 dB
for four operators. The posterior is known through Gibbs sampling: all laws are Gaussians of random variance. (Zach,
Haouchat, Unser, A statistical benchmark for diffusion posterior sampling algorithms, 2026,
https://arxiv.org/abs/2509.12821.) The diffusion lives on u, so its exact denoiser is one of one-dimensional laws.

    python benchmarks/levy.py --json OUT --signals 8
    python benchmarks/levy.py --increments laplace,student_3 --operators blur --methods PopulationHMC,DPS
    python benchmarks/levy.py --learned --methods PopulationHMC --increments gauss,laplace,student_3

A row for each cell of increments and operator, and for each method:

    gap_db           10 log10 of the error of the method's posterior mean over that of the Gibbs sampler's, mean over
                     signals, less 10 log10(1 + 1 / S) for S draws (as if they were independent)
    gap_se           its standard error over signals
    coverage_90      chance that a draw of the exact posterior lies where the known log-posterior is above the 10 %
                     quantile of the method's draws, mean over signals: .9 for an exact sampler. The true signal is one
                     such draw: this is the coverage of the 90 % highest-density region without the luck of few signals
    coverage_se      its standard error over signals
    covered          how many of the true signals lie there
    r_hat            of the worst increment of several chains, median over signals
    evaluations      of the denoiser, all draws of a signal together; a gradient counts as one
    seconds          of CPU for each signal but the first, which compiles

"Gibbs" among the methods is a second run of the Gibbs sampler, as short as the others: what an exact sampler shows.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _levy_truth import (
    INCREMENTS,
    OPERATORS,
    SIZE,
    Problem,
    draw_variances,
    exact_denoiser,
    exact_draws,
    law_of,
    log_density,
    pose,
)
from flax import nnx
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_diffusion.denoise import Denoiser, Repeated
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    DiffusionPCN,
    GuidedPCN,
    GuidedReverse,
    LineIntegral,
    NoiseSpace,
    PopulationHMC,
    ScoreHMC,
    TemperedSMC,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Adams, DPMSolverPP
from numpyro_diffusion.train import fit
from numpyro_diffusion.train.losses import StableTargetField
from numpyro_diffusion.train.weighting import EDM


def model(matrix: jax.Array, y: jax.Array, sigma: jax.Array, prior: DiffusionPrior) -> None:
    u = numpyro.sample("u", prior)
    numpyro.sample("y", dist.Normal(matrix @ u, sigma).to_event(1), obs=y)


Run = tuple[np.ndarray, float, float]
"""Draws of the increments, (S, 64), evaluations of the denoiser, and R-hat, which is NaN where there are no chains."""


def tempered(kernel: Callable, size: int, **options: Any) -> Callable[[jax.Array, tuple], Run]:
    """A tempered population with moves of a kernel."""
    smc = TemperedSMC(model, size, kernel=kernel, progress_bar=False, **options)

    def run(key: jax.Array, args: tuple) -> Run:
        smc.run(key, *args)
        return smc.get_samples()["u"], smc.num_score_evals * size, np.nan

    return run


def chains(kernel: Any, num_chains: int, num_warmup: int, num_draws: int, counts: str) -> Callable:
    """Chains of a kernel; `counts` is the field that has its evaluations."""
    options = {"chain_method": "vectorized", "jit_model_args": True, "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_draws, num_chains=num_chains, **options)

    def run(key: jax.Array, args: tuple) -> Run:
        mcmc.run(key, *args, extra_fields=(counts,))
        each = float(np.mean(mcmc.get_extra_fields()[counts]))
        u = mcmc.get_samples(group_by_chain=True)["u"]
        r_hat = float(np.max(split_gelman_rubin(u))) if num_draws > 3 else np.nan
        return u.reshape(-1, SIZE), each * num_chains * (num_warmup + num_draws), r_hat

    return run


def population(num_walkers: int) -> Callable[[jax.Array, tuple], Run]:
    """One round of the population in noise space; whether it has converged is told by `PopulationHMC.problems`."""
    sampler = PopulationHMC(model, num_walkers, num_draws=8, max_gradients=1, progress_bar=False)

    def run(key: jax.Array, args: tuple) -> Run:
        sampler.run(key, *args)
        return sampler.get_samples()["u"], float(sampler.num_gradients) * FLOW.evaluations(), np.nan

    return run


FLOW = Adams(16)
SAMPLER = DPMSolverPP(32, eta=1.0)


def hamiltonian(density: Any, **options: Any) -> Callable:
    """Makes Hamiltonian moves with the metric of the whole population."""
    return lambda model: ScoreHMC(model, num_steps=8, density=density, dense_mass=True, **options)


METHODS = {
    "TemperedSMC": lambda size: tempered(hamiltonian("denoiser"), size),
    "NUTS, density": lambda size: chains(NUTS(model, dense_mass=True), 16, 300, size // 16, "num_steps"),
    "NoiseSpace": lambda size: chains(NoiseSpace(model, max_tree_depth=6), 16, 400, size // 16, "num_score_evals"),
    "PopulationHMC": population,
    "GuidedPCN": lambda size: chains(GuidedPCN(model), 8, 1000, size // 8, "num_score_evals"),
    "DiffusionPCN": lambda size: chains(DiffusionPCN(model), 8, 1000, size // 8, "num_score_evals"),
    "MMPS": lambda size: chains(GuidedReverse(model, guidance="mmps"), size, 0, 1, "num_score_evals"),
    "DPS": lambda size: chains(GuidedReverse(model), size, 0, 1, "num_score_evals"),
    "MMPS, learned": lambda size: chains(GuidedReverse(model, guidance="mmps"), size, 0, 1, "num_score_evals"),
    "TemperedSMC, learned": lambda size: tempered(hamiltonian(LineIntegral(circulation=False)), size),
}
"""Those up to `DiffusionPCN` are exact in the limit, "MMPS" and "DPS" are not. A learned score of one increment has no
closed density, but in one dimension every score is a gradient, so that its line integral is exact."""


def learned_denoiser(increments: str, num_steps: int) -> Denoiser:
    """A scalar network, trained on increments and repeated: they are independent, so there is no more to learn."""
    key_size, key_sign, key_fit = jax.random.split(jax.random.key(100 + INCREMENTS.index(increments)), 3)
    v = draw_variances(key_size, increments, (200_000,))
    rows = jnp.sqrt(v) * jax.random.normal(key_sign, v.shape)
    scale = float(jnp.std(rows))
    options = {"schedule": VE(0.1, 80.0), "loss": StableTargetField(rows / scale, 1024), "weighting": EDM(-1.0, 1.4)}
    backbone = MLP((), features=32, num_blocks=2, rngs=nnx.Rngs(0))
    options |= {"num_steps": num_steps, "batch_size": 512, "progress_bar": False}
    return Repeated(fit(key_fit, backbone, rows / scale, **options).denoiser.with_units(0.0, scale), (SIZE,))


def measure(problem: Problem, i: int, increments: str, draws: np.ndarray, gold: np.ndarray) -> tuple[float, ...]:
    """The gap in dB, coverage by draws of the exact posterior, and whether the true signal is covered."""
    errors = [np.sum(np.cumsum(u.mean(0) - problem.u[i]) ** 2) for u in (draws, gold)]
    gap = 10.0 * np.log10(errors[0] / errors[1]) - 10.0 * np.log10(1.0 + 1.0 / len(draws))
    noise = 0.02 if increments == "bernoulli_laplace" else 0.0  # on all alike: an atom has no density
    random, law = np.random.default_rng(i), law_of(increments)

    def log_posterior(u: np.ndarray) -> np.ndarray:
        u = u + noise * random.standard_normal(u.shape)
        residual = (u @ problem.matrix.T - problem.y[i]) / problem.sigma
        return log_density(u, law, noise) - 0.5 * np.sum(residual**2, -1)

    lowest = np.quantile(log_posterior(draws), 0.1)
    return gap, float(np.mean(log_posterior(gold) >= lowest)), bool(log_posterior(problem.u[i]) >= lowest)


def row(problem: Problem, increments: str, gold: np.ndarray, run: Callable[[int], Run]) -> dict[str, Any]:
    """All signals of a cell by one method."""
    found, seconds, r_hats, evaluations = [], [], [], 0.0
    for i in range(len(problem.u)):
        started = time.process_time()
        with warnings.catch_warnings():  # that one round is no proof; what is wrong shows in the figures
            warnings.simplefilter("ignore")
            draws, count, r_hat = run(i)
            draws = np.asarray(draws, float)
        seconds.append(time.process_time() - started)
        r_hats.append(r_hat)
        evaluations += count / len(problem.u)
        found.append(measure(problem, i, increments, draws, gold[i]))
    gaps, coverages, covered = np.array(found, float).T
    root = np.sqrt(max(len(gaps) - 1, 1))
    return {
        "gap_db": float(gaps.mean()),
        "gap_se": float(gaps.std() / root),
        "coverage_90": float(coverages.mean()),
        "coverage_se": float(coverages.std() / root),
        "covered": int(covered.sum()),
        "signals": len(gaps),
        "draws": len(draws),
        **({"r_hat": float(np.median(r_hats))} if np.all(np.isfinite(r_hats)) else {}),
        "evaluations": round(evaluations),
        "seconds": round(float(np.mean(seconds[1:] or seconds)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=8, help="for each cell, at most a hundred")
    parser.add_argument("--increments", default=",".join(INCREMENTS))
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--methods", default="Gibbs;TemperedSMC;MMPS;DPS", help=f"of Gibbs; {'; '.join(METHODS)}")
    parser.add_argument("--draws", type=int, default=512, help="of a method, for each signal")
    parser.add_argument("--learned", action="store_true", help="train a denoiser, for the methods that are not exact")
    parser.add_argument("--fast", action="store_true", help="two laws, one operator, two signals")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    options = parser.parse_args()
    if options.fast:
        options.increments, options.operators, options.methods = "gauss,laplace", "blur", "Gibbs;TemperedSMC;DPS"
        options.signals, options.draws = 2, 128
    for name, known in (("increments", INCREMENTS), ("operators", OPERATORS), ("methods", ("Gibbs", *METHODS))):
        given = getattr(options, name).split(";" if name == "methods" else ",")
        if unknown := set(given) - set(known):
            parser.error(f"--{name} must be among {known}; got {sorted(unknown)}")
        setattr(options, name, given)

    runs = {name: METHODS[name](options.draws) for name in options.methods if name != "Gibbs"}
    rows = []
    for increments in options.increments:
        priors = {"exact": DiffusionPrior(exact_denoiser(increments), sampler=SAMPLER, flow_solver=FLOW)}
        if options.learned:
            learned = learned_denoiser(increments, 50 if options.fast else 4000)
            priors["learned"] = DiffusionPrior(learned, sampler=SAMPLER, flow_solver=FLOW)
        for name in options.operators:
            problem = pose(increments, name, options.signals)
            gold = exact_draws(0, problem, increments, 200 if options.fast else 4000, 5)
            control = exact_draws(1, problem, increments, options.draws, 5)

            def arguments(i: int, prior: DiffusionPrior, problem: Problem = problem) -> tuple:
                return (*(jnp.asarray(v, jnp.float32) for v in (problem.matrix, problem.y[i], problem.sigma)), prior)

            for method in options.methods:
                prior = priors["learned" if "learned" in method else "exact"]

                def run(i: int, method: str = method, prior: DiffusionPrior = prior, control: Any = control) -> Run:
                    return (
                        (control[i], 0, np.nan)
                        if method == "Gibbs"
                        else runs[method](jax.random.key(i), arguments(i, prior))
                    )

                found = row(problem, increments, gold, run)
                rows.append({"increments": increments, "operator": name, "method": method, **found})
                print(
                    "  ".join(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in rows[-1].items()),
                    flush=True,
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
