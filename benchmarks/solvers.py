"""Solvers at equal evaluations: how far are their draws from the law, and do they keep its spread?

    python benchmarks/solvers.py --json OUT

The law is 25 unit Gaussians in two dimensions, eight apart, with unequal weights and the exact denoiser. For each
solver and number of evaluations: the sliced W1 of 5000 draws to exact ones over the floor, that of other exact draws;
the total variation between the shares of the modes and their weights; and the mean squared distance to the nearest
mode, per dimension, which is 1 for the law. Means over four repetitions.

One of them, `AdamFlow`, is no sampler and lives here: it answers whether an optimiser can walk the reverse process.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, GaussianMixture
from numpyro_diffusion.diagnostics import sliced_wasserstein
from numpyro_diffusion.noise import VE, Karras, TimeGrid
from numpyro_diffusion.solve import (
    Ancestral,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    Solver,
    StochasticHeun,
    sample,
)


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdamFlow(Solver):
    r"""Descent on $-\log p_t$ along a falling noise ladder with Adam's moments: finds modes, does not sample.

    In $u = x / \alpha$ the gradient at a level, in units of the level, is $\hat\varepsilon$, so a step is
    $u \leftarrow u - \gamma \lambda_s\, \mathrm{Adam}(\hat\varepsilon(u, \lambda_s))$. It stops where
    $\hat\varepsilon$ vanishes, while a draw of $p_s$ has $\|\hat\varepsilon\|^2$ of order $d$.

    Args:
        num_times: number of times visited.
        num_descents: Adam steps at each level, one denoiser evaluation each.
        learning_rate: step $\gamma$ in units of the noise level.
        grid: where the times lie.

    References:
        Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980.
    """

    num_times: int = 64
    num_descents: int = 1
    learning_rate: float = 0.3
    grid: TimeGrid = Karras()

    law = "flow"  # no noise on the way, that is; it has no law of its own
    order = 0
    adam = optax.scale_by_adam(0.5, 0.9)

    @property
    def evaluations_per_step(self) -> int:
        return self.num_descents

    def init(self, denoiser: Denoiser, x_t: jax.Array) -> optax.OptState:
        return self.adam.init(x_t)

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: optax.OptState,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, optax.OptState]:
        alpha, reach = denoiser.schedule.alpha(s), self.learning_rate * denoiser.schedule.noise_level(s)

        def descend(carry: tuple, _: None) -> tuple[tuple, None]:
            u, moments = carry
            direction, moments = self.adam.update(denoiser(alpha * u, s).eps, moments)
            return (u - reach * direction, moments), None

        (u, memory), _ = jax.lax.scan(descend, (x_t / denoiser.schedule.alpha(t), memory), None, self.num_descents)
        return alpha * u, memory


# a walk of n times takes n - 1 steps and one evaluation at the end
SOLVERS = {
    "Ancestral (DDPM)": lambda n: Ancestral(n),
    "EulerMaruyama": lambda n: EulerMaruyama(n),
    "PredictorCorrector": lambda n: PredictorCorrector(Ancestral((n - 1) // 2 + 1), snr=0.3),
    "StochasticHeun": lambda n: StochasticHeun((n - 1) // 2 + 1),
    "DPMSolverPP, eta=1": lambda n: DPMSolverPP(n, eta=1.0),
    "Ancestral, eta=0 (DDIM)": lambda n: Ancestral(n, eta=0.0),
    "Heun": lambda n: Heun((n - 1) // 2 + 1),
    "DPMSolverPP": lambda n: DPMSolverPP(n),
    "DPMSolverPP, Karras": lambda n: DPMSolverPP(n, grid=Karras()),
    "AdamFlow": lambda n: AdamFlow(n),
    "AdamFlow, 4 a level": lambda n: AdamFlow((n - 1) // 4 + 1, num_descents=4),
}
CORNERS = 8.0 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])
WEIGHTS = np.random.default_rng(0).dirichlet(np.full(25, 3.0))


def summary(draws: jax.Array, exact: jax.Array) -> jax.Array:
    squared = jnp.sum((draws[:, None] - CORNERS) ** 2, -1)
    shares = jnp.bincount(jnp.argmin(squared, 1), length=25) / len(draws)
    w1 = sliced_wasserstein(draws, exact, jax.random.key(7), 500)
    return jnp.array([w1, jnp.abs(shares - WEIGHTS).sum() / 2, jnp.min(squared, 1).mean() / 2])


@partial(jax.jit, static_argnums=(0, 2))
def measure(solver: Solver, key: jax.Array, count: int) -> jax.Array:
    law = GaussianMixture(WEIGHTS, CORNERS, 1.0, VE(0.02, 80.0))
    key_draws, key_exact = jax.random.split(key)
    return summary(sample(solver, law, key_draws, (count,)), law.sample(key_exact, (count,)))


@partial(jax.jit, static_argnums=1)
def floor(key: jax.Array, count: int) -> jax.Array:
    law = GaussianMixture(WEIGHTS, CORNERS, 1.0)
    first, second = (law.sample(k, (count,)) for k in jax.random.split(key))
    return summary(first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one repetition, few draws and evaluations")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    repeats, count, budgets = (1, 500, (9,)) if options.fast else (4, 5000, (17, 33, 65, 257))

    keys = jax.random.split(jax.random.key(0), repeats)
    base = np.mean([floor(key, count) for key in keys], 0)
    rows = [{"solver": "exact draws", "evaluations": 0, "w1_over_floor": 1.0, "modes": base[1], "spread": base[2]}]
    for evaluations in budgets:
        for name, make in SOLVERS.items():
            solver = make(evaluations)
            distance, modes, spread = np.mean([measure(solver, key, count) for key in keys], 0)
            row = {"solver": name, "evaluations": solver.evaluations(), "w1_over_floor": distance / base[0]}
            rows.append(row | {"modes": modes, "spread": spread})
    rows = [{k: v if isinstance(v, str) else float(v) for k, v in row.items()} for row in rows]
    print(f"{'solver':26} {'evaluations':>11} {'W1/floor':>9} {'modes':>7} {'spread':>7}")
    for row in rows:
        print("{solver:26} {evaluations:11.0f} {w1_over_floor:9.2f} {modes:7.3f} {spread:7.3f}".format(**row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
