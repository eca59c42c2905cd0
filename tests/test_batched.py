"""Priors with a batch of conditions: each row is the prior under its own condition, wherever NumPyro takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from laws import around
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.util import log_density

from numpyro_diffusion.denoise import Conditioned, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.nn import MLP, Condition
from numpyro_diffusion.nn.condition import Absent
from numpyro_diffusion.noise import VE
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import DPMSolverPP, Heun

SOLVERS = {"sampler": DPMSolverPP(16, eta=1.0), "flow_solver": Heun(4), "density_solver": Heun(4)}


def network():
    backbone = MLP((2,), features=8, num_blocks=1, cond_shape=(3,), rngs=nnx.Rngs(0))
    backbone.output_layer.kernel[...] = jax.random.normal(jax.random.key(1), (8, 2), jnp.float32)
    for _, node in nnx.iter_graph(backbone):
        if isinstance(node, Absent):  # as after training with and without conditions
            node[...] = jnp.full_like(node[...], 0.3)
    return NetworkDenoiser(backbone, schedule=VE(0.05, 20.0))


NETWORK = network()
COND = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
POINTS = np.random.default_rng(1).normal(size=(5, 4, 2)).astype(np.float32)
POINTS[0] = POINTS[0, 0]


def prior(cond, denoiser=NETWORK, **options):
    return DiffusionPrior(denoiser, cond=cond, **SOLVERS, **options)


def rows(of, x):
    """What the priors of one condition each say of their column of points."""
    return jnp.stack([getattr(prior(cond), of)(x[:, i]) for i, cond in enumerate(COND)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["log_prob", "flow"])
def test_each_row_is_the_prior_under_its_condition(of):
    """In one batch, in a grid of them, and with one point for all conditions."""
    batch, expected = getattr(prior(COND), of), rows(of, POINTS)
    assert np.ptp(expected[0], axis=0).max() > 0.1  # at one point: conditions matter
    np.testing.assert_allclose(batch(POINTS), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(batch(POINTS[0, 0]), expected[0], rtol=1e-4, atol=1e-4)
    grid = getattr(prior(COND.reshape(2, 2, 3)), of)(POINTS.reshape(5, 2, 2, 2))
    np.testing.assert_allclose(grid, expected.reshape(grid.shape), rtol=1e-4, atol=1e-4)


CENTRES = np.array([-2.0, 0.0, 1.5], np.float32)


def test_draws_of_each_row():
    """Mean and variance of 4,000 draws of three laws within 4.5 standard errors and the 3 % that 32 times cost."""
    law = around(CENTRES, sampler=DPMSolverPP(32, eta=1.0))
    x = np.asarray(law.sample(jax.random.key(0), (4, 1000)))
    assert x.shape == (4, 1000, 3, 1)
    x = x.reshape(4000, 3)
    assert (abs(x.mean(0) - CENTRES) < 4.5 / 4000**0.5 + 0.01).all()
    assert (abs(x.var(0) - 1) < 4.5 * (2 / 4000) ** 0.5 + 0.03).all()
    assert (abs(np.corrcoef(x.T)[np.triu_indices(3, 1)]) < 4.5 / 4000**0.5).all()  # each with noise of its own


def test_gradient_in_the_conditions():
    """Row by row and zero between rows; against finite differences of the density and the closed form of the flow."""
    x, law = np.array([[0.3], [0.4], [-1.0]], np.float32), lambda c: around(c, density_solver=Heun(32))
    density = jax.jit(lambda c: law(c).log_prob(x))
    jacobian, step = np.asarray(jax.jit(jax.jacrev(density))(CENTRES)), 0.1  # a parabola: no error but rounding's
    for i in range(3):
        h = step * np.eye(3, dtype=np.float32)[i]
        by_differences = (density(CENTRES + h) - density(CENTRES - h)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, i], by_differences, atol=2e-3)
    # the terminal law does not know of c: 2 / sigma_max of the slope
    np.testing.assert_allclose(np.diag(jacobian), x[:, 0] - CENTRES, rtol=0.06)
    by_flow = jax.jit(jax.jacrev(lambda c: law(c).flow(x)[:, 0]))(CENTRES)
    np.testing.assert_allclose(by_flow, np.eye(3), atol=0.05)


class Labelled(nnx.Module):
    """A network told its class: the standardised mean is that class's row of a table."""

    event_shape, cond_shape = (2,), ()

    def __init__(self):
        self.table = nnx.Param(jnp.arange(6.0).reshape(3, 2))

    def __call__(self, x, c_noise, cond=None):
        return self.table[cond]


def test_class_labels():
    """Whole numbers are conditions too: two classes in two rows."""
    labels, denoiser = jnp.array([2, 0]), NetworkDenoiser(Labelled(), target="x0")
    batch = prior(labels, denoiser)
    assert batch.batch_shape == (2,) and batch.sample(jax.random.key(0), (3,)).shape == (3, 2, 2)
    np.testing.assert_allclose(batch.flow(jnp.zeros((2, 2))), [[4.0, 5.0], [0.0, 1.0]], atol=1e-4)


@pytest.mark.slow
def test_conditions_with_a_switch():
    """One switch for all rows or one for each: a row whose condition is absent is the unconditional prior."""
    absent = DiffusionPrior(NETWORK, **SOLVERS).log_prob(POINTS[0])
    present = prior(COND).log_prob(POINTS[0])
    on = np.array([True, False, True, False])
    mixed = prior(Condition(COND, on))
    assert mixed.batch_shape == (4,)
    np.testing.assert_allclose(mixed.log_prob(POINTS[0]), np.where(on, present, absent), rtol=1e-4)
    np.testing.assert_allclose(prior(Condition(COND, jnp.asarray(True))).log_prob(POINTS[0]), present, rtol=1e-4)


def model(cond, y=None):
    with numpyro.plate("rows", 4):
        x = numpyro.sample("x", prior(cond))
        numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


@pytest.mark.slow
def test_as_any_distribution_in_numpyro():
    """Plates, expand, to_event, a model's density, and noise space."""
    x, y = POINTS[0], np.zeros(4, np.float32)
    terms = prior(COND).log_prob(x)
    sites = trace(seed(model, 0)).get_trace(COND)
    assert sites["x"]["value"].shape == (4, 2) and sites["x"]["fn"].batch_shape == (4,)
    got, _ = log_density(model, (COND, y), {}, {"x": x})
    np.testing.assert_allclose(got, terms.sum() + dist.Normal(x.sum(-1), 1.0).log_prob(y).sum(), rtol=1e-4)
    wide = prior(COND).expand((5, 4))
    assert jax.eval_shape(lambda key: wide.sample(key, (7,)), jax.random.key(0)).shape == (7, 5, 4, 2)
    np.testing.assert_allclose(wide.log_prob(POINTS), prior(COND).log_prob(POINTS), rtol=1e-5)
    one = prior(COND).to_event(1)
    assert (one.batch_shape, one.event_shape) == ((), (4, 2))
    np.testing.assert_allclose(one.log_prob(x), terms.sum(), rtol=1e-5)
    noisy = trace(seed(reparam(model, config={"x": NoiseReparam()}), 0)).get_trace(COND)
    assert noisy["x_noise"]["fn"].batch_shape == (4,)
    np.testing.assert_allclose(noisy["x"]["value"], prior(COND).flow(noisy["x_noise"]["value"]), rtol=1e-5)


def test_new_conditions_are_no_new_program():
    traces = []

    @jax.jit
    def density(p, x):
        traces.append(x)
        return p.log_prob(x)

    for cond in (COND, COND + 1.0):
        np.testing.assert_allclose(density(prior(cond), POINTS[0]), prior(cond).log_prob(POINTS[0]), rtol=1e-5)
    assert len(traces) == 1


@jax.default_matmul_precision("highest")  # a GPU rounds to ten bits otherwise, batch and single differently
def test_over_points():
    """A function of a denoiser and a point, mapped over both; a condition given by `Conditioned` is one like any."""
    batch = DiffusionPrior(Conditioned(NETWORK, COND), **SOLVERS)
    mean = lambda denoiser, x, t: denoiser(x, t).x0  # noqa: E731
    times = jnp.linspace(0.2, 0.8, 20).reshape(5, 4)
    over = jax.jit(lambda p, *arrays: p.over_points(mean, arrays[0].shape[:-1], *arrays))
    got = over(batch, POINTS, times)
    for i, cond in enumerate(COND):
        one = over(prior(cond), POINTS[:, i], times[:, i])
        np.testing.assert_allclose(got[:, i], one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one[0], Conditioned(NETWORK, COND[3])(POINTS[0, 3], times[0, 3]).x0, rtol=1e-5)


BAD = {
    "one denoiser": (lambda: prior(COND).denoiser, r"batch_shape \(4,\): one denoiser for each condition"),
    "shape": (lambda: prior(COND[:, :2]), r"cond must end with shape \(3,\), that of one condition; got \(4, 2\)"),
    "few dimensions": (lambda: around(1.0), "cond must have cond_batch_dims=1 leading dimensions"),
    "points": (lambda: prior(COND).log_prob(POINTS[:, 0]), "Incompatible shapes for broadcasting"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
