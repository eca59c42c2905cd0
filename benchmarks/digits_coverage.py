"""Do posterior intervals cover? Held-out digits, half hidden, noise level unknown.

For each held-out digit the upper half is observed with noise of standard deviation 1, `PopulationHMC` samples pixels
and noise level jointly, and the 90 % equal-tailed interval of every hidden pixel is held against the truth. Runs that
have not converged are counted and left out.

    python benchmarks/digits_coverage.py --json OUT

The prior is the quickstart's, trained here if `examples/output` has none. Coverage is that of the learned prior: it
falls short of 90 % by what the network has not learned, and digits differ, so its error is given over digits.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from numpyro_diffusion.data import digits
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import PopulationHMC
from numpyro_diffusion.solve import DPMSolverPP

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import ROWS, model, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=int, default=20, help="how many held-out digits")
    parser.add_argument("--fast", action="store_true", help="one digit, few walkers, little training; all runs count")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    num_digits = 1 if options.fast else options.digits

    images, held_out = digits(jax.random.key(42))
    denoiser = trained(images, options.fast)
    prior = DiffusionPrior(denoiser, flow_solver=DPMSolverPP(10))
    sampler = PopulationHMC(model, 16, 4, max_gradients=1) if options.fast else PopulationHMC(model)
    rows = []
    for i in range(num_digits):
        started = time.perf_counter()
        key_noise, key_run = jax.random.split(jax.random.fold_in(jax.random.key(7), i))
        truth = held_out[i]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the verdict is in the row
            sampler.run(key_run, truth[:ROWS] + jax.random.normal(key_noise, (ROWS, 8)), prior)
        draws, said = np.asarray(sampler.get_samples()["x"]), verdict(sampler)
        low, high = np.quantile(draws[:, ROWS:], [0.05, 0.95], axis=0)
        inside = (low <= truth[ROWS:]) & (truth[ROWS:] <= high)
        rows.append(
            {
                "digit": i,
                "coverage": float(inside.mean()),
                "converged": said.converged,
                "worst_r_hat": said.r_hat,
                "smallest_bulk_ess": said.ess,
                "noise": float(sampler.get_samples()["noise"].mean()),
                "seconds": time.perf_counter() - started,
            }
        )
        print({k: round(v, 3) for k, v in rows[-1].items()}, flush=True)
    coverage = np.array([row["coverage"] for row in rows if row["converged"] or options.fast])
    print(f"{sum(not row['converged'] for row in rows)} of {len(rows)} runs have not converged and do not count")
    error = coverage.std(ddof=1) / np.sqrt(len(coverage)) if len(coverage) > 1 else np.nan
    mean = coverage.mean() if len(coverage) else np.nan
    print(f"90 % intervals cover {mean:.3f} of the hidden pixels (standard error over digits {error:.3f})")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
