"""Exact laws know their scale: draws and densities in any unit, and schedules that do not resolve a law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from numpyro_diffusion.denoise import FromDensity, Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.noise import VE, VP, Rectified, schedule_for
from numpyro_diffusion.solve import Heun

CENTRES = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]])
DRAWS = 20_000


def mixture(unit):
    """One narrow component among wide ones, in some unit of length."""
    return GaussianMixture([0.4, 0.3, 0.3], unit * CENTRES, unit**2 * np.array([0.01**2, 1.0, 1.0]))


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_draws_and_densities_in_any_unit(unit):
    """Moments within 4.5 standard errors of the draws, densities within the flow's error of 5e-3 nats."""
    prior = DiffusionPrior(Gaussian(jnp.full(2, 3.0 * unit), unit**2))
    x = np.asarray(prior.sample(jax.random.key(0), (DRAWS,)), float) / unit - 3.0
    assert (abs(x.mean(0)) < 4.5 / DRAWS**0.5).all()
    assert (abs(x.var(0) - 1.0) < 4.5 * (2 / DRAWS) ** 0.5).all()
    exact = -np.log(2 * np.pi) - 2 * np.log(unit)
    np.testing.assert_allclose(prior.log_prob(jnp.full(2, 3.0 * unit)), exact, atol=5e-3)


@pytest.mark.parametrize("unit", [1e-4, 1.0])
def test_a_narrow_component_among_wide_ones(unit):
    """A hundredth of the others: its share and its deviation in 64 steps, its density in 128 (in 64: .06 nats)."""
    law = mixture(unit)
    prior = DiffusionPrior(law, density_solver=Heun(128))
    x = np.asarray(prior.sample(jax.random.key(1), (DRAWS,)), float) / unit
    z = (x - CENTRES[0]) / 0.01
    near = (np.abs(z) < 4.0).all(1)
    wide = np.exp(-0.5 * ((CENTRES[0] - CENTRES[1:]) ** 2).sum(1)).sum() * 0.3 * 0.08**2 / (2 * np.pi)
    share = 0.4 * 0.9999 + wide  # of the square of 4 deviations, where the wide ones are flat
    assert abs(near.mean() - share) < 4.5 * (share * (1 - share) / DRAWS) ** 0.5
    deviations = z[near].std(0)
    assert (abs(deviations - 1.0) < 4.5 / (2 * near.sum()) ** 0.5 + 0.01).all(), deviations
    for point in unit * np.array([[-1.0, 0.005], [1.0, 0.5]]):
        np.testing.assert_allclose(prior.log_prob(point), law.log_density(jnp.asarray(point), 0.0), atol=0.025)


def test_levels_follow_the_law():
    """Of scale one they are those of VE(); the proportion is a plain number, the scale an array and no parameter."""
    for law in (Gaussian([0.0, 0.0]), FromDensity(lambda x_t, t, _: -jnp.sum(x_t**2), (2,))):
        assert law.schedule.base == VE() and float(law.schedule.scale) == 1.0
    law = mixture(1.0)
    ends = [float(law.schedule.noise_level(t)) for t in (0.0, 1.0)]
    assert 0.001 * 0.01 < ends[0] < 0.003 * 0.01 and abs(ends[1] / (80 * float(law.scale)) - 1) < 1e-5
    assert jax.tree.structure(law) == jax.tree.structure(mixture(7.0))  # one program
    lone = GaussianMixture([1.0, 0.0], [[0.0], [5.0]], [1.0, 1e-8])
    assert lone.schedule.base == VE()  # a component of no weight needs no levels
    slopes = jax.grad(lambda law: law.schedule.sigma(0.5) + law.means.sum())(law)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slopes._schedule)) and (slopes.means == 1).all()
    known = jax.jit(lambda: mixture(1.0).schedule.sigma(0.0))  # also where a model makes it inside jit
    np.testing.assert_allclose(known(), ends[0], rtol=1e-5)
    traced = jax.jit(lambda scale: Gaussian(jnp.zeros(2), scale**2).schedule.sigma(0.0))
    np.testing.assert_allclose(traced(50.0), 0.1, rtol=1e-5)


COARSE = {
    "Gaussian": lambda: Gaussian(jnp.zeros(2), 1e-8, VE()),
    "mixture": lambda: GaussianMixture([0.5, 0.5], [[0.0], [1.0]], [1e-8, 1.0], Rectified()),
    "FromDensity": lambda: FromDensity(norm.logpdf, (2,), VP(), scale=1e-4),
}


@pytest.mark.parametrize("make", COARSE.values(), ids=COARSE)
def test_a_schedule_that_does_not_resolve_the_law(make):
    with pytest.raises(ValueError, match=r"lowest noise level .* below the narrowest .*0.0001; got .*sigma_min=2e-07,"):
        make()


def test_what_is_no_schedule():
    with pytest.raises(TypeError, match="schedule must be a noise.Schedule; got str"):
        schedule_for(1.0, schedule="VE")
    assert schedule_for(1.0, 0.01, VE()) == VE()  # coarse for the narrow part, but it resolves it
