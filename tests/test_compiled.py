"""Compiled functions of a model: new data are no new program, a new variable of the notebook is one."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.kernel.compiled import Compiled

READ = {"number": 1.0, "numpy": np.ones(2), "jax": jnp.ones(2), "prior": DiffusionPrior(Gaussian([0.0, 0.0]))}
TRACED = []


def model(y, kind="normal", size=2, on=True, scale=None):
    x = numpyro.sample("x", READ["prior"])
    if on and kind == "normal":
        loc = jax.nn.relu(x) + READ["number"] + READ["numpy"] + READ["jax"]
        numpyro.sample("y", dist.Normal(loc[:size], 1.0 if scale is None else scale).to_event(1), obs=y[:size])


def total(x, args, kwargs):
    """All that the model reads, and a note that it was traced."""
    TRACED.append(kwargs)
    prior = READ["prior"].denoiser.means
    return x + jnp.sum(args[0]) + READ["number"] + READ["numpy"].sum() + READ["jax"].sum() + prior.sum()


def traces(compiled, y, **kwargs):
    """The answer, and how often the function was traced for it."""
    before = len(TRACED)
    (function,) = compiled.bind((y,), kwargs)
    return float(function(0.0)), len(TRACED) - before


def test_data_are_no_new_program_and_python_values_are():
    compiled, y = Compiled(model, total), jnp.ones(2)
    assert traces(compiled, y) == (7.0, 1)
    assert traces(compiled, y + 1.0) == (9.0, 0)
    assert traces(compiled, np.ones(2, np.float32)) == (7.0, 0)
    for change in ({"kind": "none"}, {"size": 1}, {"on": False}):
        assert traces(compiled, y, **change) == (7.0, 1)
        assert traces(compiled, y + 1.0, **change) == (9.0, 0)
    assert traces(compiled, y, scale=2.0) == (7.0, 1) and traces(compiled, y, scale=3.0) == (7.0, 0)
    restored = pickle.loads(pickle.dumps(compiled))
    assert traces(restored, y) == (7.0, 1)


CHANGES = {
    "number": lambda old: old + 1.0,
    "numpy": lambda old: old + np.array([1.0, 0.0]),
    "numpy in place": lambda old: np.add(old, 0.5, out=old),
    "jax": lambda old: old.at[0].add(1.0),
    "prior": lambda old: DiffusionPrior(Gaussian([1.0, 0.0])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_model_reads_besides_is_seen(name, monkeypatch):
    """Every kind of variable: the function sees the new one, and the same one again is no new program."""
    what = name.split()[0]
    monkeypatch.setitem(READ, what, READ[what].copy() if what == "numpy" else READ[what])
    compiled, y = Compiled(model, total), jnp.ones(2)
    assert traces(compiled, y) == (7.0, 1)
    monkeypatch.setitem(READ, what, CHANGES[name](READ[what]))
    assert traces(compiled, y) == (8.0, 1)
    assert traces(compiled, y) == (8.0, 0)


def test_a_model_that_branches_on_a_number_gets_it():
    def branching(threshold):
        if threshold > 0:
            numpyro.sample("x", dist.Normal(threshold, 1.0))

    compiled = Compiled(branching, lambda x, args, kwargs: x + args[0])
    for threshold in (1.0, 2.0, -1.0):
        assert float(compiled.bind((threshold,), {})[0](1.0)) == 1.0 + threshold
