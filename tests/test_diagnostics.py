"""What a kernel is exact for stays with its draws in ArviZ, old and new, and in a file."""

import subprocess
import sys

import arviz as az
import jax
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import HMC, MCMC

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, DiffusionGibbs, DiffusionPCN, LineIntegral, NoiseSpace


def model(y=1.0):
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0])))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def short_run(kernel):
    mcmc = MCMC(kernel, num_warmup=5, num_samples=10, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("accept_prob",) if not isinstance(kernel, ULA) else ())
    return mcmc


def test_status_travels_with_the_draws(tmp_path):
    data = to_arviz(short_run(MALA(model, density=LineIntegral())))
    attributes = dict(data["posterior"].attrs)
    assert attributes["kernel"] == "MALA" and attributes["exact"] == "no"
    assert "circulation" in attributes["statement"] and "circulation" in data["sample_stats"]
    assert data["posterior"]["x"].shape == (2, 10, 2) and "acceptance_rate" in data["sample_stats"]
    assert "log_likelihood" not in data
    data.to_netcdf(tmp_path / "draws.nc")
    assert dict(az.from_netcdf(tmp_path / "draws.nc")["posterior"].attrs)["statement"] == attributes["statement"]


def test_kernels_of_numpyro_have_no_status():
    attributes = to_arviz(short_run(HMC(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), num_steps=1)))[
        "posterior"
    ].attrs
    assert attributes["kernel"] == "HMC" and "exact" not in attributes


@pytest.mark.parametrize(
    ("kernel", "exact"),
    [(ULA(model), False), (MALA(model), True), (NoiseSpace(model), True), (DiffusionPCN(model), False),
     (DiffusionGibbs(model, x_kernel=NoiseSpace), True)],
    ids=lambda k: type(k).__name__,
)  # fmt: skip
def test_every_kernel_says_what_it_is_exact_for(kernel, exact):
    assert kernel.status.exact is exact and len(kernel.status.statement) > 20


@pytest.mark.slow
def test_arviz_may_be_imported_first():
    """ArviZ 1.x then loads NumPyro lazily, and its own converter misses a module of it."""
    code = """
import arviz, jax, jax.numpy as jnp
from numpyro.infer import MCMC
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.infer import ULA
import numpyro
import numpyro.distributions as dist
jax.config.update("jax_disable_most_optimizations", True)
mcmc = MCMC(ULA(lambda: numpyro.sample("x", dist.Normal(jnp.zeros(1), 1.0))), num_warmup=0, num_samples=3)
mcmc.run(jax.random.key(0))
print(to_arviz(mcmc)["posterior"]["x"].shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("(1, 3, 1)"), result.stderr
