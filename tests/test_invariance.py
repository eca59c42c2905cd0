"""Moves by noising and denoising leave the posterior where it is: 100,000 exact draws, ranked after a few steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionPCN
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

pytestmark = pytest.mark.slow
COUNT = 100_000
WEIGHTS, MEANS = jnp.array([0.4, 0.6]), jnp.array([[-2.0, 0.5], [1.5, -1.0]])
PRIOR = DiffusionPrior(GaussianMixture(WEIGHTS, MEANS, 0.5, VE(0.01, 40.0)), sampler=DPMSolverPP(128, eta=1.0))
DIRECTIONS = jnp.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])


def model(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.7), obs=y)


def exact_draws(key):
    """The posterior given y = 1: a mixture of two Gaussians."""
    gain = 0.5 * jnp.ones(2) / (1.0 + 0.49)
    log_weight = jnp.log(WEIGHTS) - 0.5 * (1.0 - MEANS.sum(1)) ** 2 / 1.49
    covariance = 0.5 * jnp.eye(2) - jnp.outer(gain, 0.5 * jnp.ones(2))
    key_k, key_x = jax.random.split(key)
    k = jax.random.categorical(key_k, log_weight, shape=(COUNT,))
    centre = MEANS[k] + (1.0 - MEANS[k].sum(1))[:, None] * gain
    return centre + jax.random.normal(key_x, (COUNT, 2)) @ jnp.linalg.cholesky(covariance).T


KERNELS = {"pcn": DiffusionPCN, "pcn_3_proposals": partial(DiffusionPCN, num_proposals=3)}


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_steps_leave_the_posterior_invariant(make):
    """Ranks against as many fresh draws in three directions, by a Kolmogorov-Smirnov distance."""
    start, fresh = exact_draws(jax.random.key(1)), exact_draws(jax.random.key(2))
    kernel = make(model, global_fraction=1.0)
    state = kernel.init(jax.random.split(jax.random.key(3), COUNT), 0, {"x": start}, (1.0,), {})
    step = jax.jit(lambda state: kernel.sample(state, (1.0,), {}))
    for _ in range(3):
        state = step(state)
    moved = state.z["x"]
    assert float(jnp.mean(jnp.any(moved != start, axis=1))) > 0.5
    for direction in DIRECTIONS:
        a, b = np.sort(moved @ direction), np.sort(fresh @ direction)
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid) - np.searchsorted(b, grid)).max() / COUNT
        assert distance < 1.95 * np.sqrt(2.0 / COUNT)  # the 0.1 % point of the two-sample statistic
