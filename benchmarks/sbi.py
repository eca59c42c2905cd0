"""Amortised posteriors from few simulations, before and after their correction by MCMC where the likelihood is known.

    python benchmarks/sbi.py --json OUT

Tasks of the sbi benchmark: two moons, linear Gaussian (ten parameters) and Gaussian mixture. A small MLP is trained on
pairs of parameters and data and gives the posterior of each observation (`DiffusionPrior(cond=y)`). Corrected, chains
begin at its draws and move in its noise space (`TransportReparam`) under the model with its true likelihood: by
independent proposals, eight at a time, and for ten parameters by an elliptical slice in turn with them.

    c2st         share that a random forest tells right of draws and as many exact ones; five folds, mean over data sets
    floor        the same for exact draws and other exact draws
    acceptance   of the independent proposals
    published    NPSE (VE) and NPE of the sbi benchmark at as many simulations, by 10,000 draws; `ceiling`: the best of
                 three diffusion models with 32 million simulations
    sbc          smallest p-value, over number of tests, of simulation-based calibration of the mixture's posterior
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.handlers import reparam
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

from numpyro_diffusion import DiffusionPrior, fit
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.infer import SBC, Cycle, EllipticalSlice, Independence
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.reparam import TransportReparam
from numpyro_diffusion.solve import Heun

RNG = np.random.Generator
FLOW = Heun(10)


class Task(NamedTuple):
    """A simulator whose posterior can be drawn from."""

    model: Callable  # NumPyro model of data y
    simulate: Callable[[RNG, np.ndarray], np.ndarray]  # data (n, d_y) of parameters (n, d)
    prior: Callable[[RNG, int], np.ndarray]
    posterior: Callable[[RNG, np.ndarray, int], np.ndarray]  # exact draws (n, d)
    published: dict[int, tuple[float, float]]  # NPSE and NPE by the number of simulations
    ceiling: float


def box(edge: float, size: int) -> dist.Distribution:
    return dist.Uniform(-edge, edge).expand([size]).to_event(1)


def crescent(rng: RNG, count: int) -> np.ndarray:
    angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, count), rng.normal(0.1, 0.01, count)
    return np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], -1)


def two_moons(y: jax.Array) -> None:
    theta = numpyro.sample("theta", box(1.0, 2))
    place = y + jnp.stack([jnp.abs(theta[0] + theta[1]), theta[0] - theta[1]]) / jnp.sqrt(2.0)
    right, up = place[0] - 0.25, place[1]
    radius = jnp.hypot(right, up)
    log_density = dist.Normal(0.1, 0.01).log_prob(radius) - jnp.log(jnp.pi * radius)
    numpyro.factor("y", jnp.where(right > 0.0, log_density, -jnp.inf))


def moons_of(rng: RNG, theta: np.ndarray) -> np.ndarray:
    total, gap = theta.sum(1), theta[:, 1] - theta[:, 0]
    return crescent(rng, len(theta)) + np.stack([-np.abs(total), gap], -1) / np.sqrt(2.0)


def moons_posterior(rng: RNG, y: np.ndarray, count: int) -> np.ndarray:
    away = crescent(rng, 8 * count) - y
    total, gap = np.sqrt(2.0) * away[:, 0], -np.sqrt(2.0) * away[:, 1]
    total, gap = (values[away[:, 0] > 0.0] for values in (total, gap))
    total *= rng.choice([-1.0, 1.0], len(total))
    theta = np.stack([total - gap, total + gap], -1) / 2.0
    return theta[(np.abs(theta) < 1.0).all(1)][:count]


def linear(y: jax.Array | None = None) -> None:
    theta = numpyro.sample("theta", dist.Normal(0.0, 0.1**0.5).expand([10]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, 0.1**0.5).to_event(1), obs=y)


def mixture(y: jax.Array | None = None) -> None:
    theta = numpyro.sample("theta", box(10.0, 2))
    wide_and_narrow = dist.Normal(theta, jnp.array([[1.0], [0.1]])).to_event(1)
    numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.5, 0.5])), wide_and_narrow), obs=y)


def mixture_noise(rng: RNG, count: int) -> np.ndarray:
    return rng.choice([1.0, 0.1], (count, 1)) * rng.normal(size=(count, 2))


def mixture_posterior(rng: RNG, y: np.ndarray, count: int) -> np.ndarray:
    theta = y + mixture_noise(rng, 8 * count)
    return theta[(np.abs(theta) < 10.0).all(1)][:count]


TASKS = {
    "two moons": Task(
        two_moons, moons_of, lambda rng, n: rng.uniform(-1.0, 1.0, (n, 2)), moons_posterior,
        {1000: (0.570, 0.761), 10_000: (0.514, 0.576)}, 0.504,
    ),
    "linear Gaussian": Task(
        linear, lambda rng, theta: theta + 0.1**0.5 * rng.normal(size=theta.shape),
        lambda rng, n: 0.1**0.5 * rng.normal(size=(n, 10)),
        lambda rng, y, n: 0.5 * y + 0.05**0.5 * rng.normal(size=(n, 10)),
        {1000: (0.705, 0.770), 10_000: (0.572, 0.600)}, 0.502,
    ),
    "mixture": Task(
        mixture, lambda rng, theta: theta + mixture_noise(rng, len(theta)),
        lambda rng, n: rng.uniform(-10.0, 10.0, (n, 2)), mixture_posterior,
        {1000: (0.613, 0.691), 10_000: (0.528, 0.557)}, 0.519,
    ),
}  # fmt: skip


def train(task: Task, count: int, num_steps: int) -> NetworkDenoiser:
    """The amortised posterior from `count` simulations."""
    rng = np.random.default_rng(count)
    theta = task.prior(rng, count)
    y = task.simulate(rng, theta)
    size = theta.shape[1]
    backbone = MLP((size,), 64, 2, 64, cond_shape=(y.shape[1],), rngs=nnx.Rngs(0))
    options = {"num_steps": num_steps, "batch_size": 256, "num_evaluations": 20, "patience": 5}
    return fit(jax.random.key(0), backbone, theta, cond=y, progress_bar=False, **options).denoiser


def amortised(denoiser: NetworkDenoiser) -> Callable:
    """A model whose law is the amortised posterior, and nothing else."""

    def model(y: jax.Array) -> None:
        numpyro.sample("theta", DiffusionPrior(denoiser, cond=y, flow_solver=FLOW))

    return model


def corrected(model: Callable, denoiser: NetworkDenoiser) -> Callable:
    """The model itself, in the noise space of its amortised posterior."""

    def moved(y: jax.Array) -> None:
        law = DiffusionPrior(denoiser, cond=y, flow_solver=FLOW)
        with reparam(config={"theta": TransportReparam(law)}):
            model(y)

    return moved


def moves(model: Callable, dimension: int) -> MCMCKernel:
    proposals = Independence(model, num_proposals=8)
    return proposals if dimension <= 2 else Cycle([proposals, EllipticalSlice(model)])


def c2st(x: np.ndarray, exact: np.ndarray) -> float:
    rows, labels = np.concatenate([x, exact]), np.repeat([0, 1], [len(x), len(exact)])
    forest = RandomForestClassifier(100, random_state=0)
    order = np.random.default_rng(0).permutation(len(rows))
    return float(cross_val_score(forest, rows[order], labels[order], cv=5).mean())


def rows_of(name: str, count: int, num_data: int, draws: int, num_steps: int, chains: int) -> dict:
    task, started = TASKS[name], time.process_time()
    denoiser = train(task, count, num_steps)
    trained = time.process_time()
    rng = np.random.default_rng(7)
    data = task.simulate(rng, task.prior(rng, num_data))
    flow = jax.jit(lambda y, z: DiffusionPrior(denoiser, cond=y, flow_solver=FLOW).flow(z))
    kernel = moves(corrected(task.model, denoiser), data.shape[1])
    steps = 2 * -(-draws // chains)
    options = {"num_warmup": steps, "num_samples": steps, "thinning": 2, "num_chains": chains}
    mcmc = MCMC(kernel, **options, chain_method="vectorized", progress_bar=False, jit_model_args=True)
    scores, accepted = [], []
    for i, y in enumerate(data):
        exact, other = (task.posterior(rng, y, draws) for _ in range(2))
        z = jax.random.normal(jax.random.key(i), (draws, exact.shape[1]))
        mcmc.run(jax.random.key(100 + i), jnp.asarray(y), extra_fields=("accept_prob",))  # begins at draws of the law
        after = np.asarray(mcmc.get_samples()["theta"])
        accept_prob = np.asarray(mcmc.get_extra_fields()["accept_prob"]).reshape(
            len(after), -1
        )  # a column for each kernel
        accepted.append(float(accept_prob[:, 0].mean()))
        scores.append([c2st(x, exact) for x in (np.asarray(flow(y, z)), after[:draws], other)])
    before, after, floor = np.mean(scores, 0)
    return {
        "task": name, "simulations": count, "before": before, "after": after, "floor": floor,
        "acceptance": float(np.mean(accepted)), "npse": task.published[count][0], "npe": task.published[count][1],
        "ceiling": task.ceiling, "train_seconds": trained - started, "seconds": time.process_time() - started,
    }  # fmt: skip


def calibration(count: int, num_simulations: int, num_steps: int) -> dict:
    """SBC of the mixture's amortised posterior, before and after."""
    denoiser = train(TASKS["mixture"], count, num_steps)
    kernels = {
        "before": lambda _: Independence(amortised(denoiser)),
        "after": lambda model: moves(corrected(model, denoiser), 2),
    }
    found = {"simulations": count, "sbc_simulations": num_simulations}
    for name, make in kernels.items():
        options = {"num_simulations": num_simulations, "num_warmup": 30, "num_samples": 100, "num_chains": 2}
        result = SBC(make, mixture, **options).run(jax.random.key(1), None)
        found[name] = {"calibrated": bool(result.calibrated), "p_value": result.tests[0].p_value, "report": str(result)}
        print(name, result, sep="\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--simulations", default="1000,10000")
    parser.add_argument("--data", type=int, default=10, help="data sets for each task")
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000, help="of training, at most")
    parser.add_argument("--sbc", type=int, default=300, help="simulations of SBC, 0 for none")
    parser.add_argument("--fast", action="store_true", help="one task, short training, few draws: two minutes")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if options.fast:
        options.tasks, options.simulations, options.data, options.draws = "mixture", "1000", 1, 400
        options.steps, options.sbc, options.chains = 500, 20, 100
    results = {"rows": [], "sbc": None}
    print(
        f"{'task':16} {'pairs':>6} {'before':>7} {'after':>6} {'floor':>6} {'accept':>6} | NPSE   NPE  ceiling  CPU s"
    )
    for name in options.tasks.split(","):
        for count in map(int, options.simulations.split(",")):
            row = rows_of(name, count, options.data, options.draws, options.steps, options.chains)
            results["rows"].append(row)
            print(f"{name:16} {count:6} {row['before']:7.3f} {row['after']:6.3f} {row['floor']:6.3f} "
                  f"{row['acceptance']:6.2f} | {row['npse']:.3f} {row['npe']:.3f} {row['ceiling']:.3f} "
                  f"{row['seconds']:6.0f}", flush=True)  # fmt: skip
    if options.sbc:
        results["sbc"] = calibration(1000, options.sbc, options.steps)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
