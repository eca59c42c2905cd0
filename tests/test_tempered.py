"""Tempering a model's likelihood and nothing else; one adaptation for all particles of a population."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMC
from numpyro.infer.util import potential_energy
from scipy import stats

from numpyro_diffusion.infer import MALA, DiffusiveGibbs, ScoreHMC, Vectorize
from numpyro_diffusion.infer.kernel.adapt import pool_adaptation
from numpyro_diffusion.infer.model.handlers import TEMPERATURE, draw_prior, temper
from numpyro_diffusion.infer.particles.tempering import log_likelihood

SLOW = pytest.mark.slow
Y = jnp.array([0.3, -0.8])


def model(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.3, 2.0))
    share = numpyro.sample("share", dist.Beta(2.0, 3.0))
    numpyro.sample("y", dist.Normal(share, scale).expand([2]).to_event(1), obs=y)
    numpyro.factor("extra", -(share**2))


def nested(y):
    """A site that is drawn while the model is on its way through another's handlers, and a plate."""
    with numpyro.plate("points", 2):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0])
def test_the_likelihood_is_tempered_and_the_jacobian_is_not(temperature):
    """In unconstrained coordinates the target is prior, Jacobian and the power of the likelihood, to rounding."""
    log_scale, logit = 0.7, -0.4
    scale, share = np.exp(log_scale), 1.0 / (1.0 + np.exp(-logit))
    z = {"scale": jnp.asarray(log_scale), "share": jnp.asarray(logit)}
    energy = jax.jit(partial(potential_energy, temper(model), (Y,)))({TEMPERATURE: temperature}, z)
    prior = stats.lognorm.logpdf(scale, 2.0, scale=np.exp(0.3)) + stats.beta.logpdf(share, 2.0, 3.0)
    jacobian = log_scale + np.log(share * (1.0 - share))
    likelihood = stats.norm.logpdf(np.asarray(Y), share, scale).sum() - share**2
    assert float(-energy) == pytest.approx(float(prior + jacobian + temperature * likelihood), rel=1e-5)
    values = {"scale": jnp.asarray(scale), "share": jnp.asarray(share)}
    assert float(log_likelihood(model, (Y,), {}, values)) == pytest.approx(float(likelihood), rel=1e-5)


def test_tempering_in_plates_and_without_a_temperature():
    z = {"scale": jnp.array([0.2, -0.5])}
    prior = (dist.HalfNormal(1.0).log_prob(jnp.exp(z["scale"])) + z["scale"]).sum()
    likelihood = dist.Normal(0.0, jnp.exp(z["scale"])).log_prob(Y).sum()
    for kwargs, power in (({TEMPERATURE: 0.5}, 0.5), ({}, 1.0)):
        energy = potential_energy(temper(nested), (Y,), kwargs, z)
        assert float(-energy) == pytest.approx(float(prior + power * likelihood), rel=1e-5)


def test_values_that_are_no_likelihoods_stay_what_they_are():
    """Who weighs them decides; a prior that cannot be drawn is named."""

    def improper(y):
        numpyro.sample("fine", dist.Normal(0.0, 1.0))
        numpyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(ValueError, match="'flat'.*cannot be drawn.*numpyro.factor"):
        draw_prior(improper, jax.random.key(0), (Y,), {})

    def wild(value):
        numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("wild", value)

    for value in (np.inf, -np.inf, np.nan):
        np.testing.assert_equal(float(log_likelihood(wild, (value,), {}, {"x": 0.0})), value)


# Adaptation


def narrow_and_wide():
    """Half of the mass is within 0.1 of zero, half is spread over 1."""
    numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(jnp.ones(2) / 2), [dist.Normal(0, s) for s in (0.03, 1)]))


@pytest.mark.slow
def test_particles_must_not_adapt_by_themselves():
    """From exact draws, 60 moves of MALA: the share near zero stays. With a step size for each particle it does not."""
    count = 8000
    key_side, key_x, key_run = jax.random.split(jax.random.key(0), 3)
    scale = jnp.where(jax.random.bernoulli(key_side, 0.5, (count,)), 0.03, 1.0)
    z = {"x": scale * jax.random.normal(key_x, (count,))}
    truth = 0.5 * 0.95450 + 0.5 * 0.04784
    error, kernel = 4.0 * np.sqrt(truth * (1.0 - truth) / count), MALA(narrow_and_wide)
    for pool in (pool_adaptation, lambda state: state):
        state = pool(kernel.init(jax.random.split(key_run, count), 100, z, (), {}))
        state, _ = jax.lax.scan(lambda state, _: (pool(kernel.sample(state, (), {})), None), state, None, 60)  # noqa: B023
        share = float((abs(state.z["x"]) < 0.06).mean())
        assert (abs(share - truth) < error) == (pool is pool_adaptation), share


def two_sites(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("a", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


KERNELS = {
    "dense": (partial(MALA, dense_mass=True), "dense"),
    "fixed": (partial(MALA, adapt_mass_matrix=False, target_accept_prob=None, step_size=0.02), "fixed"),
    "ScoreHMC": (partial(ScoreHMC, num_steps=2), "diagonal"),
    "DiffusiveGibbs": (
        partial(DiffusiveGibbs, noise_levels=(2.0, 1.0), num_steps=1, adapt_mass_matrix=True),
        "diagonal",
    ),
    "HMC": (lambda model: Vectorize(HMC(model, trajectory_length=1.0)), "diagonal"),
    "HMC, blocks": (lambda model: Vectorize(HMC(model, trajectory_length=1.0, dense_mass=[("x",)])), "blocks"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) if name != "dense" else name for name in KERNELS])
def test_all_particles_have_the_population_s_adaptation(name):
    """One step size for all, and the covariance of the other half's points; what is fixed by the user stays."""
    make, kind = KERNELS[name]
    z = {"x": jnp.array([1.0, 5.0]) * jax.random.normal(jax.random.key(0), (50, 2)), "a": jnp.linspace(-0.3, 0.3, 50)}
    kernel = make(two_sites)
    state = pool_adaptation(kernel.init(jax.random.split(jax.random.key(1), 50), 20, z, (Y,), {}))
    state = pool_adaptation(kernel.sample(state, (Y,), {}))
    adapted, (a, x) = state.adapt_state, (np.asarray(state.z[name], np.float64) for name in ("a", "x"))
    np.testing.assert_allclose(adapted.step_size, np.broadcast_to(adapted.step_size[0], adapted.step_size.shape))
    others = np.column_stack([a, x])[::2]  # of number 7, and of all odd ones
    covariance = np.cov(others.T) * 25 / 30 + 1e-3 * 5 / 30 * np.eye(3)
    matrix = adapted.inverse_mass_matrix
    if kind == "fixed":
        np.testing.assert_array_equal(matrix, 1.0)
        np.testing.assert_allclose(adapted.step_size, 0.02, rtol=1e-6)
    elif kind == "blocks":
        np.testing.assert_allclose(matrix[("x",)][7], covariance[1:, 1:], rtol=1e-3)
        np.testing.assert_allclose(matrix[("a",)][7], covariance[:1, 0], rtol=1e-3)
    else:
        matrix = next(iter(matrix.values())) if isinstance(matrix, dict) else matrix
        expected = covariance if kind == "dense" else np.diag(covariance)
        np.testing.assert_allclose(matrix[7], np.broadcast_to(expected, matrix[7].shape), rtol=1e-3, atol=1e-4)


def many(size):
    numpyro.sample("x", dist.Normal(0.0, 1.0).expand([size]).to_event(1))


def test_a_dense_preconditioner_of_many_dimensions_does_not_bias_the_population():
    """Draws of N(0, I) in 64 dimensions stay such; by the covariance of all 256, mean squares are .91.

    Their mean square has the error of 256 x 64 squares.
    """
    kernel = ScoreHMC(many, num_steps=8, dense_mass=True, step_size=0.5, target_accept_prob=None)
    draws = jax.random.normal(jax.random.key(0), (256, 64))
    keys = jax.random.split(jax.random.key(1), 256)
    state = pool_adaptation(kernel.init(keys, 10, {"x": draws}, (64,), {}))

    def move(state, _):
        return pool_adaptation(kernel.sample(state, (64,), {})), None

    moved = jax.jit(lambda state: jax.lax.scan(move, state, None, 10)[0])(state)
    assert float(jnp.mean(moved.z["x"] ** 2)) == pytest.approx(1.0, abs=4.5 * np.sqrt(2.0 / (256 * 64)))
