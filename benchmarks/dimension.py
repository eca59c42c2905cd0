"""What a draw costs as the dimension grows and the data do not: moves that keep N(0, I) beside NUTS, in noise space.

    python benchmarks/dimension.py --json OUT

The prior is a Gaussian field on [0, 1] by d coefficients, f(s) = sum_k x_k sqrt(2) sin(pi k s) / (pi k) with
x ~ N(0, I), the Brownian bridge as d grows, and four values of it are seen with noise of standard deviation .2. Printed
are the mean acceptance (of elliptical slices one over the points tried) and the effective draws, the fewest of the four
values', per evaluation of the model with its gradient, or without it where the method needs none. Last comes how much
each differs over the dimensions, largest over smallest.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import CrankNicolson, EllipticalSlice, NoiseSpace
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

PLACES = np.array([0.15, 0.4, 0.6, 0.9])
Y = jnp.array([0.6, -0.3, 0.2, 0.5])
METHODS: dict[str, Callable[..., MCMCKernel]] = {
    "NUTS": NoiseSpace,
    "EllipticalSlice": partial(NoiseSpace, inner=EllipticalSlice),
    "CrankNicolson": partial(NoiseSpace, inner=CrankNicolson),
    "CrankNicolson, gradient=False": partial(NoiseSpace, inner=CrankNicolson, gradient=False),
}


def field(y: jax.Array, prior: DiffusionPrior, values_of: jax.Array) -> None:
    x = numpyro.sample("x", prior)
    values = numpyro.deterministic("values", values_of @ x)
    numpyro.sample("y", dist.Normal(values, 0.2).to_event(1), obs=y)


def run(make: Callable[..., MCMCKernel], size: int, chains: int, num_samples: int) -> dict[str, float]:
    order = np.pi * np.arange(1, size + 1)
    values_of = jnp.asarray(np.sqrt(2.0) / order * np.sin(np.outer(PLACES, order)), jnp.float32)
    prior = DiffusionPrior(Gaussian(jnp.zeros(size), 1.0, VE(0.01, 40.0)), flow_solver=DPMSolverPP(6))
    mcmc = MCMC(
        make(field),
        num_warmup=300,
        num_samples=num_samples,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
        postprocess_fn=lambda z: {"values": z["values"]},
    )
    mcmc.run(jax.random.key(0), Y, prior, values_of)
    fields = mcmc.get_extra_fields()
    effective = effective_sample_size(np.asarray(mcmc.get_samples(group_by_chain=True)["values"])).min()
    return {
        "acceptance": float(np.mean(fields["accept_prob"])),
        "ess_per_evaluation": float(effective / np.sum(fields["num_steps"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--fast", action="store_true", help="few draws of two sizes")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    sizes, chains, num_samples = ([8, 64], 4, 50) if options.fast else (options.sizes, 16, 1000)

    rows = []
    print(f"{'d':>5} {'method':30} {'acceptance':>10} {'ess_per_evaluation':>18}")
    for name, make in METHODS.items():
        for size in sizes:
            row = {"d": size, "method": name, **run(make, size, chains, num_samples)}
            rows.append(row)
            print(f"{size:5} {name:30} {row['acceptance']:10.3f} {row['ess_per_evaluation']:18.4f}", flush=True)
    for name in METHODS:
        spread = {
            key: max(values) / min(values)
            for key in ("acceptance", "ess_per_evaluation")
            for values in [[row[key] for row in rows if row["method"] == name]]
        }
        print(f"  all {name:30} {spread['acceptance']:10.2f} {spread['ess_per_evaluation']:18.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
