"""Laws learned from pairs of parameters and data: as a likelihood, as an amortised posterior, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from laws import run
from moments import assert_moments
from numpyro.handlers import reparam
from numpyro.infer import NUTS
from numpyro.infer.util import log_density

from numpyro_diffusion.denoise import Conditioned, Gaussian, NetworkDenoiser, Prediction
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import Independence
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.reparam import TransportReparam
from numpyro_diffusion.solve import DPMSolverPP, Heun
from numpyro_diffusion.train import fit
from numpyro_diffusion.train.losses import StableTargetField

SLOW = pytest.mark.slow
SCHEDULE = VE(0.01, 40.0)
A, NOISE = np.array([[1.0, 0.5], [0.0, 1.2]]), 0.6
UNITS = 1000.0, 100.0
"""Location and scale in which the amortised posterior is given its data."""


@jax.tree_util.register_static
class Simulator:
    """The exact conditional denoiser of y given theta, N(A theta, NOISE^2).

    Its highest noise is a thousand: the density takes one terminal law for all conditions, and an error of the first
    order in their means over that noise.
    """

    schedule, event_shape, cond_shape, location, scale = VE(0.01, 1000.0), (2,), (2,), 0.0, 1.5

    def __call__(self, x_t, t, cond=None):
        return Gaussian(A @ cond, NOISE**2, self.schedule)(x_t, t)


def posterior(y):
    """Mean (2,) and covariance (2, 2) of theta ~ N(0, I) given data (n, 2)."""
    covariance = np.linalg.inv(np.eye(2) + len(y) * A.T @ A / NOISE**2)
    return covariance @ A.T @ np.asarray(y).sum(0) / NOISE**2, covariance


def model(y, denoiser, steps=12):
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", DiffusionPrior(denoiser, cond=theta, density_solver=Heun(steps)), obs=y)


def pairs(count=8000):
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(count, 2))
    return theta, theta @ A.T + NOISE * rng.normal(size=(count, 2))


def network(features=8, **options):
    return MLP((2,), features, 2, features, rngs=nnx.Rngs(0), **{"cond_shape": (2,), **options})


def train(x, cond, features=32, **options):
    settings = {"schedule": SCHEDULE, "num_steps": 2000, "batch_size": 256, "progress_bar": False, **options}
    return fit(jax.random.key(0), network(features), x, cond=cond, **settings).denoiser


@pytest.fixture(scope="module")
def learned():
    """The likelihood and the amortised posterior of one simulator."""
    theta, y = pairs()
    return train(y, theta), train(theta, UNITS[0] + UNITS[1] * y)


DATA = np.array([0.5, -0.3]) @ A.T + NOISE * np.random.default_rng(1).normal(size=(6, 2))


def test_likelihood_and_its_gradient_in_the_parameters(x64):
    """Of the flow's density, against the closed form: second order in the solver's step."""

    def log_likelihood(theta, y, steps):
        return DiffusionPrior(Simulator(), cond=theta, density_solver=Heun(steps)).log_prob(y)

    both, variance = jax.jit(jax.value_and_grad(log_likelihood), static_argnums=2), NOISE**2 + 0.01**2
    for theta, y in [([0.3, -0.7], [1.0, 0.5]), ([-1.0, 0.4], [-1.5, 0.2])]:
        residual = np.array(y) - A @ theta
        expected = -0.5 * residual @ residual / variance - np.log(2 * np.pi * variance)
        coarse, fine = (both(jnp.array(theta), jnp.array(y), steps) for steps in (33, 129))
        assert abs(fine[0] - expected) < min(0.006, 0.5 * abs(coarse[0] - expected))
        np.testing.assert_allclose(fine[1], A.T @ residual / variance, rtol=0.01)


@SLOW
def test_nuts_with_an_exact_simulator():
    kernel, draws = NUTS(model), {"num_warmup": 150, "num_samples": 300, "chains": 4}
    theta = run(kernel, DATA, Simulator(), 24, **draws).get_samples(group_by_chain=True)["theta"]
    mean, covariance = posterior(DATA)
    assert_moments(theta, mean, np.diag(covariance))
    assert_moments(theta.sum(-1), mean.sum(), covariance.sum())


@SLOW
@pytest.mark.optimised
def test_nuts_with_a_learned_likelihood(learned):
    """Three data have three times the network's error: .17 posterior sd in a mean, 8 % of a standard deviation."""
    draws = {"num_warmup": 100, "num_samples": 150, "chains": 4}
    theta = run(NUTS(model), DATA[:3], learned[0], 10, **draws).get_samples()["theta"]
    mean, covariance = posterior(DATA[:3])
    deviation = np.sqrt(np.diag(covariance))
    assert np.abs((theta.mean(0) - mean) / deviation).max() < 0.3
    assert np.abs(np.log(theta.std(0) / deviation)).max() < 0.2


@SLOW
def test_amortised_posterior(learned):
    """Eight data sets at once, in units far from one; errors were .1 posterior sd and 6 % of it, with its correlation.

    Each is its own law in a plate, as any batch of conditions.
    """
    y = np.asarray(pairs()[1][:8])
    prior = DiffusionPrior(learned[1], cond=UNITS[0] + UNITS[1] * y, sampler=DPMSolverPP(32, eta=1.0))

    def units():
        with numpyro.plate("unit", 8):
            numpyro.sample("theta", prior)

    theta = numpyro.infer.Predictive(units, num_samples=4000)(jax.random.key(1))["theta"]
    assert theta.shape == (4000, 8, 2)
    for i in range(8):
        mean, covariance = posterior(y[i : i + 1])
        deviation = np.sqrt(np.diag(covariance))
        assert np.abs((theta[:, i].mean(0) - mean) / deviation).max() < 0.2
        assert np.abs(np.log(theta[:, i].std(0) / deviation)).max() < 0.15
        assert np.corrcoef(theta[:, i].T)[0, 1] == pytest.approx(covariance[0, 1] / deviation.prod(), abs=0.15)


CENTRE, SPREAD, CORRELATED = np.array([1.0, -0.5]), np.array([1.5, 0.7]), 0.2 * np.eye(2) + 0.8


def tall_posterior(y):
    """Mean and covariance of theta given data (n, 2): theta ~ N(CENTRE, SPREAD^2), y | theta ~ N(theta, CORRELATED)."""
    precision = np.linalg.inv(CORRELATED)
    covariance = np.linalg.inv(np.diag(SPREAD**-2.0) + len(y) * precision)
    return covariance @ (CENTRE / SPREAD**2 + precision @ y.sum(0)), covariance


FAR = VE(0.01, 1000.0)
AROUND = Gaussian(np.zeros(2), tall_posterior(np.zeros((1, 2)))[1], FAR)


@jax.tree_util.register_static
class AmortisedPosterior:
    """The exact denoiser of theta given one datum."""

    schedule, event_shape, cond_shape, location, scale = FAR, (2,), (2,), 0.5, 1.0

    def __call__(self, x_t, t, cond=None):
        mean = tall_posterior(cond[None])[0]
        around = AROUND(x_t - mean, t)
        return Prediction(mean + around.x0, around.eps, x_t, t, FAR)


def composed(y, denoiser, units=(0.0, 1.0), centre=CENTRE, spread=SPREAD, steps=10):
    """Amortised posteriors of one datum each as factors, with the prior taken out of each."""
    prior = dist.Normal(centre, spread).to_event(1)
    theta = numpyro.sample("theta", prior)
    each = DiffusionPrior(denoiser, cond=units[0] + units[1] * y, density_solver=Heun(steps))
    numpyro.factor("data", (each.log_prob(theta) - prior.log_prob(theta)).sum())


def test_many_data_by_exact_scores(x64):
    """Composed posteriors of eight data: differences of the density, which test a move, and the score, which makes it.

    An annealed walk by the composed scores has a max-sliced W2 of .37 here without a test, and exact draws .04.
    """
    y = np.random.default_rng(3).multivariate_normal([2.0, 0.3], CORRELATED, size=8)
    mean, covariance = tall_posterior(y)
    points = mean + np.random.default_rng(4).normal(size=(4, 2)) @ np.linalg.cholesky(covariance).T

    @jax.jit
    def both(theta):
        of_model = lambda theta: log_density(composed, (y, AmortisedPosterior()), {"steps": 97}, {"theta": theta})[0]  # noqa: E731
        return jax.vmap(jax.value_and_grad(of_model))(theta)

    values, slopes = both(jnp.asarray(points))
    expected = [-0.5 * (p - mean) @ np.linalg.solve(covariance, p - mean) for p in points]
    np.testing.assert_allclose(values - values[0], np.array(expected) - expected[0], atol=0.02)
    np.testing.assert_allclose(slopes, np.linalg.solve(covariance, (mean - points).T).T, rtol=0.01, atol=0.02)


@SLOW
def test_corrected_where_the_likelihood_is_known(learned):
    """The learned posterior as a proposal, for three data though it has seen one: exact moments of all three."""

    def corrected(y):
        first = DiffusionPrior(learned[1], cond=UNITS[0] + UNITS[1] * y[0], flow_solver=Heun(10))
        with reparam(config={"theta": TransportReparam(first)}):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(A @ theta, NOISE).to_event(1), obs=y)

    kernel = Independence(corrected, num_proposals=4)
    samples = run(kernel, DATA[:3], num_warmup=50, num_samples=200, chains=50).get_samples(group_by_chain=True)
    mean, covariance = posterior(DATA[:3])
    assert_moments(samples["theta"], mean, np.diag(covariance))
    assert_moments(samples["theta"].sum(-1), mean.sum(), covariance.sum())


SHORT = {"num_steps": 4, "batch_size": 16, "steps_per_call": 4, "validation_fraction": 0.0, "features": 8}


def test_conditions_in_their_own_units():
    """The network holds mean and standard deviation of each entry, and keeps them when training goes on."""
    theta, y = pairs(64)
    cond = np.stack([UNITS[0] + UNITS[1] * y[:, 0], np.full(64, 3.0)], -1)
    first = train(theta, cond, **SHORT)
    embedding = first.backbone.cond_embed
    np.testing.assert_allclose(embedding.location[...], [cond[:, 0].mean(), 3.0], rtol=1e-5)
    np.testing.assert_allclose(embedding.scale[...], [cond[:, 0].std(), 1.0], rtol=1e-5)
    options = {"num_steps": 4, "batch_size": 16, "steps_per_call": 4, "validation_fraction": 0.0, "progress_bar": False}
    again = fit(jax.random.key(1), first, theta, cond=-cond, **options).denoiser.backbone.cond_embed
    np.testing.assert_array_equal(again.location[...], embedding.location[...])
    batches = ((theta[:16], cond[:16]) for _ in range(4))
    streamed = fit(jax.random.key(1), network(), batches, **options).denoiser.backbone.cond_embed
    np.testing.assert_allclose(streamed.scale[0], cond[:16, 0].std(), rtol=1e-5)


THETA, Y = pairs(64)
BAD_PAIRS = {
    "no condition": ({"cond": None}, r"cond must be given: this MLP has cond_shape=\(2,\)"),
    "shape": ({"cond": Y[:, :1]}, r"cond must have shape \(rows, 2\), after the cond_shape of the MLP; got \(64, 1\)"),
    "rows": ({"cond": Y[:5]}, r"cond must have one entry for each of the 64 rows; got shape \(5, 2\)"),
    "NaN in a condition": ({"cond": Y * np.nan}, "cond must be finite; got 128 non-finite values.*Drop or impute"),
    "NaN in a row": ({"data": THETA * np.nan}, "data must be finite; got 128 non-finite values.*Drop or impute"),
    "held out": ({"held_out": THETA}, "the condition of held_out must be given"),
    "unconditional": (
        {"backbone": network(cond_shape=None)},
        r"cond must be None: this MLP is unconditional. Make it with cond_shape=\(2,\)",
    ),
    "pooled": ({"loss": StableTargetField(THETA)}, "pools examples of one law, so cond must be None"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs(change, message):
    """A loss that pools rows of different conditions, as a minibatch coupling would, is among them."""
    given = {"backbone": network(), "data": THETA, "cond": Y, "progress_bar": False, **SHORT, **change}
    del given["features"]
    with pytest.raises(ValueError, match=message):
        fit(jax.random.key(0), **given)
    with pytest.raises(TypeError, match="cond must be numbers; got an array of <U1"):
        fit(jax.random.key(0), network(), THETA, cond=np.full((64, 2), "a"), progress_bar=False)


def test_a_law_without_its_condition_is_refused():
    """Unless it was trained without one too."""
    always = NetworkDenoiser(network(), schedule=SCHEDULE)
    with pytest.raises(ValueError, match="cond must be given: the network was always trained with a condition"):
        DiffusionPrior(always)
    with pytest.raises(ValueError, match=r"cond must end with shape \(2,\).*got \(3,\)"):
        DiffusionPrior(always, cond=np.zeros(3))
    assert DiffusionPrior(Conditioned(always, np.zeros(2))).event_shape == (2,)
    assert DiffusionPrior(train(THETA, Y, cond_dropout=0.5, **SHORT)).event_shape == (2,)


def test_an_energy_is_no_likelihood():
    """Its constant depends on the parameters: a gradient in them would be wrong, and is refused."""
    energy = NetworkDenoiser(network(), schedule=SCHEDULE, target="energy")

    def log_prob(theta, y):
        return DiffusionPrior(energy, cond=theta, density="denoiser").log_prob(y)

    assert jnp.isfinite(jax.grad(log_prob, 1)(jnp.zeros(2), jnp.ones(2))).all()
    with pytest.raises(ValueError, match='known but for a constant that depends on the condition.*density="flow"'):
        jax.grad(log_prob)(jnp.zeros(2), jnp.ones(2))
