"""Training against laws whose denoiser is known: the loss, its floor, the fit, and everything that can go wrong."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.train import Objective, denoising_loss, fit, run
from numpyro_diffusion.train import data as train_data
from numpyro_diffusion.train.steps import average_decay, init, move_average, train_steps

fit_module = importlib.import_module("numpyro_diffusion.train.fit")  # the package's `fit` is the function

WEIGHTS, MEANS, VARIANCES = [0.3, 0.7], jnp.array([[4.0, 0.0], [7.0, 2.0]]), jnp.array([0.09, 0.36])
STEPS, PER_CALL = 800, 100
SETTINGS = {
    "num_steps": STEPS,
    "batch_size": 256,
    "steps_per_call": PER_CALL,
    "optimizer": fit_module._default_optimizer(STEPS),  # named, so that shorter runs can follow the same rates
    "progress_bar": False,
}


def mixture(schedule=None):
    return GaussianMixture(WEIGHTS, MEANS, VARIANCES, schedule)


def backbone(seed=0):
    return MLP((2,), features=64, num_blocks=1, embed_features=16, rngs=nnx.Rngs(seed))


def mean_loss(denoiser, data):
    """Mean over the rows and its Monte Carlo standard error."""
    keys = jax.random.split(jax.random.key(7), len(data))
    losses = jax.jit(jax.vmap(denoising_loss, in_axes=(None, 0, 0)))(denoiser, keys, data)
    return float(losses.mean()), float(losses.std() / math.sqrt(len(data)))


@pytest.fixture(scope="module")
def data():
    return mixture().sample(jax.random.key(0), (20_000,))


@pytest.fixture(scope="module")
def result(data):
    return fit(jax.random.key(1), backbone(), data, **SETTINGS)


# The loss


@pytest.mark.parametrize("schedule", [noise.VE(), noise.VP(), noise.Rectified()], ids=lambda s: type(s).__name__)
def test_loss_of_isotropic_gaussian_is_one_in_any_units(schedule):
    # the posterior variance is c^2 / (1 + SNR): the EDM weight makes the loss chi-squared with mean one
    location, scale, count = jnp.array([3.0, -1.0]), 2.5, 20_000
    truth = Gaussian(location, scale**2, noise.Scaled(schedule, scale))
    data = truth.sample(jax.random.key(0), (count,))
    loss, error = mean_loss(truth, data)
    assert abs(loss - 1.0) < 4.0 / math.sqrt(count)
    assert error == pytest.approx(1.0 / math.sqrt(count), rel=0.1)  # standard deviation of chi-squared_2 / 2


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


# The fit


def test_fit_recovers_the_exact_denoiser(result, data):
    denoiser = result.denoiser
    truth, points, scale = mixture(denoiser.schedule), data[:2000], float(denoiser.scale)
    for level in (0.3, 1.0, 3.0, 20.0):
        t = denoiser.schedule.inverse_noise_level(level * scale)
        x_t = noise.perturb(jax.random.key(3), denoiser.schedule, points, t)
        error = jax.jit(jax.vmap(lambda x_t, t=t: denoiser(x_t, t).x0 - truth(x_t, t).x0))(x_t)
        posterior_deviation = scale * level / math.sqrt(1.0 + level**2)
        assert math.sqrt(float(jnp.mean(error**2))) < 0.1 * posterior_deviation


def test_fit_comes_close_to_the_floor_of_the_loss(result):
    fresh = mixture().sample(jax.random.key(5), (20_000,))
    loss, _ = mean_loss(result.denoiser, fresh)
    floor, error = mean_loss(mixture(result.denoiser.schedule), fresh)
    assert floor < loss < 1.03 * floor
    assert result.held_out_losses[-1] == pytest.approx(floor, abs=5.0 * error * math.sqrt(20_000 / 1024))
    assert result.held_out_losses[-1] < result.held_out_losses[0]
    assert result.losses[-PER_CALL:].mean() == pytest.approx(floor, rel=0.05)


def test_fit_standardises_inside(result, data):
    x = np.asarray(data, np.float64)
    np.testing.assert_allclose(result.denoiser.location, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.denoiser.scale, math.sqrt(x.var(0).mean()), rtol=1e-6)


def test_result_accounts_for_every_step(result):
    assert result.num_steps == STEPS and not result.interrupted
    assert result.losses.shape == (STEPS,)
    assert result.held_out_steps.tolist() == list(range(PER_CALL, STEPS + 1, PER_CALL))
    assert result.held_out_losses.shape == result.held_out_steps.shape
    assert result.denoiser.frozen


def test_same_key_same_weights_bit_for_bit_and_nothing_compiles_again(result, data):
    compiled = train_steps._cache_size()
    again = fit(jax.random.key(1), backbone(), data, **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, again.denoiser, result.denoiser)
    np.testing.assert_array_equal(again.losses, result.losses)
    np.testing.assert_array_equal(again.held_out_losses, result.held_out_losses)
    assert not np.array_equal(fit(jax.random.key(2), backbone(), data, **SETTINGS).losses, result.losses)
    assert train_steps._cache_size() == compiled


def test_shorter_last_call_changes_nothing_and_compiles_nothing(result, data):
    compiled = train_steps._cache_size()
    again = fit(jax.random.key(1), backbone(), data, **SETTINGS | {"num_steps": 250})
    np.testing.assert_array_equal(again.losses, result.losses[:250])
    assert again.num_steps == 250 and again.held_out_steps.tolist() == [100, 200, 250]
    assert train_steps._cache_size() == compiled


def test_training_goes_on_from_a_denoiser(result, data):
    shifted = data + 1.0  # its own location and scale are kept, not those of the new data
    more = fit(jax.random.key(3), result.denoiser, data, **SETTINGS)
    end = result.losses[-PER_CALL:]
    margin = 4.0 * end.std() / math.sqrt(10)  # four standard errors of ten batches
    assert abs(more.losses[:10].mean() - end.mean()) < margin < result.losses[:10].mean() - end.mean()
    np.testing.assert_array_equal(more.denoiser.location, result.denoiser.location)
    moved = fit(jax.random.key(3), result.denoiser, shifted, **SETTINGS)
    np.testing.assert_array_equal(moved.denoiser.location, result.denoiser.location)


class Tiny(nnx.Module):
    """One trained number and one that is not."""

    def __init__(self):
        self.event_shape = (2,)
        self.gain, self.offset = nnx.Param(jnp.float32(0.5)), nnx.Variable(jnp.float32(0.25))

    def __call__(self, x, c_noise, cond=None):
        return self.gain[...] * x + self.offset[...]


TINY = {"num_steps": 5, "batch_size": 8, "progress_bar": False}


def test_only_params_are_trained_in_their_own_precision(x64, data):
    network = Tiny()
    result = fit(jax.random.key(0), network, np.asarray(data[:50], np.float64), validation_fraction=0.0, **TINY)
    trained = result.denoiser.backbone
    assert network.gain[...] == 0.5 and trained.gain[...] != 0.5
    assert trained.offset[...] == 0.25
    assert {leaf.dtype for leaf in jax.tree.leaves(result.denoiser)} == {jnp.dtype(jnp.float32)}
    assert result.losses.shape == (5,) and result.held_out_losses.shape == (0,)


def test_steps_are_those_of_a_loop_written_by_hand(data):
    rows, key, optimizer, objective = data[:50], jax.random.key(4), optax.sgd(0.1), Objective()
    denoiser = NetworkDenoiser(Tiny()).with_units(data.mean(0), 3.0).unfreeze()
    state, losses = init(denoiser, optimizer), []
    settings = {"optimizer": optimizer, "batch_size": 8, "ema_decay": 0.5, "objective": objective, "max_count": 3}
    for count in (3, 2):
        state, new = train_steps(state, denoiser, key, (rows, None), count, **settings)
        losses += new[:count].tolist()

    @jax.jit
    def loss_and_slope(gain, key, x):
        def loss(gain):
            trained = denoiser.with_params(jax.tree.map(lambda _: gain, denoiser.params))
            return objective(trained, key, x, None, ())[0].mean()

        return jax.value_and_grad(loss)(gain)

    gain, average, expected = jnp.float32(0.5), 0.5, []
    for n in range(5):
        key_rows, key_noise = jax.random.split(jax.random.fold_in(key, n))
        x = rows[jax.random.randint(key_rows, (8,), 0, 50)]
        loss, slope = loss_and_slope(gain, key_noise, x)
        gain = gain - 0.1 * slope
        beta = min(0.5, (1 + n) / (10 + n))
        average, expected = beta * average + (1.0 - beta) * gain, [*expected, loss]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(state.params["gain"][...], gain, rtol=1e-4)
    np.testing.assert_allclose(state.average["gain"][...], average, rtol=1e-4)
    assert int(state.step) == 5


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (20, 0.25, 5), (9, 0.0, 0)])
def test_held_out_rows_are_not_trained_on(rows, fraction, held_out):
    (train, _), rest = train_data.split_rows(jax.random.key(0), (jnp.arange(rows), None), fraction)
    rest = [] if rest is None else rest[0].tolist()
    assert len(rest) == held_out
    assert sorted([*train.tolist(), *rest]) == list(range(rows))


def test_divergence_is_an_error(data):
    with pytest.raises(FloatingPointError, match="not finite at step [0-9]. Lower the learning rate of the optimizer"):
        fit(jax.random.key(0), Tiny(), data[:50], optimizer=optax.sgd(1e30), validation_fraction=0.0, **TINY)


# The bar and Ctrl-C


class Bar:
    """What `fit` needs of tqdm; Ctrl-C is pressed at the update number `interrupt_at`."""

    interrupt_at = None

    def __init__(self, total, disable, desc):
        self.total, self.disable, self.updates, self.texts = total, disable, [], []
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def set_postfix_str(self, text, refresh):
        self.texts.append(text)

    def update(self, count):
        self.updates.append(count)
        if len(self.updates) == self.interrupt_at:
            raise KeyboardInterrupt


def test_averaged_weights_are_kept(result, data, monkeypatch):
    states = []

    def watched(*args, **kwargs):
        states.append(train_steps(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(fit_module, "train_steps", watched)
    kept = fit(jax.random.key(1), backbone(), data, **SETTINGS).denoiser.params["output_layer"]["kernel"][...]
    np.testing.assert_array_equal(kept, states[-1][0].average["output_layer"]["kernel"][...])
    assert not np.array_equal(kept, states[-1][0].params["output_layer"]["kernel"][...])


def test_bar_shows_the_running_losses(result, data, monkeypatch):
    monkeypatch.setattr(run, "tqdm", Bar)
    fit(jax.random.key(1), backbone(), data, **SETTINGS | {"progress_bar": True})
    assert (Bar.last.total, Bar.last.disable, sum(Bar.last.updates)) == (STEPS, False, STEPS)
    expected = f"loss {result.losses[-PER_CALL:].mean():.4f}, held out {result.held_out_losses[-1]:.4f}"
    assert Bar.last.texts[-1] == expected


def test_interruption_between_calls_returns_what_was_trained(result, data, monkeypatch):
    monkeypatch.setattr(run, "tqdm", Bar)
    monkeypatch.setattr(Bar, "interrupt_at", 3)
    partial = fit(jax.random.key(1), backbone(), data, **SETTINGS)
    assert partial.interrupted and partial.num_steps == 3 * PER_CALL
    np.testing.assert_array_equal(partial.losses, result.losses[: 3 * PER_CALL])
    np.testing.assert_array_equal(partial.held_out_losses, result.held_out_losses[:3])
    monkeypatch.setattr(Bar, "interrupt_at", None)
    shorter = fit(jax.random.key(1), backbone(), data, **SETTINGS | {"num_steps": 3 * PER_CALL})
    jax.tree.map(np.testing.assert_array_equal, partial.denoiser, shorter.denoiser)


@pytest.mark.parametrize("calls_made", [0, 2])
def test_interruption_inside_a_call_keeps_the_calls_before(result, data, monkeypatch, calls_made):
    made = []

    def interrupted(*args, **kwargs):
        if len(made) == calls_made:
            raise KeyboardInterrupt
        made.append(None)
        return train_steps(*args, **kwargs)

    monkeypatch.setattr(fit_module, "train_steps", interrupted)
    partial = fit(jax.random.key(1), backbone(), data, **SETTINGS)
    assert partial.interrupted and partial.num_steps == calls_made * PER_CALL
    np.testing.assert_array_equal(partial.losses, result.losses[: calls_made * PER_CALL])
    if not calls_made:
        jax.tree.map(np.testing.assert_array_equal, partial.denoiser.params, NetworkDenoiser(backbone()).params)


# Mistakes

ROWS = np.random.default_rng(0).normal(size=(20, 2))
HOLED = np.where(np.arange(40).reshape(20, 2) == 7, np.nan, ROWS)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"data must be finite; got 1 non-finite values, the first at index \(3, 1\)", {"data": HOLED}),
        (ValueError, "data must be finite; got 40 non-finite values", {"data": ROWS * np.inf}),
        (ValueError, "data must have at least 2 rows; got 1", {"data": ROWS[:1]}),
        (ValueError, r"data must have shape \(rows, 2\), .*event_shape.*; got \(20, 1\)", {"data": ROWS[:, :1]}),
        (ValueError, r"data must have shape \(rows, 2\), .*event_shape.*; got \(2,\)", {"data": ROWS[0]}),
        (ValueError, "data must vary; got 20 rows that are all the same", {"data": np.ones((20, 2))}),
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
