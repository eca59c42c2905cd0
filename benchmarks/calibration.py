"""Which samplers have the right posterior? Simulation-based calibration of all of them, and the power to see it.

    python benchmarks/calibration.py --json OUT                # the table of docs/concepts/calibration.md
    python benchmarks/calibration.py --power --json OUT
    python benchmarks/calibration.py --exact-draws --seeds 5   # discrepancies of exact draws, by two scores

The table has a row for each sampler and model. The models are a Gaussian prior in 8 dimensions, a mixture in 2, and a
learned prior in 2 dimensions with a nonlinear likelihood and an unknown scale; data are simulated from the prior's own
law. A row:

    p_value             of the worst test, corrected for their number; below .01 the sampler is miscalibrated there
    coverage_50, _90    share of the truths in central intervals, mean over entries
    ksd                 kernel Stein discrepancy of one posterior's draws, by the gradient of the prior's density: of
                        a learned one that of its flow, through the solve
    r_hat, ess          medians over simulations, of the worst entry
    ess_per_evaluation  smallest effective sample size over evaluations of the denoiser, where the kernel counts them
    expected            what theory says: "exact", or why it is not
    seconds             wall time of the row, compilation included

`--power` plants errors: a mean .2 posterior standard deviations off, a variance 15 % too large, NUTS on a distribution
whose `log_prob` is a constant with the gradient of a Gaussian, a log-likelihood in half precision. Each is looked for
with the defaults of `SBC`, by `miscalibrated`, in many seeds:

    caught_bias, caught_variance, caught_fake_density, caught_half_precision     of `seeds`
    false_alarms        MALA with nothing wrong, and not `calibrated`, of `seeds`
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from _calibration_rows import (
    EXACT,
    GAUSSIAN,
    MIXTURE,
    MODELS,
    NOISE,
    PLANTED,
    ROWS,
    SOLVERS,
    by_flow,
    learned,
    on_learned,
    right,
)
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import seed, trace
from numpyro.infer import MCMC, log_likelihood
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.diagnostics import Calibration, stein_discrepancy
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, SBC, Score, joint_scores
from numpyro_diffusion.solve import Adams, Heun


def power(seeds: int, **options: Any) -> dict[str, Any]:
    """How often planted errors are seen, and errors where there are none."""
    results: dict[str, Any] = {"seeds": seeds}
    for name, (sampler, model, simulator) in {**PLANTED, "false_alarms": (MALA, right, right)}.items():
        started, sbc = time.process_time(), SBC(sampler, model, simulator=simulator, **options)
        found = [sbc.run(jax.random.key(seed), None) for seed in range(seeds)]
        flagged = [not each.calibrated if name == "false_alarms" else each.miscalibrated for each in found]
        results[name] = int(np.sum(flagged))
        p_values = sorted(each.p_value for each in found)
        print(f"{name:24} {results[name]:3} of {seeds}   p from {p_values[0]:.1e} to {p_values[-1]:.1e}", flush=True)
        print(f"    first seed, {time.process_time() - started:.0f} CPU s in all: {found[0]}".replace("\n", "\n    "))
    return results


# The table


def coverage_of(found: Calibration, probability: float) -> float:
    """Mean over all entries of all sites."""
    shares = found.coverage(probability)
    return float(np.mean(np.concatenate([np.ravel(shares[name].value) for name in found.truths])))


def ksd_of(model: Callable, y: jax.Array, prior: DiffusionPrior, samples: dict[str, np.ndarray]) -> float:
    """The squared discrepancy (U-statistic) of draws, by the gradient of the density that MALA and NUTS target."""
    found = joint_scores(model, samples, y, prior)
    return float(stein_discrepancy(found.points, found.scores).u_statistic)


FLOWS = {"as in the table": SOLVERS["flow_solver"], "finer": Adams(32)}


def of_exact_draws(seeds: int, steps: int) -> list[dict]:
    """The discrepancy of 1000 independent draws by the network's own score, and by that of its flow's density.

    Of the learned prior, and of three posteriors, for which the likelihood chooses from 200,000 draws of the prior.
    """
    denoiser, rows = learned(steps).denoiser, []
    usual = DiffusionPrior(denoiser, **SOLVERS)
    laws: dict[str, Any] = {"prior": None}
    for datum in (7, 1, 2):
        laws[f"posterior {datum}"] = trace(seed(on_learned, datum)).get_trace(None, usual)["y"]["value"]
    for flow, solver in FLOWS.items():
        prior = DiffusionPrior(denoiser, **SOLVERS | {"flow_solver": solver, "density_solver": Heun(64)})
        found: dict[tuple, list] = {}
        for i in range(seeds):
            key_x, key_noise, key_choice = jax.random.split(jax.random.key(i), 3)
            draws = {"x": by_flow(prior).sample(key_x, (200_000,)), "noise": NOISE.sample(key_noise, (200_000,))}
            for law, y in laws.items():
                if y is None:
                    model, chosen = partial(numpyro.sample, "x", prior), jnp.arange(1000)
                else:
                    model = partial(on_learned, y, prior)
                    weights = jax.nn.softmax(log_likelihood(model, draws)["y"])
                    chosen = jax.random.choice(key_choice, len(weights), (1000,), replace=False, p=weights)
                some = {name: value[chosen] for name, value in draws.items()}
                for score, density in (("network's", Score()), ("flow's", None)):
                    points, scores = joint_scores(model, some, density=density)
                    each = [stein_discrepancy(points[:n], scores[:n]).u_statistic for n in (250, 1000)]
                    found.setdefault((law, score), []).append(each)
        for (law, score), values in found.items():
            row = {"flow": flow, "law": law, "score": score, "seeds": seeds}
            for size, column in zip((250, 1000), np.transpose(values), strict=True):
                row |= {f"ksd_{size}": float(column.mean()), f"sd_{size}": float(column.std(ddof=1))}
            rows.append(row)
            print(*(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in row.items()), flush=True)
    return rows


def one_run(make: Callable, model: Callable, prior: DiffusionPrior, num_draws: int) -> dict[str, float | None]:
    """Evaluations of the denoiser, and the discrepancy, of one posterior."""
    y = trace(seed(model, 7)).get_trace(None, prior)["y"]["value"]
    sampler = make(model)
    if isinstance(sampler, MCMCKernel):
        options = {"num_warmup": num_draws, "num_samples": num_draws, "num_chains": 4, "progress_bar": False}
        run = MCMC(sampler, **options, chain_method="vectorized")
        fields = ("num_score_evals",) if "num_score_evals" in sampler.default_fields else ()
        run.run(jax.random.key(0), y, prior, extra_fields=fields)
        evaluations = float(np.sum(np.asarray(run.get_extra_fields()[fields[0]]))) if fields else None
        samples = run.get_samples(group_by_chain=True)
    else:
        run = sampler.run(jax.random.key(0), y, prior)
        evaluations = float(getattr(run, "num_score_evals", np.nan)) * 400
        samples = run.get_samples(group_by_chain=True)
    samples = {name: np.asarray(samples[name]) for name in samples if name in ("x", "noise")}
    ess = min(float(np.min(effective_sample_size(value))) for value in samples.values())
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in samples.items()}
    flat = {name: value[:: max(1, len(value) // 1000)] for name, value in flat.items()}
    return {
        "ksd": ksd_of(model, y, prior, flat),
        "ess_per_evaluation": ess / evaluations if evaluations and np.isfinite(evaluations) else None,
    }


def table(names: list[str], models: list[str], size: int, draws: int, steps: int, path: Path | None) -> list[dict]:
    """All samplers on all models."""
    rows: list[dict] = []
    priors = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
    if "learned" in models:
        priors["learned"] = learned(steps)
    for model in models:
        for name in names:
            sampler, started, spent = ROWS[name], time.perf_counter(), time.process_time()
            make = sampler.with_others if model == "learned" else sampler.make
            row: dict[str, Any] = {"sampler": name, "model": model, "expected": sampler.expected}
            if make is None:
                rows.append({**row, "note": "takes diffusion sites alone"})
                continue
            exact_prior = priors[model]
            truths = by_flow(exact_prior) if sampler.law == "flow" and model == "learned" else exact_prior
            simulator = lambda y, prior, law=truths, of=MODELS[model]: of(y, law)  # noqa: E731
            if size == 0:
                rows.append({**row, **one_run(make, MODELS[model], exact_prior, draws)})
                print(rows[-1], flush=True)
                continue
            # samplers with a run of their own take seconds for each simulation
            count = size if isinstance(make(MODELS[model]), MCMCKernel) else min(size, 100)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes = {"num_simulations": count, "num_warmup": draws, "num_samples": draws}
                    sbc = SBC(make, MODELS[model], simulator=simulator, **sizes)
                    found = sbc.run(jax.random.key(0), None, exact_prior)
                    row |= one_run(make, MODELS[model], exact_prior, draws)
            except Exception as error:  # a row that fails is told as one
                rows.append({**row, "note": f"{type(error).__name__}: {str(error)[:200]}"})
                print(rows[-1], flush=True)
                continue
            rows.append(
                {
                    **row,
                    "p_value": found.p_value,
                    "miscalibrated": found.miscalibrated,
                    "worst": f"{found.tests[0].kind} of {found.tests[0].name}",
                    "coverage_50": coverage_of(found, 0.5),
                    "coverage_90": coverage_of(found, 0.9),
                    "r_hat": float(np.median(found.r_hat)),
                    "ess": float(np.median(found.ess)),
                    "num_ranks": found.num_ranks,
                    "simulations": count,
                    "failed": sum(map(len, found.failures.values())),
                    "problems": list(found.problems),
                    "seconds": time.perf_counter() - started,
                    "cpu_seconds": time.process_time() - spent,
                }
            )
            last = rows[-1]
            figures = ("p_value", "coverage_50", "coverage_90", "r_hat", "ess", "cpu_seconds")
            print(f"{name:28} {model:9}", *(f"{key} {last[key]:.3g}" for key in figures), last["worst"], flush=True)
            jax.clear_caches()
            if path:
                path.write_text(json.dumps({"rows": rows}, indent=1))
    return rows


def summarise(rows: list[dict]) -> None:
    """What contradicts theory first."""
    tested = [row for row in rows if "p_value" in row]
    short = [row for row in tested if row["r_hat"] > 1.1]
    for row in tested:
        where = f"{row['sampler']} on {row['model']}"
        if row in short:
            print(f"chains too short to be judged (raise --draws): {where}: median R-hat {row['r_hat']:.2f}")
        elif row["miscalibrated"] and row["expected"] == EXACT:
            print(f"EXACT AND MISCALIBRATED: {where}: {'; '.join(row['problems'])}")
    tested = [row for row in tested if row not in short]
    for row in tested:
        if not row["miscalibrated"] and row["expected"] != EXACT:
            print(f"biased and not seen with {row['simulations']} simulations: {row['sampler']} on {row['model']}")
    passed = sum(not row["miscalibrated"] for row in tested if row["expected"] == EXACT)
    print(f"{passed} of {sum(row['expected'] == EXACT for row in tested)} rows of exact samplers pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--power", action="store_true", help="planted errors instead of the table")
    parser.add_argument("--exact-draws", action="store_true", help="exact draws of the learned prior, not samplers")
    parser.add_argument("--seeds", type=int, default=20, help="of each planted error, or of exact draws")
    parser.add_argument("--samplers", default=";".join(ROWS), help="of the table, separated by semicolons")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--simulations", type=int, default=400, help="of each row; 0 for `ksd` alone")
    parser.add_argument("--draws", type=int, default=250, help="of each chain, after as many warm-up steps")
    parser.add_argument("--fast", action="store_true", help="one sampler on one model, or two seeds of small runs")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if options.power:
        small = {"num_simulations": 300, "num_warmup": 100, "num_samples": 100} if options.fast else {}
        results = power(2 if options.fast else options.seeds, **small)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        return
    if options.exact_draws:
        rows = of_exact_draws(options.seeds, 3000)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return
    names, models = options.samplers.split(";"), options.models.split(",")
    size, draws = options.simulations, options.draws
    if options.fast:
        names, models, size, draws = ["MALA"], ["gaussian"], 200, 200
    rows = table(names, models, size, draws, 3000, options.json)
    summarise(rows)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
