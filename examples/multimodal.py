"""Which measurements matter? An ordinary model with some thirty modes: where chains of NUTS stay, a population weighs.

Progress of diabetes on ten measurements (442 patients, data of scikit-learn), all in standard deviations. A slope is
nothing to speak of, Normal(0, 0.005), or something, Normal(0, 0.5), with even odds: a spike and a slab. Blood values
stand in for each other, so there is a mode for each set of slopes that will do. The truth is a sum: given the set of
slopes that matter, one of 1024, and the noise, on a grid, all is normal. The model has no diffusion prior.

Four chains of NUTS end at R-hat 1.23, with probabilities off by .11; `PopulationHMC` converges and is off by .022. Not
all that is made for modes gets there: `ParallelTempering` by NUTS at ten temperatures (4 x 1000 draws) had R-hat 1.24
and 13 round trips, `LearnedMCMC` with 200 chains had R-hat 1.40. Their verdicts said so (tried once; the script does
not run them).

    python examples/multimodal.py          # a minute
    python examples/multimodal.py --fast   # few draws: to test the installation

Writes examples/output/multimodal.png.
"""

import argparse
import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_sample
from scipy.stats import norm
from sklearn.datasets import load_diabetes

from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import PopulationHMC

OUTPUT = Path(__file__).parent / "output"
SPIKE, SLAB = 0.005, 0.5
NOISES = np.linspace(0.6, 0.85, 26)
"""All levels that have mass, with these data."""
NAMES = "age|sex|body mass|blood pressure|cholesterol|LDL|HDL|cholesterol / HDL|triglycerides|glucose".split("|")


def patients() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def told_by(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """All that the data say, for speed: with X = QR, the numbers Q'y ~ N(R slope, noise) and the squares left over."""
    turn, root = np.linalg.qr(x)
    return root.astype(np.float32), (turn.T @ y).astype(np.float32), float(y @ y - np.sum((turn.T @ y) ** 2))


def model(root: jax.Array, turned: jax.Array, left: float, count: int = 442) -> None:
    spike_or_slab = dist.Normal(0.0, jnp.array([SPIKE, SLAB]))
    with numpyro.plate("measurement", len(turned)):
        slope = numpyro.sample("slope", dist.MixtureSameFamily(dist.Categorical(probs=jnp.full(2, 0.5)), spike_or_slab))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(root @ slope, noise).to_event(1), obs=turned)
    numpyro.sample("left", dist.Gamma(0.5 * (count - len(turned)), 0.5 / noise**2), obs=left)


def truth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Probability of each slope to be in the slab, by the sum over all sets."""
    sets = np.array(list(itertools.product([0, 1], repeat=x.shape[1])))
    variances, log_weights = np.where(sets, SLAB, SPIKE) ** 2, []
    for noise in NOISES:
        precision = x.T @ x / noise**2 + np.eye(x.shape[1]) / variances[:, None, :]
        data = x.T @ y / noise**2
        terms = (np.linalg.inv(precision) @ data) @ data - np.linalg.slogdet(precision)[1] - np.log(variances).sum(1)
        log_weights.append(0.5 * (terms - y @ y / noise**2 - noise**2) - len(y) * np.log(noise))
    weights = np.exp(np.array(log_weights) - np.max(log_weights))
    return weights.sum(0) @ sets / weights.sum()


def matters(slope: np.ndarray) -> np.ndarray:
    """Probability to be in the slab, given the slope."""
    slab, spike = norm.pdf(slope, 0.0, SLAB), norm.pdf(slope, 0.0, SPIKE)
    return slab / (slab + spike)


def sample(seed: int, data: tuple, num: int, num_walkers: int, budget: int) -> dict[str, MCMC | PopulationHMC]:
    kernel = NUTS(model, init_strategy=init_to_sample)
    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=num, num_samples=num, **options)
    mcmc.run(jax.random.key(seed), *data)
    population = PopulationHMC(model, num_walkers, max_gradients=budget, progress_bar=False)
    return {"NUTS": mcmc, "PopulationHMC": population.run(jax.random.key(seed), *data)}


def draw_picture(path: Path, exact: np.ndarray, slopes: dict[str, np.ndarray]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, *others) = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained")
    place = np.arange(len(NAMES))
    left.barh(place, exact, color="0.85", label="exact")
    for (name, slope), color, axis, up in zip(slopes.items(), ("#D55E00", "#0072B2"), others, (-0.2, 0.2), strict=True):
        shares = matters(slope).mean(1) if name == "NUTS" else matters(slope).mean((0, 1))[None]
        for i, share in enumerate(shares):
            label = f"{name}, {len(shares)} chains" if name == "NUTS" else name
            left.plot(share, place + up, "o", ms=4.5, color=color, label=None if i else label)
        axis.plot(*slope.reshape(-1, 10)[:: max(1, slope[..., 0].size // 4000), 4:6].T, ".", ms=2, color=color)
        axis.set(title=f"draws of {name}", xlabel=f"slope of {NAMES[4]}", ylabel=f"slope of {NAMES[5]}")
        axis.set(xlim=(-1.0, 0.6), ylim=(-0.6, 0.8))
    left.set(yticks=place, yticklabels=NAMES, xlabel="probability that it matters")
    left.invert_yaxis()
    figure.legend(fontsize=9, loc="outside lower left", ncols=3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few draws")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    exact = truth(*patients())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict says the same, in order
        runs = sample(options.seed, told_by(*patients()), *((20, 32, 1) if options.fast else (1000, 512, 60_000_000)))
    slopes = {name: np.asarray(run.get_samples(group_by_chain=True)["slope"]) for name, run in runs.items()}
    for name, run in runs.items():
        off = matters(slopes[name]).mean((0, 1)) - exact
        print(f"\n{name}: probabilities off by {np.abs(off).max():.3f} at most\n{verdict(run)}")
    draw_picture(OUTPUT / ("multimodal-fast.png" if options.fast else "multimodal.png"), exact, slopes)


if __name__ == "__main__":
    main()
