"""What `verdict` says of runs with known faults, and nested R-hat by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from numpyro_diffusion.diagnostics import nested_rhat, verdict
from numpyro_diffusion.diagnostics.convergence import statistics
from numpyro_diffusion.diagnostics.nested import early_late_rhat, standard_error

RNG = np.random.default_rng(0)
GOOD = RNG.normal(size=(4, 500, 3))


def run_of(draws, problems=()):
    """What `verdict` reads of a particle sampler."""
    return SimpleNamespace(get_samples=lambda group_by_chain: {"x": draws}, problems=problems)


def test_nested_rhat_by_hand():
    """Two islands of two chains of two draws."""
    draws = np.array([[[0.0, 2.0], [1.0, 1.0]], [[4.0, 4.0], [2.0, 6.0]]])
    between = np.var([1.0, 4.0], ddof=1)
    within = np.mean([0.0 + np.mean([2.0, 0.0]), 0.0 + np.mean([0.0, 8.0])])
    assert nested_rhat(draws) == pytest.approx(np.sqrt(1.0 + between / within))
    with pytest.raises(ValueError, match="two islands or more"):
        nested_rhat(draws[:1])


def test_standard_error_covers():
    """Of islands of independent draws it is sd / sqrt(all draws), on average."""
    draws = RNG.normal(size=(4, 20, 5, 2000))
    assert np.sqrt(np.mean(standard_error(draws) ** 2)) == pytest.approx(1.0 / 20.0, rel=0.05)


def test_drift_is_seen_early_against_late():
    draws = RNG.normal(size=(4, 50, 10))
    assert early_late_rhat(draws) < 1.01
    assert early_late_rhat(draws + np.linspace(0.0, 1.0, 10)) > 1.05


def test_good_draws_have_converged():
    said = verdict(run_of(GOOD))
    assert said.converged and not said.problems and said.ess > 400 and said.worst.startswith("x[")
    assert str(said).startswith("converged")


def test_a_chain_apart_is_named():
    draws = GOOD.copy()
    draws[2, :, 1] += 2.0
    said = verdict(run_of(draws))
    assert not said.converged and said.worst == "x[1]"
    assert "of 4 chains, 2 (2" in said.problems[0] and "0 (" not in said.problems[0]


def test_few_draws_and_the_samplers_own_problems():
    said = verdict(run_of(GOOD[:, :60], problems=("weights degenerate",)))
    assert not said.converged and said.problems[0] == "weights degenerate"
    assert any("effective sample size" in problem for problem in said.problems)


def test_what_cannot_be_judged():
    """Constant entries, whole numbers and NaN."""
    assert statistics({"constant": np.ones((4, 500)), "x": GOOD}, "").converged
    assert "not finite" in statistics({"x": np.where(GOOD > 3, np.nan, GOOD)}, "").problems[0]


def funnel():
    scale = numpyro.sample("scale", dist.Normal(0.0, 3.0))
    with numpyro.plate("points", 5):
        numpyro.sample("x", dist.Normal(0.0, np.e ** (0.5 * 1.0) * jax.numpy.exp(0.5 * scale)))


def test_trees_and_divergences_of_a_run():
    """NUTS with shallow trees in a funnel."""
    kernel = NUTS(funnel, max_tree_depth=3, step_size=0.3, adapt_step_size=False)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=200, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("num_steps",))
    said = verdict(mcmc)
    assert not said.converged
    assert any("saturated at 7 steps" in problem for problem in said.problems)
    assert any("diverged" in problem for problem in said.problems)
