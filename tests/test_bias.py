"""The bias of a run, by a short exact correction: known shifts are measured, exact runs are not accused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, DiffusionPCN, EllipticalSlice, bias_report
from numpyro_diffusion.infer.trust.bias import _report

Y = jnp.array([3.0, -1.0])
PRIOR = DiffusionPrior(Gaussian([0.0, 0.0]))
CHAINS = 128


def model(y):
    """Posterior N(y / 2, 1/2)."""
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


class Finished:
    """What a run leaves: draws of N(y / 2 + shift sd, ratio^2 / 2)."""

    def __init__(self, shift=0.0, ratio=1.0, posterior=model, size=4000):
        noise = np.random.default_rng(0).normal(size=(size, 2))
        self.draws = (0.5 * np.asarray(Y) + np.sqrt(0.5) * (shift + ratio * noise)).astype(np.float32)
        self.model, self.arguments = posterior, ((Y,), {})

    def get_samples(self, group_by_chain=False):
        return {"x": self.draws}


@pytest.mark.parametrize(("shift", "ratio"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.7)])
def test_known_bias_is_measured(shift, ratio):
    """Within 4 standard errors, which are near those of independent draws; exact draws are not accused."""
    report = bias_report(jax.random.key(0), Finished(shift, ratio), num_chains=CHAINS, num_steps=40)
    assert np.all(np.abs(report.mean_shift["x"] - shift) < 4.0 * report.mean_error["x"])
    assert np.all(np.abs(report.log_sd_shift["x"] - np.log(ratio)) < 4.0 * report.log_sd_error["x"])
    assert np.all(report.mean_error["x"] < 1.5 / np.sqrt(CHAINS))
    assert report.biased == (shift != 0.0 or ratio != 1.0), str(report)
    assert report.kernel == "MALA" and not report.problems


def test_errors_are_standard_errors():
    """Of a run and corrected chains that are independent draws: z-scores of 300 entries are standard normal."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(100, 300))
    ends = 0.5 * start + np.sqrt(0.75) * rng.normal(size=(100, 300))
    report = _report({"x": rng.normal(size=(4, 100, 300))}, {"x": start}, {"x": ends[:, None]}, "exact")
    for shift, error in ((report.mean_shift, report.mean_error), (report.log_sd_shift, report.log_sd_error)):
        z = shift["x"] / error["x"]
        assert abs(z.mean()) < 4.0 / np.sqrt(300.0) and abs(z.std() - 1.0) < 4.0 / np.sqrt(600.0)
    assert not report.biased and "no bias seen" in str(report) and "lower bounds" in str(report)


def test_chains_that_have_not_moved_far_are_said_to():
    slow = lambda model: MALA(model, step_size=1e-3, target_accept_prob=None)  # noqa: E731
    report = bias_report(jax.random.key(0), Finished(0.5), slow, num_chains=CHAINS, num_steps=4)
    assert report.correlation > 0.9 and "lower bounds" in str(report)


@pytest.mark.slow
def test_ula_is_biased_and_pcn_is_not():
    """A long step makes posteriors of ULA too wide; moves by noising and denoising have no bias to see."""
    reports = {}
    for kernel in (ULA(model, step_size=0.8, adapt_mass_matrix=False), DiffusionPCN(model)):
        mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, num_chains=4, chain_method="vectorized")
        mcmc.run(jax.random.key(0), Y)
        reports[type(kernel)] = bias_report(jax.random.key(1), mcmc, num_chains=500)
    assert reports[ULA].biased and not reports[DiffusionPCN].biased, [*map(str, reports.values())]
    assert np.all(reports[ULA].log_sd_shift["x"] > 0.0)


def discrete(y):
    numpyro.sample("x", dist.Bernoulli(0.5).expand([2]).to_event(1))


def test_bad_arguments():
    run = Finished()
    with pytest.raises(ValueError, match="num_chains must be at least 4"):
        bias_report(jax.random.key(0), run, num_chains=2)
    with pytest.raises(TypeError, match="kernel must make a kernel"):
        bias_report(jax.random.key(0), run, 1.0)
    with pytest.raises(ValueError, match=r"run\(...\) must come first"):
        bias_report(jax.random.key(0), MCMC(EllipticalSlice(model), num_warmup=1, num_samples=4))
    with pytest.raises(ValueError, match="are discrete"):
        bias_report(jax.random.key(0), Finished(posterior=discrete))
    run.draws[0] = np.nan
    with pytest.raises(ValueError, match="draws of 'x' must be finite"):
        bias_report(jax.random.key(0), run)
