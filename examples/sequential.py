"""The posterior of one study as the prior of the next, on the diabetes data that scikit-learn ships (442 patients).

1. Regression of the disease's progress on ten measurements. The posterior of the first half of the patients is learned,
   and is the prior for the second half: the result is to be the posterior of all patients.
2. A common factor behind five of the measurements. Without an outcome its sign is free: the posterior of the first
   study has two modes. A small second study also has the outcome, which rises with the factor: one mode is left.

Beside the learned prior stands the multivariate normal with the mean and covariance of the same draws, in the same
unconstrained coordinates: right for the first, where the posterior is nearly normal, wrong for the second. The
populations that sample the second are short, and say that they have not converged.

    python examples/sequential.py          # some minutes
    python examples/sequential.py --fast   # the first, with little training and few draws: to test the installation

Writes examples/output/sequential.png.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import load_diabetes

from numpyro_diffusion import DiffusionPrior, prior_from_samples
from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import NoiseSpace, PopulationHMC
from numpyro_diffusion.learned import LearnedPrior

OUTPUT = Path(__file__).parent / "output"
NUM_DRAWS, NUM_STEPS = 6000, 3000
"""Of each posterior, and of training."""
GRADIENTS_PER_DRAW = 70
"""At most, of the population."""
SECOND_STUDY = 40
"""Patients whose outcome the second factor study has."""
Draws = dict[str, np.ndarray]


def patients() -> tuple[np.ndarray, np.ndarray]:
    """Measurements (442, 10) and outcome (442,), standardised, in an order that is random and fixed."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), ((y - y.mean()) / y.std()).astype(np.float32)


def regression(x: jax.Array, y: jax.Array) -> None:
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(intercept + x @ slope, noise), obs=y)


def factor_priors(num: int) -> tuple[jax.Array, jax.Array]:
    loading = numpyro.sample("loading", dist.Normal(0.0, 1.0).expand([num]).to_event(1))
    return loading, numpyro.sample("spread", dist.HalfNormal(1.0).expand([num]).to_event(1))


def law_of(loading: jax.Array, spread: jax.Array) -> dist.Distribution:
    """Measurements with one standard normal factor behind them, which is integrated out."""
    return dist.LowRankMultivariateNormal(jnp.zeros(len(loading)), loading[:, None], spread**2)


def factor(x: jax.Array) -> None:
    """The first study: both signs of the loadings are equally good."""
    numpyro.sample("x", law_of(*factor_priors(x.shape[1])), obs=x)


def factor_and_outcome(x: jax.Array, x_and_y: jax.Array) -> None:
    """A study with outcome, and one without; that may be empty."""
    loading, spread = factor_priors(x_and_y.shape[1] - 1)
    effect = numpyro.sample("effect", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    law = law_of(jnp.append(loading, effect), jnp.append(spread, noise))
    numpyro.sample("x_and_y", law, obs=x_and_y)
    if len(x):
        numpyro.sample("x", law_of(loading, spread), obs=x)


def sample(model: Callable, *args: jax.Array, seed: int, num: int, kernel: Callable = NUTS, **options) -> Draws:
    """Draws of all sites by four chains."""
    chains = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel(model, **options), num_warmup=min(num // 4, 500), num_samples=num // 4, **chains)
    mcmc.run(jax.random.key(seed), *args)
    return {name: np.asarray(values) for name, values in mcmc.get_samples().items()}


def normal_like(learned: LearnedPrior) -> LearnedPrior:
    """The multivariate normal with the mean and covariance of the same draws, in the same coordinates."""
    return LearnedPrior(DiffusionPrior(Gaussian(np.zeros(learned.layout.size))), learned.layout, learned.units)


def errors(found: Draws, truth: Draws, names: list[str]) -> tuple[float, float]:
    """The largest error of a mean, in posterior standard deviations, and of a log standard deviation."""
    pairs = [(np.reshape(found[n], (len(found[n]), -1)), np.reshape(truth[n], (len(truth[n]), -1))) for n in names]
    mean = max(np.abs((a.mean(0) - b.mean(0)) / b.std(0)).max() for a, b in pairs)
    return float(mean), float(max(np.abs(np.log(a.std(0) / b.std(0))).max() for a, b in pairs))


def regressions(seed: int, num: int, num_steps: int) -> tuple[dict[str, Draws], LearnedPrior]:
    """Posteriors of the slopes: of the first half, of all, and of the second half with either prior."""
    x, y = patients()
    half = len(y) // 2
    found = {"all data": sample(regression, x, y, seed=seed, num=num)}
    found["first study"] = sample(regression, x[:half], y[:half], seed=seed + 1, num=num)
    learned = prior_from_samples(
        found["first study"], {"noise": constraints.positive}, key=jax.random.key(seed), num_steps=num_steps
    )
    for name, prior, kernel in ("learned prior", learned, NoiseSpace), ("normal prior", normal_like(learned), NUTS):
        sequel = prior.in_place_of_priors(regression)
        found[name] = sample(sequel, x[half:], y[half:], seed=seed + 2, num=num, kernel=kernel)
    return found, learned


def factors(seed: int, num: int, num_steps: int) -> tuple[dict[str, Draws], LearnedPrior]:
    """Posteriors of the loadings, as above; of the first study, both modes."""
    x, y = patients()
    x = x[:, [2, 3, 6, 8, 9]]  # body mass index, blood pressure, HDL, triglycerides, glucose
    half, x_and_y = len(y) // 2, np.column_stack([x, y])
    second, none = x_and_y[half : half + SECOND_STUDY], x[:0]
    start = numpyro.infer.init_to_value(values={"loading": np.array([0.6, 0.4, -0.5, 0.7, 0.6], np.float32)})
    options = {"seed": seed, "num": num, "init_strategy": start}
    found = {"all data": sample(factor_and_outcome, x[:half], second, **options)}
    first = sample(factor, x[:half], **options)
    sign = np.random.default_rng(seed).choice(np.float32([-1.0, 1.0]), (len(first["loading"]), 1))
    found["first study"] = first = {**first, "loading": sign * first["loading"]}  # the posterior is symmetric
    learned = prior_from_samples(first, {"spread": constraints.positive}, key=jax.random.key(seed), num_steps=num_steps)
    sequels = {
        name: prior.in_place_of_priors(factor_and_outcome)
        for name, prior in {"learned prior": learned, "normal prior": normal_like(learned)}.items()
    }
    # with two modes chains would stay in one, and the walkers never forget in which they are
    limits = {"max_moves": 4, "max_gradients": GRADIENTS_PER_DRAW * num, "progress_bar": False}
    for name, sequel in sequels.items():
        population = PopulationHMC(sequel, **limits).run(jax.random.key(seed + 2), none, second)
        print(f"{name}: {verdict(population)}")
        found[name] = {site: np.asarray(values) for site, values in population.get_samples().items()}
    return found, learned


STUDIES = {
    "regression": (regressions, ["intercept", "slope", "noise"]),
    "factor": (factors, ["loading", "spread", "effect", "noise"]),
}
"""What to run, and the sites to compare."""


def look(name: str, seed: int, num: int, num_steps: int) -> tuple[dict[str, Draws], dict[str, tuple[float, float]]]:
    """Runs a study, prints and returns its posteriors and the errors of both priors against all data."""
    started = time.perf_counter()
    run, names = STUDIES[name]
    print(f"\n{name}")
    found, learned = run(seed, num, num_steps)
    print(f"{learned}\n{learned.report}")
    off = {prior: errors(found[prior], found["all data"], names) for prior in ("learned prior", "normal prior")}
    for prior, (mean, log_sd) in off.items():
        print(f"{prior}: means within {mean:.3f} posterior sd of those of all data, log sds within {log_sd:.3f}")
    print(f"{time.perf_counter() - started:.0f} s")
    return found, off


def draw(found: dict[str, dict[str, Draws]], path: Path) -> None:
    """Two entries of each study: the first posterior, that of all data, and the sequels."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(found), 3, figsize=(11, 3.2 * len(found)), layout="constrained", sharex="row", sharey="row", squeeze=False
    )
    shown = {
        "regression": ("slope", (4, "slope of total cholesterol"), (5, "slope of LDL")),
        "factor": ("loading", (0, "loading of the body mass index"), (2, "loading of HDL")),
    }
    for row, (name, draws) in zip(axes, found.items(), strict=True):
        site, (first, across), (second, up) = shown[name]
        for ax, panel in zip(row, ("first study", "learned prior", "normal prior"), strict=True):
            truth, values = draws["all data"][site][:1500], draws[panel][site][:1500]
            ax.plot(truth[:, first], truth[:, second], ".", color="0.6", ms=3, label="all data at once")
            ax.plot(values[:, first], values[:, second], ".", color="tab:red", ms=2, alpha=0.4, label="here")
            ax.set_title(f"{name}: {panel}" if panel == "first study" else f"{panel} and second study", fontsize=10)
            ax.set_xlabel(across)
        row[0].set_ylabel(up)
        row[0].legend(loc="upper right", fontsize=8, markerscale=4)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"\nwrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the first study, little training, few draws")
    parser.add_argument("--seed", type=int, default=0, help="of chains and training")
    options = parser.parse_args()
    sizes, names = ((400, 100), ["regression"]) if options.fast else ((NUM_DRAWS, NUM_STEPS), list(STUDIES))
    found = {name: look(name, options.seed, *sizes)[0] for name in names}
    draw(found, OUTPUT / ("sequential-fast.png" if options.fast else "sequential.png"))


if __name__ == "__main__":
    main()
