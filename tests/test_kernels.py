"""Every kernel in every way to run it: chain methods, precision, pickling, thinning, going on, ArviZ, second runs.

What a kernel draws is held to closed forms in its own tests; here it is shown that it draws at all.
"""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, BarkerMH, Predictive, log_likelihood

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    ULA,
    AnnealedLangevin,
    CrankNicolson,
    Cycle,
    DelayedAcceptance,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    EllipticalSlice,
    GuidedPCN,
    GuidedReverse,
    Independence,
    LineIntegral,
    Mixture,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    ScoreHMC,
    SplitGibbs,
    Vectorize,
)
from numpyro_diffusion.infer.noise.reference import ReferenceKernel
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Ancestral, DPMSolverPP

SLOW = pytest.mark.slow
Y = jnp.array([3.0, -1.0])
SHORT = {"num_warmup": 6, "num_samples": 8}


def prior(mean=0.0):
    return DiffusionPrior(Gaussian(jnp.full(2, mean), 1.0, VE(0.05, 20.0)), sampler=DPMSolverPP(8, eta=1.0))


def alone(y, prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def with_noise(y, prior):
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def without_diffusion(y, prior):
    x = numpyro.sample("x", dist.Normal(prior.denoiser.location, 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


KERNELS = {
    "pcn": (DiffusionPCN, alone),
    "noise_space": (partial(NoiseSpace, max_tree_depth=2), with_noise),
    "gibbs": (DiffusionGibbs, with_noise),
    "ula": (ULA, with_noise),
    "mala": (MALA, with_noise),
    "mala_line": (partial(MALA, density=LineIntegral()), with_noise),
    "hmc": (partial(ScoreHMC, num_steps=2, momentum_refresh=0.5), with_noise),
    "annealed": (partial(AnnealedLangevin, num_levels=4), alone),
    "guided_reverse": (GuidedReverse, alone),
    "guided_pcn": (GuidedPCN, alone),
    "particle_gibbs": (partial(ParticleGibbs, num_particles=3), alone),
    "split_gibbs": (partial(SplitGibbs, rho=0.5), with_noise),
    "diffusive_gibbs": (DiffusiveGibbs, with_noise),
    "independence": (partial(Independence, num_proposals=2), with_noise),
    "elliptical_slice": (EllipticalSlice, without_diffusion),
    "crank_nicolson": (CrankNicolson, without_diffusion),
    "parallel_tempering": (partial(ParallelTempering, kernel=MALA, num_temperatures=3), with_noise),
    "parallel_tempering_pcn": (partial(ParallelTempering, kernel=DiffusionPCN, num_temperatures=3), alone),
    "cycle": (lambda model: Cycle([DiffusionPCN, MALA], model=model), alone),
    "mixture": (lambda model: Mixture([DiffusionPCN, MALA], [0.5, 0.5], model=model), alone),
    "delayed_acceptance": (
        partial(DelayedAcceptance, surrogate=Ancestral(4, eta=0.0), num_moves=2, max_tree_depth=2),
        with_noise,
    ),
    "vectorize": (lambda model: Vectorize(BarkerMH(model)), with_noise),
}
TABLE = [pytest.param(make, model, id=name) for name, (make, model) in KERNELS.items()]
QUICK = ("mala",)
ONE_OF_EACH = [
    pytest.param(make, model, id=name, marks=() if name in QUICK else SLOW) for name, (make, model) in KERNELS.items()
]


@pytest.mark.parametrize(("make", "model"), ONE_OF_EACH)
def test_pickle_thin_arviz_predict_go_on_and_run_again(make, model, monkeypatch, compiling):
    """Data and prior are model arguments: a second run on others of the same shapes finds everything compiled."""
    for variable in ("CI", "PYTEST_XDIST_WORKER"):  # there NumPyro turns the progress bar off, which recompiles
        monkeypatch.delenv(variable, raising=False)
    kernel = make(model)
    if not isinstance(kernel, Vectorize):
        kernel = pickle.loads(pickle.dumps(kernel))
    mcmc = MCMC(kernel, **SHORT, num_chains=2, chain_method="vectorized", jit_model_args=True, thinning=2)
    mcmc.run(jax.random.key(0), Y, prior())
    x = mcmc.get_samples(group_by_chain=True)["x"]
    assert x.shape == (2, 4, 2) and bool(jnp.isfinite(x).all()) and not np.array_equal(x[0], x[1])
    fields = mcmc.get_extra_fields(group_by_chain=True)
    assert all(value.shape[:2] == (2, 4) for value in jax.tree.leaves(fields))
    if not isinstance(kernel, Vectorize):
        assert not bool(fields["diverging"].any())
    if not isinstance(kernel, Vectorize | ReferenceKernel):
        assert (fields["num_score_evals"] > 0).all()
    data = to_arviz(mcmc)
    assert data["posterior"]["x"].shape == (2, 4, 2)
    if fields:
        assert set(fields) & {"diverging", "num_score_evals"} <= set(data["sample_stats"].data_vars)
    samples = mcmc.get_samples()
    assert log_likelihood(model, samples, Y, prior())["y"].shape == (8,)
    assert Predictive(model, samples)(jax.random.key(0), None, prior())["y"].shape == (8, 2)
    if model is with_noise:
        np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)

    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key, Y, prior())
    assert not np.array_equal(mcmc.get_samples(group_by_chain=True)["x"], x)

    mcmc.post_warmup_state = None
    y, other, key = Y + 1.0, prior(1.0), jax.random.key(1)
    with compiling() as programs:
        mcmc.run(key, y, other)
    assert programs == []


def run(make, model, y, method):
    mcmc = MCMC(make(model), **SHORT, num_chains=2, chain_method=method, progress_bar=False)
    mcmc.run(jax.random.key(0), y, prior())
    samples = mcmc.get_samples(group_by_chain=True)
    x = samples["x"]
    assert x.shape == (2, 8, 2) and not np.array_equal(x[0], x[1])
    assert all(bool(jnp.isfinite(value).all()) for value in samples.values())
    return samples


@SLOW
@pytest.mark.parametrize(("make", "model"), TABLE)
def test_a_chain_in_a_vmap_of_the_users(make, model):
    run(make, model, Y, jax.vmap)


@SLOW
@pytest.mark.parametrize(("make", "model"), TABLE)
def test_double_precision_and_a_chain_by_itself(make, model, x64):
    """On a device each where there are two, and one after the other where not."""
    samples = run(make, model, jnp.asarray(Y, float), "parallel")
    assert all(value.dtype == jnp.float64 for value in samples.values())


def test_kernels_are_in_the_table():
    """A kernel that `infer` hands out has its row."""
    from numpyro_diffusion import infer

    classes = {value for value in vars(infer).values() if isinstance(value, type)}
    kernels = {cls.__name__ for cls in classes if issubclass(cls, infer.DiffusionKernel)} - {"DiffusionKernel"}
    tried = {type(copy.copy(make(model))).__name__ for make, model in KERNELS.values()}
    assert kernels <= tried, kernels - tried
    assert NUTS not in classes
