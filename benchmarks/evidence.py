"""Normalising constants that are known: how far off are the samplers, and do they know how far?

    python benchmarks/evidence.py --seeds 30 --json OUT

Ordinary NumPyro models, no diffusion prior. `TemperedSMC` moves particles by kernels that are made for each problem;
`PopulationHMC` (one round, steps of the temperature by an effective size of .9) by its default moves for all:

    funnel     x0 ~ N(0, 9), xi | x0 ~ N(0, exp(x0)), i = 1..9, from a prior with xi ~ N(0, 9): log Z = 0
    many_well  sixteen copies of exp(x / 2 + 6 x^2 - x^4) exp(-v^2 / 2), from N(0, 4) in 32 dimensions: log Z = 164.696
    brownian   a random walk of 30 steps, seen with noise but for the middle ten, both scales unknown with priors
               LogNormal(0, 2): log Z = 1.18775 by quadrature

Prints, over seeds, mean and standard deviation of the estimated log Z, the mean of the standard errors that the runs
gave themselves, how many runs are within two and four of these, and the gradients of `PopulationHMC`. The data of the
walk are those of TensorFlow Probability's inference gym (https://github.com/tensorflow/probability, Apache-2.0).
"""

import argparse
import itertools
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

from numpyro_diffusion.infer import Cycle, PopulationHMC, ScoreHMC, TemperedSMC

WALK = """.21592641 .118771404 -.07945447 .037677474 -.27885845 -.1484156 -.3250906 -.22957903 -.44110894 -.09830782
-.8786016 -.83736074 -.7384849 -.8939254 -.7774566 -.70238715 -.87771565 -.51853573 -.6948214 -.6202789"""
SEEN = np.r_[0:10, 20:30]


def funnel() -> None:
    x0 = numpyro.sample("x0", dist.Normal(0.0, 3.0))
    prior = dist.Normal(0.0, 3.0).expand([9]).to_event(1)
    x = numpyro.sample("x", prior)
    numpyro.factor("funnel", dist.Normal(0.0, jnp.exp(x0 / 2.0)).log_prob(x).sum() - prior.log_prob(x))


def many_well() -> None:
    prior = dist.Normal(0.0, 2.0).expand([16]).to_event(1)
    x, v = numpyro.sample("x", prior), numpyro.sample("v", prior)
    target = jnp.sum(0.5 * x + 6.0 * x**2 - x**4 - 0.5 * v**2)
    numpyro.factor("wells", target - prior.log_prob(x) - prior.log_prob(v))


def brownian(y: jax.Array) -> None:
    step = numpyro.sample("step", dist.LogNormal(0.0, 2.0))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 2.0))
    increments = numpyro.sample("increments", dist.Normal(0.0, 1.0).expand([30]).to_event(1))
    walk = step * jnp.cumsum(increments)
    numpyro.sample("y", dist.Normal(walk[SEEN], noise).to_event(1), obs=y)


class Problem(NamedTuple):
    """A model with a known constant, and how it is sampled."""

    model: Callable
    args: tuple
    truth: float
    kernel: Callable | None
    options: dict[str, Any]


def scales(*steps: float, **options: bool) -> Callable:
    """Trajectories of steps that fit the mouth of a funnel, in turn with those that fit its neck."""
    kernels = [partial(ScoreHMC, step_size=step, target_accept_prob=None, **options) for step in steps]
    return lambda model: Cycle(kernels, model=model)


PROBLEMS = {
    "funnel": Problem(
        funnel,
        (),
        0.0,
        scales(1.0, 0.3, 0.1, 0.03, 0.01, adapt_mass_matrix=False),
        {"ess_threshold": 0.9, "correlation": 0.01},
    ),
    "many_well": Problem(many_well, (), 164.696, None, {}),
    "brownian": Problem(
        brownian,
        (jnp.array([float(y) for y in WALK.split()]),),
        1.18775,
        scales(0.6, 0.15, 0.04, dense_mass=True),
        {"ess_threshold": 0.8, "correlation": 0.02},
    ),
}


def sampler(name: str, num_particles: int = 4000, **options: Any) -> TemperedSMC:
    """The sampler of a problem; twenty islands, so that their spread is known."""
    problem = PROBLEMS[name]
    options = {"num_islands": 20, "progress_bar": False, **problem.options, **options}
    return TemperedSMC(problem.model, num_particles, kernel=problem.kernel, **options)


def population(name: str, num_walkers: int = 4000) -> PopulationHMC:
    """The same with the default moves of `PopulationHMC`, the same for all problems."""
    options = {"num_islands": 20, "ess_threshold": 0.9, "correlation": 0.05, "max_moves": 256, "progress_bar": False}
    return PopulationHMC(PROBLEMS[name].model, num_walkers, max_gradients=1, **options)


SAMPLERS = {"TemperedSMC": sampler, "PopulationHMC": population}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--particles", type=int, default=4000, help="a multiple of 20")
    parser.add_argument("--samplers", default="TemperedSMC,PopulationHMC")
    parser.add_argument("--fast", action="store_true", help="one problem and seed, few particles")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()

    seeds, particles = (1, 200) if options.fast else (options.seeds, options.particles)
    problems, results = list(PROBLEMS.items())[: 1 if options.fast else None], {}
    header = f"{'sampler':13} {'problem':10} {'truth':>8} {'mean':>8} {'sd':>6} {'own error':>9} {'in 2, in 4':>10}"
    print(f"{header} {'gradients':>10} {'seconds':>8}")
    for (label, make), (name, problem) in itertools.product(SAMPLERS.items(), problems):
        if label not in options.samplers.split(","):
            continue
        smc, found, started = make(name, particles), [], time.perf_counter()
        for seed in range(seeds):
            with warnings.catch_warnings():  # that one round is no proof
                warnings.simplefilter("ignore", UserWarning)
                evidence = smc.run(jax.random.key(seed), *problem.args).log_evidence
            gradients = smc.num_gradients if isinstance(smc, PopulationHMC) else np.nan
            found.append((float(evidence.value), float(evidence.standard_error), gradients))
        values, errors, gradients = np.array(found).T
        off = abs(values - problem.truth) / errors
        row = {
            "truth": problem.truth,
            "mean": values.mean(),
            "sd": values.std(ddof=1) if seeds > 1 else None,
            "own_error": errors.mean(),
            "within_two": int((off < 2).sum()),
            "within_four": int((off < 4).sum()),
            "gradients": None if label == "TemperedSMC" else gradients.mean(),
            "seeds": seeds,
            "seconds": (time.perf_counter() - started) / seeds,
        }
        results.setdefault(label, {})[name] = row
        print(
            f"{label:13} {name:10} {problem.truth:8.3f} {values.mean():8.3f} {row['sd'] or np.nan:6.3f} "
            f"{errors.mean():9.3f} {row['within_two']:4}, {row['within_four']:4} {gradients.mean():10.3g} "
            f"{row['seconds']:8.1f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
