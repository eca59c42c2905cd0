"""Runs that are killed and resumed are those that never were, bit for bit; and what cannot be resumed says why."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from numpyro_diffusion.train import Adaptive, fit, levels, losses, weighting
from numpyro_diffusion.train import run as run_module
from numpyro_diffusion.train.steps import train_steps

fit_module = importlib.import_module("numpyro_diffusion.train.fit")  # the package's `fit` is the function


class Tiny(nnx.Module):
    """Two trained numbers and dropout."""

    def __init__(self, gain=0.5, rate=0.2):
        self.event_shape, self.drop = (2,), nnx.Dropout(rate, rngs=nnx.Rngs(0))
        self.gain, self.shift = nnx.Param(jnp.float32(gain)), nnx.Param(jnp.float32(0.0))

    def __call__(self, x, c_noise, cond=None):
        return self.drop(self.gain[...] * x) + self.shift[...] * c_noise


ROWS = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
OPTIMIZER = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(5)), optax.adam(0.05))  # a state with a key
SETTINGS = {
    "num_steps": 24,
    "batch_size": 16,
    "steps_per_call": 4,
    "num_evaluations": 3,
    "noise_levels": Adaptive(num_bins=8),
    "optimizer": OPTIMIZER,
    "progress_bar": False,
}


def run(path=None, data=ROWS, backbone=None, key=1, **changes):
    return fit(jax.random.key(key), backbone or Tiny(), data, checkpoint=path, **SETTINGS | changes)


def killed_at(call, monkeypatch, path, **changes):
    """A run that dies in a compiled call."""
    made = []

    def dying(*args, **kwargs):
        made.append(None)
        if len(made) == call:
            raise RuntimeError("killed")
        return train_steps(*args, **kwargs)

    monkeypatch.setattr(fit_module, "train_steps", dying)
    with pytest.raises(RuntimeError, match="killed"):
        run(path, **changes)
    monkeypatch.setattr(fit_module, "train_steps", train_steps)


@pytest.fixture(scope="module")
def whole():
    return run()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The file of a run that has ended."""
    path = tmp_path_factory.mktemp("runs") / "run.safetensors"
    run(path)
    return path


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("call", [1, 2, 4, 6])  # before anything is kept, between two files, and in the last call
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch, call):
    path = tmp_path / "run.safetensors"
    killed_at(call, monkeypatch, path)
    assert path.exists() == (call > 2)
    assert_same(run(path), whole)
    assert_same(run(path), whole)  # a run that has ended ends at once


def test_interrupted_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_steps(*args, **kwargs)

    monkeypatch.setattr(fit_module, "train_steps", interrupted)
    partial = run(path)
    assert partial.interrupted and partial.num_steps == 12  # kept at Ctrl-C, not only at the measurement before
    monkeypatch.setattr(fit_module, "train_steps", train_steps)
    made = []
    monkeypatch.setattr(run_module, "_call", lambda *args: made.append(None) or loop_call(*args))
    assert_same(run(path), whole)
    assert len(made) == 3


loop_call = run_module._call


def test_a_long_run_is_kept_each_minute_too(whole, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(run_module, "SECONDS_BETWEEN_SAVES", -1.0)
    killed_at(2, monkeypatch, path)
    assert path.exists()
    assert_same(run(path), whole)


def batches():
    rng = np.random.default_rng(3)
    while True:
        yield rng.normal(size=(16, 2)).astype(np.float32)


@pytest.mark.slow
def test_stream_is_resumed_where_it_was(tmp_path, monkeypatch):
    path, options = tmp_path / "run.safetensors", {"held_out": ROWS, "noise_levels": levels.LogNormal()}
    whole = run(data=batches(), **options)
    killed_at(4, monkeypatch, path, data=batches(), **options)
    assert_same(run(path, data=batches(), **options), whole)


def test_patience_is_resumed_with_its_best_average(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    options = {"patience": 2, "num_evaluations": 6, "optimizer": optax.sgd(2.5), "ema_decay": 0.0}
    whole = run(**options)
    assert whole.num_steps < 24 and np.argmin(whole.held_out_losses) < len(whole.held_out_losses) - 1
    killed_at(whole.num_steps // 4, monkeypatch, path, **options)
    assert_same(run(path, **options), whole)


def own_loss(denoiser, key, x, t, cond):
    return losses.DenoisingScoreMatching()(denoiser, key, x, t, cond)


OTHER_RATE = optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(5)), optax.adam(0.06))
OTHER_ROWS = np.where(np.arange(120).reshape(60, 2) == 7, 0.5, ROWS)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("batch_size was 16, is 8", {"batch_size": 8}),
        ("num_steps was 24, is 28", {"num_steps": 28}),
        ("steps_per_call was 4, is 8", {"steps_per_call": 8}),
        ("ema_decay was 0.999, is 0.9", {"ema_decay": 0.9}),
        ("patience was None, is 3", {"patience": 3}),
        (r"key was \[0, 1\], is \[0, 2\]", {"key": 2}),
        ("data was [0-9a-f]*, is [0-9a-f]*[;.]", {"data": OTHER_ROWS}),
        ("backbone was Tiny [0-9a-f]*, is Tiny [0-9a-f]*[;.]", {"backbone": Tiny(0.6)}),
        ("training_mode was [0-9a-f]*, is [0-9a-f]*[;.]", {"backbone": Tiny(rate=0.3)}),
        (r"weighting was EDM\(mean=-0.5, std=1.5\), is Sigmoid\(bias=2.0\)", {"weighting": weighting.Sigmoid()}),
        (r"noise_levels was Adaptive\(.*\), is LogNormal\(mean=-0.5, std=1.5\)", {"noise_levels": levels.LogNormal()}),
        (r"loss was Denoising.*\(\), is Implicit.*\(num_probes=1\)", {"loss": losses.ImplicitScoreMatching(1)}),
        ("loss was Denoising.*\\(\\), is test_resume.own_loss", {"loss": own_loss}),
        ("target was edm, is x0", {"target": "x0"}),
        ("optimizer was [0-9a-f]*, is [0-9a-f]*[;.]", {"optimizer": OTHER_RATE}),
        ("optimizer was [0-9a-f]*, is [0-9a-f]*[;.]", {"clip_norm": 1.0}),
        ("held_out was [0-9a-f]*, is [0-9a-f]*[;.]", {"held_out": ROWS[:9], "validation_fraction": 0.1}),
    ],
)
def test_another_configuration_is_an_error_that_names_the_difference(saved, named, changes):
    with pytest.raises(ValueError, match=rf"cannot resume from .*run.safetensors.*another configuration: .*{named}"):
        run(saved, **changes)


def test_damaged_files_are_named(saved, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"not a run")
    with pytest.raises(ValueError, match="cannot resume from .*: it is truncated, corrupt or not a safetensors file"):
        run(path)
    path.write_bytes(saved.read_bytes()[:-1] + bytes([saved.read_bytes()[-1] ^ 1]))
    with pytest.raises(
        ValueError, match="the content is not what was saved: the file is corrupt. Delete it to start anew"
    ):
        run(path)
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2)}))
    with pytest.raises(ValueError, match="it is a safetensors file, but not of a run of train.fit"):
        run(path)


def test_precisions_that_the_format_does_not_know_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    state = {
        "small": jnp.array([1.5, -0.1], jnp.bfloat16),
        "key": jax.random.key(3),
        "scalar": jnp.zeros((), jnp.int32),
    }
    progress = run_module.begin(run_module.TrainState({}, {}, state, jnp.int32(0)))
    run_module.save(path, progress, {"a": "b"})
    back = run_module.load(path, progress, {"a": "b"}).state.opt_state
    assert back["small"].dtype == jnp.bfloat16 and back["scalar"].shape == ()
    np.testing.assert_array_equal(back["small"], state["small"])
    assert (jax.random.normal(back["key"]) == jax.random.normal(state["key"])).all()


SCRIPT = """
import sys; sys.path.insert(0, {folder!r})
import jax; jax.config.update("jax_disable_most_optimizations", True)  # the same program as here
import test_resume
test_resume.run_module.SECONDS_BETWEEN_SAVES = -1.0
test_resume.run({path!r}, num_steps=4000)
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path):
    path = tmp_path / "run.safetensors"
    script = SCRIPT.format(folder=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script])
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with safetensors.safe_open(path, framework="numpy") as file:
        assert 0 < len(file.get_tensor(".losses")) < 4000
        assert json.loads(file.metadata()[run_module._KEY])["configuration"]["num_steps"] == "4000"
    assert_same(run(path, num_steps=4000), run(num_steps=4000))
