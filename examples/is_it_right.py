"""Is my posterior right? Chains that agree, and are wrong together: from `verdict` through `SBC` to `bias_report`.

The upper half of a handwritten digit is observed, averaged to 4 x 4 numbers, with noise. Under a Gaussian prior with
mean and covariance of real digits, a guided reverse process draws the rest: draws that are independent, so that R-hat
is one, and biased. Simulation sees it, a short exact correction says by how much, and an exact kernel passes.

    python examples/is_it_right.py          # a minute or two
    python examples/is_it_right.py --fast   # few simulations: to test the installation

Writes examples/output/is_it_right.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_diffusion.data import digits
from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import Calibration, verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, SBC, GuidedReverse, bias_report
from numpyro_diffusion.noise import VE
from numpyro_diffusion.plots import plot_coverage, plot_ecdf_difference
from numpyro_diffusion.solve import DPMSolverPP

OUTPUT = Path(__file__).parent / "output"
NOISE = 1.0


def blocks(images: jax.Array) -> np.ndarray:
    """Digits (n, 8, 8) as means over 2 x 2 pixels, (n, 16)."""
    return np.asarray(images).reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)


def prior_of(x: np.ndarray) -> DiffusionPrior:
    """The Gaussian with the mean and the covariance of the examples."""
    law = Gaussian(x.mean(0), np.cov(x.T) + 0.1 * np.eye(16), VE(0.05, 60.0))
    return DiffusionPrior(law, sampler=DPMSolverPP(24, eta=1.0))


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[:8], NOISE).to_event(1), obs=y)


def look(
    kernel: Callable,
    y: jax.Array,
    prior: DiffusionPrior,
    num_simulations: int,
    num_draws: int,
    num_warmup: int,
    num_samples: int,
) -> Calibration:
    """All that can be asked of one sampler."""
    options = {"num_warmup": num_draws, "num_samples": num_draws, "num_chains": 4, "chain_method": "vectorized"}
    mcmc = MCMC(kernel(model), **options, progress_bar=False)
    mcmc.run(jax.random.key(0), y, prior)
    print(f"\n{kernel.__name__}\nverdict: {verdict(mcmc)}")
    print(f"bias_report: {bias_report(jax.random.key(1), mcmc)}")
    sizes = {"num_simulations": num_simulations, "num_warmup": num_warmup, "num_samples": num_samples}
    found = SBC(kernel, model, **sizes).run(jax.random.key(2), None, prior)
    print(f"SBC: {found}")
    share, error = (np.mean(part) for part in found.coverage(0.9)["x"])
    print(f"90 % intervals hold {share:.1%} of the truths")
    return found


def draw(found: dict[str, Calibration], path: Path) -> Any:
    """The ranks of pixels and of the log-likelihood, and coverage, a row for each sampler."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(found), 3, figsize=(10.5, 3.0 * len(found)), layout="constrained", squeeze=False)
    for row, (name, result) in zip(axes, found.items(), strict=True):
        plot_ecdf_difference(result.levels["x"], label="16 pixels", ax=row[0])
        plot_ecdf_difference(result.levels["log_likelihood"], label="log-likelihood", ax=row[1])
        plot_coverage(result.levels["x"], label="16 pixels", ax=row[2])
        row[0].set_title(name)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=72)
    print(f"\nwrote {path}")
    return axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few simulations")
    parser.add_argument("--png", type=Path, default=OUTPUT / "is_it_right.png", help="where to write the figure")
    options = parser.parse_args()

    images, held_out = digits(jax.random.key(0))
    prior = prior_of(blocks(images))
    truth = blocks(held_out)[0]
    y = jnp.asarray(truth[:8] + NOISE * np.random.default_rng(0).normal(size=8), jnp.float32)
    kernels = {GuidedReverse: (1000, 100), MALA: (5000, 800)}  # draws of a chain, of the run and of a simulation
    found = {}
    for kernel, (num_draws, num_samples) in kernels.items():
        sizes = (40, 100, 50, 50) if options.fast else (400, num_draws, 500, num_samples)
        found[kernel.__name__] = look(kernel, y, prior, *sizes)
    draw(found, options.png)


if __name__ == "__main__":
    main()
