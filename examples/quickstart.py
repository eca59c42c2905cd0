"""Half a handwritten digit, an unknown noise level, and a learned prior.

Trains a diffusion prior on real 8x8 digits (or loads the one it trained before), hides the lower half of a digit that
it has never seen, adds noise of a standard deviation that the model must infer too, and samples the posterior by a
population of Hamiltonian chains, which ends with a verdict: converged, or not and why.

    python examples/quickstart.py          # trains and samples; a second time it loads what it trained
    python examples/quickstart.py --fast   # a few seconds of training, few walkers: to test the installation

Writes examples/output/quickstart.png.
"""

import argparse
import time
import warnings
from pathlib import Path

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx

from numpyro_diffusion import checkpoint
from numpyro_diffusion.data import digits
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.diagnostics import to_arviz, verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import PopulationHMC
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP
from numpyro_diffusion.train import fit

OUTPUT = Path(__file__).parent / "output"
ROWS = 4
"""Rows of the digit that are observed, from the top."""


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    numpyro.sample("y", dist.Normal(x[:ROWS], noise).to_event(2), obs=y)


def stem_of(fast: bool, seed: int = 0) -> str:
    """What files of a run are called."""
    return "quickstart" + ("-fast" if fast else "") + (f"-{seed}" if seed else "")


def trained(images: jax.Array, fast: bool = False, seed: int = 0) -> NetworkDenoiser:
    """Loads the denoiser of an earlier run, or trains it and saves it; the fast form is small and knows little."""
    path = OUTPUT / f"{stem_of(fast, seed)}.safetensors"
    if path.exists():
        print(f"loading {path}")
        return checkpoint.load(path)
    size, num_steps = ({"features": 32, "num_blocks": 1}, 200) if fast else ({"features": 128, "num_blocks": 3}, 3000)
    backbone = MLP((8, 8), **size, rngs=nnx.Rngs(seed))
    # in units of the standard deviation: dequantisation is noise of 0.05, the widest direction is 3
    key = jax.random.key(seed)
    result = fit(key, backbone, images, schedule=VE(0.02, 20.0), num_steps=num_steps, batch_size=128)
    path.parent.mkdir(exist_ok=True)
    if not result.interrupted:
        checkpoint.save(path, result.denoiser)
    return result.denoiser


def sample(key: jax.Array, y: jax.Array, prior: DiffusionPrior, fast: bool) -> PopulationHMC:
    """Samples pixels and noise level jointly; prints the table of the noise level and the verdict."""
    population = PopulationHMC(model, 16, 4, max_gradients=1) if fast else PopulationHMC(model, max_gradients=2_500_000)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict says the same, in order
        population.run(key, y, prior)
    print(f"\n{population.num_gradients} gradients in {time.perf_counter() - started:.0f} s with compilation")
    print(az.summary(to_arviz(population), var_names=["noise"]).to_string())
    print("\n".join(map(str, population.rounds)))
    print(verdict(population))
    return population


def draw_picture(path: Path, truth: jax.Array, y: jax.Array, draws: np.ndarray) -> None:
    import matplotlib.pyplot as plt

    observed = np.full((8, 8), np.nan)
    observed[:ROWS] = y
    grey = {"cmap": "gray_r", "vmin": 0, "vmax": 16}
    panels = [
        ("truth", truth, grey),
        ("observed (blue: not)", observed, grey),
        ("posterior mean", draws.mean(0), grey),
        ("posterior sd", draws.std(0), {"cmap": "viridis", "vmin": 0}),
    ]
    panels += [(f"draw {i + 1}", draws[k], grey) for i, k in enumerate(np.linspace(0, len(draws) - 1, 4, dtype=int))]
    figure, axes = plt.subplots(2, 4, figsize=(9, 5), layout="constrained")
    for axis, (title, image, style) in zip(axes.flat, panels, strict=True):
        axis.set_facecolor("lightsteelblue")
        shown = axis.imshow(image, **style)
        axis.set(title=title, xticks=[], yticks=[])
        if title in ("truth", "posterior sd"):
            figure.colorbar(shown, ax=axis, shrink=0.8, label="grey value" if title == "truth" else "grey values")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little training and few walkers")
    parser.add_argument("--digit", type=int, default=0, help="which held-out digit")
    parser.add_argument("--seed", type=int, default=1, help="random key of the sampler")
    parser.add_argument("--training-seed", type=int, default=0, help="random key and initial weights of the prior")
    options = parser.parse_args()
    started = time.perf_counter()

    images, held_out = digits(jax.random.key(42))
    denoiser = trained(images, options.fast, options.training_seed)
    prior = DiffusionPrior(denoiser, flow_solver=DPMSolverPP(10))
    print(f"prior ready after {time.perf_counter() - started:.0f} s")

    truth = held_out[options.digit]
    y = truth[:ROWS] + 1.0 * jax.random.normal(jax.random.key(3), (ROWS, 8))
    population = sample(jax.random.key(options.seed), y, prior, options.fast)
    draw_picture(
        OUTPUT / f"{stem_of(options.fast, options.training_seed)}.png",
        truth,
        y,
        np.asarray(population.get_samples()["x"]),
    )
    print(f"\n{time.perf_counter() - started:.0f} s in all; the true noise is 1.0")


if __name__ == "__main__":
    main()
