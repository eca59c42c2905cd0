"""What a model observes, read off the model: guidance agrees with the observation written down by hand."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.guidance import Guided, Likelihood, Observation, linear
from numpyro_diffusion.infer.model.observation import guided_site
from numpyro_diffusion.infer.model.tempering import TEMPERATURE, temper
from numpyro_diffusion.noise import VE

A, Y = jnp.array([[1.0, 0.5], [0.0, 2.0], [1.0, 1.0]]), jnp.array([1.0, -0.5, 0.3])
SCALE = jnp.array([0.4, 0.7, 1.0])
MIXTURE = GaussianMixture([0.3, 0.7], jnp.array([[-1.0, 0.0], [1.0, 1.0]]), 0.5, VE())
X_T, T = jnp.array([0.4, -0.8]), 0.5


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


def with_what_has_nothing_to_do_with_it(x):
    in_one_site(x)
    numpyro.sample("other", dist.Poisson(2.0), obs=3)
    numpyro.factor("constant", 1.0)


SAME = [in_one_site, in_a_plate, in_several_sites, with_a_covariance, with_what_has_nothing_to_do_with_it]


@pytest.mark.parametrize("rest", SAME, ids=lambda rest: rest.__name__)
def test_reads_what_is_written(rest, x64):
    _, _, guided = guided_site(with_prior(rest), (), {})
    assert isinstance(guided.observation, Observation) and guided.moment == "mmps"
    found, expected = guided.outlook(X_T, T), Guided(MIXTURE, linear(A, Y, SCALE)).outlook(X_T, T)
    np.testing.assert_allclose(found.guided, expected.guided, rtol=1e-6)
    shift = jnp.log(SCALE).sum()  # read in units of the noise
    np.testing.assert_allclose(found.log_twist - shift, expected.log_twist, rtol=1e-6)


def test_a_tempered_likelihood_is_one_of_more_noise(x64):
    _, _, guided = guided_site(temper(with_prior(in_one_site)), (), {TEMPERATURE: jnp.array(0.25)})
    expected = Guided(MIXTURE, linear(A, Y, 2.0 * SCALE))(X_T, T)
    np.testing.assert_allclose(guided(X_T, T).x0, expected.x0, rtol=1e-6)


def test_a_transform_is_part_of_the_observation(x64):
    """The map is linearised in the denoiser's own space."""
    prior = DiffusionPrior(MIXTURE, transform=transforms.ExpTransform())
    _, _, guided = guided_site(
        with_prior(lambda x: numpyro.sample("y", dist.Normal(A @ jnp.log(x), SCALE).to_event(1), obs=Y), prior), (), {}
    )
    expected = Guided(MIXTURE, linear(A, Y, SCALE))(X_T, T)
    np.testing.assert_allclose(guided(X_T, T).x0, expected.x0, rtol=1e-6)


def test_plates_are_one_point(x64):
    """Two points, each seen through the same map, and their sum: a joint observation."""

    def model():
        with numpyro.plate("points", 2):
            x = numpyro.sample("x", DiffusionPrior(MIXTURE))
        numpyro.sample("sum", dist.Normal(x.sum(0), 0.5).to_event(1), obs=Y[:2])

    _, _, guided = guided_site(model, (), {})
    pair = jnp.stack([X_T, -X_T])
    assert guided.event_shape == (2, 2)
    shift = guided(pair, T).x0 - guided.base(pair, T).x0
    step = 1e-4
    moved = guided.base(pair + step * guided.base(pair, T).score, T).x0  # anything smooth: the base is a plate of two
    np.testing.assert_allclose(moved[0], MIXTURE(pair[0] + step * MIXTURE(pair[0], T).score, T).x0, rtol=1e-6)
    assert (jnp.abs(shift) > 1e-3).all()


def counts(x):
    numpyro.sample("y", dist.Poisson(jnp.exp(x[0])), obs=3)


def varying_noise(x):
    numpyro.sample("y", dist.Normal(x[0], jnp.exp(x[1])), obs=1.0)


def gaussian_and_factor(x):
    in_one_site(x)
    numpyro.factor("constraint", -jnp.abs(x[0]))


@pytest.mark.parametrize("rest", [counts, varying_noise, gaussian_and_factor], ids=lambda rest: rest.__name__)
def test_other_likelihoods_steer_by_their_gradient(rest):
    _, _, guided = guided_site(with_prior(rest), (), {})
    assert isinstance(guided.observation, Likelihood) and guided.moment == "dps"
    with pytest.raises(ValueError, match=r"moment 'mmps' needs a Gaussian observation of site 'x'.*Use moment=\"dps\""):
        guided_site(with_prior(rest), (), {}, "mmps")
    given = linear(jnp.eye(2), jnp.zeros(2), 1.0)
    assert guided_site(with_prior(rest), (), {}, "mmps", given)[2].observation is given


def test_several_sites_are_refused():
    def model():
        x, z = (numpyro.sample(name, DiffusionPrior(Gaussian([0.0]))) for name in "xz")
        numpyro.sample("y", dist.Normal(x + z, 1.0).to_event(1), obs=jnp.ones(1))

    with pytest.raises(ValueError, match=r"guidance moves one diffusion site; the model has \['x', 'z'\]"):
        guided_site(model, (), {})
