"""Learned denoisers against the exact Gaussian one: targets, units, precision, gradients and mistakes."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import Denoiser, Gaussian, NetworkDenoiser
from numpyro_diffusion.nn import MLP

SCHEDULES = [noise.VE(), noise.VP(), noise.SubVP(), noise.Cosine(), noise.Rectified()]
TARGETS = ["edm", "x0", "eps", "v", "velocity", "score"]
LOCATION, SCALE = np.array([3.0, -2.0]), 2.5
MEAN, COVARIANCE = np.array([3.5, -1.0]), np.array([[4.0, 1.5], [1.5, 2.0]])  # neither is the location or the scale


class Oracle(nnx.Module):
    """A backbone that returns exactly what `target` asks of it, for Gaussian data in standardised units."""

    def __init__(self, schedule, target):
        self.event_shape, self.schedule, self.target = (2,), schedule, target

    def __call__(self, x, c_noise, cond=None):
        t = self.schedule.inverse_log_snr(-8.0 * c_noise)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        total = jnp.sqrt(alpha**2 + sigma**2)
        u_t = total * x
        truth = Gaussian((MEAN - LOCATION) / SCALE, COVARIANCE / SCALE**2, self.schedule)(u_t, t)
        return {
            "edm": (truth.x0 - alpha / total**2 * u_t) / (sigma / total),
            "x0": truth.x0,
            "eps": truth.eps,
            "v": truth.v,
            "velocity": truth.velocity,
            "score": sigma * truth.score,
        }[self.target]


class Rising(noise.Rectified):
    """A schedule by a mistaken user: noise at t = 0, data at t = 1."""

    def alpha(self, t):
        return jnp.asarray(t)

    def sigma(self, t):
        return 1.0 - jnp.asarray(t)


class Seen(nnx.Module):
    """A backbone that remembers the precision it was called in, and answers with its condition."""

    def __init__(self, *, shape=(2,), rngs=None):
        self.event_shape, self.gain = (2,), nnx.Param(jnp.full(shape, 2.0, jnp.float32))

    def __call__(self, x, c_noise, cond=None):
        Seen.dtypes = (x.dtype, c_noise.dtype, None if cond is None else cond.dtype)
        return self.gain[...] * (x if cond is None else cond)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.event_shape = (2,)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x, c_noise, cond=None):
        for layer in self.layers:
            x = layer(x)
        return x


@jax.jit
def predict(denoiser, x_t, t):
    return denoiser(x_t, t).x0


def untrained_mlp(seed=0):
    return MLP((2,), features=8, num_blocks=1, embed_features=6, rngs=nnx.Rngs(seed))


def random_mlp(seed=0):
    """A small perceptron whose output layer is not zero."""
    backbone = untrained_mlp(seed)
    backbone.output_layer.kernel[...] = jnp.asarray(np.random.default_rng(seed).normal(size=(8, 2)), jnp.float32)
    return backbone


def exact(schedule, x_t, t):
    """Posterior mean of the Gaussian law and its Jacobian, in NumPy."""
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    return MEAN + gain @ (x_t - alpha * MEAN), gain


CASES = [(schedule, target) for schedule in (noise.VE(), noise.Rectified()) for target in TARGETS]
CASES += [(schedule, "edm") for schedule in (noise.VP(), noise.SubVP(), noise.Cosine())]


@pytest.mark.parametrize(
    ("schedule", "target"), CASES, ids=lambda case: case if isinstance(case, str) else type(case).__name__
)
def test_every_target_gives_the_exact_posterior_mean(x64, schedule, target):
    denoiser = NetworkDenoiser(
        Oracle(schedule, target), schedule=schedule, location=LOCATION, scale=SCALE, target=target
    )
    x_t, times = np.array([1.0, -4.0]), jnp.array([0.05, 0.4, 0.9])
    got = jax.jit(jax.vmap(denoiser, in_axes=(None, 0)))(x_t, times)
    for i, t in enumerate(times):
        x0, _ = exact(denoiser.schedule, x_t, t)
        np.testing.assert_allclose(got.x0[i], x0, rtol=1e-6)


def test_gradient_with_respect_to_the_point_is_exact(x64):
    denoiser = NetworkDenoiser(
        Oracle(noise.Rectified(), "edm"), schedule=noise.Rectified(), location=LOCATION, scale=SCALE
    )
    x_t = np.array([1.0, -4.0])
    jacobian = jax.jit(jax.jacrev(lambda x: denoiser(x, 0.4).x0))(x_t)
    np.testing.assert_allclose(jacobian, exact(denoiser.schedule, x_t, 0.4)[1], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_untrained_edm_is_exact_for_isotropic_data(schedule):
    denoiser = NetworkDenoiser(untrained_mlp(), schedule=schedule, location=LOCATION, scale=SCALE)
    truth = Gaussian(LOCATION, SCALE**2, denoiser.schedule)
    for t in (0.1, 0.5, 0.9):
        x_t = jnp.array([5.0, 0.5])
        np.testing.assert_allclose(predict(denoiser, x_t, t), truth(x_t, t).x0, rtol=1e-4)


def test_user_stays_in_data_units():
    schedule = NetworkDenoiser(random_mlp(), schedule=noise.VP(), scale=SCALE).schedule
    assert schedule.base == noise.VP()
    np.testing.assert_allclose(schedule.sigma(0.3), SCALE * noise.VP().sigma(0.3), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda s: type(s).__name__)
def test_schedules_agree_at_the_same_noise_level(schedule):
    x, level = jnp.array([1.0, -0.5]), 0.7
    answers = []
    for one in (noise.VE(), schedule):
        denoiser = NetworkDenoiser(random_mlp(), schedule=one, location=LOCATION, scale=SCALE)
        t = one.inverse_noise_level(level)
        answers.append(predict(denoiser, denoiser.schedule.alpha(t) * x, t))
    np.testing.assert_allclose(*answers, rtol=1e-3)


def test_frozen_weights_have_no_gradient_and_unfrozen_ones_do():
    denoiser = NetworkDenoiser(random_mlp(), location=LOCATION, scale=SCALE)
    gradient_of = jax.jit(jax.grad(lambda denoiser: jnp.sum(denoiser(jnp.ones(2), 0.6).score ** 2)))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient_of(denoiser)))
    gradient = gradient_of(denoiser.unfreeze())
    assert all(jnp.any(g != 0) for g in jax.tree.leaves((gradient.location, gradient.scale)))
    assert jnp.any(gradient.params["output_layer"]["kernel"][...] != 0)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradient_of(denoiser.unfreeze().freeze())))


def test_gradients_reach_the_condition():
    denoiser = NetworkDenoiser(Seen(), schedule=noise.VP(), scale=SCALE, target="x0")
    jacobian = jax.jacrev(lambda cond: denoiser(jnp.ones(2), 0.5, cond).x0)(jnp.ones(2))
    np.testing.assert_allclose(jacobian, SCALE * 2.0 * np.eye(2), rtol=1e-6)


def test_network_runs_in_its_own_precision(x64):
    denoiser = NetworkDenoiser(Seen(), scale=SCALE, target="x0")
    assert denoiser(jnp.ones(2, jnp.float32), jnp.float64(0.5)).x0.dtype == jnp.float32
    assert denoiser(jnp.ones(2, jnp.float64), jnp.float64(0.5), jnp.ones(2, jnp.float64)).x0.dtype == jnp.float64
    assert Seen.dtypes == (jnp.float32,) * 3


def test_with_params_replaces_what_is_trained_and_nothing_else():
    first, second = (NetworkDenoiser(random_mlp(seed=seed), location=LOCATION) for seed in (0, 1))
    both = first.with_params(second.params)
    np.testing.assert_array_equal(predict(both, jnp.ones(2), 0.4), predict(second, jnp.ones(2), 0.4))
    assert not np.array_equal(predict(first, jnp.ones(2), 0.4), predict(second, jnp.ones(2), 0.4))


def test_with_units_moves_the_same_network():
    standard = NetworkDenoiser(random_mlp())
    moved = standard.with_units(LOCATION, SCALE)
    u_t, t = jnp.array([0.3, -1.0]), 0.4
    np.testing.assert_allclose(
        predict(moved, LOCATION + SCALE * u_t, t), LOCATION + SCALE * predict(standard, u_t, t), rtol=1e-5
    )


def test_backbone_is_copied_and_given_back():
    backbone = random_mlp()
    denoiser = NetworkDenoiser(backbone)
    before = predict(denoiser, jnp.ones(2), 0.4)
    backbone.output_layer.kernel[...] = jnp.zeros((8, 2))
    np.testing.assert_array_equal(predict(denoiser, jnp.ones(2), 0.4), before)
    np.testing.assert_array_equal(predict(NetworkDenoiser(denoiser.backbone), jnp.ones(2), 0.4), before)


def test_dropout_network_is_deterministic_inside_a_scan():
    backbone = Dropping(nnx.Rngs(0))
    denoiser = NetworkDenoiser(backbone)
    assert not backbone.layers[1].deterministic  # the user's own network is left in training mode
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(denoiser))
    scan = jax.jit(lambda denoiser: jax.lax.scan(lambda x, t: (denoiser(x, t).x0,) * 2, jnp.ones(2), jnp.ones(3) / 2))
    x, expected = jnp.ones(2), []
    for _ in range(3):
        x = denoiser(x, 0.5).x0
        expected.append(x)
    np.testing.assert_allclose(scan(denoiser)[1], jnp.stack(expected), rtol=1e-5)


def test_it_is_a_denoiser_and_a_pytree_that_compiles_once():
    once = jax.jit(lambda denoiser, x_t, t: denoiser(x_t, t).x0)
    for seed in (0, 1):
        denoiser = NetworkDenoiser(random_mlp(seed=seed), location=LOCATION, scale=1.0 + seed)
        again = pickle.loads(pickle.dumps(denoiser))
        np.testing.assert_array_equal(once(denoiser, jnp.ones(2), 0.4), once(again, jnp.ones(2), 0.4))
    assert isinstance(denoiser, Denoiser)
    assert once._cache_size() == 1
    batch = jax.vmap(predict, in_axes=(None, 0, None))(denoiser, jnp.eye(2), 0.4)
    np.testing.assert_allclose(batch[1], predict(denoiser, jnp.eye(2)[1], 0.4), rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "backbone must be a flax.nnx.Module; got function", lambda: NetworkDenoiser(lambda x: x)),
        (
            TypeError,
            "backbone must have a tuple `event_shape`; Linear has none",
            lambda: NetworkDenoiser(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        ),
        (TypeError, "schedule must be a noise.Schedule; got str", lambda: NetworkDenoiser(random_mlp(), schedule="VP")),
        (
            TypeError,
            "schedule must be in standardised units; got a Scaled one. Give its base, and scale=",
            lambda: NetworkDenoiser(random_mlp(), schedule=noise.Scaled(noise.VP(), 2.0)),
        ),
        (
            ValueError,
            "the log-SNR of schedule must decrease from t_min to t_max; that of Rising",
            lambda: NetworkDenoiser(random_mlp(), schedule=Rising()),
        ),
        (
            ValueError,
            "target must be one of 'edm', 'x0', 'eps', 'v', 'velocity', 'score', 'energy'; got 'noise'",
            lambda: NetworkDenoiser(random_mlp(), target="noise"),
        ),
        (
            ValueError,
            r"location must be a scalar or have shape \(2,\); got \(3,\)",
            lambda: NetworkDenoiser(random_mlp(), location=jnp.zeros(3)),
        ),
        (
            ValueError,
            r"location must be finite; got 1 non-finite values, the first at index \(1,\)",
            lambda: NetworkDenoiser(random_mlp(), location=jnp.array([0.0, jnp.nan])),
        ),
        (
            ValueError,
            "scale must be a scalar, one for all dimensions; got shape",
            lambda: NetworkDenoiser(random_mlp(), scale=jnp.ones(2)),
        ),
        (ValueError, "scale must be positive and finite; got 0.0", lambda: NetworkDenoiser(random_mlp(), scale=0.0)),
        (ValueError, "scale must be positive and finite; got -1", lambda: NetworkDenoiser(random_mlp(), scale=-1.0)),
        (
            ValueError,
            r"x_t must be one point of shape \(2,\); got \(5, 2\). Use jax.vmap",
            lambda: NetworkDenoiser(random_mlp())(jnp.ones((5, 2)), 0.5),
        ),
        (
            ValueError,
            r"backbone must return shape \(2,\); got \(3, 2\)",
            lambda: NetworkDenoiser(Seen(shape=(3, 2)))(jnp.ones(2), 0.5),
        ),
    ],
)
def test_mistakes_are_named(error, message, build):
    with pytest.raises(error, match=message):
        build()
