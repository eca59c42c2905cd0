"""One denoiser under two schedules: the same law, the same answers, in the units of either."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import Denoiser, GaussianMixture, NetworkDenoiser, reschedule
from numpyro_diffusion.noise import VE, VP, Cosine, Rectified, Scaled, SubVP, Tabulated
from numpyro_diffusion.solve import Heun, solve, terminal_point

WEIGHTS, MEANS, VARIANCES = np.array([0.3, 0.7]), np.array([[-2.0, 0.5], [1.0, 1.0]]), np.array([0.3, 0.1])
SCHEDULES = [VP(), SubVP(), VE(), Cosine(), Rectified(), Tabulated([12.0, 3.0, -9.0])]


def mixture(schedule):
    return GaussianMixture(WEIGHTS, MEANS, VARIANCES, schedule)


@jax.jit
def views(denoiser, x_t, t):
    prediction = denoiser(x_t, t)
    return prediction.x0, prediction.eps, prediction.score, prediction.v, prediction.velocity


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_same_law_under_another_schedule(schedule, x64):
    """Every view of a rescheduled exact mixture is that of the mixture made with the other schedule."""
    x_t = jnp.array([0.7, -1.3])
    for base in (VE(), VP()):
        moved = reschedule(mixture(base), schedule)
        assert isinstance(moved, Denoiser)
        for t in (moved.schedule.t_min, 0.4, moved.schedule.t_max):
            for got, expected in zip(views(moved, x_t, t), views(mixture(schedule), x_t, t), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-7)


def network(target):
    backbone = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    class Backbone(nnx.Module):
        event_shape = (2,)

        def __init__(self):
            self.linear = backbone

        def __call__(self, x, c_noise, cond=None):
            return jnp.tanh(self.linear(x) + c_noise)

    return NetworkDenoiser(Backbone(), schedule=VP(), location=5.0, scale=3.0, target=target)


@pytest.mark.parametrize("target", ["edm", "v", "eps"])
def test_a_network_in_the_units_of_its_data(target):
    """Noise level by noise level, the posterior mean of a network is the same number; the scale stays with it."""
    denoiser = network(target)
    moved = reschedule(denoiser, Rectified())
    assert isinstance(moved.schedule, Scaled) and float(moved.schedule.scale) == 3.0
    u = jnp.array([4.0, 7.5])
    for t in (0.1, 0.5, 0.9):
        base_t = denoiser.schedule.inverse_noise_level(moved.schedule.noise_level(t))
        expected = denoiser(denoiser.schedule.alpha(base_t) * u, base_t).x0
        np.testing.assert_allclose(moved(moved.schedule.alpha(t) * u, t).x0, expected, rtol=2e-5)


def test_the_ladder_is_cut_to_what_the_denoiser_knows():
    """Levels of VP reach 152, those of VE 80; a narrower ladder is left as it is."""
    moved = reschedule(mixture(VE()), VP())
    np.testing.assert_allclose(moved.schedule.noise_level(moved.schedule.t_max), 80.0, rtol=1e-4)
    narrow = VE(0.1, 10.0)
    assert reschedule(mixture(VE()), narrow).schedule == narrow


def test_train_with_one_sample_with_another(x64):
    """The flow under the new schedule, from the same noise and through the same levels, ends at the same points."""
    z = jax.random.normal(jax.random.key(0), (5, 2))

    @jax.jit
    def flow(denoiser):
        return jax.vmap(lambda z: solve(Heun(12), denoiser, terminal_point(denoiser, z)))(z)

    moved = reschedule(mixture(VE(0.01, 50.0)), VP())
    low, high = (float(moved.schedule.noise_level(t)) for t in (moved.schedule.t_min, moved.schedule.t_max))
    np.testing.assert_allclose(high, 50.0, rtol=1e-9)
    np.testing.assert_allclose(flow(moved), flow(mixture(VE(low, high))), rtol=1e-6)


@pytest.mark.parametrize("schedule", [Scaled(VP(), 2.0), "VP"], ids=["scaled", "no schedule"])
def test_what_is_no_base_schedule(schedule):
    with pytest.raises(TypeError, match="schedule must be a noise.Schedule, not Scaled; got"):
        reschedule(mixture(VE()), schedule)


def test_no_level_in_common():
    with pytest.raises(ValueError, match="no noise level in common"):
        reschedule(mixture(VE(0.1, 1.0)), VE(2.0, 5.0))


def test_it_can_be_made_inside_jit(x64):
    inside = jax.jit(lambda law, x_t: reschedule(law, Rectified())(x_t, 0.4).x0)
    x_t = jnp.array([0.7, -1.3])
    np.testing.assert_allclose(inside(mixture(VE()), x_t), mixture(Rectified())(x_t, 0.4).x0, rtol=1e-7)


class Rising(Rectified):
    """A schedule by a mistaken user: noise at t = 0, data at t = 1."""

    alpha = Rectified.sigma
    sigma = Rectified.alpha


def test_a_schedule_whose_log_snr_rises():
    """Refused by whoever is given one: an exact law and `reschedule` here, a network in `test_network`."""
    for make in (lambda: mixture(Rising()), lambda: reschedule(mixture(VE()), Rising())):
        with pytest.raises(
            ValueError, match="the log-SNR of schedule must decrease from t_min to t_max; that of Rising"
        ):
            make()
