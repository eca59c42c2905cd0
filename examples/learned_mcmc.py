"""A posterior with two modes, and chains that learn to jump between them: a factor behind five measurements.

The diabetes data that scikit-learn ships (442 patients): body mass index, blood pressure, HDL, triglycerides and
glucose have one common factor. Its sign is free, so the posterior of the loadings has two modes, of weight one half
each, and no data can choose. NUTS stays in the mode that it has come to first. `LearnedMCMC` runs short local chains
from draws of the prior, learns a law from all of them, and takes it for jumps, which a Metropolis test keeps exact.

    python examples/learned_mcmc.py          # a minute
    python examples/learned_mcmc.py --fast   # few chains and draws: to test the installation

Writes examples/output/learned_mcmc.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_sample
from sklearn.datasets import load_diabetes

from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import LearnedMCMC

OUTPUT = Path(__file__).parent / "output"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Of chains, for all eyes."""
KEPT = {"thinning": 5, "progress_bar": False}
NAMES = ["body mass index", "blood pressure", "HDL", "triglycerides", "glucose"]


def measurements() -> np.ndarray:
    """The five measurements, standardised, (442, 5)."""
    x = load_diabetes().data[:, [2, 3, 6, 8, 9]]
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32)


def factor(x: jax.Array) -> None:
    """A standard normal factor behind all entries, integrated out; the data enter by their mean squares."""
    count, size = x.shape
    loading = numpyro.sample("loading", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0).expand([size]).to_event(1))
    root = jnp.linalg.cholesky(jnp.outer(loading, loading) + jnp.diag(spread**2))
    explained = jnp.trace(jax.scipy.linalg.cho_solve((root, True), x.T @ x / count))
    log_det = 2.0 * jnp.sum(jnp.log(jnp.diag(root))) + size * jnp.log(2.0 * jnp.pi)
    numpyro.factor("x", -0.5 * count * (log_det + explained))


def by_nuts(seed: int, x: np.ndarray, num_draws: int) -> MCMC:
    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(NUTS(factor, init_strategy=init_to_sample), num_warmup=300, num_samples=num_draws // 4, **options)
    mcmc.run(jax.random.key(seed), x)
    return mcmc


def by_learning(seed: int, x: np.ndarray, num_draws: int, num_chains: int) -> LearnedMCMC:
    sampler = LearnedMCMC(factor, num_chains=num_chains, num_draws=num_draws // num_chains, **KEPT)
    return sampler.run(jax.random.key(seed), x)


def positive(run: MCMC | LearnedMCMC) -> float:
    """The share of draws in the mode where the body mass index has a positive loading."""
    return float((run.get_samples()["loading"][:, 0] > 0.0).mean())


def draw(runs: dict[str, MCMC | LearnedMCMC], path: Path) -> None:
    """Draws of four chains in one plane, and the first chains' way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharey=True)
    for row, (name, run) in zip(axes, runs.items(), strict=True):
        loading = np.asarray(run.get_samples(group_by_chain=True)["loading"])
        for index, chain in enumerate(loading[:4]):
            row[0].plot(chain[:, 2], chain[:, 0], ".", ms=3, color=COLORS[index])
            row[1].plot(chain[:, 0], lw=0.8, color=COLORS[index], label=f"chain {index + 1}")
        row[0].set(title=f"{name}: four chains", xlabel=f"loading of {NAMES[2]}", ylabel=f"loading of {NAMES[0]}")
        row[1].set(title=f"R-hat {verdict(run).r_hat:.3f}, {positive(run):.0%} in the upper mode", xlabel="draw")
    axes[0, 1].legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few chains and draws")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    x, (num_draws, num_chains) = measurements(), ((800, 40) if options.fast else (10_000, 100))
    runs = {
        "NUTS": by_nuts(options.seed, x, num_draws),
        "LearnedMCMC": by_learning(options.seed, x, num_draws, num_chains),
    }
    for name, run in runs.items():
        print(f"\n{name}: {positive(run):.1%} of the draws in the upper mode, of 50 %\n{verdict(run)}")
    learned = runs["LearnedMCMC"]
    value, error, _ = learned.log_evidence
    print(f"\n{learned.global_moves}\n{learned.num_target_evals} evaluations of the model in all")
    print(f"log evidence {value:.3f} +- {error:.3f}")
    draw(runs, OUTPUT / ("learned_mcmc-fast.png" if options.fast else "learned_mcmc.png"))


if __name__ == "__main__":
    main()
