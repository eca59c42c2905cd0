"""Learned models against laws with a known density: two moons and 25 Gaussians, both in two dimensions.

    python benchmarks/learned.py --json OUT

For each law and seed: the mean over fresh draws of |log p_model - log p| in nats, where log p_model is the probability
flow's, and of the difference with its sign; and the sliced W1 of the model's draws to exact ones over the floor, that
of other exact draws. Training takes about three minutes a law on two cores.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_diffusion.denoise import GaussianMixture, NetworkDenoiser
from numpyro_diffusion.density import log_prob
from numpyro_diffusion.diagnostics import sliced_wasserstein
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import StochasticHeun, sample
from numpyro_diffusion.train import fit
from numpyro_diffusion.train.losses import StableTargetField
from numpyro_diffusion.train.weighting import EDM


def moons(count: int = 500, noise: float = 0.1) -> GaussianMixture:
    """Two half circles under Gaussian noise, as many close Gaussians: their spacing is a tenth of the noise."""
    angle = np.pi * (np.arange(count // 2) + 0.5) / (count // 2)
    upper = np.stack([np.cos(angle), np.sin(angle)], 1)
    arcs = np.concatenate([upper, [1.0, 0.5] - upper])
    return GaussianMixture(np.ones(count) / count, arcs, noise**2)


def grid() -> GaussianMixture:
    """25 unit Gaussians, eight apart."""
    corners = 8.0 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])
    return GaussianMixture(np.ones(25) / 25, corners, 1.0)


LAWS = {"two moons": moons, "25 Gaussians": grid}


@jax.jit
def sliced_w1(draws: jax.Array, exact: jax.Array) -> jax.Array:
    return sliced_wasserstein(draws, exact, jax.random.key(7))


@jax.jit
def log_probs(denoiser: NetworkDenoiser, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda x: log_prob(denoiser, x).value)(x)


@partial(jax.jit, static_argnums=2)
def draws_of(denoiser: NetworkDenoiser, key: jax.Array, count: int) -> jax.Array:
    return sample(StochasticHeun(64), denoiser, key, (count,))


def run(
    name: str, seed: int, num_steps: int, features: int, plain: bool = False, count: int = 5000
) -> dict[str, object]:
    law, started = LAWS[name](), time.perf_counter()
    keys = jax.random.split(jax.random.key(seed), 6)
    data = law.sample(keys[0], (200_000,))
    location, scale = data.mean(0), data.std()
    rows = (data - location) / scale
    # narrow laws in wide data: the smallest noise level is a tenth of the narrowest spread, in units of the data's, and
    # most of the training is at levels between that spread and the data's
    schedule = VE(0.1 * float(jnp.sqrt(jnp.min(law.variances)) / scale), 80.0)
    options = {"schedule": schedule, "num_steps": num_steps, "batch_size": 512, "progress_bar": False}
    waves = {}
    if not plain:
        options |= {"loss": StableTargetField(rows, 1024), "weighting": EDM(-1.5, 1.3)}  # at levels of the same law
        waves = {"input_frequencies": tuple(np.geomspace(0.5, 4.0, 6)), "embed_frequency": 4.0}
    backbone = MLP((2,), features=features, **waves, rngs=nnx.Rngs(seed))
    denoiser = fit(keys[1], backbone, rows, **options).denoiser.with_units(location, scale)
    trained = time.perf_counter() - started
    x = law.sample(keys[2], (2 * count // 5,))
    error = log_probs(denoiser, x) - jax.vmap(lambda x: law.log_density(x, law.schedule.t_min))(x)
    exact = [law.sample(key, (count,)) for key in jax.random.split(keys[3], 9)]
    floor = float(np.mean([sliced_w1(other, exact[0]) for other in exact[1:]]))
    drawn = [draws_of(denoiser, key, count) for key in jax.random.split(keys[4], 4)]
    distance = float(np.mean([sliced_w1(x, exact[0]) for x in drawn]))
    return {
        "law": name,
        "seed": seed,
        "log_density_error": float(jnp.mean(jnp.abs(error))),
        "log_density_bias": float(jnp.mean(error)),
        "sliced_w1": distance,
        "floor": floor,
        "w1_over_floor": distance / floor,
        "train_seconds": trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one law and seed, a hundred steps")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="the defaults of fit and MLP instead")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    num_steps, seeds, features = (100, 1, 32) if options.fast else (options.steps, options.seeds, options.features)
    count = 500 if options.fast else 5000
    names = list(LAWS)[: 1 if options.fast else None]
    results = [run(name, seed, num_steps, features, options.plain, count) for name in names for seed in range(seeds)]
    for row in results:
        print("  ".join(f"{k} {v if isinstance(v, str | int) else round(v, 3)}" for k, v in row.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
