"""Published problems with known answers, by the kernels that claim to be right on them."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from moments import assert_moments

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, DiffusionPCN, Mixture, NoiseSpace, ParticleGibbs, ScoreHMC
from numpyro_diffusion.noise import VE, UniformLogSNR
from numpyro_diffusion.solve import DPMSolverPP

pytestmark = pytest.mark.slow
PROBLEMS = Path(__file__).parents[1] / "benchmarks/data/mixture_inverse_problems.json"


def run(kernel, *args, num_warmup, num_samples, chains=8):
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": chains}
    mcmc = numpyro.infer.MCMC(kernel, **options, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), *args)
    return mcmc.get_samples(group_by_chain=True)


# Tall data: theta ~ N(mu, diag tau^2), x_i | theta ~ N(theta, 0.2 I + 0.8 11')

CENTRE, SPREAD = jnp.array([1.0, -0.5]), jnp.array([1.5, 0.7])
NOISE = 0.2 * jnp.eye(2) + 0.8 * jnp.ones((2, 2))
TALL = DiffusionPrior(Gaussian(CENTRE, SPREAD**2, VE(0.01, 60.0)), sampler=DPMSolverPP(100, eta=1.0))


def tall(data):
    theta = numpyro.sample("theta", TALL)
    numpyro.sample("x", dist.MultivariateNormal(theta, NOISE).expand([len(data)]).to_event(1), obs=data)


@pytest.mark.parametrize(
    "kernel",
    [MALA(tall), ScoreHMC(tall), NoiseSpace(tall), DiffusionPCN(tall, num_proposals=4)],
    ids=lambda k: type(k).__name__,
)
def test_tall_data(kernel):
    """A test at t = 0 has no composition bias: the posterior of 8 observations, means and both covariances."""
    data = dist.MultivariateNormal(jnp.array([2.0, 0.3]), NOISE).sample(jax.random.key(1), (8,))
    precision = jnp.diag(SPREAD**-2.0) + 8 * jnp.linalg.inv(NOISE)
    covariance = jnp.linalg.inv(precision)
    mean = covariance @ (CENTRE / SPREAD**2 + jnp.linalg.inv(NOISE) @ data.sum(0))
    theta = run(kernel, data, num_warmup=500, num_samples=1500)["theta"]
    assert_moments(theta, mean, jnp.diag(covariance))
    both = jnp.array([1.0, 1.0])
    assert_moments(theta @ both, mean @ both, both @ covariance @ both)


# A mixture prior under a linear observation (T1 of the MCGDiff family)


def inverse_problem(name):
    fields = json.loads(PROBLEMS.read_text())[name]
    dimension = int(name.split("_")[0])
    corners = [(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = jnp.array([np.tile(corner, dimension // 2) for corner in corners])
    law = GaussianMixture(jnp.array(fields["weights"]).reshape(-1), means, 1.0, VE(0.02, 80.0))
    y = jnp.array(fields["y"], float).reshape(-1)
    return law, jnp.array(fields["A"], float).reshape(len(y), dimension), y, jnp.array(float(fields["sigma"]))


def linear(prior, matrix, y, sigma):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(matrix @ x, sigma).to_event(1), obs=y)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(DiffusionPCN, num_proposals=4, global_fraction=1.0), marks=pytest.mark.optimised),
        partial(Mixture, [partial(DiffusionPCN, num_proposals=4, global_fraction=1.0), MALA], [0.7, 0.3]),
    ],
    ids=["pcn", "mixture_with_mala"],
)
def test_mixture_inverse_problem(make):
    """The weights of the modes that hold more than a twentieth, and where the draws within them are.

    The rare modes are far away: moments over all of them are a matter of a few draws, and no test.
    """
    law, matrix, y, sigma = inverse_problem("8_4_0")
    prior = DiffusionPrior(law, sampler=DPMSolverPP(80, eta=1.0, grid=UniformLogSNR()))
    kernel = make(model=linear) if isinstance(make, partial) and make.func is Mixture else make(linear)
    x = run(kernel, prior, matrix, y, sigma, num_warmup=150, num_samples=150, chains=100)["x"]
    covariance = jnp.linalg.inv(jnp.eye(8) + matrix.T @ matrix / sigma**2)
    means = (matrix.T @ y / sigma**2 + law.means) @ covariance
    evidence = dist.MultivariateNormal(law.means @ matrix.T, matrix @ matrix.T + sigma**2 * jnp.eye(len(y)))
    weights = jax.nn.softmax(law.log_weights + evidence.log_prob(y))
    nearest = jnp.argmax(
        law.log_weights - 0.5 * jnp.sum((x[..., None, :] - law.means) ** 2, -1), axis=-1
    )  # prior components are eight apart in every pair of dimensions: a draw's component is plain
    deviation = jnp.sqrt(jnp.diag(covariance))
    for k in np.flatnonzero(np.asarray(weights) > 0.05):
        share = (nearest == k).mean()  # chains rarely leave a mode: each counts once
        assert abs(share - weights[k]) < 4.0 * jnp.sqrt(weights[k] * (1.0 - weights[k]) / len(x))
        within = x[nearest == k]
        np.testing.assert_allclose((within.mean(0) - means[k]) / deviation, 0.0, atol=0.1)
        np.testing.assert_allclose(within.std(0) / deviation, 1.0, atol=0.1)


# Gaussian-process regression by conditional diffusion: z = linspace(0, 5, 10), K = exp(-|z_i - z_j|), y = f + N(0, I)


def test_gaussian_process_by_particle_gibbs():
    """1000 draws with 10 particles: the divergence of their moments as the authors code it, twice that from the truth.

    1000 independent exact draws have .067; the authors' particle Gibbs with 10 particles has .217.
    """
    places = np.linspace(0.0, 5.0, 10)
    kernel = np.exp(-np.abs(places[:, None] - places))
    y = np.linalg.cholesky(kernel + np.eye(10)) @ np.random.default_rng(0).normal(size=10)
    covariance = np.linalg.inv(np.linalg.inv(kernel) + np.eye(10))
    prior = DiffusionPrior(Gaussian(jnp.zeros(10), jnp.asarray(kernel), VE(0.01, 40.0)), density="none")

    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("f", prior), 1.0).to_event(1), obs=y)

    draws = run(ParticleGibbs(model), jnp.asarray(y), num_warmup=100, num_samples=1000, chains=4)["f"]
    for f in np.asarray(draws, np.float64):
        gap, found = f.mean(0) - covariance @ y, np.cov(f.T)
        ratio = np.linalg.solve(covariance, found)
        assert np.trace(ratio) - np.linalg.slogdet(ratio)[1] - 10 + gap @ np.linalg.solve(covariance, gap) < 0.1
