"""Chains that run together adapt together: by NumPyro's scheme on the draws of all of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import known_noise, prior_scale, run
from moments import assert_moments
from numpyro.infer import HMC, NUTS
from numpyro.infer.hmc_util import dual_averaging, warmup_adapter

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import NoiseSpace
from numpyro_diffusion.infer.kernel.adapt import pool_chains
from numpyro_diffusion.infer.kernel.contract import _CHAINS
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

NUM_WARMUP, WINDOW = 45, (6, 41)  # steps of the one window that estimates, see `build_adaptation_schedule`


class Sites(NamedTuple):
    """A state of a kernel with NumPyro's adaptation."""

    i: jax.Array
    z: dict[str, jax.Array]
    adapt_state: Any


@partial(jax.jit, static_argnames=("dense", "alone"))
def adapted(draws, accept_prob, dense, alone=False):
    """States after every step of chains at given draws (chains, steps, 3) with given acceptance (chains, steps)."""
    start, update = warmup_adapter(NUM_WARMUP, dense_mass=[("x",)] if dense else False)

    def chain(draws, accept_prob):
        first = Sites(jnp.zeros((), int), {"x": draws[0]}, start(({"x": draws[0]},), jax.random.key(0)))

        def step(state, given):
            draw, accept_prob = given
            new = update(state.i, accept_prob, ({"x": draw},), state.adapt_state)
            new = jax.lax.cond(state.i < NUM_WARMUP, lambda: new, lambda: state.adapt_state)
            new = Sites(state.i + 1, {"x": draw}, new)
            new = new if alone else pool_chains(state, new, NUM_WARMUP)
            return new, new.adapt_state

        return jax.lax.scan(step, first, (draws, accept_prob))[1]

    return jax.vmap(chain, axis_name=_CHAINS)(draws, accept_prob)


@pytest.fixture(scope="module")
def given():
    """Draws of chains about different means, and their acceptances, that go on after warm-up."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(5, NUM_WARMUP + 10, 3)) @ rng.normal(size=(3, 3)) + rng.normal(size=(5, 1, 3))
    return jnp.asarray(draws, jnp.float32), jnp.asarray(rng.uniform(size=draws.shape[:2]), jnp.float32)


@pytest.mark.parametrize("dense", [False, True])
def test_metric_and_step_size_of_all_chains(given, dense):
    draws, accept_prob = given
    state = adapted(draws, accept_prob, dense)
    seen = np.asarray(draws, float)[:, slice(*WINDOW)].reshape(-1, 3)
    covariance, number = np.cov(seen.T), len(seen)
    expected = covariance * number / (number + 5.0) + 1e-3 * 5.0 / (number + 5.0) * np.eye(3)
    matrix = jax.tree.leaves(state.inverse_mass_matrix)[0]
    expected = expected if dense else np.diag(np.diag(expected))
    matrix = np.asarray(matrix if dense else matrix[..., None] * jnp.eye(3))
    np.testing.assert_array_equal(matrix[:, : WINDOW[1] - 1], np.broadcast_to(np.eye(3), (5, WINDOW[1] - 1, 3, 3)))
    late = matrix[:, WINDOW[1] - 1 :]
    np.testing.assert_allclose(late, np.broadcast_to(expected, late.shape), rtol=1e-4, atol=1e-5)
    init, update = dual_averaging()
    average, step_sizes = init(jnp.log(10.0)), []
    for t in range(NUM_WARMUP):
        average = update(0.8 - accept_prob[:, t].mean(), average)
        step_sizes.append(float(jnp.exp(average[1 if t == NUM_WARMUP - 1 else 0])))
        if t == WINDOW[1] - 1:
            average = init(jnp.log(10.0 * step_sizes[-1]))
    expected = [*step_sizes, *step_sizes[-1:] * 10]  # nothing adapts after warm-up
    np.testing.assert_allclose(state.step_size, np.broadcast_to(expected, (5, len(expected))), rtol=1e-4)


def test_a_chain_alone_is_numpyros(given):
    draws, accept_prob = given
    together = adapted(draws[:1], accept_prob[:1], False)
    alone = adapted(draws[:1], accept_prob[:1], False, alone=True)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(together)[:5], jax.tree.leaves(alone)[:5])


PRIOR = DiffusionPrior(Gaussian(jnp.zeros(2), 1.0, VE(0.01, 40.0)), flow_solver=DPMSolverPP(4))


def narrow(y, prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.05), obs=y)


@pytest.fixture(scope="module")
def correlated():
    """A run of many chains on a posterior with correlation .998 in two of its dimensions."""
    return run(NoiseSpace(narrow), 1.0, PRIOR, num_warmup=60, num_samples=25, chains=32)


@pytest.mark.slow
def test_many_chains_are_good_by_themselves(correlated):
    """The mass matrix is dense and that of the posterior for all chains, trees are short, the draws have the law."""
    adapt_state = correlated.last_state.inner_state.adapt_state
    assert np.ptp(adapt_state.step_size) == 0.0
    (matrix,) = adapt_state.inverse_mass_matrix.values()
    np.testing.assert_array_equal(matrix, np.broadcast_to(matrix[0], matrix.shape))
    variance = float(prior_scale(PRIOR)) ** 2  # of the law that the flow's four steps push forward
    gain = variance * np.ones(2) / (2.0 * variance + 0.05**2)
    covariance = variance * (np.eye(2) - np.outer(gain, np.ones(2)))
    scale = np.sqrt(np.diag(matrix[0]))
    correlation = covariance[0, 1] / covariance[0, 0]  # its error from 32 draws has a deviation of .001
    assert matrix[0, 0, 1] / scale.prod() == pytest.approx(correlation, abs=0.004)
    draws = correlated.get_samples(group_by_chain=True)["x"]
    assert_moments(draws, gain, np.diag(covariance))
    assert np.mean(correlated.get_extra_fields()["num_steps"]) < 8  # a diagonal one takes 24 steps


@pytest.mark.slow
def test_saturated_trees_are_told_by_default():
    """A diagonal mass matrix and trees of at most three steps, on a posterior that is narrow in one direction."""
    few = run(NoiseSpace(narrow, max_tree_depth=2), 1.0, PRIOR, num_warmup=60, num_samples=25, chains=4)
    assert any("trees are saturated at 3 steps" in problem for problem in verdict(few).problems)


METRICS = {
    "many": (NoiseSpace, 16, True),
    "few": (NoiseSpace, 15, False),
    "partial": (partial(NoiseSpace, inner=partial(HMC, trajectory_length=1.0)), 16, True),
    "told": (partial(NoiseSpace, dense_mass=False), 16, False),
    "of_their_own": (lambda model: NoiseSpace(model, NUTS(model)), 16, False),
}


@pytest.mark.parametrize(("make", "chains", "dense"), METRICS.values(), ids=METRICS)
def test_mass_matrix_of_many_chains_is_dense(make, chains, dense):
    kernel = make(known_noise)
    kernel.init(jax.random.split(jax.random.key(0), chains), 5, None, (jnp.array([3.0, -1.0]),), {})
    assert bool(kernel.inner._dense_mass) is dense
