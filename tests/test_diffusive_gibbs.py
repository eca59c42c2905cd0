"""Diffusive Gibbs sampling between modes that are far apart, against quadrature and a published mixture of 40 modes."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import run, two_modes
from moments import assert_moments
from numpyro.diagnostics import gelman_rubin
from numpyro.infer import HMC, MCMC, NUTS, Gibbs

from numpyro_diffusion.denoise import GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusiveGibbs, LineIntegral, Score, Vectorize, with_density
from numpyro_diffusion.infer.gradient.diffusive_gibbs import _conditional
from numpyro_diffusion.infer.gradient.target import Evaluation
from numpyro_diffusion.infer.kernel.adapt import Root
from numpyro_diffusion.noise import VE

SLOW = pytest.mark.slow
MODES = jnp.array([-6.0, 6.0])


def quadrature():
    """Points, and the posterior's distribution function, of `two_modes` at y = -4."""
    x = np.linspace(-12.0, 10.0, 40_001)
    normal = lambda x, m, s: np.exp(-0.5 * ((x - m) / s) ** 2) / s  # noqa: E731
    density = (0.3 * normal(x, -6.0, 1.0) + 0.7 * normal(x, 6.0, 0.5)) * normal(x, -4.0, 8.0)
    return x, np.cumsum(density) / density.sum()


def assert_quadrature(draws):
    x, cdf = quadrature()
    weight = np.diff(cdf, prepend=0.0)
    mean, right = (weight * x).sum(), weight[x > 0].sum()
    assert_moments(draws, mean, (weight * (x - mean) ** 2).sum())
    assert_moments((draws > 0).astype(float), right, right * (1 - right))


LADDER = {"noise_levels": (8.0, 2.0), "num_steps": 3, "num_sweeps": 2}


@SLOW
def test_two_modes():
    """NUTS stays in the mode where it starts; the noise takes chains across, all of them started in one mode."""
    start = {"x": jnp.tile(MODES, 4)}
    alone = run(NUTS(two_modes), -4.0, num_samples=300, start=start).get_samples(group_by_chain=True)["x"]
    assert gelman_rubin(np.asarray(alone)) > 1.5
    mcmc = run(DiffusiveGibbs(two_modes, **LADDER), -4.0, num_samples=1000, start={"x": jnp.full(8, -6.0)})
    x, extra = np.asarray(mcmc.get_samples(group_by_chain=True)["x"]), mcmc.get_extra_fields(group_by_chain=True)
    assert gelman_rubin(x) < 1.05
    assert_quadrature(x)
    assert extra["level_accept_prob"].shape == extra["level_restart_prob"].shape == (8, 1000, 2)
    by_level = extra["level_accept_prob"].mean((0, 1))
    assert (np.abs(by_level - 0.574) < 0.15).all()  # dual averaging in 300 draws
    np.testing.assert_allclose(extra["accept_prob"], extra["level_accept_prob"].mean(-1), rtol=1e-5)
    restarts = extra["level_restart_prob"].mean((0, 1))
    assert 0.02 < restarts[0] < restarts[1] < 1.0
    assert (extra["level_step_size"] == extra["level_step_size"][:, :1]).all() and not extra["diverging"].any()


def test_steps_follow_the_rule():
    """At a level rho, h rho^2 / (1 + rho^2)."""
    kernel = DiffusiveGibbs(two_modes, noise_levels=(4.0, 1.0), step_size=0.7, target_accept_prob=None)
    state = kernel.init(jax.random.key(2), 0, {"x": jnp.array(-6.0)}, (-4.0,), {})
    np.testing.assert_allclose(state.level_step_size, [0.7 * 16.0 / 17.0, 0.35], rtol=1e-6)


@pytest.mark.parametrize("root", [jnp.array([2.0, 0.5]), jnp.array([[2.0, 0.0], [0.7, 0.5]])])
def test_gradient_of_the_conditional(root):
    """It is the derivative of its log-density: a wrong one only costs acceptance, and shows in no law."""
    root = Root(root, 1.0 / root if root.ndim == 1 else jnp.linalg.inv(root), jnp.zeros(()))
    q, centre = jnp.array([0.3, -1.0]), jnp.array([1.0, 2.0])
    there = lambda q: _conditional(Evaluation(-jnp.sum(q**4), -4.0 * q**3), q, centre, root, 1.7)  # noqa: E731
    np.testing.assert_allclose(there(q).gradient, jax.grad(lambda q: there(q).log_density)(q), rtol=1e-5)
    noise = jax.vmap(root.push)(jnp.eye(2))  # by column, its covariance that of the noise that is added
    hessian = jax.hessian(lambda q: there(q).log_density + jnp.sum(q**4))(q)
    np.testing.assert_allclose(-hessian, jnp.linalg.inv(1.7**2 * noise.T @ noise), rtol=1e-4)


def unequal(y):
    """Scales a hundred apart and a correlation, one site positive."""
    a = numpyro.sample("a", dist.Normal(0.0, 10.0))
    b = numpyro.sample("b", dist.LogNormal(0.0, 0.1))
    numpyro.sample("y", dist.Normal(a + 50.0 * jnp.log(b), 5.0), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=SLOW)])
def test_preconditioner(dense):
    """Noise in units of the adapted scales; the posterior of a and 50 log b, N(0, 100) and N(0, 25), is Gaussian."""
    options = {"noise_levels": (1.0,), "num_sweeps": 2, "adapt_mass_matrix": True, "dense_mass": dense}
    mcmc = run(DiffusiveGibbs(unequal, **options), 15.0, num_samples=1000)
    samples = mcmc.get_samples(group_by_chain=True)
    assert_moments(samples["a"], 10.0, 100.0 - 100.0**2 / 150.0)
    assert_moments(50.0 * np.log(samples["b"]), 2.5, 25.0 - 25.0**2 / 150.0)
    root = mcmc.last_state.adapt_state.mass_matrix_sqrt_inv
    assert root.shape == ((8, 1, 2, 2) if dense else (8, 1, 2))


def learned(y, density="none"):
    """A diffusion site with two modes that has a density of its own, beside another site."""
    means = jnp.array([[-4.0], [4.0]])
    prior = DiffusionPrior(GaussianMixture([0.5, 0.5], means, 0.25, VE(0.01, 40.0)), density=density)
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior)[0] + s, 4.0), obs=y)


def assert_learned(mcmc):
    """The mode of weight proportional to N(1; +-4, 17.25)."""
    evidence = np.exp(-0.5 * (1.0 - np.array([-4.0, 4.0])) ** 2 / 17.25)
    right = evidence[1] / evidence.sum()
    x = mcmc.get_samples(group_by_chain=True)["x"][..., 0]
    assert_moments((x > 0).astype(float), right, right * (1 - right))
    centres = np.array([-4.0, 4.0]) + 0.25 / 17.25 * (1.0 - np.array([-4.0, 4.0]))
    mean = right * centres[1] + (1 - right) * centres[0]
    inside = 0.25 - 0.25**2 / 17.25
    assert_moments(x, mean, inside + right * (1 - right) * (centres[1] - centres[0]) ** 2)


BLOCK = {"noise_levels": (5.0,), "num_steps": 3, "num_sweeps": 2}


@SLOW
def test_diffusion_site():
    """Modes of a diffusion site that has a density of its own, beside another site."""
    mcmc = run(DiffusiveGibbs(learned, **BLOCK), 1.0, num_warmup=200, num_samples=2000, chains=2)
    assert_learned(mcmc)
    assert (mcmc.get_extra_fields()["num_score_evals"] == 2 * 4).all()


@SLOW
def test_as_a_block():
    model = with_density(learned)
    rest = HMC(model, num_steps=3, trajectory_length=None)
    kernel = Vectorize(Gibbs([(DiffusiveGibbs(model, **BLOCK), ["x"]), (rest, ["s"])]))
    assert_learned(run(kernel, 1.0, num_samples=2000))


BAD_ARGUMENTS = {
    "score": (
        {"density": Score()},
        ValueError,
        r"restarts far away and needs a density; got Score\(\)",
    ),
    "line": ({"density": LineIntegral()}, ValueError, r"needs a density; got LineIntegral"),
    "density": ({"density": 3}, TypeError, 'density must be "auto"'),
    "none": ({"noise_levels": ()}, ValueError, "at least one level; got none"),
    "rising": ({"noise_levels": (1.0, 2.0)}, ValueError, r"must decrease; got \(1.0, 2.0\). Sort them"),
    "negative": ({"noise_levels": (1.0, -2.0)}, ValueError, r"noise_levels\[1\] must be positive"),
    "num_steps": ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
    "num_sweeps": ({"num_sweeps": 0}, ValueError, "num_sweeps must be at least 1"),
    "step_size": ({"step_size": 0.0}, ValueError, "step_size must be positive"),
    "target": ({"target_accept_prob": 1.0}, ValueError, "target_accept_prob must lie in"),
    "dense": ({"dense_mass": True}, ValueError, "needs adapt_mass_matrix=True"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        DiffusiveGibbs(two_modes, **options)


# A mixture of 40 equal Gaussians in two dimensions and a quadratic function of known expectation, 1777.886, of standard
# deviation 1714.4 (Midgley et al., Flow annealed importance sampling bootstrap, 2023, https://arxiv.org/abs/2208.01893).
FORTY = jnp.array(
    [
        [-0.299473, 21.457745], [-32.921806, -29.437561], [-15.406175, 10.726295], [-0.792527, 31.71558],
        [-3.549762, 10.584502], [-12.088523, -7.862616], [-38.21394, -26.491283], [-16.488924, 1.481743],
        [15.813408, 24.000912], [-27.117643, -17.418514], [14.528685, 33.215519], [-8.232007, 29.93247],
        [-6.447334, 4.232564], [36.219048, -37.106815], [-25.181519, -10.12661], [-15.591998, 34.560032],
        [-25.927185, -18.413315], [-27.945618, -37.46244], [-23.349619, 34.383923], [17.848736, 19.386902],
        [2.103662, -20.507339], [6.767387, -37.34779], [-28.902649, -20.621201], [25.237518, 23.45285],
        [-17.739801, -1.443295], [25.582428, 39.765324], [15.875287, 5.403714], [26.819454, -23.552094],
        [7.453761, -31.01222], [-27.723446, -20.663342], [18.098923, 16.086416], [-23.694099, 12.084284],
        [21.958881, -5.048695], [1.527262, 9.268188], [24.815063, 38.407764], [-30.824944, -14.65879],
        [15.720396, 33.141975], [34.808292, 35.29427], [7.960582, -34.783306], [3.6797, -25.024214],
    ]
)  # fmt: skip
WIDTH = 1.31326162815094


def forty_modes():
    modes = dist.Normal(FORTY, WIDTH).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=jnp.zeros(40)), modes))


def quadratic(x):
    shift, b = jnp.array([3.0819921493530273, -0.586857795715332]), jnp.array([0.455627977848053, 0.6323062777519226])
    a = jnp.array([[0.6148456335067749, 1.2681573629379272], [0.9801868200302124, 1.7928894758224487]])
    return jnp.einsum("...i,ij,...j->...", x + shift, a, x + shift) + (x + shift) @ b


@jax.jit
def discrepancy(x, y):
    """Squared maximum mean discrepancy (V-statistic), five Gaussian kernels of widths h / 4 to 4 h."""
    pooled = jnp.concatenate([x, y])
    sign = jnp.concatenate([jnp.full(len(x), 1.0 / len(x)), jnp.full(len(y), -1.0 / len(y))])
    centred = pooled - pooled.mean(0)
    h = 2.0 * jnp.sum(centred**2) / len(pooled) * len(pooled) / (len(pooled) - 1)  # mean squared distance of pairs

    def row(point):
        kernel = jnp.exp(-jnp.sum((pooled - point) ** 2, 1) / (4.0 * h))
        return sum(kernel ** (2**k) for k in range(5)) @ sign

    return sign @ jax.lax.map(row, pooled, batch_size=256)


def figures_of_forty_modes(key, kernel, num_samples, chains=10):
    """From chains started at zero: the mean of the quadratic, and the discrepancy to as many exact draws."""
    options = {"num_chains": chains, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_samples, **options)
    mcmc.run(key, init_params={"x": jnp.zeros((chains, 2))})
    x = mcmc.get_samples()["x"]
    key_mode, key_normal = jax.random.split(jax.random.key(7))
    exact = FORTY[jax.random.randint(key_mode, (len(x),), 0, 40)] + WIDTH * jax.random.normal(key_normal, x.shape)
    return float(quadratic(x).mean()), float(discrepancy(x, exact))


@SLOW
@pytest.mark.optimised
def test_forty_modes():
    """The published setting: one level of alpha = .1, 200 sweeps a draw of a restart and 5 MALA steps of .1."""
    alpha = 0.1
    kernel = DiffusiveGibbs(
        forty_modes,
        noise_levels=[np.sqrt(1.0 - alpha**2) / alpha],
        num_steps=5,
        num_sweeps=200,
        step_size=0.1 / (1.0 - alpha**2),
        target_accept_prob=None,
    )
    mean, distance = figures_of_forty_modes(jax.random.key(3), kernel, 1000)
    assert abs(mean - 1777.886) < 4.0 * 1714.4 / np.sqrt(10_000)
    assert distance < 2e-3
