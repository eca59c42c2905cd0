"""The exact posterior draws that benchmarks/sbi.py measures against."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy.stats import chisquare

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sbi


@pytest.mark.slow
@pytest.mark.parametrize("name", sbi.TASKS)
def test_parameters_rank_evenly_among_exact_draws_given_their_data(name):
    """Simulation-based calibration of each entry and of the joint density; 400 simulations, 19 draws, ranks in tens.

    The density says most: it sees means that are spread twice as far as they should be, given the covariance.
    """
    task, rng = sbi.TASKS[name], np.random.default_rng(0)
    theta = task.prior(rng, 400)
    y = task.simulate(rng, theta)
    all_of_them = np.stack([[t, *task.posterior(rng, data, 19)] for t, data in zip(theta, y, strict=True)])
    joint = jax.vmap(lambda data, x: log_density(task.model, (data,), {}, {"theta": x})[0], (None, 0))
    density = np.asarray(jax.jit(jax.vmap(joint))(y, all_of_them))
    statistics = np.concatenate([all_of_them, density[..., None]], -1)
    ranks = (statistics[:, 1:] < statistics[:, :1]).sum(1)
    counts = np.stack([(ranks // 2 == tenth).sum(0) for tenth in range(10)])
    assert (chisquare(counts).pvalue > 1e-3 / counts.shape[1]).all()
