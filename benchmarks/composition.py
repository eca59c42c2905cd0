"""A product of two laws, by composition at inference and as a posterior: who ends at the product?

    python benchmarks/composition.py --json OUT

One factor is a ring, eight Gaussians of standard deviation 0.03 at radius 0.5; the other a bar, uniform on |x1| < 0.2,
|x2| < 1 (Du et al., Reduce, reuse, recycle, 2023, https://arxiv.org/abs/2302.11552). The product has two modes, at
(0, 0.5) and (0, -0.5), each with weight one half, and a mean log-density of 3.48. Both factors are exact at every noise
level. The reverse process and both walks are given the `Product`; `DiffusionPCN` has the ring as its prior and the bar
as a factor of the model, and all its chains begin at the upper mode.

Printed are the mean of the product's normalised log-density over draws, where one below -10 (outside of the bar it is
minus infinity) counts as -10, the share of draws at each mode, within five standard deviations, and denoiser
evaluations a draw.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.denoise import FromDensity, GaussianMixture, Product
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import AnnealedLangevin, DiffusionPCN
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, sample

SCHEDULE = VE(0.002, 10.0)
RADIUS, DEVIATION, HALF_WIDTHS, FLOOR = 0.5, 0.03, (0.2, 1.0), -10.0
MODES = np.array([[0.0, RADIUS], [0.0, -RADIUS]])
ANGLES = np.arange(8) * np.pi / 4
RING = GaussianMixture(
    np.ones(8), RADIUS * np.stack([np.sin(ANGLES), np.cos(ANGLES)], -1), DEVIATION**2, schedule=SCHEDULE
)


def log_bar(x_t: jax.Array, t: ArrayLike, half_widths: jax.Array) -> jax.Array:
    """The log-density of a uniform law on a box under noise: a difference of normal distribution functions."""
    sigma, away = SCHEDULE.sigma(t), jnp.abs(x_t)
    near, far = (log_ndtr((side - away) / sigma) for side in (half_widths, -half_widths))
    return jnp.sum(near + jnp.log1p(-jnp.exp(far - near)) - jnp.log(2.0 * half_widths))


BAR = FromDensity(log_bar, (2,), SCHEDULE, scale=0.4, parameters=jnp.array(HALF_WIDTHS))
PRODUCT = Product([RING, BAR])


def log_target(x: np.ndarray) -> np.ndarray:
    """The product's log-density, normalised and not below the floor, of points (n, 2)."""
    distances = ((x[:, None] - np.asarray(RING.means)) ** 2).sum(-1)
    ring = np.log(np.exp(-0.5 * distances / DEVIATION**2).sum(1) / (2 * math.pi * DEVIATION**2) + 1e-300)
    inside = (np.abs(x) < HALF_WIDTHS).all(1)  # of two of eight modes: the product is the ring there, times one half
    return np.maximum(np.where(inside, ring - math.log(2), -np.inf), FLOOR)


def product() -> None:
    numpyro.sample("x", DiffusionPrior(PRODUCT, density="none"))


def posterior() -> None:
    x = numpyro.sample("x", DiffusionPrior(RING, sampler=DPMSolverPP(64, eta=1.0)))
    numpyro.factor("bar", jnp.where((jnp.abs(x) < jnp.array(HALF_WIDTHS)).all(), 0.0, -jnp.inf))


def reverse(key: jax.Array, count: int, num_steps: int) -> tuple[jax.Array, float]:
    solver = DPMSolverPP(num_steps, eta=1.0)
    draw = jax.jit(lambda key: sample(solver, PRODUCT, key, (count,)))
    return draw(key), float(solver.evaluations())


def annealed(key: jax.Array, count: int, metropolis: bool, num_levels: int, steps: int) -> tuple[jax.Array, float]:
    kernel = AnnealedLangevin(
        product, num_levels=num_levels, steps_per_level=steps, step_size=0.4, metropolis=metropolis
    )
    return last(kernel, key, count, 1)


def pcn(key: jax.Array, count: int, num_moves: int) -> tuple[jax.Array, float]:
    kernel = DiffusionPCN(posterior, num_proposals=4, global_fraction=1.0)
    return last(kernel, key, count, num_moves, {"x": jnp.tile(jnp.array(MODES[0]), (count, 1))})


def last(
    kernel: MCMCKernel, key: jax.Array, count: int, num_draws: int, init_params: dict | None = None
) -> tuple[jax.Array, float]:
    """The last draw of each of many chains, and the evaluations that it took from the start of its chain."""
    options = {"num_chains": count, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_draws, **options)
    mcmc.run(key, init_params=init_params, extra_fields=("num_score_evals",))
    evaluations = mcmc.get_extra_fields()["num_score_evals"].sum() / count
    return mcmc.get_samples(group_by_chain=True)["x"][:, -1], float(evaluations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--fast", action="store_true", help="few draws by short walks")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    count, levels, steps, moves = (200, 16, 4, 5) if options.fast else (options.draws, 100, 10, 20)
    methods = {
        "reverse, summed scores": partial(reverse, num_steps=levels),
        "annealed, unadjusted": partial(annealed, metropolis=False, num_levels=levels, steps=steps),
        "annealed, adjusted": partial(annealed, metropolis=True, num_levels=levels, steps=steps),
        "annealed, adjusted, 5 x steps": partial(annealed, metropolis=True, num_levels=levels, steps=5 * steps),
        "DiffusionPCN, bar as a factor": partial(pcn, num_moves=moves),
    }
    rows = []
    print(f"{'method':30} {'mean log target':>20} {'(0, .5)':>8} {'(0, -.5)':>8} {'evaluations':>11}")
    for name, method in methods.items():
        x, evaluations = method(jax.random.key(0), count)
        x = np.asarray(x, np.float64)
        values = log_target(x)
        at_modes = (np.linalg.norm(x[:, None] - MODES, axis=-1) < 5 * DEVIATION).mean(0)
        row = {
            "method": name,
            "mean_log_target": values.mean(),
            "standard_error": values.std() / math.sqrt(count),
            "median_log_target": float(np.median(values)),
            "at_modes": at_modes.tolist(),
            "evaluations": evaluations,
        }
        rows.append(row)
        print(f"{name:30} {values.mean():13.3f} ± {row['standard_error']:.3f} {at_modes[0]:8.3f} {at_modes[1]:8.3f} "
              f"{evaluations:11.0f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
