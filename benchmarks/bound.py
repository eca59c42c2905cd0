"""How tight is the variational bound? Steps, variances of the transitions, and importance weights.

    python benchmarks/bound.py --json OUT

Mean over draws of a law of the exact log-density minus a bound, in nats, with its standard error; the law is a mixture
in eight dimensions with its exact denoiser, so that all of the gap is the bound's own.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.density import elbo, importance_weighted_bound, learn_variances, log_prob
from numpyro_diffusion.noise import VE

rng = np.random.default_rng(8)
LAW = GaussianMixture([0.2, 0.3, 0.5], 2 * rng.normal(size=(3, 8)), [0.1, 0.4, 1.0], VE(0.02, 50.0))


@partial(jax.jit, static_argnames=("num_times", "transition"))
def plain(x: jax.Array, keys: jax.Array, places: jax.Array | None, num_times: int, transition: str | None) -> jax.Array:
    how = places if transition is None else transition
    return jax.vmap(lambda x, key: elbo(LAW, x, key, transition=how, num_times=num_times).value)(x, keys)


@partial(jax.jit, static_argnames=("num_times", "num_paths"))
def weighted(x: jax.Array, keys: jax.Array, num_times: int, num_paths: int) -> jax.Array:
    bound = partial(importance_weighted_bound, LAW, num_paths=num_paths, num_times=num_times)
    return jax.vmap(lambda x, key: bound(x, key))(x, keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few draws and steps")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    count, budgets, paths = (50, (16,), (4,)) if options.fast else (1000, (16, 64, 256, 1024), (4, 32))

    x = LAW.sample(jax.random.key(0), (count,))
    keys = jax.random.split(jax.random.key(1), count)
    truth = jax.vmap(lambda x: LAW.log_density(x, LAW.schedule.t_min))(x)
    rows = []

    def add(name: str, num_times: int, values: jax.Array) -> None:
        gap = np.asarray(truth - values)
        error = float(gap.std() / len(gap) ** 0.5)
        rows.append({"bound": name, "steps": num_times, "gap": float(gap.mean()), "standard_error": error})

    add("flow, Heun", 64, jax.jit(jax.vmap(lambda x: log_prob(LAW, x).value))(x))
    for num_times in budgets:
        for name in ("beta", "posterior", "continuous"):
            add(name, num_times, plain(x, keys, None, num_times, name))
        places = learn_variances(LAW, LAW.sample(jax.random.key(2), (count,)), jax.random.key(3), num_times=num_times)
        add("learned", num_times, plain(x, keys, jnp.asarray(places), num_times, None))
    for num_paths in paths:
        add(f"posterior, {num_paths} paths", budgets[0], weighted(x, keys, budgets[0], num_paths))
    print(f"{'bound':22} {'steps':>6} {'gap':>8} {'s.e.':>7}")
    for row in rows:
        print("{bound:22} {steps:6} {gap:8.3f} {standard_error:7.3f}".format(**row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
