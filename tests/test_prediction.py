"""Digits of the score wherever the law lies, shifts, functions of the user's own, and what is no denoiser."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import (
    Conditioned,
    FromDensity,
    FromFunction,
    Gaussian,
    MixtureOf,
    NetworkDenoiser,
    Prediction,
    Product,
    Repeated,
    Rescheduled,
    require_denoiser,
    reschedule,
)
from numpyro_diffusion.denoise.targets import TARGETS
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.noise import VE, VP, Scaled, value_and_slope

D = 4
TIMES = np.array([0.0, 0.3, 0.6, 0.9], np.float32)
NAMES = ("x0", "eps", "score", "v", "velocity")


def log_normal(x_t, t, parameters):
    """Of N(m, c^2) under the noise of VE, in its units."""
    mean, scale = parameters
    variance = scale**2 * (1.0 + VE().sigma(t) ** 2)
    return -0.5 * jnp.sum((x_t - mean) ** 2 / variance + jnp.log(2.0 * jnp.pi * variance))


def score_of(x_t, t, parameters):
    mean, scale = parameters
    return (mean - x_t) / (scale**2 * (1.0 + VE().sigma(t) ** 2))


def eps_of(x_t, t, parameters):
    return -parameters[1] * VE().sigma(t) * score_of(x_t, t, parameters)


def x0_of(x_t, t, parameters):
    return x_t + (parameters[1] * VE().sigma(t)) ** 2 * score_of(x_t, t, parameters)


class Silent(nnx.Module):
    """A backbone for data of unit variance: what each target asks of it, by hand; for edm it is zero."""

    def __init__(self, target, schedule):
        self.event_shape, self.target, self.base = (D,), target, schedule
        self.weight, self.scalar = nnx.Param(jnp.zeros(1)), target == "energy"

    def __call__(self, w, c_noise, cond=None):
        t = self.base.inverse_log_snr(-8.0 * c_noise)
        (a, a_slope), (s, s_slope) = (value_and_slope(f, t) for f in (self.base.alpha, self.base.sigma))
        u0, eps = a / jnp.hypot(a, s) * w, s / jnp.hypot(a, s) * w
        answers = {"x0": u0, "eps": eps, "score": -eps, "v": a * eps - s * u0, "velocity": a_slope * u0 + s_slope * eps}
        return {**answers, "edm": 0.0 * w, "energy": jnp.sum(0.0 * w)}[self.target]


def network(target, mean, scale):
    return NetworkDenoiser(Silent(target, VE()), schedule=VE(), location=mean, scale=scale, target=target)


def everyone(mean, scale):
    """N(mean, scale^2) in D dimensions by all who can stand for it, under VE in its units."""
    schedule = Scaled(VE(), scale)
    law = Gaussian(jnp.full(D, mean), scale**2, schedule)
    written = {"schedule": schedule, "location": mean, "scale": scale, "parameters": (mean, scale)}
    return {
        "Gaussian": law,
        "full covariance": Gaussian(jnp.full(D, mean), scale**2 * jnp.eye(D), schedule),
        "mixture": MixtureOf([law, law], [0.3, 0.7]),
        "product": Product([law, law], [0.25, 0.75]),
        "repeated": Repeated(Gaussian(jnp.full(1, mean), scale**2, schedule), (D,)),
        "rescheduled": Rescheduled(law, schedule),
        "FromDensity": FromDensity(log_normal, (D,), **written),
        "score": FromFunction(score_of, (D,), "score", **written),
        "eps": FromFunction(eps_of, (D,), "eps", **written),
        **{f"network {target}": network(target, mean, scale) for target in TARGETS},
    }


@jax.jit
def predictions(laws, x_t, times):
    def one(law, x_t, t):
        prediction = law(x_t.reshape(law.event_shape), t)
        return {name: getattr(prediction, name).reshape(-1) for name in NAMES}

    return {name: jax.vmap(one, (None, 0, 0))(law, x_t, times) for name, law in laws.items()}


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (1000.0, 1.0), (288.0, 10.0)])
def test_no_digit_of_the_score_depends_on_where_the_law_lies(mean, scale):
    """Single precision against the closed form in double, at the same points: 1e-5 of the score, for every denoiser.

    The posterior mean has the rounding of the point, too. The network with the target x0 alone may lose what
    standardised data lose, a few roundings over sigma.
    """
    sigma = scale * 0.002 * 40_000.0 ** TIMES.astype(float)[:, None]
    x_t = mean + np.hypot(scale, sigma) * np.random.default_rng(0).normal(size=(len(TIMES), D))
    x_t = np.float32(x_t)
    residual = x_t.astype(float) - mean
    eps = sigma * residual / (scale**2 + sigma**2)
    x0 = mean + scale**2 * residual / (scale**2 + sigma**2)
    exact = {"x0": x0, "eps": eps, "score": -eps / sigma, "v": eps - sigma * x0}
    exact["velocity"] = np.log(40_000.0) * sigma * eps
    shapes = everyone(mean, scale)
    for name, got in predictions(shapes, jnp.asarray(x_t.reshape(len(TIMES), D)), TIMES).items():
        for view, truth in exact.items():
            tolerance = 1e-5 * np.abs(truth)
            rounding = 3e-7 * (np.abs(mean) + np.abs(residual))  # x0 may be read from the point and the noise
            if name == "network x0":  # its noise is a difference in units of the data
                lost = 3e-7 * np.abs(residual) / sigma
                tolerance += lost * {"x0": 0, "score": 1 / sigma, "velocity": np.log(40_000.0) * sigma}.get(view, 1)
            if view == "x0":
                tolerance += rounding
            if view == "v":  # a difference of eps and sigma x0, zero for N(0, 1)
                tolerance += 1e-5 * np.abs(eps) + sigma * (1e-5 * np.abs(x0) + rounding)
            assert (np.abs(got[view] - truth) <= tolerance).all(), (name, view, np.abs(got[view] / truth - 1).max())


def test_either_fills_in_the_other_and_shifts_keep_both():
    """Under VP, where alpha is not one: x_t is put together again, and moving the mean moves the noise with it."""
    x_t, t, by = jnp.array([0.3, -2.0]), 0.4, jnp.array([0.5, -0.25])
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    prediction = Gaussian([1.0, -1.0], 0.5, VP())(x_t, t)
    for one in (
        Prediction.from_x0(prediction.x0, x_t, t, VP()),
        Prediction.from_eps(prediction.eps, x_t, t, VP()),
    ):
        np.testing.assert_allclose(one.x0, prediction.x0, rtol=1e-5)
        np.testing.assert_allclose(one.eps, prediction.eps, rtol=1e-5)
    moved = prediction.shifted(by)
    np.testing.assert_allclose(moved.x0, prediction.x0 + by, rtol=1e-6)
    np.testing.assert_allclose(alpha * moved.x0 + sigma * moved.eps, x_t, rtol=1e-5)
    far = Gaussian([1000.0], 1.0, VE())(jnp.array([1000.5]), 0.1).shifted(jnp.zeros(1))
    np.testing.assert_allclose(far.score, -0.5 / (1.0 + VE().sigma(0.1) ** 2), rtol=1e-5)


@pytest.mark.parametrize("predicts, function", [("score", score_of), ("eps", eps_of), ("x0", x0_of)])
def test_a_function_of_ones_own(predicts, function):
    """As exact as the law, under every view; its parameters are leaves with gradients; it draws and has a density."""
    own = FromFunction(function, (2,), predicts, location=3.0, scale=0.5, parameters=(3.0, 0.5))
    law = Gaussian([3.0, 3.0], 0.25)
    x_t = jnp.array([2.5, 3.7])
    for t in (0.3, 0.7):
        got, expected = own(x_t, t), law(x_t, t)
        for name in NAMES:
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-4)
    assert require_denoiser(own) is own
    slope = jax.grad(lambda own: own(x_t, 0.5).x0[0])(own)
    ratio = VE().sigma(0.5) ** 2 / (1.0 + VE().sigma(0.5) ** 2)
    np.testing.assert_allclose(slope.parameters[0], ratio, rtol=1e-4)
    prior = DiffusionPrior(own)
    np.testing.assert_allclose(prior.log_prob(jnp.full(2, 3.0)), -np.log(2 * np.pi * 0.25), atol=5e-3)
    draws = np.asarray(prior.sample(jax.random.key(0), (4000,)))
    assert (abs(draws.mean(0) - 3.0) < 4.5 * 0.5 / 4000**0.5).all()
    assert (abs(draws.var(0) / 0.25 - 1.0) < 4.5 * (2 / 4000) ** 0.5).all()


def test_conditions_and_clocks_in_either_order():
    """A condition held inside another clock, and around it: the same; around what takes none: refused."""

    @jax.tree_util.register_static
    class Centred:
        schedule, event_shape, location, scale = VE(), (2,), 0.0, 1.0

        def __call__(self, x_t, t, cond=None):
            return Gaussian(jnp.zeros(2) + cond, 1.0, VE())(x_t, t)

    x_t, cond = jnp.array([0.3, -1.0]), jnp.array([2.0, 1.0])
    inner = reschedule(Conditioned(Centred(), cond), VP())(x_t, 0.4)
    outer = Conditioned(reschedule(Centred(), VP()), cond)(x_t, 0.4)
    expected = Gaussian(cond, 1.0, VP())(x_t, 0.4)
    for got in (inner, outer):
        np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-4)
        np.testing.assert_allclose(got.eps, expected.eps, rtol=1e-4)
    held = Conditioned(Centred(), cond)
    for base, cure in (
        (Gaussian([0.0, 0.0]), "Gaussian takes no condition$"),
        (Repeated(Centred(), (3,)), r"Repeated takes no condition. To hold a condition inside, give Repeated a Condit"),
        (held, "Conditioned takes no condition"),
        (Rescheduled(held, VP()), "Rescheduled takes no condition"),
    ):
        with pytest.raises(TypeError, match=f"base must be a conditional denoiser, called as .*{cure}"):
            Conditioned(base, cond)


class Unregistered:
    schedule, event_shape, location, scale = VE(), (2,), 2.0, 0.5

    def __call__(self, x_t, t):
        return Prediction.from_x0(x_t, x_t, t, self.schedule)


@jax.tree_util.register_dataclass
@dataclass
class Named(Unregistered):
    name: str = "a leaf that is no array"


CURE = "register it with jax.tree_util.register_dataclass, or with jax.tree_util.register_static .* or use denoise.From"
NO_DENOISER = {
    "function": (lambda: lambda x_t, t: x_t, "got function. To make one of a function of your own use denoise.FromFu"),
    "array": (lambda: jnp.zeros(2), r"denoiser must be a Denoiser such as denoise.NetworkDenoiser; got ArrayImpl$"),
    "unregistered": (Unregistered, f"^Unregistered is not a pytree: {CURE}"),
    "inside": (lambda: Repeated(Unregistered(), (3,)), rf"^Unregistered \(found in denoiser, a Repeated\) is .*{CURE}"),
    "string": (Named, rf"^str \(found in denoiser, a Named\) is not a pytree: {CURE}"),
}


@pytest.mark.parametrize("make, message", NO_DENOISER.values(), ids=NO_DENOISER)
def test_what_is_no_denoiser(make, message):
    with pytest.raises(TypeError, match=message):
        DiffusionPrior(make())


own = dict(event_shape=(2,), predicts="score")
BAD = {
    "predicts": (lambda: FromFunction(score_of, (2,), "v"), ValueError, "predicts must be one of 'score', 'eps', 'x0'"),
    "function": (lambda: FromFunction("score", **own), TypeError, "function must be callable .*; got str"),
    "event_shape": (lambda: FromFunction(score_of, [2], "score"), TypeError, r"event_shape must be a tuple .*; got \["),
    "schedule": (lambda: FromFunction(score_of, **own, schedule="VE"), TypeError, "schedule must be a noise.Schedule"),
    "location": (lambda: FromFunction(score_of, **own, location=np.ones(3)), ValueError, "location must be a scalar"),
    "scale": (lambda: FromFunction(score_of, **own, scale=-1.0), ValueError, "scale must be positive and finite"),
    "shape": (
        lambda: FromFunction(lambda x_t, t, _: x_t.sum(), **own)(np.zeros(2), 0.5),
        ValueError,
        r"function must return shape \(2,\); got \(\)",
    ),
    "batch": (
        lambda: FromFunction(score_of, **own)(np.zeros((5, 2)), 0.5),
        ValueError,
        r"x_t must be one point of shape \(2,\); got \(5, 2\). Use jax.vmap",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
