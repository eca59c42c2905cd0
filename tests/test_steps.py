"""The steps of training on networks of a few numbers: by hand, their precision, dropout, divergence, and mistakes."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.train import Objective, fit, levels, weighting
from numpyro_diffusion.train.data import split_rows
from numpyro_diffusion.train.steps import average_decay, init, move_average, train_steps

fit_module = importlib.import_module("numpyro_diffusion.train.fit")  # the package's `fit` is the function
ROWS = np.random.default_rng(0).normal([6.0, 1.0], size=(50, 2))
KEYS = nnx.Rngs(7)


# The moving average


def test_moving_average_follows_its_recursion():
    weights, average, expected = [3.0, -1.0, 2.0], {"w": jnp.array(5.0)}, 5.0
    for n, w in enumerate(weights):
        average = move_average(average, {"w": jnp.array(w)}, n, 0.15)
        beta = min(0.15, (1 + n) / (10 + n))
        expected = beta * expected + (1.0 - beta) * w
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


def test_moving_average_forgets_its_start():
    np.testing.assert_allclose(
        jax.vmap(lambda n: average_decay(n, 0.999))(jnp.array([0, 10, 10**6])), [0.1, 0.55, 0.999]
    )


# The loop


class Tiny(nnx.Module):
    """One trained number and one that is not."""

    def __init__(self):
        self.event_shape = (2,)
        self.gain, self.offset = nnx.Param(jnp.float32(0.5)), nnx.Variable(jnp.float32(0.25))

    def __call__(self, x, c_noise, cond=None):
        return self.gain[...] * x + self.offset[...]


TINY = {"num_steps": 5, "batch_size": 8, "progress_bar": False}


def test_only_params_are_trained_in_their_own_precision(x64):
    network = Tiny()
    result = fit(jax.random.key(0), network, ROWS, validation_fraction=0.0, **TINY)
    trained = result.denoiser.backbone
    assert network.gain[...] == 0.5 and trained.gain[...] != 0.5
    assert trained.offset[...] == 0.25
    assert {leaf.dtype for leaf in jax.tree.leaves(result.denoiser)} == {jnp.dtype(jnp.float32)}
    assert result.losses.shape == (5,) and result.held_out_losses.shape == (0,)


def test_steps_are_those_of_a_loop_written_by_hand():
    rows, key, optimizer, objective = jnp.asarray(ROWS, jnp.float32), jax.random.key(4), optax.sgd(0.1), Objective()
    denoiser = NetworkDenoiser(Tiny()).with_units(ROWS.mean(0), 3.0).unfreeze()
    state, losses = init(denoiser, optimizer), []
    settings = {"optimizer": optimizer, "batch_size": 8, "ema_decay": 0.5, "objective": objective, "max_count": 3}
    for count in (3, 2):
        state, new = train_steps(state, denoiser, key, (rows, None), count, **settings)
        losses += new[:count].tolist()

    @jax.jit
    def by_hand(gain, average, n):
        key_rows, key_noise = jax.random.split(jax.random.fold_in(key, n))
        x = rows[jax.random.randint(key_rows, (8,), 0, 50)]

        def loss(gain):
            trained = denoiser.with_params(jax.tree.map(lambda _: gain, denoiser.params))
            return objective(trained, key_noise, x, None, ())[0].mean()

        value, slope = jax.value_and_grad(loss)(gain)
        gain, beta = gain - 0.1 * slope, jnp.minimum(0.5, (1 + n) / (10 + n))
        return gain, beta * average + (1.0 - beta) * gain, value

    gain = average = jnp.float32(0.5)
    expected = []
    for n in range(5):
        gain, average, loss = by_hand(gain, average, n)
        expected.append(loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(state.params["gain"][...], gain, rtol=1e-4)
    np.testing.assert_allclose(state.average["gain"][...], average, rtol=1e-4)
    assert int(state.step) == 5


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (20, 0.25, 5), (9, 0.0, 0)])
def test_held_out_rows_are_not_trained_on(rows, fraction, held_out):
    (train, _), rest = split_rows(jax.random.key(0), (jnp.arange(rows), None), fraction)
    rest = [] if rest is None else rest[0].tolist()
    assert len(rest) == held_out
    assert sorted([*train.tolist(), *rest]) == list(range(rows))


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match="not finite at step [0-9]. Lower the learning rate of the optimizer"):
        fit(jax.random.key(0), Tiny(), ROWS, optimizer=optax.sgd(1e30), validation_fraction=0.0, **TINY)


def test_weights_that_the_last_step_spoils_are_an_error_and_are_not_kept(tmp_path):
    path, options = tmp_path / "run.safetensors", {"validation_fraction": 0.0} | TINY | {"num_steps": 1}
    with pytest.raises(FloatingPointError, match="gain has 1 weights that are not finite at step 1. Lower"):
        fit(jax.random.key(0), Tiny(), ROWS, optimizer=optax.scale(math.nan), checkpoint=path, **options)
    assert not path.exists()


# Random layers


class Masked(nnx.Module):
    """Answers one, or what dropout makes of it, wherever and whenever."""

    def __init__(self, rate=0.3, rngs=KEYS):
        self.event_shape, self.gain, self.drop = (64,), nnx.Param(jnp.float32(1.0)), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, c_noise, cond=None):
        return self.drop(self.gain[...] * jnp.ones_like(x))


class Normed(nnx.Module):
    def __init__(self):
        self.event_shape, self.norm = (2,), nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x, c_noise, cond=None):
        return self.norm(x)


def share_of_zeros(denoiser, key, x, t, cond):
    return jnp.mean(denoiser(x, t).x0 == 0.0)


def test_dropout_has_its_rate_a_mask_for_each_example_and_step_and_no_part_in_evaluation():
    # uniform times under a weighting that is their density: every example counts one
    unit = {"weighting": weighting.Simple(noise.VE()), "noise_levels": levels.Uniform(), "loss": share_of_zeros}
    rows, num_steps, rate = np.random.default_rng(0).normal(size=(100, 64)), 200, 0.3
    options = {"num_steps": num_steps, "batch_size": 16, "progress_bar": False} | unit
    found = fit(jax.random.key(0), NetworkDenoiser(Masked(rate), target="x0"), rows, **options)
    deviation = math.sqrt(rate * (1.0 - rate) / (64 * 16))  # of a batch of independent masks
    assert abs(found.losses.mean() - rate) < 4.0 * deviation / math.sqrt(num_steps)
    assert abs(found.losses.std() / deviation - 1.0) < 4.0 / math.sqrt(2 * num_steps)
    assert (found.held_out_losses == 0.0).all()
    assert (found.denoiser(jnp.ones(64), 0.5).x0 == 1.0).all()
    again = fit(jax.random.key(0), NetworkDenoiser(found.denoiser.backbone, target="x0"), rows, **options)
    np.testing.assert_array_equal(again.losses, found.losses)  # a backbone that comes back can be trained on


@pytest.mark.parametrize("target", ["x0", "energy"])
def test_one_key_is_one_function(target):
    denoiser = NetworkDenoiser(Masked(), target=target)
    draw = jax.jit(lambda key, x: denoiser.in_training(key)(x, 0.5).x0)
    first, again, other = (draw(jax.random.key(i), jnp.ones(64)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != denoiser(jnp.ones(64), 0.5).x0).any()


# Mistakes

HOLED = np.where(np.arange(100).reshape(50, 2) == 7, np.nan, ROWS)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"data must be finite; got 1 non-finite values, the first at index \(3, 1\)", {"data": HOLED}),
        (ValueError, "data must be finite; got 100 non-finite values", {"data": ROWS * np.inf}),
        (ValueError, "data must have at least 2 rows; got 1", {"data": ROWS[:1]}),
        (ValueError, r"data must have shape \(rows, 2\), .*event_shape.*; got \(50, 1\)", {"data": ROWS[:, :1]}),
        (ValueError, r"data must have shape \(rows, 2\), .*event_shape.*; got \(2,\)", {"data": ROWS[0]}),
        (ValueError, "data must vary; got 50 rows that are all the same", {"data": np.ones((50, 2))}),
        (TypeError, "data must be real numbers; got an array of complex128", {"data": ROWS * 1j}),
        (TypeError, "data must be real numbers; got an array of object", {"data": ROWS.astype(object)}),
        (ValueError, "num_steps must be at least 1; got 0", {"num_steps": 0}),
        (ValueError, "batch_size must be at least 1; got 0", {"batch_size": 0}),
        (ValueError, "steps_per_call must be at least 1; got -1", {"steps_per_call": -1}),
        (TypeError, "num_steps must be a whole number; got 10.0", {"num_steps": 10.0}),
        (ValueError, r"ema_decay must lie in \[0, 1\); got 1.0", {"ema_decay": 1.0}),
        (ValueError, r"validation_fraction must lie in \[0, 1\); got 1.0", {"validation_fraction": 1.0}),
        (TypeError, "optimizer must be an optax.GradientTransformation; got float", {"optimizer": 1e-3}),
        (ValueError, "target must be one of", {"target": "noise"}),
        (TypeError, "backbone must be a flax.nnx.Module; got str", {"backbone": "MLP"}),
        (
            TypeError,
            "backbone must not have batch statistics; got norm/mean. A denoiser is .*: use nnx.LayerNorm",
            {"backbone": Normed()},
        ),
        (
            TypeError,
            "dropout must have random keys to act; drop has none. Give it rngs=",
            {"backbone": Masked(rngs=None), "data": np.random.default_rng(0).normal(size=(20, 64))},
        ),
        (
            ValueError,
            "schedule and target must be left out when a NetworkDenoiser is given",
            {"backbone": NetworkDenoiser(Tiny()), "target": "edm"},
        ),
    ],
)
def test_mistakes_are_named_before_anything_compiles(error, message, arguments, monkeypatch):
    monkeypatch.setattr(fit_module, "train_steps", None)
    with pytest.raises(error, match=message):
        fit(jax.random.key(0), **{"backbone": Tiny(), "data": ROWS, "progress_bar": False} | arguments)
