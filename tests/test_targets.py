"""Every target from every other, for Gaussian and mixture laws in 2 to 32 dimensions: what is asked is no matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import GaussianMixture, NetworkDenoiser, Prediction
from numpyro_diffusion.denoise.targets import TARGETS
from numpyro_diffusion.noise import VE, VP, Cosine, Rectified, value_and_slope

LOCATION, SCALE = 0.5, 2.0


def answers(prediction):
    """What each target is, from a prediction in standardised units; the energy's is the gradient that it stands for."""
    alpha, sigma = prediction.schedule.alpha(prediction.t), prediction.schedule.sigma(prediction.t)
    total = jnp.hypot(alpha, sigma)
    residual = (prediction.x0 - alpha / total**2 * prediction.x_t) / (sigma / total)
    views = {name: getattr(prediction, name) for name in ("x0", "eps", "v", "velocity")}
    return views | {"score": sigma * prediction.score, "edm": residual, "energy": residual}


class Asked(nnx.Module):
    """A backbone that returns exactly what a target asks of it, for a law in standardised units."""

    def __init__(self, law, target):
        self.event_shape, self.law, self.target, self.scalar = (
            law.event_shape,
            nnx.data(law),
            target,
            target == "energy",
        )

    def __call__(self, x, c_noise, cond=None):
        schedule = self.law.schedule
        t = schedule.inverse_log_snr(-8.0 * c_noise)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        u_t = jnp.hypot(alpha, sigma) * x
        if self.target == "energy":
            return sigma / alpha * (self.law.log_density(u_t, t) + 0.5 * jnp.sum(x**2))
        return answers(self.law(u_t, t))[self.target]


@jax.jit
def expressed(denoisers, x_t, t):
    """The posterior mean from each target, and from that what every target would have been, and the mean from those."""

    def one(x_t):
        means, others, again = {}, {}, {}
        for name, denoiser in denoisers.items():
            prediction, base = denoiser(x_t, t), denoiser.schedule.base
            u_t = (x_t - base.alpha(t) * LOCATION) / SCALE
            means[name] = (prediction.x0 - LOCATION) / SCALE
            others[name] = answers(Prediction.from_x0(means[name], u_t, t, base))
            (alpha, alpha_slope), (sigma, sigma_slope) = (value_and_slope(f, t) for f in (base.alpha, base.sigma))
            coefficients = alpha, sigma, alpha_slope, sigma_slope
            again[name] = {other: TARGETS[other](u_t, out, *coefficients)[0] for other, out in others[name].items()}
        return means, others, again

    return jax.vmap(one)(x_t)


@jax.jit
def expected_of(truth, u_t, t):
    return jax.vmap(lambda u_t: answers(truth(u_t, t)))(u_t)


CASES = [("Gaussian", 2, VE(0.05, 20.0)), ("mixture", 2, Rectified()), ("mixture", 8, VP())]
CASES += [("Gaussian", 32, Cosine()), ("mixture", 32, VE(0.05, 20.0))]


@pytest.mark.parametrize("law, d, schedule", CASES, ids=[f"{law} {d} {type(s).__name__}" for law, d, s in CASES])
def test_every_target_expressed_in_every_other(law, d, schedule, x64):
    """Seven networks, one for each target, know the same law; 49 ways round, to a few units of double precision."""
    rng = np.random.default_rng(d)
    factors = rng.normal(size=(3, d, d)) / np.sqrt(2 * d)
    covariances = 0.1 * np.eye(d) + factors @ factors.transpose(0, 2, 1)
    count = 1 if law == "Gaussian" else 3
    truth = GaussianMixture([0.2, 0.3, 0.5][:count], rng.normal(size=(count, d)), covariances[:count], schedule)
    options = {"schedule": schedule, "location": LOCATION, "scale": SCALE}
    denoisers = {name: NetworkDenoiser(Asked(truth, name), target=name, **options) for name in TARGETS}
    u = np.asarray(truth.sample(jax.random.key(0), (3,)))
    for t in (0.2, 0.5, 0.8):
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        u_t = alpha * u + sigma * rng.normal(size=u.shape)
        x_t = SCALE * u_t + alpha * LOCATION
        expected = expected_of(truth, u_t, t)
        means, others, again = expressed(denoisers, x_t, t)
        for name in TARGETS:
            np.testing.assert_allclose(means[name], expected["x0"], rtol=1e-8, atol=1e-9, err_msg=name)
            for other in TARGETS:
                pair = f"{name} -> {other}"
                np.testing.assert_allclose(others[name][other], expected[other], rtol=1e-7, atol=1e-8, err_msg=pair)
                np.testing.assert_allclose(again[name][other], expected["x0"], rtol=1e-8, atol=1e-9, err_msg=pair)
