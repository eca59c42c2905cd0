"""The exact posterior draws that benchmarks/sbi.py measures against."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sbi


@pytest.mark.slow
@pytest.mark.parametrize("name", sbi.TASKS)
def test_parameters_rank_evenly_among_exact_draws_given_their_data(name):
    """Simulation-based calibration of each entry and each square; ranks of 200 simulations among 19 draws, in tens."""
    task, rng = sbi.TASKS[name], np.random.default_rng(0)
    theta = task.prior(rng, 200)
    draws = np.stack([task.posterior(rng, y, 19) for y in task.simulate(rng, theta)])
    ranks = [(f(draws) < f(theta)[:, None]).sum(1) for f in (np.positive, np.square)]
    counts = np.stack([((np.concatenate(ranks, 1)) // 2 == tenth).sum(0) for tenth in range(10)])
    assert (chisquare(counts).pvalue > 1e-3 / counts.shape[1]).all()
