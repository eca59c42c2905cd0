"""A site in the noise behind another law: the model keeps its own, whatever that law is and however coarse its flow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import SCHEDULE, around, run
from numpyro.distributions import transforms
from numpyro.handlers import condition, mask, reparam, scale, seed, trace
from numpyro.infer import HMC
from numpyro.infer.util import log_density
from scipy.stats import kstest

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.density import log_prob, pushed
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import EllipticalSlice, Independence, TemperedSMC
from numpyro_diffusion.reparam import TransportReparam
from numpyro_diffusion.solve import FlowMap, Heun

TWO = GaussianMixture([0.4, 0.6], [[-0.3, 1.0], [0.8, -0.5]], 0.4, SCHEDULE)


def test_density_of_a_fine_map_is_that_of_its_law(x64):
    """Of a mixture in two dimensions: off by the solver's step and the terminal law."""
    both = jax.jit(lambda z, steps: pushed(Heun(steps), TWO, z), static_argnums=1)
    for z in np.random.default_rng(0).normal(size=(3, 2)):
        found, coarse = both(jnp.array(z), 129), both(jnp.array(z), 5)
        truth = log_prob(TWO, found.x, Heun(129)).value
        assert found.log_prob == pytest.approx(float(truth), abs=2e-3)
        assert abs(coarse.log_prob - log_prob(TWO, coarse.x, Heun(129)).value) > 0.01  # it is the density of the map


Y = 1.3
MODES = DiffusionPrior(  # far from the posterior, of log x, in eight steps
    GaussianMixture([0.5, 0.5], [[-1.0], [0.6]], 0.3, SCHEDULE),
    transform=transforms.ExpTransform(),
    flow_solver=Heun(8),
)


def positive(y):
    x = numpyro.sample("x", dist.Gamma(2.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("y", dist.Normal(x[0], 0.7), obs=y)


TRANSPORTED = reparam(positive, config={"x": TransportReparam(MODES)})
GRID = np.linspace(1e-4, 8.0, 40_001)
DENSITY = GRID * np.exp(-GRID - 0.5 * ((GRID - Y) / 0.7) ** 2)
CUMULATIVE = np.cumsum(DENSITY) / DENSITY.sum()
LEAP = partial(HMC, num_steps=2, trajectory_length=None, step_size=0.7, adapt_step_size=False, adapt_mass_matrix=False)


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(partial(Independence, num_proposals=2), id="independence", marks=pytest.mark.slow),
        pytest.param(EllipticalSlice, id="elliptical slice"),
        pytest.param(LEAP, id="hmc", marks=pytest.mark.slow),
    ],
)
def test_exact_draws_stay_exact(kernel):
    """Ranks of 3000 chains, begun at the noise behind exact draws, after three steps; half of them have moved far."""
    noise = np.linspace(-6.0, 6.0, 4001)
    points = np.asarray(jax.jit(MODES.flow)(jnp.asarray(noise[:, None])))[:, 0]
    assert (np.diff(points) > 0).all()
    x = np.interp(np.random.default_rng(0).uniform(size=3000), CUMULATIVE, GRID)
    start = {"x_noise": jnp.asarray(np.interp(np.log(x), np.log(points), noise)[:, None])}
    mcmc = run(kernel(TRANSPORTED), Y, num_warmup=0, num_samples=3, chains=3000, start=start)
    end = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[:, -1, 0]
    assert kstest(np.interp(end, GRID, CUMULATIVE), "uniform").pvalue > 0.003
    assert np.abs(end - x).mean() > 0.2


@pytest.mark.slow
def normal(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("y", dist.Normal(x[0], 0.7), obs=y)


@pytest.mark.slow
def test_evidence():
    """A population drawn from the law climbs to the posterior: its evidence is that of the model.

    The law is wider than the posterior. With narrower tails, as `MODES` has for `positive`, weights have no variance,
    and errors mean little.
    """
    wide = DiffusionPrior(GaussianMixture([0.5, 0.5], [[-1.0], [0.6]], 0.8, SCHEDULE), flow_solver=Heun(8))
    model = reparam(normal, config={"x": TransportReparam(wide)})
    evidence = TemperedSMC(model, 2000, num_islands=20, progress_bar=False).run(jax.random.key(0), Y).log_evidence
    truth = dist.Normal(0.0, np.sqrt(1.0 + 0.7**2)).log_prob(Y)
    assert abs(evidence.value - truth) < 4.0 * evidence.standard_error < 0.1


def in_a_plate(y):
    with numpyro.plate("unit", 3):
        x = numpyro.sample("x", dist.Normal(0.5, 2.0).expand([3, 1]).to_event(1))
        numpyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)


def test_one_law_for_each_point_of_a_plate(x64):
    """The joint density of noise and data is that of points and data, times the determinant of each map."""
    law = around(jnp.array([-1.0, 0.0, 2.0]), flow_solver=Heun(6), transform=transforms.AffineTransform(0.2, 3.0))
    y, z = jnp.array([0.3, -0.2, 1.0]), jnp.array([[0.5], [-1.2], [0.1]])

    @jax.jit
    def both(z):
        x, slopes = jax.jvp(law.flow, (z,), (jnp.ones_like(z),))
        moved = log_density(reparam(in_a_plate, config={"x": TransportReparam(law)}), (y,), {}, {"x_noise": z})[0]
        return moved, log_density(in_a_plate, (y,), {}, {"x": x})[0] + jnp.log(slopes).sum()

    np.testing.assert_allclose(*both(z), rtol=1e-6)


GUESS = DiffusionPrior(Gaussian([0.0, 0.0]))


def model(fn=dist.Normal(0.0, 1.0).expand([2]).to_event(1)):  # noqa: B008
    numpyro.sample("x", fn)


def subsampled():
    with numpyro.plate("unit", 3, subsample_size=2):
        model()


BAD = {
    "event": (lambda: model(dist.Normal(jnp.zeros(2), 1.0)), r"events of \(2,\); got \(2,\) and \(\). Use .to_event"),
    "observed": (condition(model, data={"x": jnp.zeros(2)}), "site 'x' is observed"),
    "masked": (mask(model, mask=True), "unmasked and unscaled; got a mask handler"),
    "scaled": (scale(model, scale=2.0), "unmasked and unscaled; got a scale handler"),
    "subsampled": (subsampled, "got a subsampling plate"),
}


@pytest.mark.parametrize(("site", "message"), BAD.values(), ids=BAD)
def test_bad_sites(site, message):
    with pytest.raises(ValueError, match=message):
        trace(seed(reparam(site, config={"x": TransportReparam(GUESS)}), 0)).get_trace()


def test_bad_laws():
    with pytest.raises(TypeError, match="law must be a DiffusionPrior; got Normal"):
        TransportReparam(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"batches of \(3,\) and events of \(1,\); got \(2,\)"):
        pair = partial(model, dist.Normal(0.0, 1.0).expand([2, 1]).to_event(1))
        trace(seed(reparam(pair, config={"x": TransportReparam(around(jnp.zeros(3)))}), 0)).get_trace()
    learned = object.__new__(FlowMap)
    law = GUESS.with_flow(Heun(8))
    law._parts = (*law._parts[:2], learned)
    with pytest.raises(ValueError, match="a FlowMap need not be one-to-one"):
        TransportReparam(law)


def test_outside_of_the_support_has_no_weight():
    """A law that reaches beyond the site's bounds: candidates there are rejected."""
    bounded = partial(model, dist.Uniform(-0.2, 0.2).expand([2]).to_event(1))
    moved = reparam(bounded, config={"x": TransportReparam(GUESS)})
    density = jax.jit(lambda z: log_density(moved, (), {}, {"x_noise": z})[0])
    assert density(jnp.ones(2)) == -jnp.inf
    assert jnp.isfinite(density(jnp.zeros(2)))
