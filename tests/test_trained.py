"""The sampler that learns from a density, against evidences and modes in closed form, trained well, badly or not."""

import pickle
import warnings

import jax
import jax.numpy as jnp
import laws
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from scipy.stats import norm

from numpyro_diffusion.diagnostics import to_arviz, verdict
from numpyro_diffusion.infer import DenoisingDiffusionSampler
from numpyro_diffusion.infer.particles.trained import walk
from numpyro_diffusion.infer.particles.trained.problems import problems_of, reference_of
from numpyro_diffusion.infer.particles.trained.training import Trace
from numpyro_diffusion.nn import MLP

KEY = jax.random.key
SLOW = pytest.mark.slow
QUIET = {"progress_bar": False}
Y = jnp.array([2.0, -1.0])


def normal(y, dimensions=2):
    """Two numbers N(1, 4), each seen with unit noise: y ~ N(1, 5)."""
    x = numpyro.sample("x", dist.Normal(1.0, 2.0).expand([dimensions]).to_event(1))
    numpyro.sample("y", dist.Normal(x[:2], 1.0).to_event(1), obs=y)


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
    assert sampler.num_target_evals == 2 * 5000 + 20_000 * (5 + 1 + 1)


def test_a_wrong_variance_of_a_step_is_caught(monkeypatch):
    """By the same numbers: standard deviations a tenth too large in the density of the walk are seven errors off."""
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
    sampler = DenoisingDiffusionSampler(two_modes, 4000, num_training_steps=300, num_islands=10, **SMALL)
    return pickle.dumps(sampler.train(KEY(0)))  # the programs are left behind


@SLOW
@pytest.mark.parametrize("correct", ["resample", "independence"])
def test_two_modes(trained, correct, tmp_path, capsys):
    """Shares, moments and evidence within their errors; by a sampler that has been trained, pickled and unpickled."""
    sampler = pickle.loads(trained)
    sampler._correct = correct
    sampler.run(KEY(1))
    value, error, _ = sampler.log_evidence
    assert not sampler.problems and error < 0.06 and abs(value - 1.5) < 4.0 * error
    bound = sampler.evidence_bound
    assert 0.5 < bound.value + 4.0 * bound.standard_error < 1.5
    assert sampler.effective_size > 700.0  # of 4000; 280 of draws of the normal law that it begins with
    size = sampler.effective_size * (1.0 if correct == "resample" else 0.5)
    x = sampler.get_samples()["x"]
    left = np.asarray(x[:, 0] < 0.0)
    assert abs(left.mean() - 0.3) < 4.0 * np.sqrt(0.21 / size)
    for mode, mean, width in ((left, MODES[0], 0.5), (~left, MODES[1], 1.0)):
        assert (abs(x[mode].mean(0) - mean) < 4.0 * width / np.sqrt(size * mode.mean())).all()
        assert (abs(x[mode].var(0) / width**2 - 1.0) < 4.0 * np.sqrt(2.0 / (size * mode.mean()))).all()
    assert np.isfinite(sampler.training.loss).all() and sampler.training.power[-1] == 1.0
    assert sampler.num_target_evals == 2 * 5000 + 300 * 128 * 13 + 4000 * (13 + 1 + sampler._moves_made)
    sampler = pickle.loads(pickle.dumps(sampler))
    data = to_arviz(sampler)
    assert data["posterior"]["x"].shape == (10, 400, 2) and data["posterior"].attrs["log_evidence"] == value
    data.to_netcdf(tmp_path / "draws.nc")
    assert verdict(sampler).converged or correct == "independence"  # whose chains have an R-hat of 1.012
    sampler.print_summary()
    assert "training included" in capsys.readouterr().out


@SLOW
def test_hard_walls_and_holes():
    """The evidence is P(x > .5), and no draw is outside."""
    sampler = DenoisingDiffusionSampler(
        laws.half_line, 2000, num_training_steps=50, num_moves=0, num_islands=10, **SMALL
    )
    sampler.run(KEY(0), -2.0)
    value, error, _ = sampler.log_evidence
    assert not sampler.problems and abs(value - norm.logsf(0.5)) < 4.0 * error < 0.2
    x = np.asarray(sampler.get_samples()["x"])
    assert x.min() > 0.5 and sampler.evidence_bound.value == -np.inf
    size, mean = sampler.effective_size, norm.pdf(0.5) / norm.sf(0.5)
    assert abs(x.mean() - mean) < 4.0 * np.sqrt((1.0 + 0.5 * mean - mean**2) / size)


def impossible():
    numpyro.factor("bad", jnp.where(numpyro.sample("x", dist.Normal(0.0, 1.0)) > 1e3, 0.0, -jnp.inf))


def no_gradient():
    """Its value is right, and its gradient is NaN everywhere."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("trap", jnp.where(x < 1e9, -0.5 * x**2, jnp.sqrt(x - 1e9)))


def narrow():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.01).to_event(1), obs=jnp.full(8, 2.0))


FEW = {"num_training_steps": 3, "batch_size": 8, "num_levels": 2, "num_moves": 0, **QUIET}


@SLOW
def test_what_cannot_be_trusted_says_so():
    """A training that fails at each step leaves the walk as it was, exact still; a weight on few walks."""
    with pytest.warns(UserWarning, match="training has failed: 3 of 3 steps"):
        failed = DenoisingDiffusionSampler(no_gradient, 2000, **FEW, objective="kl").run(KEY(0))
    value, error, _ = failed.log_evidence
    assert np.isinf(error) and abs(value - 0.5 * np.log(0.5)) < 0.1
    with pytest.warns(UserWarning, match="the weights degenerate: of the 20 walks"):
        lost = DenoisingDiffusionSampler(narrow, 80, **FEW).run(KEY(0))
    assert np.isinf(lost.log_evidence.standard_error) and not verdict(lost).converged


def test_weights_that_agree_on_too_little_are_found_out():
    """All walks in a mode of share .7, when draws about the prior see both; and not when these are few."""
    trace = Trace(*np.zeros((4, 10)))
    (message,) = problems_of(np.full((4, 100), np.log(0.7)), trace, reference_of(jnp.zeros(5000)))
    assert "modes are lost: the walks hold 0.70" in message
    assert problems_of(np.zeros((4, 100)), trace, reference_of(jnp.zeros(5000))) == ()
    assert problems_of(np.zeros((4, 100)), trace, reference_of(jnp.zeros(5000).at[0].set(50.0))) == ()


def run(model, *args, **options):
    DenoisingDiffusionSampler(model, 80, **FEW, **options).run(KEY(0), *args)


def moved():
    DenoisingDiffusionSampler(normal, 80, **FEW).train(KEY(0), Y).run(KEY(0), Y, dimensions=3)


REFUSED = {
    "nothing": (lambda: run(laws.nothing), "DenoisingDiffusionSampler needs a latent site"),
    "discrete": (lambda: run(laws.discrete), r"sites \['k'\] are discrete"),
    "improper": (lambda: run(laws.improper), "DenoisingDiffusionSampler takes its units .* Give location= and scale="),
    "nan": (lambda: run(laws.not_a_number), "zero or NaN at all of 5000 points"),
    "impossible": (lambda: run(impossible), "zero or NaN at all of 5000 points"),
    "one of two": (lambda: run(narrow, location={"x": 0.0}), "must be given together"),
    "flat": (lambda: run(narrow, location={"x": 0.0}, scale={"x": 0.0}), "those given are not"),
    "network": (lambda: run(normal, Y, network=MLP((3,), 8, 1, rngs=nnx.Rngs(0))), "vectors of 4 entries"),
    "levels": (lambda: DenoisingDiffusionSampler(narrow, noise_levels=(0.1, 1.0)), r"noise_levels\[0\] must exceed"),
    "rate": (lambda: DenoisingDiffusionSampler(narrow, learning_rate=0.0), "learning_rate must be positive"),
    "batch": (lambda: DenoisingDiffusionSampler(narrow, batch_size=1), "batch_size must be at least 2"),
    "objective": (lambda: DenoisingDiffusionSampler(narrow, objective="tb"), "objective must be one of"),
    "correct": (lambda: DenoisingDiffusionSampler(narrow, correct="smc"), "correct must be one of"),
    "moved": (moved, "3 unconstrained numbers, and 2 where train"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] * (name == "moved")) for name in REFUSED])
def test_errors(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()
