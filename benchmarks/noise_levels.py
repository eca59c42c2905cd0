"""Does it pay to draw noise levels where the gradient is, or the loss? Adaptive levels against fixed log-normal ones.

    python benchmarks/noise_levels.py --json OUT

For each law of the data and each seed, the same networks are trained on the same rows, several times with other
minibatches, since luck is as large as what is to be measured: a run's excess varies by a tenth. All along, the held-out
loss above that of the exact denoiser is measured on 20,000 noised points, the same for all runs of a seed, as the mean
square of the difference to the exact one, which is what it is in the mean and has less noise. `steps_ratio` is the
number of steps after which the mean curve of a seed is where that of the fixed log-normal levels ends, over their
steps: infinite if never. `excess` is the final loss above the exact one's.
"""

import argparse
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from learned import LAWS

from numpyro_diffusion.denoise import GaussianMixture, NetworkDenoiser
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE, perturb
from numpyro_diffusion.train import Adaptive, Objective, levels, weighting
from numpyro_diffusion.train.steps import init, train_steps

WEIGHTINGS = {"EDM": weighting.EDM(), "Sigmoid": weighting.Sigmoid(), "V": weighting.V()}
NOISE_LAWS = {
    "fixed": levels.LogNormal(),
    "adaptive": Adaptive(),
    "adaptive_by_loss": Adaptive(follows="loss"),
}
EVALUATIONS, BATCH_SIZE = 40, 250


class Yardstick(NamedTuple):
    """Noised points that all networks of a seed are measured on."""

    x_t: jax.Array  # (points, 2)
    t: jax.Array  # levels, spread evenly, (points,)
    x0: jax.Array  # what the exact denoiser answers, (points, 2)
    counts: jax.Array  # what a squared error of the clean point counts there, (points,)


@functools.partial(jax.jit, static_argnums=3)
def yardstick(exact: GaussianMixture, key: jax.Array, x: jax.Array, weight: weighting.Weighting) -> Yardstick:
    key_levels, key_noise = jax.random.split(key)
    law, schedule = levels.LowDiscrepancy(Adaptive(floor=1.0)), exact.schedule
    state = law.start(schedule, weight)
    log_snr = law.sample(key_levels, len(x), schedule, state)
    t = jnp.clip(schedule.inverse_log_snr(log_snr), schedule.t_min, schedule.t_max)
    x_t = perturb(key_noise, schedule, x, t[:, None])
    x0 = jax.lax.map(lambda pair: exact(*pair).x0, (x_t, t), batch_size=500)
    log_counts = weight.log_weight(log_snr) - law.log_density(log_snr, schedule, state) + log_snr
    return Yardstick(x_t, t, x0, jnp.exp(log_counts))


@jax.jit
def excess(denoiser: NetworkDenoiser, on: Yardstick) -> jax.Array:
    """The mean square difference of the noise to that of the exact denoiser: the loss above the least one."""
    x0 = jax.lax.map(lambda pair: denoiser(*pair).x0, (on.x_t, on.t), batch_size=500)
    return jnp.mean(on.counts * jnp.mean((x0 - on.x0) ** 2, 1))


@functools.lru_cache
def adam(num_steps: int) -> optax.GradientTransformation:
    """One object for all seeds, so that each law of the levels is compiled once."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, 5e-3, num_steps // 10, num_steps))


def curves(name: str, weight: weighting.Weighting, seed: int, num_steps: int, num_rows: int, repeats: int) -> dict:
    """The excess along training of each law of the levels, (repeats, evaluations)."""
    law, per_call = LAWS[name](), max(1, num_steps // EVALUATIONS)
    key_data, key_test, key_noise, key_train = jax.random.split(jax.random.key(seed), 4)
    location, scale = law.location, float(law.scale)
    schedule = VE(0.1 * float(np.sqrt(jnp.min(law.variances))) / scale, 80.0)
    exact = GaussianMixture(
        jnp.exp(law.log_weights), (law.means - location) / scale, law.variances / scale**2, schedule
    )
    rows = (law.sample(key_data, (50_000,)) - location) / scale
    on = yardstick(exact, key_noise, (law.sample(key_test, (num_rows,)) - location) / scale, weight)
    settings = {"max_count": per_call, "optimizer": adam(num_steps), "batch_size": BATCH_SIZE, "ema_decay": 0.999}

    def trained(objective: Objective, repeat: int) -> list[float]:
        network = MLP((2,), features=64, rngs=nnx.Rngs(100 * seed + repeat))
        denoiser = NetworkDenoiser(network, schedule=schedule).unfreeze()
        state, key, curve = init(denoiser, settings["optimizer"], objective), jax.random.fold_in(key_train, repeat), []
        for _ in range(num_steps // per_call):
            state, _ = train_steps(state, denoiser, key, (rows, None), per_call, objective=objective, **settings)
            curve.append(float(excess(denoiser.with_params(state.average), on)))
        return curve

    objectives = {levels: Objective(weighting=weight, noise_levels=law) for levels, law in NOISE_LAWS.items()}
    return {name: np.array([trained(objective, r) for r in range(repeats)]) for name, objective in objectives.items()}


def run(name: str, weight: str, seeds: int, *sizes: int) -> dict[str, object]:
    """Steps ratio of each seed, and the final excess with its standard error over all runs."""
    found = [curves(name, WEIGHTINGS[weight], seed, *sizes) for seed in range(seeds)]
    row: dict[str, object] = {"law": name, "weighting": weight}
    for kind in NOISE_LAWS:
        final = np.concatenate([curve[kind][:, -1] for curve in found])
        row[f"excess_{kind}"] = [float(final.mean()), float(final.std(ddof=1) / math.sqrt(len(final)))]
        row[f"steps_ratio_{kind}"] = []
        for curve in found:
            mean = curve[kind].mean(0)
            reached = np.flatnonzero(mean <= curve["fixed"].mean(0)[-1])
            row[f"steps_ratio_{kind}"].append(float((reached[0] + 1) / len(mean)) if len(reached) else math.inf)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one law and seed, two runs of eighty steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=["EDM"])
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    sizes = (1, 80, 1000, 2) if options.fast else (options.seeds, options.steps, 20_000, options.repeats)
    names = list(LAWS)[: 1 if options.fast else None]
    each = [run(name, weight, *sizes) for weight in options.weightings for name in names]
    worst = {f"{row['law']}, {row['weighting']}": max(row["steps_ratio_adaptive"]) for row in each}
    print("worst steps_ratio of the adaptive levels:", worst)
    if options.json:
        options.json.write_text(json.dumps({"steps_ratio": worst, "each": each}, indent=1))


if __name__ == "__main__":
    main()
