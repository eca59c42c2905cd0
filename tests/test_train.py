"""Training against laws whose denoiser is known: the loss, its floor, the fit, and everything that can go wrong."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.train import denoising_loss, fit, run
from numpyro_diffusion.train.steps import train_steps

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


@jax.jit
def losses_of(denoiser, data):
    keys = jax.random.split(jax.random.key(7), len(data))
    losses = jax.vmap(denoising_loss, in_axes=(None, 0, 0))(denoiser, keys, data)
    return losses.mean(), losses.std() / math.sqrt(len(data))


def mean_loss(denoiser, data):
    """Mean over the rows and its Monte Carlo standard error."""
    return tuple(map(float, losses_of(denoiser, data)))


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


# The fit


def test_fit_recovers_the_exact_denoiser(result, data):
    denoiser = result.denoiser
    truth, scale = mixture(denoiser.schedule), float(denoiser.scale)

    @jax.jit
    def mean_square(level):
        t = denoiser.schedule.inverse_noise_level(level * scale)
        x_t = noise.perturb(jax.random.key(3), denoiser.schedule, data[:2000], t)
        return jnp.mean(jax.vmap(lambda x_t: denoiser(x_t, t).x0 - truth(x_t, t).x0)(x_t) ** 2)

    for level in (0.3, 1.0, 3.0, 20.0):
        posterior_deviation = scale * level / math.sqrt(1.0 + level**2)
        assert math.sqrt(mean_square(level)) < 0.1 * posterior_deviation


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


def test_same_key_same_weights_bit_for_bit_and_nothing_compiles_again(result, data, monkeypatch):
    """The average is what is kept, and the bar shows the losses."""
    compiled, states = train_steps._cache_size(), []

    def watched(*args, **kwargs):
        states.append(train_steps(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(fit_module, "train_steps", watched)
    monkeypatch.setattr(run, "tqdm", Bar)
    again = fit(jax.random.key(1), backbone(), data, **SETTINGS | {"progress_bar": True})
    jax.tree.map(np.testing.assert_array_equal, again.denoiser, result.denoiser)
    np.testing.assert_array_equal(again.losses, result.losses)
    np.testing.assert_array_equal(again.held_out_losses, result.held_out_losses)
    kept = again.denoiser.params["output_layer"]["kernel"][...]
    np.testing.assert_array_equal(kept, states[-1][0].average["output_layer"]["kernel"][...])
    assert not np.array_equal(kept, states[-1][0].params["output_layer"]["kernel"][...])
    assert (Bar.last.total, Bar.last.disable, sum(Bar.last.updates)) == (STEPS, False, STEPS)
    expected = f"loss {result.losses[-PER_CALL:].mean():.4f}, held out {result.held_out_losses[-1]:.4f}"
    assert Bar.last.texts[-1] == expected
    other = fit(jax.random.key(2), backbone(), data, **SETTINGS | {"num_steps": PER_CALL})
    assert not np.array_equal(other.losses, result.losses[:PER_CALL])
    assert train_steps._cache_size() == compiled


def test_shorter_last_call_changes_nothing_and_compiles_nothing(result, data):
    compiled = train_steps._cache_size()
    again = fit(jax.random.key(1), backbone(), data, **SETTINGS | {"num_steps": 250})
    np.testing.assert_array_equal(again.losses, result.losses[:250])
    assert again.num_steps == 250 and again.held_out_steps.tolist() == [100, 200, 250]
    assert train_steps._cache_size() == compiled


def test_training_goes_on_from_a_denoiser(result, data):
    shifted = data + 1.0  # its own location and scale are kept, not those of the new data
    short = SETTINGS | {"num_steps": PER_CALL}
    more = fit(jax.random.key(3), result.denoiser, data, **short)
    end = result.losses[-PER_CALL:]
    margin = 4.0 * end.std() / math.sqrt(10)  # four standard errors of ten batches
    assert abs(more.losses[:10].mean() - end.mean()) < margin < result.losses[:10].mean() - end.mean()
    np.testing.assert_array_equal(more.denoiser.location, result.denoiser.location)
    moved = fit(jax.random.key(3), result.denoiser, shifted, **short)
    np.testing.assert_array_equal(moved.denoiser.location, result.denoiser.location)


# Ctrl-C


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
