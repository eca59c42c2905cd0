"""Do stochastic solvers have the law of the clean point given a noisy one? Kernels that noise and denoise rely on it.

    python benchmarks/reverse_law.py --json OUT

The law is N(0, 1), the noisy point stands at 1, and each solver walks it down from the time of its own grid that is
nearest to a noise level, with the exact denoiser. Printed are the variance over the truth, the error of the mean, and
the denoiser evaluations of the walk.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.noise import VE, Karras
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, EulerMaruyama, Solver, StochasticHeun, solve

SCHEDULE = VE(0.01, 40.0)
LEVELS = (0.1, 0.5, 2.0, 10.0)
SOLVERS = {
    "DPMSolverPP, eta=1": partial(DPMSolverPP, eta=1.0),
    "DPMSolverPP, eta=1, Karras": partial(DPMSolverPP, eta=1.0, grid=Karras()),
    "Ancestral": Ancestral,
    "EulerMaruyama": EulerMaruyama,
    "StochasticHeun": StochasticHeun,
}


@partial(jax.jit, static_argnames=("solver", "count"))
def draws(key: jax.Array, solver: Solver, start: jax.Array, count: int) -> jax.Array:
    law, point = Gaussian([0.0], 1.0, SCHEDULE), jnp.ones(1)
    return jax.vmap(lambda key: solve(solver, law, point, key, start)[0])(jax.random.split(key, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--fast", action="store_true", help="few draws of one number of steps")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    steps, count = ([16], 1000) if options.fast else (options.steps, 100_000)

    rows = []
    print(f"{'solver':28} {'steps':>5} {'level':>6} {'variance':>9} {'mean':>8} {'evaluations':>11}")
    for name, make in SOLVERS.items():
        for num_times in steps:
            solver = make(num_times)
            levels = np.asarray(SCHEDULE.noise_level(solver.times(Gaussian([0.0], 1.0, SCHEDULE))))
            for wanted in LEVELS:
                start = int(np.argmin(np.abs(np.log(levels / wanted))))
                level = float(levels[start])
                x = np.asarray(draws(jax.random.key(0), solver, jnp.asarray(start), count), np.float64)
                row = {
                    "solver": name,
                    "num_times": num_times,
                    "level": level,
                    "variance_over_truth": x.var() * (1.0 + level**2) / level**2,
                    "mean_error": x.mean() - 1.0 / (1.0 + level**2),
                    "evaluations": int(solver.evaluations(start)),
                }
                rows.append(row)
                print("{solver:28} {num_times:5} {level:6.2f} {variance_over_truth:9.3f} {mean_error:8.4f} "
                      "{evaluations:11}".format(**row))  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
