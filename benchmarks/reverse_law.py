"""Do stochastic solvers have the law of the clean point given a noisy one? Kernels that noise and denoise rely on it.

    python benchmarks/reverse_law.py --json OUT

First, the law is N(0, 1), the noisy point stands at 1, and each solver walks it down from the time of its own grid
that is nearest to a noise level, with the exact denoiser. Printed are the variance over the truth, the error of the
mean, and the denoiser evaluations of the walk.

Second, `solve.draw_given` at equal evaluations on a Gaussian, two narrow modes in one dimension and 25 modes in two:
`Adams` follows the flow of x given x_t, `DPMSolverPP(eta=1)` walks the reverse process from x_t. Levels are in units
of the law's scale. Printed, over eight noisy points, are the sliced W1 of 2,000 draws over that of 2,000 exact ones
(both to 20,000 exact draws), and the variance over that of the exact draws.

Third, `DiffusionPCN` on two modes: 100,000 chains start at exact draws of the posterior, make five moves at log-uniform
levels, and the Kolmogorov-Smirnov distance of where they end to the posterior is printed; exact draws have .0027.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.stats import norm

from numpyro_diffusion.denoise import Denoiser, Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionPCN
from numpyro_diffusion.noise import VE, Karras
from numpyro_diffusion.solve import (
    Adams,
    Ancestral,
    DPMSolverPP,
    EulerMaruyama,
    Solver,
    StochasticHeun,
    draw_given,
    evaluations_given,
    solve,
)

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


MODES = 8.0 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), -1).reshape(25, 2)
LAWS = {
    "Gaussian": Gaussian([0.0]),
    "two modes": GaussianMixture([0.5, 0.5], np.array([[-1.0], [1.0]]), np.array([0.01, 0.09])),
    "25 modes": GaussianMixture(np.random.default_rng(0).dirichlet(np.ones(25)), MODES, 1.0),
}
GIVEN = {"Adams": lambda n: Adams(n - 2), "DPMSolverPP, eta=1": lambda n: DPMSolverPP(n, eta=1.0)}
POINTS, DRAWS, EXACT = 8, 2000, 20_000


def conditional(law: GaussianMixture, u: jax.Array, level: jax.Array) -> GaussianMixture:
    """The law of x given u, which is x with Gaussian noise of a level; of isotropic components."""
    variances = law.variances[:, 0]
    spread = variances + level**2
    log_joint = law.log_weights - 0.5 * jnp.sum((u - law.means) ** 2, -1) / spread - 0.5 * u.size * jnp.log(spread)
    means = law.means + (variances / spread)[:, None] * (u - law.means)
    return GaussianMixture(jax.nn.softmax(log_joint), means, variances * level**2 / spread)


@partial(jax.jit, static_argnums=(0, 4))
def compare(solver: Solver, law: Denoiser, level: jax.Array, key: jax.Array, points: int) -> tuple[jax.Array, ...]:
    """W1 of draws and of exact ones, and their variances, in units of the conditional law; over noisy points."""
    t = law.schedule.inverse_noise_level(level)

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        key_x, key_noise, key_draw, key_exact, key_floor, key_line = jax.random.split(key, 6)
        u = law.sample(key_x) + level * jax.random.normal(key_noise, law.event_shape)
        x_t = law.schedule.alpha(t) * u
        truth = conditional(law, u, level)
        exact, floor = truth.sample(key_exact, (EXACT,)), truth.sample(key_floor, (DRAWS,))
        x = jax.vmap(lambda key: draw_given(solver, law, x_t, t, key))(jax.random.split(key_draw, DRAWS))
        lines = jax.random.normal(key_line, (u.size, 50))
        lines = lines / jnp.linalg.norm(lines, axis=0)
        sorted_exact = jnp.sort(exact @ lines, 0).reshape(DRAWS, EXACT // DRAWS, -1)
        w1 = [jnp.abs(jnp.sort(v @ lines, 0)[:, None] - sorted_exact).mean() / truth.scale for v in (x, floor)]
        return *w1, *(v.var(0).mean() / truth.scale**2 for v in (x, floor))

    return jax.lax.map(one, jax.random.split(key, points))


def at_equal_evaluations(evaluations: list[int], levels: tuple[float, ...], points: int) -> list[dict]:
    rows = []
    print(f"\n{'law':10} {'solver':20} {'evaluations':>11} {'level':>6} {'W1 / floor':>10} {'variance':>9}")
    for name, law in LAWS.items():
        for kind, make in GIVEN.items():
            for n in evaluations:
                for level in levels:
                    solver = make(n)
                    w1, floor, variance, exact = compare(solver, law, level * law.scale, jax.random.key(0), points)
                    row = {
                        "law": name,
                        "solver": kind,
                        "evaluations": int(evaluations_given(solver)),
                        "level": level,
                        "w1_over_floor": float(w1.mean() / floor.mean()),
                        "variance_over_truth": float(variance.mean() / exact.mean()),
                    }
                    rows.append(row)
                    print("{law:10} {solver:20} {evaluations:11} {level:6.2f} {w1_over_floor:10.2f} "
                          "{variance_over_truth:9.3f}".format(**row), flush=True)  # fmt: skip
    return rows


def rank_distance(solver: Solver, chains: int, moves: int = 5) -> float:
    """Of `DiffusionPCN` on the two modes observed at .3 with unit noise, started at exact draws."""
    law, y, noise = LAWS["two modes"], 0.3, 1.0

    def model() -> None:
        x = numpyro.sample("x", DiffusionPrior(law, density="none"))
        numpyro.sample("y", dist.Normal(x[0], noise), obs=y)

    kernel, truth = DiffusionPCN(model, global_fraction=1.0, solver=solver), conditional(law, jnp.array([y]), noise)
    start = truth.sample(jax.random.key(1), (chains,))
    state = kernel.init(jax.random.split(jax.random.key(2), chains), 0, {"x": start}, (), {})
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    for _ in range(moves):
        state = step(state)
    weights, means, variances = np.exp(truth.log_weights), np.asarray(truth.means)[:, 0], truth.variances[:, 0]
    x = np.sort(np.asarray(state.z["x"], np.float64)[:, 0])
    ranks = norm.cdf((x[:, None] - means) / np.sqrt(np.asarray(variances))) @ np.asarray(weights)
    return float(np.abs(ranks - (np.arange(chains) + 0.5) / chains).max() + 0.5 / chains)


def moves_of_pcn(evaluations: list[int], chains: int) -> list[dict]:
    rows = []
    print(f"\n{'solver of DiffusionPCN':36} {'rank distance':>13}")
    for n in evaluations:
        for kind, make in GIVEN.items():
            distance = rank_distance(make(n), chains)
            rows.append({"solver": kind, "num_times": make(n).num_times, "rank_distance": distance})
            print(f"{kind + f', {make(n).num_times} times':36} {distance:13.4f}", flush=True)
    return rows


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
    sizes = ([8], (0.3,), 1) if options.fast else ([8, 16, 32, 64], (0.1, 0.3, 1.0, 10.0), POINTS)
    rows += at_equal_evaluations(*sizes)
    rows += moves_of_pcn([16] if options.fast else [16, 32, 64], count)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
