"""Noise space: the sites that `NoiseReparam` makes, and the density of what it samples."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions.transforms import ExpTransform, LowerCholeskyTransform
from numpyro.handlers import condition, reparam, seed, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density
from scipy.stats import norm

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import Heun

MEAN, DEVIATION = np.array([0.5, -1.0], np.float32), 0.8


def prior(transform=None, mean=MEAN, **options):
    """An isotropic Gaussian, whose flow mean + deviation z three Heun steps find exactly."""
    return DiffusionPrior(Gaussian(mean, DEVIATION**2), transform=transform, flow_solver=Heun(3), **options)


def plated(prior):
    with numpyro.plate("rows", 3):
        return numpyro.sample("x", prior)


# name: (model of one site "x", shape of x, shape of its noise, what the flow's Gaussian point becomes)
MODELS = {
    "one": (lambda: numpyro.sample("x", prior()), (2,), (2,), lambda u: u),
    "plate": (lambda: plated(prior()), (3, 2), (3, 2), lambda u: u),
    "expand": (lambda: numpyro.sample("x", prior().expand((4,))), (4, 2), (4, 2), lambda u: u),
    "to_event": (lambda: numpyro.sample("x", prior().expand((4,)).to_event(1)), (4, 2), (4, 2), lambda u: u),
    "plate and event": (lambda: plated(prior().expand((3, 5)).to_event(1)), (3, 5, 2), (3, 5, 2), lambda u: u),
    "transform": (lambda: numpyro.sample("x", prior(ExpTransform())), (2,), (2,), jnp.exp),
    "transform in a plate": (lambda: plated(prior(ExpTransform())), (3, 2), (3, 2), jnp.exp),
    "to matrices": (
        lambda: plated(prior(LowerCholeskyTransform(), np.zeros(3, np.float32))),
        (3, 2, 2),
        (3, 3),
        LowerCholeskyTransform(),
    ),
    "no density": (lambda: numpyro.sample("x", prior(density="none")), (2,), (2,), lambda u: u),
}


@pytest.mark.parametrize("model, shape, noise_shape, to_support", MODELS.values(), ids=MODELS)
def test_sites(model, shape, noise_shape, to_support):
    """A standard normal site, and `x` a deterministic one that is the transformed quantile map of it."""
    sites = trace(seed(reparam(model, config={"x": NoiseReparam()}), 0)).get_trace()
    z, x = sites["x_noise"], sites["x"]
    assert (z["type"], x["type"]) == ("sample", "deterministic")
    assert z["value"].shape == noise_shape and x["value"].shape == shape
    density = np.asarray(jax.jit(z["fn"].log_prob)(z["value"]))
    np.testing.assert_allclose(density.sum(), norm.logpdf(np.asarray(z["value"])).sum(), rtol=1e-5)
    assert density.shape == z["fn"].batch_shape
    mean = MEAN if noise_shape[-1] == 2 else 0.0
    np.testing.assert_allclose(x["value"], to_support(mean + DEVIATION * np.asarray(z["value"])), atol=2e-3)


def regression(y, prior):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x, noise).to_event(2), obs=y)


noisy_regression = reparam(regression, config={"x": NoiseReparam()})


def test_density_in_noise_space():
    """N(0, I) for the noise, plus the rest of the model at the flow's point: no Jacobian, with a transform either."""
    z = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    y = np.ones((3, 2), np.float32)
    for p in (prior(), prior(ExpTransform()), prior(density="none")):
        got, _ = log_density(noisy_regression, (y, p), {}, {"x_noise": z, "noise": 0.7})
        rest = dist.Normal(p.flow(z), 0.7).log_prob(y).sum() + dist.HalfNormal(1.0).log_prob(0.7)
        np.testing.assert_allclose(got, dist.Normal().log_prob(z).sum() + rest, rtol=1e-5)


def test_gradient_reaches_the_noise(x64):
    """Through the flow: -z plus deviation times the likelihood's gradient."""
    z, y = np.random.default_rng(0).normal(size=(3, 2)), np.ones((3, 2))

    def density(z):
        return log_density(noisy_regression, (y, prior()), {}, {"x_noise": z, "noise": 0.7})[0]

    expected = -z + DEVIATION * (y - (MEAN + DEVIATION * z)) / 0.7**2
    np.testing.assert_allclose(jax.jit(jax.grad(density))(z), expected, rtol=1e-3)


def test_several_priors():
    """Each named site is moved, the others stay."""

    def model():
        numpyro.sample("a", prior())
        numpyro.sample("b", prior())
        numpyro.sample("c", dist.Normal())

    sites = trace(seed(reparam(model, config={"a": NoiseReparam()}), 0)).get_trace()
    assert [name for name, site in sites.items() if site["type"] == "sample"] == ["a_noise", "b", "c"]
    sites = trace(seed(reparam(model, config={"a": NoiseReparam(), "b": NoiseReparam()}), 0)).get_trace()
    assert [name for name, site in sites.items() if site["type"] == "sample"] == ["a_noise", "b_noise", "c"]
    assert (sites["a_noise"]["value"] != sites["b_noise"]["value"]).all()


@pytest.mark.slow
def test_variational_inference():
    """A normal guide finds the conjugate posterior: y = 3 under N(0, 1) and unit noise is N(1.5, 0.5)."""

    def model(y):
        x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), flow_solver=Heun(3)))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    noisy = reparam(model, config={"x": NoiseReparam()})
    guide = AutoNormal(noisy)
    svi = SVI(noisy, guide, numpyro.optim.Adam(0.03), Trace_ELBO(num_particles=16))
    params = svi.run(random.key(0), 500, jnp.array([3.0]), progress_bar=False).params
    x = guide.sample_posterior(random.key(1), params, jnp.array([3.0]), sample_shape=(4000,))["x"]
    assert abs(x.mean() - 1.5) < 0.1  # of the optimiser; the draws' own error is 0.011
    assert abs(x.std() - 0.5**0.5) < 0.07


BAD = {
    "observed": (condition(lambda: numpyro.sample("x", prior()), {"x": MEAN}), ValueError, "site 'x' is observed"),
    "observed by obs": (lambda: numpyro.sample("x", prior(), obs=MEAN), ValueError, "site 'x' is observed"),
    "no prior": (
        lambda: numpyro.sample("x", dist.Normal().expand((2,))),
        TypeError,
        "NoiseReparam needs a DiffusionPrior at site 'x'; got Normal",
    ),
}


@pytest.mark.parametrize("model, error, message", BAD.values(), ids=BAD)
def test_bad_sites(model, error, message):
    with pytest.raises(error, match=message):
        trace(seed(reparam(model, config={"x": NoiseReparam()}), 0)).get_trace()
