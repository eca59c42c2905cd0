"""Half a handwritten digit, an unknown noise level, and a learned prior.

Trains a diffusion prior on real 8x8 digits (or loads the one it trained before), hides the lower half of a digit that
it has never seen, adds noise of a standard deviation that the model must infer too, and samples the posterior with
`numpyro.infer.MCMC`: in noise space by NUTS and, for comparison, by DiffusionGibbs.

    python examples/quickstart.py          # trains and samples; a second time it loads what it trained
    python examples/quickstart.py --fast   # a few seconds of training, short chains: to test the installation

Writes examples/output/quickstart.png.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.infer import MCMC

from numpyro_diffusion import checkpoint
from numpyro_diffusion.data import digits
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionGibbs, DiffusionPCN, NoiseSpace
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Heun
from numpyro_diffusion.train import fit

OUTPUT = Path(__file__).parent / "output"
ROWS = 4
"""Rows of the digit that are observed, from the top."""


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(x[:ROWS], noise).to_event(2), obs=y)


def trained(images: jax.Array, num_steps: int, path: Path) -> NetworkDenoiser:
    """Loads the denoiser at `path`, or trains it and saves it there."""
    if path.exists():
        print(f"loading {path}")
        return checkpoint.load(path)
    backbone = MLP((8, 8), features=128, num_blocks=3, rngs=nnx.Rngs(0))
    # in units of the standard deviation: dequantisation is noise of 0.05, the widest direction is 3
    result = fit(jax.random.key(0), backbone, images, schedule=VE(0.02, 20.0), num_steps=num_steps, batch_size=128)
    path.parent.mkdir(exist_ok=True)
    if not result.interrupted:
        checkpoint.save(path, result.denoiser)
    return result.denoiser


def run(name: str, kernel, num_draws: int, num_warmup: int, y: jax.Array, prior: DiffusionPrior) -> MCMC:
    """Four chains; prints the table of the noise level and the worst pixel, and what they cost."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws,
        num_chains=4,
        chain_method="vectorized",
        jit_model_args=True,
    )
    started = time.perf_counter()
    mcmc.run(jax.random.key(1), y, prior, extra_fields=("accept_prob", "num_score_evals"))
    jax.block_until_ready(mcmc.get_samples())
    seconds = time.perf_counter() - started

    idata = to_arviz(mcmc)
    table = az.summary(idata, kind="diagnostics", round_to="none").astype(float)
    worst, least = table["r_hat"].max(), table["ess_bulk"].min()
    print(
        f"\n{name}: {seconds:.0f} s with compilation, worst R-hat {worst:.3f}, smallest bulk ESS {least:.0f}, "
        f"{least / seconds:.1f} ESS per second"
    )
    pixels = table.drop("noise")
    print(az.summary(idata, var_names=["noise"]).to_string())
    print(pixels.loc[[pixels["r_hat"].idxmax(), pixels["ess_bulk"].idxmin()]].round(3).to_string())
    return mcmc


def draw_picture(path: Path, truth: jax.Array, y: jax.Array, draws: np.ndarray) -> None:
    import matplotlib.pyplot as plt

    observed = np.full((8, 8), np.nan)
    observed[:ROWS] = y
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 16}
    panels = [
        ("truth", truth, grey),
        ("observation", observed, grey),
        ("posterior mean", draws.mean(0), grey),
        ("posterior sd", draws.std(0), {"cmap": "viridis", "vmin": 0}),
    ]
    panels += [(f"draw {i + 1}", draws[k], grey) for i, k in enumerate(np.linspace(0, len(draws) - 1, 4, dtype=int))]
    figure, axes = plt.subplots(2, 4, figsize=(9, 5), layout="constrained")
    for axis, (title, image, style) in zip(axes.flat, panels, strict=True):
        axis.set_facecolor("lightsteelblue")
        shown = axis.imshow(image, **style)
        axis.set(title=title, xticks=[], yticks=[])
        if title == "posterior sd":
            figure.colorbar(shown, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little training and short chains")
    parser.add_argument("--digit", type=int, default=0, help="which held-out digit")
    options = parser.parse_args()
    started = time.perf_counter()

    images, held_out = digits(jax.random.key(42))
    stem = "quickstart-fast" if options.fast else "quickstart"
    denoiser = trained(images, 200 if options.fast else 3000, OUTPUT / f"{stem}.safetensors")
    prior = DiffusionPrior(denoiser, flow_solver=Heun(8))
    print(f"prior ready after {time.perf_counter() - started:.0f} s")

    truth = held_out[options.digit]
    y = truth[:ROWS] + 1.0 * jax.random.normal(jax.random.key(3), (ROWS, 8))
    num_warmup, num_draws = (10, 10) if options.fast else (200, 350)
    mcmc = run("NoiseSpace (NUTS)", NoiseSpace(model, max_tree_depth=5), num_draws, num_warmup, y, prior)
    draw_picture(OUTPUT / f"{stem}.png", truth, y, np.asarray(mcmc.get_samples()["x"]))
    gibbs = DiffusionGibbs(model, x_kernel=partial(DiffusionPCN, num_proposals=8))
    run("DiffusionGibbs (PCN, NUTS)", gibbs, num_draws // 2, num_warmup // 2, y, prior)
    print(f"\n{time.perf_counter() - started:.0f} s in all; the true noise is 1.0")


if __name__ == "__main__":
    main()
