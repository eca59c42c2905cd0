"""Which distance sees which defect: draws that are wrong in a known way, against the score, and against data.

    python benchmarks/discrepancies.py --json OUT

The law is a mixture of two Gaussians of weights .4 and .6 in two dimensions, eight standard deviations apart. Printed
is the share of seeds in which a test at its defaults has p <= .05: of the kernel Stein discrepancy with the exact
score; of energy distance, sliced Wasserstein, MMD and a classifier against as many held-out data again; and of the
check for memorised data. A test that works has .05 in the first row, up to the error of that many seeds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.diagnostics import classifier_test, compare, memorisation, score_function, stein_test

MEANS, WEIGHTS, IDENTITY = np.array([[-4.0, 0.0], [4.0, 0.0]]), (0.4, 0.6), np.eye(2)
LAW = GaussianMixture(WEIGHTS, MEANS, 1.0)
SCORE = score_function(LAW)


def draw(
    rng: np.random.Generator, size: int, weights: tuple = WEIGHTS, covariance: np.ndarray = IDENTITY
) -> np.ndarray:
    """Points of the law, or with other weights or another covariance within the modes."""
    return MEANS[rng.choice(2, size, p=weights)] + rng.multivariate_normal(np.zeros(2), covariance, size)


DEFECTS: dict[str, Callable[[np.random.Generator, int, np.ndarray], np.ndarray]] = {
    "none": lambda rng, size, train: draw(rng, size),
    "shifted by .2": lambda rng, size, train: draw(rng, size) + 0.2,
    "variance 30 % too large": lambda rng, size, train: draw(rng, size, WEIGHTS, 1.3 * IDENTITY),
    "correlated by .4": lambda rng, size, train: draw(rng, size, WEIGHTS, 0.6 * IDENTITY + 0.4),
    "weights .5 and .5": lambda rng, size, train: draw(rng, size, (0.5, 0.5)),
    "a mode missing": lambda rng, size, train: draw(rng, size, (0.0, 1.0)),
    "training data again": lambda rng, size, train: rng.choice(train, size) + 0.01 * rng.normal(size=(size, 2)),
}


def run(defect: str, seed: int, size: int) -> dict[str, float]:
    """The p-values of one seed."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    train, data = draw(rng, size), draw(rng, size)
    x = DEFECTS[defect](rng, size, train)
    return {
        "Stein": stein_test(x, SCORE, key, block_length=1).p_value,
        **{name: compare(x, data, key, name).p_value for name in ("energy", "sliced_wasserstein", "mmd")},
        "classifier": classifier_test(x, data, key).p_value,
        "memorisation": memorisation(x, train, data, key).p_value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one seed, few draws")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--size", type=int, default=400, help="draws, training data and held-out data")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    seeds, size = (1, 100) if options.fast else (options.seeds, options.size)
    rows = []
    for defect in DEFECTS:
        p = [run(defect, seed, size) for seed in range(seeds)]
        rows.append({"defect": defect, **{name: float(np.mean([each[name] <= 0.05 for each in p])) for name in p[0]}})
        if len(rows) == 1:
            print(f"{'defect':24}" + "".join(f"{name:>20}" for name in p[0]))
        print(f"{defect:24}" + "".join(f"{rows[-1][name]:20.2f}" for name in p[0]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
