"""Which samplers have the right posterior? Simulation-based calibration of all of them, and the power to see it.

    python benchmarks/calibration.py --json OUT                # the table of docs/concepts/calibration.md
    python benchmarks/calibration.py --power --json OUT

The table has a row for each sampler and model. The models are a Gaussian prior in 8 dimensions, a mixture in 2, and a
learned prior in 2 dimensions with a nonlinear likelihood and an unknown scale; data are simulated from the prior's own
law. A row:

    p_value             of the worst test, corrected for their number; below .01 the sampler is miscalibrated there
    coverage_50, _90    share of the truths in central intervals, mean over entries
    ksd                 kernel Stein discrepancy of one posterior's draws, of models with a score
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.handlers import seed, trace
from numpyro.infer import MCMC, NUTS
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import potential_energy, unconstrain_fn

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.diagnostics import Calibration
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    SBC,
    ULA,
    AnnealedLangevin,
    CrankNicolson,
    Cycle,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    EllipticalSlice,
    GuidedPCN,
    GuidedReverse,
    Independence,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    PopulationHMC,
    ScoreHMC,
    SplitGibbs,
    TemperedSMC,
    TwistedSMC,
    with_density,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, Heun
from numpyro_diffusion.train import fit

DIMENSION = 8
SCHEDULE = VE(0.01, 40.0)
KELVIN = 300.0


# Planted errors: a posterior N(y / 2, 1/2) in each dimension, unless it is said otherwise.

PRIOR = DiffusionPrior(Gaussian(jnp.zeros(DIMENSION), 1.0, SCHEDULE))


def right(y: jax.Array) -> None:
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def biased(y: jax.Array) -> None:
    """Posterior means .2 standard deviations too high."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x - 0.2 * 2.0**0.5, 1.0).to_event(1), obs=y)


def inflated(y: jax.Array) -> None:
    """Posterior variances 15 % too large."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.15**0.5).expand([DIMENSION]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.15**0.5).to_event(1), obs=y)


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape[:-1])


@_constant.defjvp
def _score_alone(primals: tuple, tangents: tuple) -> tuple:
    (x,), (step,) = primals, tangents
    return _constant(x), -jnp.sum(x * step, -1)


class FakeDensity(dist.Distribution):
    """N(0, I) whose log_prob is a constant with the right gradient."""

    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__((), (DIMENSION,))

    def sample(self, key: jax.Array, sample_shape: tuple = ()) -> jax.Array:
        return jax.random.normal(key, (*sample_shape, DIMENSION))

    def log_prob(self, value: jax.Array) -> jax.Array:
        return _constant(value)


def fake(y: jax.Array) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", FakeDensity()), 1.0).to_event(1), obs=y)


class HalfPrecision(dist.Normal):
    """A normal law that is evaluated in 16 bits."""

    def log_prob(self, value: jax.Array) -> jax.Array:
        value, loc, scale = (jnp.asarray(a, jnp.float16) for a in (value, self.loc, self.scale))
        return (-0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale)).astype(jnp.float32)


def temperature(y: jax.Array, law: type = dist.Normal) -> None:
    """Temperatures in kelvin, to a tenth of one, where numbers of 16 bits are a quarter apart.

    With two tenths the error hardly shows: data and prediction are rounded alike, and posteriors are about as much too
    wide as they are off.
    """
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", law(KELVIN + x, 0.1).to_event(1), obs=y)


half = partial(temperature, law=HalfPrecision)
PLANTED = {
    "caught_bias": (MALA, biased, right),
    "caught_variance": (MALA, inflated, right),
    "caught_fake_density": (partial(NUTS, max_tree_depth=5), fake, right),
    "caught_half_precision": (MALA, half, temperature),
}


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


def learned(num_steps: int) -> DiffusionPrior:
    """A small network, trained on two crescents; what it has not learned does no harm, as data are drawn from it."""
    key_side, key_angle, key_noise = jax.random.split(jax.random.key(0), 3)
    side = jax.random.bernoulli(key_side, shape=(4000,)).astype(float)
    angle = jnp.pi * jax.random.uniform(key_angle, (4000,))
    x = jnp.stack([jnp.cos(angle) + side - 0.5, (1.0 - 2.0 * side) * jnp.sin(angle) + 0.3 * side], -1)
    x = x + 0.15 * jax.random.normal(key_noise, x.shape)
    backbone = MLP((2,), features=32, num_blocks=2, rngs=nnx.Rngs(0))
    found = fit(jax.random.key(1), backbone, x, schedule=VE(0.03, 20.0), num_steps=num_steps, batch_size=256)
    return DiffusionPrior(found.denoiser, **SOLVERS)


SOLVERS = {"sampler": DPMSolverPP(48, eta=1.0), "flow_solver": DPMSolverPP(12), "density_solver": Heun(16)}
GAUSSIAN = DiffusionPrior(Gaussian(jnp.zeros(DIMENSION), 1.0, SCHEDULE), **SOLVERS)
MODES = GaussianMixture([0.4, 0.6], [[-2.0, 0.5], [1.5, -1.0]], 0.5, SCHEDULE)
MIXTURE = DiffusionPrior(MODES, **SOLVERS)


class ByFlow(DiffusionPrior):
    """A prior whose draws are those of its flow, for kernels that are exact for that law."""

    def sample(self, key: jax.Array, sample_shape: tuple = ()) -> jax.Array:
        return self.flow(jax.random.normal(key, (*sample_shape, *self.batch_shape, *self.noise_shape)))


def by_flow(prior: DiffusionPrior) -> DiffusionPrior:
    return ByFlow(prior.denoiser, **SOLVERS)


def on_gaussian(y: jax.Array, prior: DiffusionPrior) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0).to_event(1), obs=y)


def on_mixture(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.7), obs=y)


def on_learned(y: jax.Array, prior: DiffusionPrior) -> None:
    """Distances from three places, with noise of an unknown scale."""
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    places = jnp.array([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.5]])
    numpyro.sample("y", dist.Normal(jnp.sqrt(jnp.sum((x - places) ** 2, -1) + 0.01), noise).to_event(1), obs=y)


def in_gibbs(kernel: Callable) -> Callable:
    """A kernel of diffusion sites, with MALA for the others."""
    return partial(DiffusionGibbs, x_kernel=kernel, rest_kernel=MALA)


class Row(NamedTuple):
    """A sampler of the table."""

    make: Callable  # from a model of diffusion sites alone
    with_others: Callable | None  # from a model that has other sites too
    law: str  # whose draws the truths are: "reverse" or "flow"
    expected: str


EXACT = "exact"
ROWS = {
    "MALA": Row(MALA, MALA, "flow", EXACT),
    "ScoreHMC": Row(ScoreHMC, ScoreHMC, "flow", EXACT),
    "NUTS(with_density)": Row(*[lambda m: NUTS(with_density(m), max_tree_depth=5)] * 2, "flow", EXACT),
    "NoiseSpace": Row(partial(NoiseSpace, max_tree_depth=5), partial(NoiseSpace, max_tree_depth=5), "flow", EXACT),
    "NoiseSpace(EllipticalSlice)": Row(
        lambda m: NoiseSpace(m, EllipticalSlice), lambda m: NoiseSpace(m, EllipticalSlice), "flow", EXACT
    ),
    "NoiseSpace(CrankNicolson)": Row(
        lambda m: NoiseSpace(m, CrankNicolson), lambda m: NoiseSpace(m, CrankNicolson), "flow", EXACT
    ),
    "DiffusionPCN": Row(DiffusionPCN, in_gibbs(DiffusionPCN), "reverse", EXACT),
    "GuidedPCN": Row(GuidedPCN, in_gibbs(GuidedPCN), "reverse", EXACT),
    "ParticleGibbs": Row(partial(ParticleGibbs, num_particles=8), None, "reverse", EXACT),
    "Independence": Row(Independence, Independence, "reverse", EXACT),
    "DiffusiveGibbs": Row(DiffusiveGibbs, DiffusiveGibbs, "flow", EXACT),
    "ParallelTempering(MALA)": Row(
        partial(ParallelTempering, kernel=MALA, num_temperatures=4),
        partial(ParallelTempering, kernel=MALA, num_temperatures=4),
        "flow",
        EXACT,
    ),
    "Cycle(DiffusionPCN, MALA)": Row(lambda m: Cycle([DiffusionPCN, MALA], model=m), None, "flow", EXACT),
    "TemperedSMC": Row(*[partial(TemperedSMC, num_particles=400, progress_bar=False)] * 2, "reverse", EXACT),
    "TwistedSMC": Row(
        partial(TwistedSMC, num_particles=400, progress_bar=False), None, "reverse", "exact with many particles"
    ),
    "PopulationHMC": Row(
        *[partial(PopulationHMC, num_walkers=128, max_seconds=2.0, progress_bar=False)] * 2, "flow", EXACT
    ),
    "ULA": Row(ULA, ULA, "flow", "too wide, by its step size"),
    "SplitGibbs": Row(partial(SplitGibbs, rho=0.5), partial(SplitGibbs, rho=0.5), "reverse", "too wide, by rho"),
    "AnnealedLangevin": Row(AnnealedLangevin, in_gibbs(AnnealedLangevin), "reverse", "biased, by the guidance"),
    "GuidedReverse": Row(GuidedReverse, in_gibbs(GuidedReverse), "reverse", "biased, by the guidance"),
}
MODELS = {"gaussian": on_gaussian, "mixture": on_mixture, "learned": on_learned}


def coverage_of(found: Calibration, probability: float) -> float:
    """Mean over all entries of all sites."""
    shares = found.coverage(probability)
    return float(np.mean(np.concatenate([np.ravel(shares[name].value) for name in found.truths])))


def ksd_of(model: Callable, y: jax.Array, prior: DiffusionPrior, samples: dict[str, np.ndarray]) -> float | None:
    """The squared discrepancy (U-statistic) of draws from the joint, in unconstrained coordinates."""
    try:
        from numpyro_diffusion.diagnostics import stein_discrepancy
    except ImportError:
        return None
    z = jax.vmap(lambda values: unconstrain_fn(model, (y, prior), {}, values))(samples)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], z))
    points = jax.vmap(lambda one: ravel_pytree(one)[0])(z)
    energy = lambda point: potential_energy(model, (y, prior), {}, unravel(point))  # noqa: E731
    scores = -jax.jit(jax.vmap(jax.grad(energy)))(points)
    return float(stein_discrepancy(np.asarray(points), np.asarray(scores)).u_statistic)


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
    parser.add_argument("--seeds", type=int, default=20, help="of each planted error")
    parser.add_argument("--samplers", default=";".join(ROWS), help="of the table, separated by semicolons")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--simulations", type=int, default=400, help="of each row")
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
