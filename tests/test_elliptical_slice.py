"""Elliptical slice sampling in noise space: cost that does not grow with the dimension, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import known_noise, run
from moments import assert_moments
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import Cycle, EllipticalSlice, NoiseSpace
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

SEEN = jnp.array([1.0, -0.5, 0.3, 2.0])


def field(y, prior):
    """A field of which four entries are seen with noise .5: posterior means .8 y and variances .2."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[: len(y)], 0.5).to_event(1), obs=y)


@pytest.fixture(scope="module")
def fields():
    """Runs on fields of 8 and of 4096 entries."""

    def sampled(size):
        prior = DiffusionPrior(Gaussian(jnp.zeros(size), 1.0, VE(0.01, 40.0)), flow_solver=DPMSolverPP(6))
        options = {"num_warmup": 50, "num_samples": 300, "chains": 8, "fields": ("accept_prob",)}
        return run(NoiseSpace(field, EllipticalSlice), SEEN, prior, **options)

    return {size: sampled(size) for size in (8, 4096)}


def test_cost_does_not_grow_with_the_dimension(fields):
    """Points tried in a step, and how far steps go in the entries that are seen."""

    def cost(mcmc):
        x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[..., :4]
        steps = np.mean(np.square(np.diff(x, axis=1)))
        return float(np.mean(1.0 / np.asarray(mcmc.get_extra_fields()["accept_prob"]))), steps

    (tried, steps), (tried_more, steps_more) = (cost(fields[size]) for size in (8, 4096))
    assert 1.0 < tried < 6.0
    assert tried_more == pytest.approx(tried, rel=0.1) and steps_more == pytest.approx(steps, rel=0.15)


def test_law_of_a_field(fields):
    draws = fields[4096].get_samples(group_by_chain=True)["x"][..., :8]
    variance = np.r_[np.full(4, 0.2), np.ones(4)]
    assert_moments(draws, np.r_[0.8 * np.asarray(SEEN), np.zeros(4)], variance)


def test_in_turn_with_a_kernel_that_adapts():
    """Other sites on a scale far from one: the cycle has both."""

    def model(y):
        far = numpyro.sample("far", dist.Normal(50.0, 0.1))
        numpyro.sample("y", dist.Normal(far, 0.1), obs=y)

    mcmc = run(Cycle([EllipticalSlice, NUTS], model=model), 50.2, num_warmup=200, num_samples=300)
    assert_moments(mcmc.get_samples(group_by_chain=True)["far"], 50.1, 0.005)


def discrete():
    numpyro.sample("k", dist.Bernoulli(0.3))


REFUSED = {
    "diffusion": (known_noise, (SEEN[:2],), r"Use NoiseSpace\(model, EllipticalSlice\)"),
    "discrete": (discrete, (), "discrete"),
    "empty": (lambda: numpyro.factor("y", 0.0), (), "needs a latent site"),
}


@pytest.mark.parametrize("model, args, message", REFUSED.values(), ids=REFUSED)
def test_refused(model, args, message):
    with pytest.raises(ValueError, match=message):
        EllipticalSlice(model).init(jax.random.key(0), 0, None, args, {})
