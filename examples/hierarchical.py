"""Three digits by one camera: a plate of images under a learned prior, with one noise level that they share.

    noise ~ HalfNormal(4),   x_i ~ prior,   y_i = upper half of x_i + noise,   i = 1, 2, 3

A `numpyro.plate` is all that it takes. `PopulationHMC` moves the noise behind all three images together, and says that
it has converged. Beside it stands each image alone: the noise level is 1.88 +- .30, 2.47 +- .38 and 2.37 +- .42 then,
and 2.18 +- .19 from all three, where the truth is 2.

    python examples/hierarchical.py          # some minutes
    python examples/hierarchical.py --fast   # little training, few walkers: to test the installation

Writes examples/output/hierarchical.png.
"""

import argparse
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from quickstart import ROWS, trained

from numpyro_diffusion import DiffusionPrior
from numpyro_diffusion.data import digits
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import PopulationHMC
from numpyro_diffusion.solve import DPMSolverPP

OUTPUT = Path(__file__).parent / "output"
NUM_IMAGES, NOISE = 3, 2.0
"""Of the plate, and of the camera, in grey values."""


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    noise = numpyro.sample("noise", dist.HalfNormal(4.0))
    with numpyro.plate("image", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x[..., :ROWS, :], noise).to_event(2), obs=y)


def sample(seed: int, y: jax.Array, prior: DiffusionPrior, **options: int) -> PopulationHMC:
    """Noise level and images (images, 8, 8), given their upper rows `y` (images, 4, 8); prints what came of it."""
    population, started = PopulationHMC(model, **options, progress_bar=False), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict says the same
        population.run(jax.random.key(seed), y, prior)
    noise = population.get_samples()["noise"]
    print(
        f"noise {noise.mean():.2f} +- {noise.std():.2f}, {time.perf_counter() - started:.0f} s\n{verdict(population)}\n"
    )
    return population


def draw_picture(path: Path, truth: np.ndarray, y: np.ndarray, together: dict, alone: list[np.ndarray]) -> None:
    import matplotlib.pyplot as plt

    names = ["truth", "seen", "mean", "sd"]
    layout = [[f"{name} {i}" for name in names] + ["noise", "noise"] for i in range(len(y))]
    figure, axes = plt.subplot_mosaic(layout, figsize=(11, 2 * len(y)), layout="constrained")
    seen = np.full(truth.shape, np.nan)
    seen[:, :ROWS] = y
    shown = (truth, seen, together["x"].mean(0), together["x"].std(0))
    for name, images in zip(names, shown, strict=True):
        style = {"cmap": "viridis", "vmin": 0, "vmax": 6} if name == "sd" else {"cmap": "gray_r", "vmin": 0, "vmax": 16}
        for i, image in enumerate(images):
            axis = axes[f"{name} {i}"]
            axis.set_facecolor("lightsteelblue")
            drawn = axis.imshow(image, **style)
            axis.set(title=f"posterior {name}" if name in ("mean", "sd") else name, xticks=[], yticks=[])
    figure.colorbar(drawn, ax=[axes[f"sd {i}"] for i in range(len(y))], shrink=0.6, label="grey values")
    bins, axis = np.linspace(0.8, 4.2, 60), axes["noise"]
    for i, draws in enumerate(alone):
        style = {"histtype": "step", "linewidth": 1.5, "linestyle": ("--", ":", "-.")[i]}
        axis.hist(draws, bins, density=True, label=f"image {i + 1} alone", **style)
    axis.hist(together["noise"], bins, density=True, color="#0072B2", alpha=0.6, label="all three")
    axis.axvline(NOISE, color="k", linewidth=1.0, label="truth")
    axis.set(xlabel="noise level (grey values)", ylabel="posterior density")
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="little training, few walkers, no image alone")
    parser.add_argument("--first", type=int, default=0, help="which held-out digits: this one and the next two")
    parser.add_argument("--seed", type=int, default=1, help="random key of the sampler")
    options = parser.parse_args()
    images, held_out = digits(jax.random.key(42))
    prior = DiffusionPrior(trained(images, options.fast), flow_solver=DPMSolverPP(4 if options.fast else 10))
    truth = np.asarray(held_out[options.first : options.first + NUM_IMAGES])
    y = truth[:, :ROWS] + NOISE * jax.random.normal(jax.random.key(3), (NUM_IMAGES, ROWS, 8))

    few = {"num_walkers": 16, "num_draws": 2, "max_moves": 4, "max_gradients": 1}
    sizes = few if options.fast else {"max_gradients": 3_000_000}
    print("all three")
    together = sample(options.seed, y, prior, **sizes).get_samples()
    alone = []
    for i in range(0 if options.fast else NUM_IMAGES):
        print(f"image {i + 1} alone")
        alone.append(np.asarray(sample(options.seed, y[i : i + 1], prior, **sizes).get_samples()["noise"]))
    path = OUTPUT / ("hierarchical-fast.png" if options.fast else "hierarchical.png")
    draw_picture(path, truth, np.asarray(y), {name: np.asarray(v) for name, v in together.items()}, alone)


if __name__ == "__main__":
    main()
