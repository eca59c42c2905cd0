"""The sampler that learns from a density, against evidences and modes in closed form, trained well, badly or not."""

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.infer import MCMC
from scipy.stats import norm

from numpyro_diffusion.diagnostics import to_arviz, verdict
from numpyro_diffusion.infer import DenoisingDiffusionSampler
from numpyro_diffusion.infer.particles.trained import walk
from numpyro_diffusion.nn import MLP

KEY = jax.random.key
SLOW = pytest.mark.slow
QUIET = {"progress_bar": False}
Y = jnp.array([2.0, -1.0])


def normal(y):
    """Two numbers N(1, 4), each seen with unit noise: y ~ N(1, 5)."""
    x = numpyro.sample("x", dist.Normal(1.0, 2.0).expand([2]).to_event(1))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def log_evidence_of(y):
    return norm.logpdf(np.asarray(y), 1.0, np.sqrt(5.0)).sum()


def wrong():
    """A network that was never trained and means nothing, for two numbers."""
    network = MLP((4,), 16, 1, rngs=nnx.Rngs(1))
    network.output_layer.kernel[...] = 0.2 * jax.random.normal(KEY(2), network.output_layer.kernel.shape)
    return network


UNTRAINED = {"num_training_steps": 0, "num_levels": 5, "noise_levels": (4.0, 0.3), "num_moves": 0}


def bias_of_the_evidence():
    """By twenty thousand walks with a network that means nothing: the error of the mean weight, in its own; the run."""
    options = {"network": wrong(), "num_islands": 200, **UNTRAINED, **QUIET}
    sampler = DenoisingDiffusionSampler(normal, 20_000, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sampler.run(KEY(0), Y)
    ratio = np.exp(np.asarray(sampler.log_weights, float).reshape(-1) - log_evidence_of(Y))
    return (ratio.mean() - 1.0) / (ratio.std() / np.sqrt(ratio.size)), ratio.std(), sampler


def test_the_evidence_is_unbiased_whatever_the_network():
    """Within four errors, of 1 % or so. The mean log-weight is below it, and walks chosen by weight are right."""
    bias, spread, sampler = bias_of_the_evidence()
    assert abs(bias) < 4.0 and 0.3 < spread < 4.0
    bound = sampler.evidence_bound
    assert bound.value + 4.0 * bound.standard_error < log_evidence_of(Y)
    x, error = sampler.get_samples()["x"], 5.0 * np.sqrt(0.8 / sampler.effective_size)
    assert (abs(x.mean(0) - (1.0 + 0.8 * (Y - 1.0))) < error).all() and (abs(x.var(0) - 0.8) < 1.5 * error).all()
    assert sampler.num_target_evals == 1000 + 20_000 * (5 + 1 + 1)


def test_a_wrong_variance_of_a_step_is_caught(monkeypatch):
    """By the same numbers: standard deviations a tenth too large in the density of the walk; of 2 % the bias is 1 %, the error."""
    right = walk.log_normal
    monkeypatch.setattr(
        walk, "log_normal", lambda x, variance: right(x, 1.1**2 * variance if jnp.ndim(variance) else variance)
    )
    assert abs(bias_of_the_evidence()[0]) > 4.0


MODES = jnp.array([[-4.0, 2.0], [3.0, -1.0]])
SHARES = jnp.array([0.3, 0.7])


def two_modes():
    """Of widths .5 and 1 under a prior of deviation 5, with the evidence exp(1.5)."""
    x = numpyro.sample("x", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    parts = dist.Normal(MODES, jnp.array([0.5, 1.0])[:, None]).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(SHARES), parts)
    prior = dist.Normal(0.0, 5.0).log_prob(x).sum()
    numpyro.factor("modes", mixture.log_prob(x) - prior + 1.5)


SMALL = {"batch_size": 128, "num_levels": 12, **QUIET}


@pytest.fixture(scope="module")
def trained():
    sampler = DenoisingDiffusionSampler(two_modes, 4000, num_training_steps=400, num_islands=20, **SMALL)
    return sampler.train(KEY(0))


@SLOW
@pytest.mark.parametrize("correct", ["resample", "independence"])
def test_two_modes(trained, correct):
    """Shares, moments and evidence within their errors, and more walks effective than by the normal law at first."""
    trained._correct = correct
    sampler = trained.run(KEY(1))
    value, error, _ = sampler.log_evidence
    assert not sampler.problems and error < 0.05 and abs(value - 1.5) < 4.0 * error
    bound = sampler.evidence_bound
    assert 0.5 < bound.value + 4.0 * bound.standard_error < 1.5
    size = sampler.effective_size * (1.0 if correct == "resample" else 0.5)
    assert size > 1000.0
    x = sampler.get_samples()["x"]
    left = np.asarray(x[:, 0] < 0.0)
    assert abs(left.mean() - 0.3) < 4.0 * np.sqrt(0.21 / size)
    for mode, mean, width in ((left, MODES[0], 0.5), (~left, MODES[1], 1.0)):
        assert (abs(x[mode].mean(0) - mean) < 4.0 * width / np.sqrt(size * mode.mean())).all()
        assert (abs(x[mode].var(0) / width**2 - 1.0) < 4.0 * np.sqrt(2.0 / (size * mode.mean()))).all()
