"""All particle samplers where a user of MCMC expects the same: arguments, variables, pickling, islands, ArviZ."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    DenoisingDiffusionSampler,
    DesignedDiffusion,
    LearnedMCMC,
    PopulationHMC,
    TemperedSMC,
    TwistedSMC,
)
from numpyro_diffusion.infer.particles.evidence import resample_islands
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

PRIOR = DiffusionPrior(Gaussian([0.0, 0.0], 1.0, VE(0.05, 20.0)), sampler=DPMSolverPP(16, eta=1.0))
OFFSET = {"y": 0.0}
Y = jnp.array([3.0, -1.0])


def model(y, prior, likelihood="normal", count=1, shared=True, missing=None):
    """Posterior N((y + offset) / 2, 1/2)."""
    x = numpyro.sample("x", prior)
    numpyro.deterministic("twice", 2.0 * x)
    if shared and likelihood == "normal" and missing is None:
        y = jnp.broadcast_to(y + OFFSET["y"], (count, 2))
        numpyro.sample("y", dist.Normal(x, 1.0).expand([count, 2]).to_event(2), obs=y)


SAMPLERS = {
    "tempered": TemperedSMC(model, 400, max_moves=4, progress_bar=False),
    "twisted": TwistedSMC(model, 400, progress_bar=False),
    "population": PopulationHMC(model, 200, 4, max_gradients=1, progress_bar=False),
    "designed": DesignedDiffusion(model, 800, num_inner=8, num_shared=800, num_levels=16, progress_bar=False),
    "learned": LearnedMCMC(model, num_chains=100, num_draws=8, num_warmup=40, network=None, progress_bar=False),
    "trained": DenoisingDiffusionSampler(
        model, 2000, num_training_steps=100, batch_size=64, num_levels=8, progress_bar=False
    ),
}
"""Of 400 independent draws or more."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:at .* temperatures the moves ended"),
    pytest.mark.filterwarnings("ignore:.*the budget did not suffice for a second round"),
]


@pytest.mark.slow
@pytest.mark.parametrize("smc", SAMPLERS.values(), ids=SAMPLERS)
def test_like_mcmc(smc, tmp_path, monkeypatch, capsys, compiling):
    """Python arguments; then new data and a new prior, which compile nothing; then a variable that has changed."""
    smc = pickle.loads(pickle.dumps(smc))
    smc.run(jax.random.key(0), Y, PRIOR, "normal", count=1, shared=True, missing=None)
    draws, evidence = smc.get_samples(), smc.log_evidence
    error = 4.0 * 2.0 * np.sqrt(0.5 / 400)  # four errors, of half as many effective draws as particles and less
    assert (abs(draws["x"].mean(0) - Y / 2) < error).all()
    np.testing.assert_array_equal(draws["twice"], 2.0 * draws["x"])

    grouped = smc.get_samples(group_by_chain=True)
    islands, each = len(grouped["x"]), len(draws["x"]) // len(grouped["x"])
    assert grouped["x"].shape == (islands, each, 2)
    if islands == 4:  # each for itself, of a quarter
        assert (abs(grouped["x"].mean(1) - Y / 2) < 2.0 * error).all()
    restored = pickle.loads(pickle.dumps(smc))
    np.testing.assert_array_equal(restored.get_samples()["x"], draws["x"])
    assert restored.log_evidence.value == evidence.value

    data = to_arviz(restored, log_likelihood=True)
    np.testing.assert_array_equal(data["posterior"]["x"], grouped["x"])
    attributes = dict(data["posterior"].attrs)
    assert attributes["kernel"] == type(smc).__name__
    assert attributes["log_evidence"] == pytest.approx(float(evidence.value))
    assert attributes["log_evidence_error"] == pytest.approx(float(evidence.standard_error))
    np.testing.assert_array_equal(data["observed_data"]["y"][0], Y)
    expected = dist.Normal(grouped["x"], 1.0).log_prob(Y).sum(-1)
    np.testing.assert_allclose(np.asarray(data["log_likelihood"]["y"]).reshape(islands, each), expected, rtol=1e-4)
    data.to_netcdf(tmp_path / "draws.nc")

    key, y = jax.random.key(1), Y + 1.0
    other = DiffusionPrior(Gaussian([0.5, 0.0], 1.0, VE(0.05, 20.0)), sampler=DPMSolverPP(16, eta=1.0))
    with compiling() as programs:
        smc.run(key, y, other, "normal", count=1, shared=True, missing=None)
    assert programs == []
    assert (abs(smc.get_samples()["x"].mean(0) - (y + jnp.array([0.5, 0.0])) / 2) < error).all()

    monkeypatch.setitem(OFFSET, "y", -4.0)
    x = smc.run(key, Y, PRIOR, "normal", count=1, shared=True, missing=None).get_samples()["x"]
    assert (abs(x.mean(0) - (Y - 4.0) / 2) < error).all()
    with pytest.raises(TypeError, match=r"no.* kernel of MCMC: call its own run\(rng_key, ...\)"):
        MCMC(smc, num_warmup=1, num_samples=1)
    smc.print_summary()
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("cls", [TemperedSMC, DesignedDiffusion])
def test_double_precision(cls, x64):
    """Moves count in the integers of double precision too."""

    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    x = cls(model, 400, progress_bar=False).run(jax.random.key(0), jnp.asarray(1.0)).get_samples()["x"]
    assert x.dtype == jnp.float64 and abs(x.mean() - 0.5) < 4.0 * 2.0 * np.sqrt(0.5 / 400)


def test_an_island_without_weight_is_filled_from_the_others():
    log_weights = jnp.log(jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(resample_islands(jax.random.key(0), log_weights), np.ones((2, 3)))
