"""Chains that start from a population: at its draws, in the coordinates that every kernel takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import SQUARED, known_noise, standard
from numpyro.infer import NUTS

from numpyro_diffusion.infer import DiffusionPCN, NoiseSpace, PopulationHMC, TemperedSMC
from numpyro_diffusion.solve import DPMSolverPP, Heun

ARGS = jnp.array([3.0, -1.0]), standard(transform=SQUARED, sampler=DPMSolverPP(8, eta=1.0), flow_solver=Heun(24))
SOURCES = {
    "tempered": partial(TemperedSMC, num_particles=64, max_moves=2),
    "population": partial(PopulationHMC, num_walkers=16, num_draws=2, max_moves=2, max_gradients=1),
}
KERNELS = {"nuts": (NUTS, 1e-5), "pcn": (DiffusionPCN, 1e-5), "noise_space": (NoiseSpace, 0.05)}


@pytest.fixture(scope="module", params=[pytest.param("tempered", marks=pytest.mark.slow), "population"])
def source(request):
    with pytest.warns(UserWarning):  # both are far too short
        return SOURCES[request.param](known_noise, progress_bar=False).run(jax.random.key(0), *ARGS)


@pytest.mark.parametrize(("make", "error"), KERNELS.values(), ids=KERNELS)
def test_chains_start_at_draws(source, make, error):
    """At four different draws; in noise space at the noise behind them, to the error of the solver."""
    kernel, keys = make(known_noise), jax.random.split(jax.random.key(1), 4)
    state = kernel.init(keys, 0, source.init_params(4), model_args=ARGS, model_kwargs={})
    x = jax.vmap(kernel.postprocess_fn(ARGS, {}))(getattr(state, kernel.sample_field))["x"]
    draws = np.asarray(source.get_samples()["x"])
    nearest = np.abs(np.log(x[:, None]) - np.log(draws)).max(-1)
    assert nearest.min(1).max() < error and len(np.unique(nearest.argmin(1))) == 4


def test_numbers_of_chains(source):
    assert source.init_params()["x"].shape == (2,)
    with pytest.raises(ValueError, match=r"num_chains must be at most \d+, the number of draws"):
        source.init_params(100_000)
    with pytest.raises(ValueError, match="num_chains must be at least 1"):
        source.init_params(0)
