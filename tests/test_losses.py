"""Losses: the exact score is the minimiser of each, and those with one mean have it for any model."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import GaussianMixture, Prediction, covariance
from numpyro_diffusion.train import Objective, denoising_loss, levels
from numpyro_diffusion.train.losses import (
    DenoisingScoreMatching,
    ImplicitScoreMatching,
    SecondOrderScoreMatching,
    SlicedScoreMatching,
    StableTargetField,
)

MIXTURE = GaussianMixture([0.3, 0.7], jnp.array([[1.0, 0.0], [-0.5, 0.8]]), jnp.array([0.09, 0.36]), noise.VP())
ROWS = MIXTURE.sample(jax.random.key(0), (8000,))
KEYS = jax.random.split(jax.random.key(7), len(ROWS))
LEVELS = jnp.array([0.3, 0.7, 1.5])
DIRECTIONS = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # a shift of the answer, and a stretch


class Moved:
    """A denoiser whose answer is off by a shift and a stretch about the mean."""

    def __init__(self, truth, shift_and_stretch):
        self.truth, (self.shift, self.stretch) = truth, shift_and_stretch
        self.schedule, self.event_shape, self.location, self.scale = truth.schedule, (2,), truth.location, truth.scale

    def __call__(self, x_t, t, cond=None):
        x0 = self.truth(x_t, t).x0
        return Prediction.from_x0(x0 + self.shift + self.stretch * (x0 - self.location), x_t, t, self.schedule)


@functools.partial(jax.jit, static_argnums=0)
def rowwise(loss):
    """Loss of each row at a moved model, slope and curvature at the exact one: (levels, directions, rows)."""

    def one(level, direction, key, x):
        t = MIXTURE.schedule.inverse_noise_level(level)
        value = lambda size: loss(Moved(MIXTURE, size * direction), key, x, t)  # noqa: E731
        slope, curvature = jax.jvp(jax.grad(value), (0.0,), (1.0,))
        return value(0.3), slope, curvature

    over_rows = jax.vmap(one, (None, None, 0, 0))
    over_directions = jax.vmap(over_rows, (None, 0, None, None))
    return jax.vmap(over_directions, (0, None, None, None))(LEVELS, DIRECTIONS, KEYS, ROWS)


CASES = {
    "denoising": DenoisingScoreMatching(),
    "stable target": StableTargetField(MIXTURE.sample(jax.random.key(1), (8000,)), num_others=64),
    "implicit": ImplicitScoreMatching(),
    "implicit, 2 probes": ImplicitScoreMatching(2),
    "sliced": SlicedScoreMatching(),
    "sliced, not reduced": SlicedScoreMatching(3, variance_reduced=False, projections="rademacher"),
    "second order": SecondOrderScoreMatching(),
    "second order, alone but for the shift": SecondOrderScoreMatching(100.0, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_score_is_the_minimiser(name):
    _, slopes, curvatures = (np.asarray(values, np.float64) for values in rowwise(CASES[name]))
    error = slopes.std(-1) / math.sqrt(len(ROWS))
    assert (np.abs(slopes.mean(-1)) < 4.0 * error).all(), slopes.mean(-1) / error
    assert (curvatures.mean(-1) > 4.0 * curvatures.std(-1) / math.sqrt(len(ROWS))).all()
    assert (4.0 * error < 0.5 * curvatures.mean(-1)).all()  # so the minimum is within a half of size zero: no idle test


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("implicit", "sliced"))])
def test_implicit_and_sliced_losses_have_the_mean_of_the_denoising_one(name):
    difference = np.asarray(rowwise(CASES[name])[0] - rowwise(CASES["denoising"])[0], np.float64)
    error = difference.std(-1) / math.sqrt(len(ROWS))
    assert (np.abs(difference.mean(-1)) < 4.0 * error).all(), difference.mean(-1) / error


def test_stable_targets_have_the_gradient_of_denoising_score_matching_and_less_variance():
    found = {name: rowwise(CASES[name])[1:] for name in ("stable target", "denoising")}
    # away from the minimiser: the loss is a parabola along each direction
    stable, plain = (np.asarray(slope + 0.3 * curvature, np.float64) for slope, curvature in found.values())
    error = np.sqrt((stable.var(-1) + plain.var(-1)) / len(ROWS))
    assert (np.abs(stable.mean(-1) - plain.mean(-1)) < 4.0 * error).all(), (stable.mean(-1) - plain.mean(-1)) / error
    assert (plain.mean(-1) > 10.0 * error).all()
    # at the exact score all of the variance is the target's; a mean over n rows would leave 1 / n of it
    stable, plain = (np.asarray(slope).var(-1) for slope, _ in found.values())
    assert (stable < 0.25 * plain).all(), stable / plain


def test_second_order_target_is_the_posterior_covariance():
    # at one noisy point, the residual of posterior draws has the covariance that Tweedie's formula gives
    @jax.jit
    def estimate_and_truth(x_t):
        t = MIXTURE.schedule.inverse_noise_level(0.7)
        alpha, sigma = MIXTURE.schedule.alpha(t), MIXTURE.schedule.sigma(t)
        draws = MIXTURE.sample(jax.random.key(5), (200_000,))
        weights = jax.nn.softmax(-0.5 * jnp.sum((x_t - alpha * draws) ** 2, -1) / sigma**2)
        residual = (x_t - alpha * draws) / sigma - MIXTURE(x_t, t).eps
        estimate = jnp.einsum("n,ni,nj->ij", weights, residual, residual)
        return estimate, 1.0 / jnp.sum(weights**2), (alpha / sigma) ** 2 * covariance(MIXTURE, x_t, t).dense()

    estimate, effective, truth = estimate_and_truth(jnp.array([0.3, 0.2]))
    np.testing.assert_allclose(estimate, truth, atol=4.0 * float(truth.max()) * math.sqrt(2.0 / effective))


def test_second_order_loss_is_as_written():
    @jax.jit
    def both(key, x, t):
        key_noise, key_probes = jax.random.split(key)
        model = Moved(MIXTURE, jnp.array([0.1, 0.2]))
        sigma = MIXTURE.schedule.sigma(t)
        eps = jax.random.normal(key_noise, (2,))
        x_t = MIXTURE.schedule.alpha(t) * x + sigma * eps
        residual = eps - model(x_t, t).eps
        z = jax.random.rademacher(key_probes, (1, 2), jnp.float32)[0]
        jacobian = jnp.eye(2) + sigma**2 * jax.jacobian(lambda x_t: model(x_t, t).score)(x_t)
        second = jacobian @ z - residual * (residual @ z)
        expected = jnp.mean(residual**2) + 0.7 * jnp.mean(second**2)
        return SecondOrderScoreMatching(0.7)(model, key, x, t), expected

    np.testing.assert_allclose(*both(jax.random.key(3), jnp.array([0.4, -0.2]), 0.3), rtol=1e-4)


def test_loss_of_one_point_is_a_batch_of_one():
    x, key = jnp.array([0.4, -0.2]), jax.random.key(3)
    law = levels.LogNormal(0.2, 0.5)
    batch, _ = jax.jit(lambda key, x: Objective(noise_levels=law)(MIXTURE, key, x[None], None, ()))(key, x)
    np.testing.assert_array_equal(jax.jit(lambda key, x: denoising_loss(MIXTURE, key, x, law))(key, x), batch[0])


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "num_others must be at least 1; got 0", lambda: StableTargetField(ROWS, 0)),
        (
            ValueError,
            "StableTargetField pools examples of one law, so cond must be None",
            lambda: CASES["stable target"](MIXTURE, KEYS[0], ROWS[0], 0.5, jnp.ones(1)),
        ),
        (ValueError, "num_probes must be at least 1; got 0", lambda: ImplicitScoreMatching(0)),
        (ValueError, "num_projections must be at least 1; got 0", lambda: SlicedScoreMatching(0)),
        (
            ValueError,
            "projections must be one of 'normal', 'rademacher'",
            lambda: SlicedScoreMatching(projections="sphere"),
        ),
        (ValueError, "num_probes must be at least 1; got -1", lambda: SecondOrderScoreMatching(num_probes=-1)),
        (ValueError, "strength must be positive and finite; got 0.0", lambda: SecondOrderScoreMatching(0.0)),
        (
            TypeError,
            r"loss must be a function \(denoiser, key, x, t, cond\) of one point; got 3",
            lambda: Objective(loss=3),
        ),
        (TypeError, "weighting must be a train.weighting.Weighting", lambda: Objective(weighting="edm")),
        (TypeError, "noise_levels must be a train.levels.NoiseLaw", lambda: Objective(noise_levels=3)),
        (ValueError, r"cond_dropout must lie in \[0, 1\); got 1.0", lambda: Objective(cond_dropout=1.0)),
    ],
)
def test_mistakes_are_named(error, message, make):
    with pytest.raises(error, match=message):
        make()
