"""Does unadjusted Langevin scale better than adjusted? Bias and efficiency over dimension and step size.

    python benchmarks/langevin_bias.py --json OUT --plot docs/concepts/langevin_bias.png

The target is a Gaussian diffusion prior in 2 to 512 dimensions with standard deviations between 1/2 and 1, in equal
proportion, and its exact score. `ULA`, `MALA` and `ScoreHMC` (8 leapfrog steps) start at exact draws and make the same
number of gradient evaluations, without a preconditioner. For each step size, in units of the smallest variance:

    bias        mean over dimensions of variance / truth - 1
    ESS         effective draws of the mean per gradient evaluation, the smallest over dimensions
    error       root mean square over dimensions of the relative error of one chain's variances: bias and noise
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, ScoreHMC
from numpyro_diffusion.noise import VE

DIMENSIONS = (2, 8, 32, 128, 512)
STEPS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LEAPFROGS = 8
SMALLEST = 0.25  # variance


def model(prior: DiffusionPrior) -> None:
    numpyro.sample("x", prior)


def unadjusted(step: float) -> MCMCKernel:
    return ULA(model, step_size=step * SMALLEST, adapt_mass_matrix=False)


def adjusted(step: float) -> MCMCKernel:
    return MALA(model, step_size=step * SMALLEST, target_accept_prob=None, adapt_mass_matrix=False)


def hamiltonian(step: float) -> MCMCKernel:
    """A leapfrog step of the same length as the mean move of a Langevin step: epsilon^2 = 2 h."""
    step_size = float(np.sqrt(2.0 * step * SMALLEST))
    options = {"target_accept_prob": None, "adapt_mass_matrix": False}
    return ScoreHMC(model, num_steps=LEAPFROGS, step_size=step_size, **options)


KERNELS = {"ULA": (unadjusted, 1), "MALA": (adjusted, 1), "ScoreHMC": (hamiltonian, LEAPFROGS)}


def measure(make: Callable, cost: int, step: float, dimension: int, chains: int, evaluations: int) -> dict[str, float]:
    variances = jnp.where(jnp.arange(dimension) % 2 == 0, 1.0, SMALLEST)
    prior = DiffusionPrior(Gaussian(jnp.zeros(dimension), variances, VE(1e-3, 50.0)), density="none")
    num_draws = evaluations // cost
    sizes = {"num_warmup": 0, "num_samples": num_draws, "num_chains": chains}
    mcmc = MCMC(make(step), **sizes, chain_method="vectorized", progress_bar=False)
    start = jnp.sqrt(variances) * jax.random.normal(jax.random.key(1), (chains, dimension))
    mcmc.run(jax.random.key(0), prior, init_params={"x": start})
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"], np.float64)
    accept_prob = float(mcmc.get_extra_fields().get("accept_prob", jnp.ones(1)).mean())
    ratios = (x**2).mean(1) / np.asarray(variances)  # (chains, dimension); the mean is known
    stable = bool(np.isfinite(ratios).all()) and float(ratios.max()) < 1e3
    ess = effective_sample_size(x) if stable else np.zeros(1)
    ess = np.where((ess > 0) & (ess < chains * num_draws), ess, chains * num_draws).min()  # antithetic chains have more
    return {
        "bias": float(ratios.mean() - 1.0) if stable else float("inf"),
        "ess_per_evaluation": float(ess) / (chains * evaluations) if stable and accept_prob > 0.01 else 0.0,
        "error": float(np.sqrt(((ratios - 1.0) ** 2).mean())) if stable else float("inf"),
        "accept_prob": accept_prob,
    }


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    dimensions = sorted({row["dimension"] for row in rows})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, style in zip(KERNELS, ("o-", "s-", "^-"), strict=True):
        best = [min((r for r in rows if r["kernel"] == name and r["dimension"] == d), key=lambda r: r["error"])
                for d in dimensions]  # fmt: skip
        axes[0].plot(dimensions, [row["error"] for row in best], style, label=name)
        axes[1].plot(dimensions, [row["step"] for row in best], style, label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="dimension", ylabel="relative error of a variance",
                title="best step, equal gradient evaluations")  # fmt: skip
    axes[1].set(xscale="log", yscale="log", xlabel="dimension", ylabel="step / smallest variance", title="that step")
    axes[0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=4000, help="gradient evaluations of each chain")
    parser.add_argument("--fast", action="store_true", help="two dimensions, two steps")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--plot", type=Path, help="where to draw the figure")
    options = parser.parse_args()
    dimensions, steps = ((2, 8), (0.1, 0.5)) if options.fast else (DIMENSIONS, STEPS)
    evaluations = 200 if options.fast else options.evaluations

    rows = []
    print(f"{'kernel':9} {'dimension':>9} {'step':>6} {'accept':>7} {'bias':>8} {'ESS':>9} {'error':>8}")
    for name, (make, cost) in KERNELS.items():
        for dimension in dimensions:
            for step in steps:
                row = {"kernel": name, "dimension": dimension, "step": step}
                row |= measure(make, cost, step, dimension, options.chains, evaluations)
                rows.append(row)
                print("{kernel:9} {dimension:9} {step:6.2f} {accept_prob:7.3f} {bias:8.4f} {ess_per_evaluation:9.5f} "
                      "{error:8.4f}".format(**row), flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
