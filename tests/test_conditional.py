"""Priors conditioned on another quantity of the model: gradients in it, hierarchies in closed form, and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from laws import run
from moments import assert_moments
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, DiffusionGibbs, DiffusionPCN, NoiseSpace, ScoreHMC
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, Heun

SLOW = pytest.mark.slow
SCHEDULE = VE(0.01, 40.0)


@jax.tree_util.register_static
class AroundCondition:
    """The exact conditional denoiser of N(c, 1), known to stand at 0 with scale 1 when nothing is said of c."""

    schedule, event_shape, location, scale = SCHEDULE, (1,), 0.0, 1.0

    def __call__(self, x_t, t, cond=None):
        return Gaussian(jnp.zeros(1) + cond, 1.0, SCHEDULE)(x_t, t)


def prior(cond, **options):
    solvers = {"sampler": DPMSolverPP(24, eta=1.0), "flow_solver": Heun(10), "density_solver": Heun(12)}
    return DiffusionPrior(AroundCondition(), cond=cond, **solvers, **options)


def hierarchy(y, **options):
    """A centre ~ N(0, 1), x | centre ~ N(centre, 1), y | x ~ N(x, 1): at y = 3 the means are 1 and 2."""
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", prior(centre, **options))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


def network_prior(cond):
    backbone = MLP((2,), features=16, num_blocks=1, cond_shape=(), rngs=nnx.Rngs(0))
    backbone.output_layer.kernel[...] = jax.random.normal(jax.random.key(2), (16, 2), jnp.float32)  # it starts at zero
    solvers = {"flow_solver": Heun(4), "density_solver": Heun(4)}
    return DiffusionPrior(NetworkDenoiser(backbone, schedule=VE(0.05, 20.0)), cond=cond, **solvers)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["log_prob", "flow"])
def test_gradient_in_the_condition_is_that_of_finite_differences(of, x64):
    point = jnp.array([0.4, -0.9])

    @jax.jit
    def function(cond):
        return jnp.sum(getattr(network_prior(cond), of)(point))

    for cond, step in ((0.7, 1e-3), (-0.3, 1e-3)):
        slope = (function(cond + step) - function(cond - step)) / (2.0 * step)
        assert abs(slope) > 0.01
        assert float(jax.grad(function)(cond)) == pytest.approx(float(slope), rel=0.01)


@pytest.mark.parametrize(
    ("make", "draws"),
    [
        pytest.param(partial(MALA, density="flow"), 1000, id="mala", marks=SLOW),
        pytest.param(partial(ScoreHMC, density="flow", num_steps=4), 300, id="hmc", marks=SLOW),
        pytest.param(NUTS, 250, id="nuts", marks=SLOW),
    ],
)
def test_hierarchy(make, draws):
    samples = run(make(hierarchy), 3.0, num_warmup=150, num_samples=draws, chains=4).get_samples(group_by_chain=True)
    assert_moments(samples["centre"], 1.0, 2.0 / 3.0)
    assert_moments(samples["x"][..., 0], 2.0, 2.0 / 3.0)


@SLOW
@pytest.mark.parametrize("make", [NoiseSpace, DiffusionGibbs])
def test_many_points_share_a_condition(make):
    """Three points in a plate around one centre: posterior N(sum y / 5, 2 / 5) for the centre.

    Given it each x is N((centre + y) / 2, 1 / 2), so that its variance is .6.
    """
    y = jnp.array([3.0, 0.0, 2.0])

    def model(y):
        centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
        with numpyro.plate("points", 3):
            x = numpyro.sample("x", prior(centre))
            numpyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    samples = run(make(model), y, num_warmup=150, num_samples=400, chains=4).get_samples(group_by_chain=True)
    assert_moments(samples["centre"], float(y.sum()) / 5.0, 0.4)
    assert_moments(samples["x"][..., 0], 0.5 * (y.sum() / 5.0 + y), 0.6)


def test_refused():
    with pytest.raises(ValueError, match="prior of site 'x' depends on other latent sites.*NoiseSpace"):
        run(ULA(hierarchy), 3.0, num_warmup=1, num_samples=1, chains=2)
    with pytest.raises(ValueError, match=r"latent sites \['centre'\]. Use DiffusionGibbs"):
        run(DiffusionPCN(hierarchy), 3.0, num_warmup=1, num_samples=1, chains=2)
    with pytest.raises(ValueError, match="depend on other latent sites: moving those would move x"):
        run(DiffusionGibbs(hierarchy, x_kernel=NoiseSpace), 3.0, num_warmup=1, num_samples=1, chains=2)

    def energy(y):
        centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
        backbone = MLP((2,), features=8, num_blocks=1, cond_shape=(), scalar=True, rngs=nnx.Rngs(0))
        numpyro.sample("x", DiffusionPrior(NetworkDenoiser(backbone, target="energy"), cond=centre))

    with pytest.raises(ValueError, match="but for a constant that depends on other latent sites"):
        run(MALA(energy), 3.0, num_warmup=1, num_samples=1, chains=2)


def test_sampling_depends_on_the_condition():
    draws = {c: np.asarray(prior(c).sample(jax.random.key(0), (4000,))) for c in (-2.0, 1.0)}
    for cond, x in draws.items():
        assert abs(x.mean() - cond) < 4.0 / np.sqrt(4000) + 0.01  # the terminal law's location costs (alpha / sigma) c
        assert abs(x.var() - 1.0) < 4.0 * np.sqrt(2.0 / 4000) + 0.01
