"""Which of two diffusion priors do the data speak for? A Bayes factor with its error, beside the exact one.

Two priors for a point in the plane: a ring of eight lumps and a bar of eight lumps. The point is seen with noise at one
place after another, from the middle to outside of both. `TemperedSMC` gives the evidence of each prior, with a standard
error over islands, from the denoiser alone; since the priors are Gaussian mixtures, the truth is known:

    log p(y | prior) = log sum_k N(y; mu_k, (s^2 + noise^2) I) / 8

    python examples/bayes_factor.py          # half a minute
    python examples/bayes_factor.py --fast   # few particles, three places: to test the installation

Writes examples/output/bayes_factor.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import TemperedSMC
from numpyro_diffusion.noise import VE

OUTPUT = Path(__file__).parent / "output"
SPREAD, NOISE = 0.4, 0.8
ANGLES = 2.0 * np.pi * np.arange(8) / 8
MEANS = {
    "ring": 3.0 * np.column_stack([np.cos(ANGLES), np.sin(ANGLES)]),
    "bar": np.column_stack([np.linspace(-3.5, 3.5, 8), np.zeros(8)]),
}
DIRECTION = np.array([np.cos(np.pi / 3.0), np.sin(np.pi / 3.0)])
"""Along which the observation moves out; no lump of the ring is on it."""


def model(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def prior_of(name: str) -> DiffusionPrior:
    """Nothing but a denoiser: the sampler asks it for no density."""
    return DiffusionPrior(GaussianMixture(np.full(8, 1 / 8), MEANS[name], SPREAD**2, VE(0.01, 20.0)), density="none")


def true_log_evidence(name: str, y: np.ndarray) -> float:
    log_terms = dist.Normal(MEANS[name], np.hypot(SPREAD, NOISE)).log_prob(y).sum(-1)
    return float(jax.nn.logsumexp(log_terms) - np.log(8))


def draw_picture(path: Path, priors: dict[str, DiffusionPrior], table: np.ndarray) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for name, color in (("ring", "tab:blue"), ("bar", "tab:orange")):
        x = np.asarray(priors[name].sample(jax.random.key(9), (400,)))
        left.scatter(*x.T, s=4, alpha=0.5, color=color, label=f"draws of the {name}")
    left.plot(*np.outer(DIRECTION, table[:, 0]), "kx", label="observations")
    left.set(aspect="equal", title="two priors", xlabel="$x_1$", ylabel="$x_2$")
    left.legend(loc="upper left", fontsize=8)

    radii = np.linspace(table[0, 0], table[-1, 0], 200)
    truth = [true_log_evidence("ring", r * DIRECTION) - true_log_evidence("bar", r * DIRECTION) for r in radii]
    right.axhline(0.0, color="lightgrey")
    right.plot(radii, truth, color="k", linewidth=1, label="exact")
    right.errorbar(table[:, 0], table[:, 1], 2.0 * table[:, 2], fmt="o", color="tab:red", label="TemperedSMC, 2 errors")
    right.set(title="log Bayes factor, ring over bar", xlabel="distance of the observation from the middle")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few particles, three places")
    options = parser.parse_args()
    num_particles, num_places = (400, 3) if options.fast else (4000, 9)

    priors = {name: prior_of(name) for name in MEANS}
    smc = TemperedSMC(model, num_particles, num_islands=20, progress_bar=False)
    rows = []
    print(f"{'distance':>8} {'log Bayes factor':>17} {'error':>6} {'exact':>7} {'errors off':>10}")
    for place, radius in enumerate(np.linspace(0.0, 5.0, num_places)):
        y = radius * DIRECTION
        found = []
        for i, name in enumerate(priors):
            key = jax.random.fold_in(jax.random.key(i), place)
            found.append(smc.run(key, jnp.asarray(y, float), priors[name]).log_evidence)
        factor = float(found[0].value - found[1].value)
        error = float(np.hypot(found[0].standard_error, found[1].standard_error))
        truth = true_log_evidence("ring", y) - true_log_evidence("bar", y)
        rows.append((radius, factor, error, truth))
        print(f"{radius:8.2f} {factor:17.2f} {error:6.2f} {truth:7.2f} {(factor - truth) / error:10.1f}")

    OUTPUT.mkdir(exist_ok=True)
    draw_picture(OUTPUT / ("bayes_factor-fast.png" if options.fast else "bayes_factor.png"), priors, np.array(rows))


if __name__ == "__main__":
    main()
