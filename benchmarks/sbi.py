"""Amortised posteriors from few simulations, before and after their correction by MCMC where the likelihood is known.

    python benchmarks/sbi.py --json OUT

Tasks of the sbi benchmark: two moons, linear Gaussian (ten parameters), Gaussian mixture and SLCP (a simple likelihood
with a complex posterior, five parameters). Parameters are regressed on data, linearly, and a network learns the law of
what is left given the data; the two together are a `DiffusionPrior(cond=y, transform=...)`. Corrected, chains begin at
its draws and move in its noise space (`TransportReparam`) under the model with its true likelihood: by independent
proposals, eight at a time, and above two parameters by an elliptical slice in turn with them. Exact draws are in closed
form, but for rejection.

    c2st         share that a random forest tells right of draws and as many exact ones; five folds, mean over data sets
    before       of the amortised posterior, without the draws that lie outside of the prior's support
    after        of the corrected chains
    floor        the same for exact draws and other exact draws
    acceptance   of the independent proposals
    published    NPSE (VE) and NPE of the sbi benchmark at as many simulations, by 10,000 draws; `ceiling`: the best of
                 three diffusion models with 32 million simulations
    sbc          smallest p-value, over number of tests, of simulation-based calibration
"""

import argparse
import itertools
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
import optax
from flax import nnx
from numpyro.distributions.transforms import AffineTransform
from numpyro.handlers import reparam
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

from numpyro_diffusion import DiffusionPrior, fit
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.infer import SBC, Cycle, EllipticalSlice, Independence
from numpyro_diffusion.nn.embed import FourierEmbedding
from numpyro_diffusion.reparam import TransportReparam
from numpyro_diffusion.solve import DPMSolverPP
from numpyro_diffusion.train.weighting import EDM

RNG = np.random.Generator
FLOW = DPMSolverPP(24)
LEVELS = EDM(-2.5, 1.5)  # cleaner than the default: posteriors have detail far below the spread of their residuals


class Task(NamedTuple):
    """A simulator whose posterior can be drawn from."""

    model: Callable  # NumPyro model of data y
    simulate: Callable[[RNG, np.ndarray], np.ndarray]  # data (n, d_y) of parameters (n, d)
    prior: Callable[[RNG, int], np.ndarray]
    posterior: Callable[[RNG, np.ndarray, int], np.ndarray]  # exact draws (n, d)
    published: dict[int, tuple[float, float]]  # NPSE and NPE by the number of simulations
    ceiling: float
    edge: float = np.inf  # of the prior's support, a box


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
    away = crescent(rng, 8 * count + 20_000) - y
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
    theta = y + mixture_noise(rng, 8 * count + 20_000)
    return theta[(np.abs(theta) < 10.0).all(1)][:count]


def slcp(y: jax.Array | None = None) -> None:
    theta = numpyro.sample("theta", box(3.0, 5))
    first, second = theta[2:4] ** 2
    low, diagonal = second * jnp.tanh(theta[4]), second / jnp.cosh(theta[4])
    scale_tril = jnp.array([[first, 0.0], [low, diagonal]])
    points = dist.MultivariateNormal(theta[:2], scale_tril=scale_tril).expand([4]).to_event(1)
    numpyro.sample("y", points, obs=None if y is None else y.reshape(4, 2))


def slcp_points(rng: RNG, theta: np.ndarray, count: int, shrink: float = 1.0) -> np.ndarray:
    """Points (n, count, 2) with the means and covariances of parameters; `shrink` multiplies the deviations."""
    first, second, z = theta[:, 2:3] ** 2, theta[:, 3:4] ** 2, rng.normal(size=(len(theta), count, 2))
    up = second * (np.tanh(theta[:, 4:]) * z[..., 0] + z[..., 1] / np.cosh(theta[:, 4:]))
    return theta[:, None, :2] + shrink * np.stack([first * z[..., 0], up], -1)


def slcp_posterior(rng: RNG, y: np.ndarray, count: int) -> np.ndarray:
    """By rejection: a covariance, then the mean given it.

    With a flat law of the parameters, and the mean integrated out, the covariance has the density of an inverse Wishart
    law of 2.5 degrees of freedom and the points' scatter, times (1 - rho^2)^(1/4).
    """
    points, kept = y.reshape(4, 2), np.zeros((0, 5))
    centre = points.mean(0)
    factor = np.linalg.cholesky(np.linalg.inv((points - centre).T @ (points - centre)))
    while len(kept) < count:
        root, theta = np.zeros((20_000, 2, 2)), np.tile(centre, (20_000, 3))[:, :5]
        root[:, [0, 1], [0, 1]] = np.sqrt(rng.chisquare([2.5, 1.5], (len(root), 2)))
        root[:, 1, 0] = rng.normal(size=len(root))
        half = np.linalg.inv(factor @ root)
        deviations = np.sqrt((half**2).sum(1))
        rho = (half[..., 0] * half[..., 1]).sum(1) / deviations.prod(1)
        theta[:, 2:4] = np.sqrt(deviations) * rng.choice([-1.0, 1.0], (len(root), 2))
        theta[:, 4] = np.arctanh(np.clip(rho, -0.999999, 0.999999))
        theta = theta[rng.uniform(size=len(theta)) < (1.0 - rho**2) ** 0.25]
        theta[:, :2] = slcp_points(rng, theta, 1, 0.5)[:, 0]
        kept = np.concatenate([kept, theta[(np.abs(theta) < 3.0).all(1)]])
    return kept[:count]


TASKS = {
    "two moons": Task(
        two_moons, moons_of, lambda rng, n: rng.uniform(-1.0, 1.0, (n, 2)), moons_posterior,
        {1000: (0.570, 0.761), 10_000: (0.514, 0.576)}, 0.504, 1.0,
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
        {1000: (0.613, 0.691), 10_000: (0.528, 0.557)}, 0.519, 10.0,
    ),
    "SLCP": Task(
        slcp, lambda rng, theta: slcp_points(rng, theta, 4).reshape(-1, 8),
        lambda rng, n: rng.uniform(-3.0, 3.0, (n, 5)), slcp_posterior, {}, 0.621, 3.0,
    ),
}  # fmt: skip


class Network(nnx.Module):
    """Layers on the noisy point, the condition and features of the noise level, side by side.

    A plain network does better here than `MLP`, whose condition scales and shifts normalised features.
    """

    def __init__(self, size: int, cond_size: int, features: int = 128, num_layers: int = 4, *, rngs: nnx.Rngs) -> None:
        self.event_shape = (size,)
        self.embed = FourierEmbedding(32, 16.0)
        widths = [size + cond_size + 32, *num_layers * [features]]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)])
        self.output_layer = nnx.Linear(features, size, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, c_noise: jax.Array, cond: jax.Array) -> jax.Array:
        h = jnp.concatenate([x, cond, self.embed(c_noise)])
        for layer in self.layers:
            h = jax.nn.silu(layer(h))
        return self.output_layer(h)


class Amortised(NamedTuple):
    """An amortised posterior: a line through the parameters, and the law of their distances from it given the data."""

    denoiser: NetworkDenoiser
    location: np.ndarray  # of the data, (d_y,)
    scale: np.ndarray
    line: np.ndarray  # (1 + d_y, d)

    def law(self, y: jax.Array) -> DiffusionPrior:
        cond = (y - self.location) / self.scale
        centre = self.line[0] + cond @ self.line[1:]
        return DiffusionPrior(self.denoiser, cond=cond, flow_solver=FLOW, transform=AffineTransform(centre, 1.0))


def train(task: Task, count: int, num_steps: int, seed: int) -> Amortised:
    """The amortised posterior from `count` simulations, a tenth of them for early stopping."""
    rng = np.random.default_rng([count, seed])
    theta = task.prior(rng, count)
    y = task.simulate(rng, theta)
    location, scale = y.mean(0), y.std(0)
    cond = (y - location) / scale
    regressors = np.concatenate([np.ones((count, 1)), cond], 1)
    line = np.linalg.lstsq(regressors, theta, rcond=None)[0]
    network = Network(theta.shape[1], y.shape[1], rngs=nnx.Rngs(seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, num_steps // 10, num_steps)
    options = {"num_steps": num_steps, "batch_size": 256, "num_evaluations": 20, "patience": 5, "progress_bar": False}
    options |= {"weighting": LEVELS, "optimizer": optax.adam(rate)}
    result = fit(jax.random.key(seed), network, theta - regressors @ line, cond=cond, **options)
    return Amortised(result.denoiser, *(np.float32(part) for part in (location, scale, line)))


def alone(posterior: Amortised) -> Callable:
    """A model whose law is the amortised posterior, and nothing else."""

    def model(y: jax.Array) -> None:
        numpyro.sample("theta", posterior.law(jnp.ravel(y)))

    return model


def corrected(model: Callable, posterior: Amortised) -> Callable:
    """The model itself, in the noise space of its amortised posterior."""

    def moved(y: jax.Array) -> None:
        with reparam(config={"theta": TransportReparam(posterior.law(jnp.ravel(y)))}):
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


def row_of(name: str, count: int, options: argparse.Namespace, seed: int) -> dict:
    """One training and its data sets."""
    task, started = TASKS[name], time.process_time()
    posterior = train(task, count, options.steps, seed)
    trained = time.process_time()
    rng = np.random.default_rng(7 + seed)
    data = task.simulate(rng, task.prior(rng, options.data))
    flow = jax.jit(lambda y, z: posterior.law(y).flow(z))
    kernel = moves(corrected(task.model, posterior), task.prior(rng, 1).shape[1])
    steps = 2 * -(-max(options.corrected, 2) // options.chains)
    sizes = {"num_warmup": steps, "num_samples": steps, "thinning": 2, "num_chains": options.chains}
    mcmc = MCMC(kernel, **sizes, chain_method="vectorized", progress_bar=False, jit_model_args=True)
    before, after, floor, accepted = [], [], [], []
    for i, y in enumerate(data):
        exact, other = (task.posterior(rng, y, options.draws) for _ in range(2))
        z = jax.random.normal(jax.random.key(i), (2 * options.draws, exact.shape[1]))
        x = np.asarray(flow(y, z))
        before.append(c2st(x[(np.abs(x) < task.edge).all(1)][: options.draws], exact))
        if not options.corrected:
            continue
        exact, other = exact[: options.corrected], other[: options.corrected]
        mcmc.run(jax.random.key(100 + i), jnp.asarray(y), extra_fields=("accept_prob",))  # begins at draws of the law
        accept_prob = np.asarray(mcmc.get_extra_fields()["accept_prob"])
        accepted.append(accept_prob.reshape(len(accept_prob), -1)[:, 0].mean())  # a column for each kernel
        after.append(c2st(np.asarray(mcmc.get_samples()["theta"])[: options.corrected], exact))
        floor.append(c2st(other, exact))
    npse, npe = task.published.get(count, (np.nan, np.nan))
    means = {k: float(np.mean(v)) if v else np.nan for k, v in
             {"before": before, "after": after, "floor": floor, "acceptance": accepted}.items()}  # fmt: skip
    return {
        "task": name, "simulations": count, "seed": seed, **means, "before_each": before, "after_each": after,
        "npse": npse, "npe": npe, "ceiling": task.ceiling, "train_seconds": trained - started,
        "seconds": time.process_time() - started,
    }  # fmt: skip


def calibration(name: str, count: int, options: argparse.Namespace) -> dict:
    """SBC of an amortised posterior, before and after its correction."""
    task = TASKS[name]
    posterior = train(task, count, options.steps, 0)
    kernels = {
        "before": lambda _: Independence(alone(posterior)),
        "after": lambda model: moves(corrected(model, posterior), task.prior(np.random.default_rng(0), 1).shape[1]),
    }
    found = {"task": name, "simulations": count, "sbc_simulations": options.sbc}
    for when, make in kernels.items():
        sizes = {"num_simulations": options.sbc, "num_warmup": 30, "num_samples": 100, "num_chains": 2}
        result = SBC(make, task.model, **sizes).run(jax.random.key(1), None)
        found[when] = {"calibrated": bool(result.calibrated), "p_value": result.tests[0].p_value, "report": str(result)}
        print(when, result, sep="\n", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--simulations", default="1000,10000")
    parser.add_argument("--seeds", default="0,1", help="of simulations, training and data")
    parser.add_argument("--data", type=int, default=5, help="data sets for each seed")
    parser.add_argument("--draws", type=int, default=10_000, help="of the amortised posterior")
    parser.add_argument("--corrected", type=int, default=2000, help="draws of the corrected chains, 0 for none")
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30_000, help="of training, at most")
    parser.add_argument("--sbc", type=int, default=300, help="simulations of SBC, 0 for none")
    parser.add_argument("--sbc-task", default="mixture")
    parser.add_argument("--fast", action="store_true", help="one task, short training, few draws")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    if options.fast:
        options.tasks, options.simulations, options.seeds, options.data = "mixture", "1000", "0", 1
        options.draws = options.corrected = 200
        options.steps, options.sbc, options.chains = 100, 10, 50
    results = {"rows": [], "sbc": None}
    print("task             pairs seed  before  after  floor accept |  NPSE   NPE  ceiling  CPU s")
    rows = itertools.product(options.tasks.split(","), options.simulations.split(","), options.seeds.split(","))
    for name, count, seed in rows:
        row = row_of(name, int(count), options, int(seed))
        results["rows"].append(row)
        print(f"{name:15} {count:>6} {seed:>4} {row['before']:7.3f} {row['after']:6.3f} {row['floor']:6.3f} "
              f"{row['acceptance']:6.2f} | {row['npse']:5.3f} {row['npe']:5.3f} {row['ceiling']:6.3f} "
              f"{row['seconds']:7.0f}", flush=True)  # fmt: skip
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    if options.sbc:
        results["sbc"] = calibration(options.sbc_task, 1000, options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
