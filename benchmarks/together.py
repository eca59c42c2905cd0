"""Many chains of NUTS in noise space, adapting together or each for itself, with a diagonal or a dense mass matrix.

    python benchmarks/together.py --json OUT

The posteriors are Gaussian in noise space, with precisions from 1 to a condition number in directions that are not
those of the coordinates. Chains adapt together with chain_method="vectorized" and each for itself with jax.vmap.
Printed are the largest split R-hat in the directions of the precisions, the fewest effective draws there per thousand
gradients of sampling, the mean steps of a tree, and the gradients of warm-up for which all chains wait, each for the
longest.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import NoiseSpace
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

PROBLEMS = (20, 1e4), (100, 1.0)
"""Dimensions and condition number."""


def model(y: jax.Array, prior: DiffusionPrior, matrix: jax.Array) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(matrix @ x, 1.0).to_event(1), obs=y)


def run(size: int, condition: float, chains: int, together: bool, dense: bool, num_samples: int) -> dict:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = np.sqrt(np.geomspace(1.0, condition, size) - 1.0)[:, None] * directions.T
    y = matrix @ rng.normal(size=size) + rng.normal(size=size)
    prior = DiffusionPrior(Gaussian(jnp.zeros(size), 1.0, VE(0.01, 40.0)), flow_solver=DPMSolverPP(6))
    args = jnp.asarray(y, jnp.float32), prior, jnp.asarray(matrix, jnp.float32)
    mcmc = MCMC(
        NoiseSpace(model, dense_mass=dense),
        num_warmup=100,
        num_samples=num_samples,
        num_chains=chains,
        chain_method="vectorized" if together else jax.vmap,
        progress_bar=False,
    )
    mcmc.warmup(jax.random.key(1), *args, collect_warmup=True)
    warmup = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["num_steps"])
    mcmc.run(jax.random.key(2), *args)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["x"]) @ directions
    steps = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["num_steps"])
    return {
        "worst_rhat": float(np.max(split_gelman_rubin(draws))),
        "ess_per_1000_gradients": float(1e3 * np.min(effective_sample_size(draws)) / steps.sum()),
        "steps": float(steps.mean()),
        "warmup_gradients": int(warmup.max(0).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--fast", action="store_true", help="one small problem")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    problems, numbers = (((5, 100.0),), [16]) if options.fast else (PROBLEMS, options.chains)

    rows = []
    print(f"{'d':>4} {'condition':>9} {'chains':>6} {'adapt':>8} {'metric':>8} {'R-hat':>6} {'ESS/1000':>9} "
          f"{'steps':>6} {'warm-up':>8}")  # fmt: skip
    for size, condition in problems:
        for chains in numbers:
            for together in (False, True):
                for dense in (False, True):
                    figures = run(size, condition, chains, together, dense, max(20, 800 // chains))
                    row = {"d": size, "condition": condition, "chains": chains, "together": together, "dense": dense}
                    rows.append({**row, **figures})
                    rhat, ess, steps, warmup = figures.values()
                    names = "together" if together else "alone", "dense" if dense else "diagonal"
                    print(f"{size:4} {condition:9g} {chains:6} {names[0]:>8} {names[1]:>8} {rhat:6.3f} {ess:9.2f} "
                          f"{steps:6.1f} {warmup:8}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
