"""What a model observes, read off the model: guidance agrees with the observation written down by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.guidance import Likelihood, Observation, linear
from numpyro_diffusion.infer.model import observation
from numpyro_diffusion.infer.model.handlers import TEMPERATURE, temper
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.noise import VE

A, Y = jnp.array([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]]), jnp.array([1.0, -0.5, 0.3])
SCALE = jnp.array([0.4, 0.7, 1.0])
MIXTURE = GaussianMixture([0.3, 0.7], jnp.array([[-1.0, 0.0], [1.0, 1.0]]), 0.5, VE())
X_T, T = jnp.array([0.4, -0.8]), 0.5


def guided_sites(model, args, kwargs, *options, **named):
    return observation.guided_sites(Record(model).at(args, kwargs), *options, **named)


def guided_site(model, args, kwargs, *options):
    return observation.guided_site(Record(model).at(args, kwargs), *options)


def with_prior(rest, prior=None):
    def model(**kwargs):
        rest(numpyro.sample("x", DiffusionPrior(MIXTURE) if prior is None else prior), **kwargs)

    return model


def in_one_site(x):
    numpyro.sample("y", dist.Normal(A @ x, SCALE).to_event(1), obs=Y)


def in_a_plate(x):
    with numpyro.plate("entries", 3):
        numpyro.sample("y", dist.Normal(A @ x, SCALE), obs=Y)


def in_several_sites(x):
    numpyro.sample("b", dist.Normal(A[1] @ x, SCALE[1]), obs=Y[1])
    numpyro.sample("a", dist.Normal(A[::2] @ x, SCALE[::2]).to_event(1), obs=Y[::2])


def with_a_covariance(x):
    numpyro.sample("y", dist.MultivariateNormal(A @ x, jnp.diag(SCALE**2)), obs=Y)


def with_a_precision(x):
    precision = jnp.diag(SCALE**-2)
    numpyro.sample("y", dist.MultivariateNormal(A @ x, precision_matrix=precision).expand([1]).to_event(1), obs=Y[None])


def with_a_low_rank(x):
    factor = jnp.zeros((3, 1)).at[0, 0].set(0.3)
    diagonal = SCALE**2 - factor[:, 0] ** 2
    numpyro.sample("y", dist.LowRankMultivariateNormal(A @ x, factor, diagonal), obs=Y)


def under_a_mask(x):
    """Entries that are not there, one of them not a number."""
    mean, y = jnp.append(A @ x, jnp.array([x[0], x[1]])), jnp.append(Y, jnp.array([jnp.nan, -100.0]))
    seen = jnp.arange(5) < 3
    with numpyro.plate("entries", 5), numpyro.handlers.mask(mask=seen):
        numpyro.sample("y", dist.Normal(mean, jnp.append(SCALE, jnp.ones(2))), obs=y)


def under_masks_of_a_law(x):
    twice = dist.Normal(jnp.stack([A @ x, A @ x]), SCALE).mask(jnp.array([[True, True, False]] * 2)).to_event(1)
    numpyro.sample("two", twice.mask(jnp.array([False, True])), obs=jnp.stack([jnp.full(3, jnp.nan), Y]))
    vectors = dist.MultivariateNormal(jnp.stack([A @ x, A @ x]), jnp.diag(SCALE**2))
    numpyro.sample("none", vectors.mask(False), obs=jnp.full((2, 3), jnp.nan))
    numpyro.sample("third", dist.Normal(A[2] @ x, SCALE[2]).mask(True), obs=Y[2])


def with_what_has_nothing_to_do_with_it(x):
    in_one_site(x)
    numpyro.sample("other", dist.Poisson(2.0), obs=3)
    numpyro.factor("constant", 1.0)


SAME = [
    in_one_site,
    in_a_plate,
    in_several_sites,
    with_a_covariance,
    with_a_precision,
    with_a_low_rank,
    under_a_mask,
    under_masks_of_a_law,
    with_what_has_nothing_to_do_with_it,
]


def told(observation, x):
    """What an observation says near a point, whatever its coordinates: information, its pull and the misfit."""
    residual, slope = observation.y - observation.mean_of(x), jax.jacfwd(observation.mean_of)(x)
    scale = jnp.broadcast_to(observation.scale, residual.shape)
    residual, slope = residual / scale, slope.reshape(len(residual), -1) / scale[:, None]
    return slope.T @ slope, slope.T @ residual, residual @ residual


def assert_told(found, expected, x):
    both = jax.jit(lambda x: (told(found, x), told(expected, x)))
    for a, b in zip(*both(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


WRITTEN = Observation(Y / SCALE, jnp.ones(3), lambda x, _: A @ x / SCALE)


@pytest.mark.parametrize("rest", SAME, ids=lambda rest: rest.__name__)
def test_reads_what_is_written(rest):
    @jax.jit
    def read(x):
        _, _, guided = guided_site(with_prior(rest), (), {})
        assert isinstance(guided.observation, Observation) and guided.guidance == "mmps"
        return told(guided.observation, x), told(WRITTEN, x)

    for a, b in zip(*read(X_T), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.slow
def test_a_factor_shared_in_a_plate_is_a_factor():
    """As many points as dimensions: the factor's shape is that of the data, and it is no standard deviation."""
    factor, y = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.array([[1.0, -0.5], [0.3, 2.0]])

    def model():
        with numpyro.plate("x_points", 2):
            x = numpyro.sample("x", DiffusionPrior(MIXTURE))
        with numpyro.plate("points", 2):
            numpyro.sample("y", dist.MultivariateNormal(x, scale_tril=factor), obs=y)

    whiten = jnp.linalg.inv(factor).T
    expected = Observation((y @ whiten).reshape(-1), jnp.ones(4), lambda x, _: (x @ whiten).reshape(-1))
    assert_told(guided_site(model, (), {})[2].observation, expected, jnp.array([[0.2, 1.0], [-3.0, 0.5]]))


def test_a_tempered_likelihood_is_one_of_more_noise():
    _, _, guided = guided_site(temper(with_prior(in_one_site)), (), {TEMPERATURE: jnp.array(0.25)})
    assert_told(guided.observation, dataclasses.replace(WRITTEN, scale=2.0 * jnp.ones(3)), X_T)


def test_a_transform_is_part_of_the_observation():
    """The map is that of the denoiser's own space."""
    prior = DiffusionPrior(MIXTURE, transform=transforms.ExpTransform())
    _, _, guided = guided_site(
        with_prior(lambda x: numpyro.sample("y", dist.Normal(A @ jnp.log(x), SCALE).to_event(1), obs=Y), prior), (), {}
    )
    assert_told(guided.observation, WRITTEN, X_T)


PAIR = jnp.stack([X_T, -X_T])
OF_SUM = Observation(WRITTEN.y, jnp.ones(3), lambda x, _: A @ x.reshape(2, 2).sum(0) / SCALE)


def test_plates_are_one_point():
    """Two points, and their sum seen: a joint observation, of a denoiser of both."""

    def model():
        with numpyro.plate("points", 2):
            x = numpyro.sample("x", DiffusionPrior(MIXTURE))
        numpyro.sample("y", dist.Normal(A @ x.sum(0), SCALE).to_event(1), obs=Y)

    _, _, guided = guided_site(model, (), {})
    assert guided.event_shape == (2, 2)
    assert_told(guided.observation, OF_SUM, PAIR)
    np.testing.assert_allclose(guided.base(PAIR, T).x0[1], MIXTURE(PAIR[1], T).x0, rtol=1e-5)


def counts(x):
    numpyro.sample("y", dist.Poisson(jnp.exp(x[0])), obs=3)


def varying_noise(x):
    numpyro.sample("y", dist.Normal(x[0], jnp.exp(x[1])), obs=1.0)


def varying_mask(x):
    numpyro.sample("y", dist.Normal(x, 1.0).mask(x > 0.0).to_event(1), obs=Y[:2])


def gaussian_and_factor(x):
    in_one_site(x)
    numpyro.factor("constraint", -jnp.abs(x[0]))


@pytest.mark.parametrize(
    "rest", [counts, varying_noise, varying_mask, gaussian_and_factor], ids=lambda rest: rest.__name__
)
def test_other_likelihoods_steer_by_their_gradient(rest):
    _, _, guided = guided_site(with_prior(rest), (), {})
    assert isinstance(guided.observation, Likelihood) and guided.guidance == "dps"
    with pytest.raises(ValueError, match=r"guidance='mmps' needs a Gaussian observation of \['x'\].*guidance=\"dps\""):
        guided_site(with_prior(rest), (), {}, "mmps")
    given = linear(jnp.eye(2), jnp.zeros(2), 1.0)
    assert guided_site(with_prior(rest), (), {}, "mmps", given)[2].observation is given


@pytest.mark.slow
def test_several_sites_are_one_point():
    """Each in the unit of its ladder: here a law, and the same a hundred times as wide."""
    wide = VE(100.0 * MIXTURE.schedule.sigma_min, 100.0 * MIXTURE.schedule.sigma_max)
    scaled = DiffusionPrior(GaussianMixture([0.3, 0.7], 100.0 * MIXTURE.means, 0.5e4, wide))

    def model():
        x, z = numpyro.sample("x", DiffusionPrior(MIXTURE)), numpyro.sample("z", scaled)
        numpyro.sample("y", dist.Normal(A @ (x + z / 100.0), SCALE).to_event(1), obs=Y)

    found, flat = guided_sites(model, (), {}), PAIR.reshape(-1)
    assert_told(found.guided.observation, OF_SUM, flat)
    expected = jnp.concatenate([MIXTURE(x_t, T).x0 for x_t in PAIR])
    np.testing.assert_allclose(found.guided.base(flat, T).x0, expected, rtol=1e-4)
    z = {"x": X_T, "z": -100.0 * X_T}
    np.testing.assert_allclose(found.to_denoiser(z), flat, rtol=1e-6)
    np.testing.assert_allclose(found.from_denoiser(flat)["z"], z["z"], rtol=1e-6)
    given = Observation(WRITTEN.y, jnp.ones(3), lambda points, _: A @ (points["x"] + points["z"] / 100.0) / SCALE)
    assert_told(guided_sites(model, (), {}, observation=given).guided.observation, OF_SUM, flat)
    with pytest.raises(ValueError, match=r"takes one diffusion site here; the model has \['x', 'z'\]"):
        guided_site(model, (), {}, "mmps")
