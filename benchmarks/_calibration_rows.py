"""What `calibration.py` runs: models with planted errors, and the samplers, priors and models of its table."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.distributions import constraints
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    ULA,
    AnnealedLangevin,
    CrankNicolson,
    Cycle,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    EllipticalSlice,
    GuidedPCN,
    GuidedReverse,
    Independence,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    PopulationHMC,
    ScoreHMC,
    SplitGibbs,
    TemperedSMC,
    TwistedSMC,
    with_density,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, Heun
from numpyro_diffusion.train import fit

DIMENSION = 8
SCHEDULE = VE(0.01, 40.0)
KELVIN = 300.0


# Planted errors: a posterior N(y / 2, 1/2) in each dimension, unless it is said otherwise.

PRIOR = DiffusionPrior(Gaussian(jnp.zeros(DIMENSION), 1.0, SCHEDULE))


def right(y: jax.Array) -> None:
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def biased(y: jax.Array) -> None:
    """Posterior means .2 standard deviations too high."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x - 0.2 * 2.0**0.5, 1.0).to_event(1), obs=y)


def inflated(y: jax.Array) -> None:
    """Posterior variances 15 % too large."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.15**0.5).expand([DIMENSION]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.15**0.5).to_event(1), obs=y)


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape[:-1])


@_constant.defjvp
def _score_alone(primals: tuple, tangents: tuple) -> tuple:
    (x,), (step,) = primals, tangents
    return _constant(x), -jnp.sum(x * step, -1)


class FakeDensity(dist.Distribution):
    """N(0, I) whose log_prob is a constant with the right gradient."""

    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__((), (DIMENSION,))

    def sample(self, key: jax.Array, sample_shape: tuple = ()) -> jax.Array:
        return jax.random.normal(key, (*sample_shape, DIMENSION))

    def log_prob(self, value: jax.Array) -> jax.Array:
        return _constant(value)


def fake(y: jax.Array) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", FakeDensity()), 1.0).to_event(1), obs=y)


class HalfPrecision(dist.Normal):
    """A normal law that is evaluated in 16 bits."""

    def log_prob(self, value: jax.Array) -> jax.Array:
        value, loc, scale = (jnp.asarray(a, jnp.float16) for a in (value, self.loc, self.scale))
        return (-0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale)).astype(jnp.float32)


def temperature(y: jax.Array, law: type = dist.Normal) -> None:
    """Temperatures in kelvin, to a tenth of one, where numbers of 16 bits are a quarter apart.

    With two tenths the error hardly shows: data and prediction are rounded alike, and posteriors are about as much too
    wide as they are off.
    """
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", law(KELVIN + x, 0.1).to_event(1), obs=y)


half = partial(temperature, law=HalfPrecision)
PLANTED = {
    "caught_bias": (MALA, biased, right),
    "caught_variance": (MALA, inflated, right),
    "caught_fake_density": (partial(NUTS, max_tree_depth=5), fake, right),
    "caught_half_precision": (MALA, half, temperature),
}


# The table


def learned(num_steps: int) -> DiffusionPrior:
    """A small network, trained on two crescents; what it has not learned does no harm, as data are drawn from it."""
    key_side, key_angle, key_noise = jax.random.split(jax.random.key(0), 3)
    side = jax.random.bernoulli(key_side, shape=(4000,)).astype(float)
    angle = jnp.pi * jax.random.uniform(key_angle, (4000,))
    x = jnp.stack([jnp.cos(angle) + side - 0.5, (1.0 - 2.0 * side) * jnp.sin(angle) + 0.3 * side], -1)
    x = x + 0.15 * jax.random.normal(key_noise, x.shape)
    backbone = MLP((2,), features=32, num_blocks=2, rngs=nnx.Rngs(0))
    found = fit(jax.random.key(1), backbone, x, schedule=VE(0.03, 20.0), num_steps=num_steps, batch_size=256)
    return DiffusionPrior(found.denoiser, **SOLVERS)


SOLVERS = {"sampler": DPMSolverPP(48, eta=1.0), "flow_solver": DPMSolverPP(12), "density_solver": Heun(16)}
GAUSSIAN = DiffusionPrior(Gaussian(jnp.zeros(DIMENSION), 1.0, SCHEDULE), **SOLVERS)
MODES = GaussianMixture([0.4, 0.6], [[-2.0, 0.5], [1.5, -1.0]], 0.5, SCHEDULE)
MIXTURE = DiffusionPrior(MODES, **SOLVERS)


class ByFlow(DiffusionPrior):
    """A prior whose draws are those of its flow, for kernels that are exact for that law."""

    def sample(self, key: jax.Array, sample_shape: tuple = ()) -> jax.Array:
        return self.flow(jax.random.normal(key, (*sample_shape, *self.batch_shape, *self.noise_shape)))


def by_flow(prior: DiffusionPrior) -> DiffusionPrior:
    return ByFlow(prior.denoiser, **SOLVERS | {"flow_solver": prior.flow_solver})


def on_gaussian(y: jax.Array, prior: DiffusionPrior) -> None:
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior), 1.0).to_event(1), obs=y)


def on_mixture(y: jax.Array, prior: DiffusionPrior) -> None:
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.7), obs=y)


NOISE = dist.LogNormal(-1.0, 0.5)


def on_learned(y: jax.Array, prior: DiffusionPrior) -> None:
    """Distances from three places, with noise of an unknown scale."""
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", NOISE)
    places = jnp.array([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.5]])
    numpyro.sample("y", dist.Normal(jnp.sqrt(jnp.sum((x - places) ** 2, -1) + 0.01), noise).to_event(1), obs=y)


def in_gibbs(kernel: Callable) -> Callable:
    """A kernel of diffusion sites, with MALA for the others."""
    return partial(DiffusionGibbs, x_kernel=kernel, rest_kernel=MALA)


class Row(NamedTuple):
    """A sampler of the table."""

    make: Callable  # from a model of diffusion sites alone
    with_others: Callable | None  # from a model that has other sites too
    law: str  # whose draws the truths are: "reverse" or "flow"
    expected: str


EXACT = "exact"
ROWS = {
    "MALA": Row(MALA, MALA, "flow", EXACT),
    "ScoreHMC": Row(ScoreHMC, ScoreHMC, "flow", EXACT),
    "NUTS(with_density)": Row(*[lambda m: NUTS(with_density(m), max_tree_depth=5)] * 2, "flow", EXACT),
    "NoiseSpace": Row(partial(NoiseSpace, max_tree_depth=5), partial(NoiseSpace, max_tree_depth=5), "flow", EXACT),
    "NoiseSpace(EllipticalSlice)": Row(
        lambda m: NoiseSpace(m, EllipticalSlice), lambda m: NoiseSpace(m, EllipticalSlice), "flow", EXACT
    ),
    "NoiseSpace(CrankNicolson)": Row(
        lambda m: NoiseSpace(m, CrankNicolson), lambda m: NoiseSpace(m, CrankNicolson), "flow", EXACT
    ),
    "DiffusionPCN": Row(DiffusionPCN, in_gibbs(DiffusionPCN), "reverse", EXACT),
    "GuidedPCN": Row(GuidedPCN, in_gibbs(GuidedPCN), "reverse", EXACT),
    "ParticleGibbs": Row(partial(ParticleGibbs, num_particles=8), None, "reverse", EXACT),
    "Independence": Row(Independence, Independence, "reverse", EXACT),
    "DiffusiveGibbs": Row(DiffusiveGibbs, DiffusiveGibbs, "flow", EXACT),
    "ParallelTempering(MALA)": Row(
        partial(ParallelTempering, kernel=MALA, num_temperatures=4),
        partial(ParallelTempering, kernel=MALA, num_temperatures=4),
        "flow",
        EXACT,
    ),
    "Cycle(DiffusionPCN, MALA)": Row(lambda m: Cycle([DiffusionPCN, MALA], model=m), None, "flow", EXACT),
    "TemperedSMC": Row(*[partial(TemperedSMC, num_particles=400, progress_bar=False)] * 2, "reverse", EXACT),
    "TwistedSMC": Row(
        partial(TwistedSMC, num_particles=400, progress_bar=False), None, "reverse", "exact with many particles"
    ),
    "PopulationHMC": Row(
        *[partial(PopulationHMC, num_walkers=128, max_seconds=2.0, progress_bar=False)] * 2, "flow", EXACT
    ),
    "ULA": Row(ULA, ULA, "flow", "too wide, by its step size"),
    "SplitGibbs": Row(partial(SplitGibbs, rho=0.5), partial(SplitGibbs, rho=0.5), "reverse", "too wide, by rho"),
    "AnnealedLangevin": Row(AnnealedLangevin, in_gibbs(AnnealedLangevin), "reverse", "biased, by the guidance"),
    "GuidedReverse": Row(GuidedReverse, in_gibbs(GuidedReverse), "reverse", "biased, by the guidance"),
}
MODELS = {"gaussian": on_gaussian, "mixture": on_mixture, "learned": on_learned}
