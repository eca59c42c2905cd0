"""What `fit` is fed and how: conditions, streams of batches, several devices, clipped gradients, patience."""

import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.nn.condition import Condition
from numpyro_diffusion.noise import VE
from numpyro_diffusion.train import Adaptive, Objective, fit, levels, weighting
from numpyro_diffusion.train.data import Stream

fit_module = importlib.import_module("numpyro_diffusion.train.fit")  # the package's `fit` is the function
ROWS = 3.0 + 2.0 * np.random.default_rng(0).normal(size=(256, 2))
CONDS = np.sign(ROWS[:, :1])
OPTIMIZER = optax.sgd(0.1)
SETTINGS = {"num_steps": 20, "batch_size": 16, "steps_per_call": 8, "optimizer": OPTIMIZER, "progress_bar": False}


class Tiny(nnx.Module):
    """Three trained numbers: this compiles quickly."""

    def __init__(self):
        self.event_shape = (2,)
        self.gain, self.shift, self.absent = (nnx.Param(jnp.float32(value)) for value in (0.5, 0.1, 0.0))

    def __call__(self, x, c_noise, cond=None):
        if isinstance(cond, Condition):
            cond = jnp.where(cond.present, cond.value, self.absent[...])
        return self.gain[...] * x + self.shift[...] * c_noise + (0.0 if cond is None else 0.1 * cond)


def backbone():
    return Tiny()


def run(data=ROWS, network=None, **changes):
    return fit(jax.random.key(1), network or backbone(), data, **SETTINGS | changes)


def batches(count=None, conds=False):
    for i in itertools.count() if count is None else range(count):
        x = ROWS[16 * (i % 16) : 16 * (i % 16) + 16]
        yield (x, CONDS[16 * (i % 16) : 16 * (i % 16) + 16]) if conds else x


class Loader:
    """Sixteen batches, as often as wanted."""

    def __iter__(self):
        return batches(16)


@pytest.fixture(scope="module")
def resident():
    return run()


ADAPTIVE = {"noise_levels": Adaptive(num_bins=8), "held_out": ROWS[:40]}


@pytest.fixture(scope="module")
def adaptive():
    return run(**ADAPTIVE)


# Streams


@pytest.fixture(scope="module")
def streamed():
    return run(batches())


def test_stream_is_trained_on_in_its_order(streamed, monkeypatch):
    seen = []

    def watched(state, denoiser, key, rows, count, **settings):
        seen.append((np.asarray(rows[0])[:count], settings["in_order"]))
        return fit_module_steps(state, denoiser, key, rows, count, **settings)

    fit_module_steps = fit_module.train_steps
    monkeypatch.setattr(fit_module, "train_steps", watched)
    again = run(batches())
    jax.tree.map(np.testing.assert_array_equal, again, streamed)
    assert [len(rows) for rows, _ in seen] == [8, 8, 4] and all(in_order for _, in_order in seen)
    location, scale = np.asarray(again.denoiser.location, np.float64), float(again.denoiser.scale)
    expected = [(x - location) / scale for x in itertools.islice(batches(), 20)]
    np.testing.assert_allclose(np.concatenate([rows for rows, _ in seen]), expected, rtol=1e-6, atol=1e-6)


def test_each_step_has_the_batch_of_its_number():
    def loss(denoiser, key, x, t, cond):
        return x[0] + 0.0 * denoiser(x, t, cond).x0.sum()

    given = NetworkDenoiser(backbone(), location=3.0, scale=2.0)
    # uniform times under a weighting that is their density: every example counts one
    unit = {"weighting": weighting.Simple(VE()), "noise_levels": levels.Uniform()}
    result = run(batches(), given, loss=loss, **unit)
    expected = [(x[:, 0].mean() - 3.0) / 2.0 for x in itertools.islice(batches(), 20)]
    np.testing.assert_allclose(result.losses, expected, rtol=1e-3, atol=1e-5)  # the density's slope, in float32


def test_location_and_scale_of_a_stream_are_those_of_its_first_call(streamed):
    first = ROWS[: 8 * 16]
    np.testing.assert_allclose(streamed.denoiser.location, first.mean(0), rtol=1e-6)
    np.testing.assert_allclose(streamed.denoiser.scale, math.sqrt(first.var(0).mean()), rtol=1e-6)


def test_location_and_scale_that_are_given_are_kept():
    given = NetworkDenoiser(backbone(), location=1.0, scale=4.0)
    kept = run(batches(), given).denoiser
    assert kept.location.tolist() == [1.0, 1.0] and kept.scale == 4.0


def test_loader_is_walked_again_and_an_iterator_is_used_up(streamed):
    jax.tree.map(np.testing.assert_array_equal, run(Loader()), streamed)
    with pytest.warns(UserWarning, match="data ended after 11 batches, and training with it"):
        ended = run(batches(11))
    assert ended.num_steps == 11 and not ended.interrupted
    np.testing.assert_array_equal(ended.losses, streamed.losses[:11])
    with pytest.warns(UserWarning, match="data ended after 16 batches"):
        assert run(batches(16)).num_steps == 16  # the end of a call


@pytest.mark.slow
def test_held_out_rows_that_are_given(resident):
    rows = ROWS[:20] + 1.0
    result = run(batches(), held_out=rows)
    assert len(result.held_out_losses) == 3
    moved = run(batches(), held_out=rows + 5.0)
    assert moved.held_out_losses[-1] > result.held_out_losses[-1]
    np.testing.assert_array_equal(moved.losses, result.losses)
    np.testing.assert_array_equal(run(held_out=rows).held_out_steps, resident.held_out_steps)


# Conditions


@pytest.mark.slow
def test_conditions_stay_with_their_rows(monkeypatch):
    def loss(denoiser, key, x, t, cond):
        # one minus the agreement of a row's sign with its condition, which is its sign
        raw = x * 2.0 + 3.0
        return jnp.abs(jnp.sign(raw[0]) - cond[0]) + 0.0 * denoiser(x, t, cond).x0.sum()

    given = NetworkDenoiser(backbone(), location=3.0, scale=2.0)
    told = {"held_out": (ROWS[:26], CONDS[:26])}
    rest = ROWS[26:], {"cond": CONDS[26:]} | told  # as many rows as are left by the split
    for data, options in ((ROWS, {"cond": CONDS}), rest, (batches(conds=True), told)):
        result = run(data, given, loss=loss, **options)
        assert len(result.held_out_losses) == 3
        assert (result.losses == 0.0).all() and (result.held_out_losses == 0.0).all()
    assert run(ROWS, given, loss=loss, cond=CONDS[::-1]).losses.max() > 0.0


def test_dropout_withholds_the_share_asked_for():
    objective = Objective(cond_dropout=0.3)
    cond = jnp.arange(20_000.0)[:, None]
    withheld = objective._withhold(jax.random.key(0), cond)
    assert isinstance(withheld, Condition)
    np.testing.assert_array_equal(withheld.value, cond)
    assert abs(float(1.0 - withheld.present.mean()) - 0.3) < 4.0 * math.sqrt(0.3 * 0.7 / 20_000)
    assert Objective()._withhold(jax.random.key(0), cond) is cond


@pytest.mark.slow
def test_dropout_trains_the_network_without_a_condition():
    assert run(cond=CONDS).denoiser.params["absent"][...] == 0.0
    assert run(cond=CONDS, cond_dropout=0.5).denoiser.params["absent"][...] != 0.0


# Several devices


def two_devices():
    """A mesh of two devices of the host; an accelerator has seldom more than one."""
    if jax.default_backend() != "cpu" or jax.device_count() < 2:
        pytest.skip(f"two devices are asked for on the CPU only; this is {jax.device_count()} {jax.default_backend()}")
    return Mesh(np.array(jax.devices()[:2]), ("rows",))


@pytest.mark.slow
def test_two_devices_have_the_losses_of_one(adaptive):
    """Levels that follow the gradient take every path of a step; fixed ones are in the next test."""
    two = run(mesh=two_devices(), **ADAPTIVE)
    np.testing.assert_allclose(two.losses, adaptive.losses, rtol=1e-4)
    np.testing.assert_allclose(two.held_out_losses, adaptive.held_out_losses, rtol=1e-4)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(two.denoiser))


@pytest.mark.slow
def test_batches_are_shared_out_between_two_devices(streamed):
    mesh = two_devices()
    np.testing.assert_allclose(run(batches(), mesh=mesh).losses, streamed.losses, rtol=1e-4)
    source = Stream(batches(), NetworkDenoiser(backbone()), False, 16, 8, mesh)
    rows, _ = source.take(8)
    seen = sorted(shard.data.shape for shard in rows[0].addressable_shards)
    assert seen == [(8, 8, 2), (8, 8, 2)]


# Gradients and patience


def length(tree):
    return math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree)))


def test_clipped_gradients_are_no_longer_than_asked():
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    for bound, expected in ((0.5, 0.5), (1e9, 5.0), (None, 5.0)):
        optimizer = fit_module._clipped(optax.sgd(1.0), bound)
        update, _ = optimizer.update(gradient, optimizer.init(gradient))
        assert length(update) == pytest.approx(expected, rel=1e-6)
    clipped = run(num_steps=1, clip_norm=1e-3, optimizer=optax.sgd(1.0), ema_decay=0.0).denoiser
    moved = jax.tree.map(jnp.subtract, clipped.params, NetworkDenoiser(backbone()).params)
    assert length(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
def test_patience_ends_a_run_and_keeps_the_best_average():
    options = {"optimizer": optax.adam(1.0), "ema_decay": 0.0}
    options |= {"num_steps": 160, "num_evaluations": 20, "validation_fraction": 0.5}
    whole, patient = run(**options), run(patience=3, **options)
    best = int(np.argmin(patient.held_out_losses))
    assert len(patient.held_out_losses) == best + 4 < len(whole.held_out_losses)
    np.testing.assert_array_equal(patient.held_out_losses, whole.held_out_losses[: best + 4])
    assert patient.num_steps == 8 * (best + 4) and not patient.interrupted
    shorter = run(**options | {"num_steps": 8 * (best + 1), "num_evaluations": best + 1})
    jax.tree.map(np.testing.assert_array_equal, patient.denoiser, shorter.denoiser)


@pytest.mark.slow
def test_what_adaptive_levels_learned_is_told(resident, adaptive):
    by_loss = Adaptive(num_bins=8, follows="loss")
    for law, result in ((ADAPTIVE["noise_levels"], adaptive), (by_loss, run(noise_levels=by_loss))):
        assert law.masses(result.levels).sum() == pytest.approx(1.0, rel=1e-5)
        assert (result.levels.moments > 0.0).sum() > 3
    assert resident.levels == ()


# Mistakes


def shapes_that_change():
    yield ROWS[:16]
    yield ROWS[:16, :1]


def ragged():
    yield from batches(9)
    yield ROWS[:9]


def holed():
    yield from batches(9)
    yield np.where(np.arange(32).reshape(16, 2) == 7, np.nan, ROWS[:16])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"batch 1 of data must have shape \(rows, 2\), .*; got \(16, 1\)", {"data": shapes_that_change()}),
        (ValueError, "batch 9 of data must have batch_size=16 rows; got 9. Leave out an", {"data": ragged()}),
        (ValueError, r"batch 9 of data must be finite; got 1 non-finite .* index \(3, 1\)", {"data": holed()}),
        (
            TypeError,
            "batch 0 of data must be real numbers; got an array of complex128",
            {"data": iter([ROWS[:16] * 1j])},
        ),
        (ValueError, "data must have at least one batch; got an iterable of none", {"data": iter([])}),
        (
            ValueError,
            "data must vary; got 128 rows that are all the same",
            {"data": (np.ones((16, 2)) for _ in range(8))},
        ),
        (ValueError, "cond must come with the batches of a stream", {"data": batches(), "cond": CONDS}),
        (
            ValueError,
            r"the condition of batch 0 of data must have one entry for each of the 16 rows; got shape \(3, 1\)",
            {"data": iter([(ROWS[:16], CONDS[:3])])},
        ),
        (ValueError, r"cond must have one entry for each of the 256 rows; got shape \(255, 1\)", {"cond": CONDS[1:]}),
        (ValueError, r"cond must have one entry for each of the 256 rows; got shape \(\)", {"cond": 1.0}),
        (ValueError, "cond must be finite; got 256 non-finite values", {"cond": CONDS * np.nan}),
        (ValueError, r"cond_dropout=0.1 needs conditions to drop: give cond=", {"cond_dropout": 0.1}),
        (ValueError, r"cond_dropout must lie in \[0, 1\); got 1.0", {"cond_dropout": 1.0}),
        (ValueError, "clip_norm must be positive and finite; got -1.0", {"clip_norm": -1.0}),
        (ValueError, "patience must be at least 1; got 0", {"patience": 0}),
        (ValueError, "num_evaluations must be at least 1; got 0", {"num_evaluations": 0}),
        (ValueError, "patience needs held-out data: give held_out=", {"patience": 2, "validation_fraction": 0.0}),
        (ValueError, "patience needs held-out data: give held_out=", {"patience": 2, "data": batches()}),
        (ValueError, r"held_out must have shape \(rows, 2\)", {"held_out": ROWS[:, :1]}),
        (ValueError, "the condition of held_out must have one entry", {"held_out": (ROWS, CONDS[1:])}),
        (TypeError, "mesh must be a jax.sharding.Mesh; got int", {"mesh": 2}),
        (TypeError, "weighting must be a train.weighting.Weighting such as .*; got 'edm'", {"weighting": "edm"}),
        (
            TypeError,
            "noise_levels must be a train.levels.NoiseLaw such as .*; got 'uniform'",
            {"noise_levels": "uniform"},
        ),
        (TypeError, "loss must be a function .* of one point; got 'mse'", {"loss": "mse"}),
    ],
)
def test_mistakes_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        run(**arguments)


def test_a_batch_must_divide_among_the_devices():
    with pytest.raises(
        ValueError, match="batch_size must be divisible by the 2 devices of the mesh's axis 'rows'; got 15"
    ):
        run(mesh=two_devices(), batch_size=15)
