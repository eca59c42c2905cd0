"""Schedules against textbook closed forms and their own moment equations; time grids against their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffusion.noise import (
    VE,
    VP,
    Cosine,
    Karras,
    Rectified,
    Scaled,
    SubVP,
    Tabulated,
    TimeGrid,
    UniformLogSNR,
    UniformTime,
    perturb,
)

SCHEDULES = {
    "VP": VP(),
    "VP slow": VP(beta_min=0.5, beta_max=4.0, t_min=1e-3, t_max=0.9),
    "SubVP": SubVP(),
    "VE": VE(),
    "VE narrow": VE(sigma_min=0.1, sigma_max=3.0),
    "Cosine": Cosine(),
    "Rectified": Rectified(),
    "Tabulated": Tabulated([12.0, 3.0, 1.0, -9.0]),
    "Scaled VP": Scaled(VP(), 2.5),
    "Scaled Rectified": Scaled(Rectified(), 0.3),
}
GRIDS = {"time": UniformTime(), "log-SNR": UniformLogSNR(), "Karras": Karras(), "Karras 2": Karras(rho=2.0)}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def inner_times(schedule, count=33):
    return jnp.linspace(schedule.t_min, schedule.t_max, count)[1:-1]


# Textbook f and g^2 as functions of (schedule, t).
def rate(s, t):
    return s.beta_min + (s.beta_max - s.beta_min) * t


def rate_integral(s, t):
    return s.beta_min * t + (s.beta_max - s.beta_min) * t**2 / 2


TEXTBOOK = {
    "VP": (lambda s, t: -rate(s, t) / 2, lambda s, t: rate(s, t)),
    "SubVP": (lambda s, t: -rate(s, t) / 2, lambda s, t: rate(s, t) * (1 - np.exp(-2 * rate_integral(s, t)))),
    "VE": (lambda s, t: 0 * t, lambda s, t: 2 * s.sigma(t) ** 2 * np.log(s.sigma_max / s.sigma_min)),
    "Cosine": (lambda s, t: -np.pi / 2 * np.tan(np.pi * t / 2), lambda s, t: np.pi * np.tan(np.pi * t / 2)),
    "Rectified": (lambda s, t: -1 / (1 - t), lambda s, t: 2 * t / (1 - t)),
}


@pytest.mark.parametrize("name", ["VP", "VP slow", "SubVP", "VE", "VE narrow", "Cosine", "Rectified"])
def test_drift_and_diffusion_are_the_textbook_ones(name, x64):
    schedule = SCHEDULES[name]
    f, g2 = TEXTBOOK[name.split()[0]]
    t = inner_times(schedule)
    np.testing.assert_allclose(schedule.drift(t), f(schedule, np.asarray(t)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.diffusion(t) ** 2, g2(schedule, np.asarray(t)), rtol=1e-9)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES.values() if not isinstance(s, Tabulated)], ids=repr)
def test_moments_solve_their_differential_equations(schedule, x64):
    """The ODE d(alpha) = f alpha dt, d(sigma^2) = (2 f sigma^2 + g^2) dt, by Runge-Kutta over the middle of [0, 1]."""
    times = jnp.linspace(0.2, 0.8, 401)

    def slope(t, moments):
        alpha, variance = moments
        f, g = schedule.drift(t), schedule.diffusion(t)
        return jnp.stack([f * alpha, 2 * f * variance + g**2])

    def step(moments, t):
        h = times[1] - times[0]
        k1 = slope(t, moments)
        k2 = slope(t + h / 2, moments + h / 2 * k1)
        k3 = slope(t + h / 2, moments + h / 2 * k2)
        k4 = slope(t + h, moments + h * k3)
        return moments + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def moments(t):
        return jnp.stack([schedule.alpha(t), schedule.sigma(t) ** 2])

    end, _ = jax.jit(lambda start: jax.lax.scan(step, start, times[:-1]))(moments(times[0]))
    np.testing.assert_allclose(end, moments(times[-1]), rtol=1e-8)


@each_schedule
def test_noise_grows_and_its_inverse_inverts(schedule):
    t = jnp.linspace(schedule.t_min, schedule.t_max, 65)
    log_snr = schedule.log_snr(t)
    assert (jnp.diff(log_snr) < 0).all()
    np.testing.assert_allclose(schedule.inverse_log_snr(log_snr), t, rtol=2e-4)  # single precision near the ends
    level = schedule.noise_level(t)
    np.testing.assert_allclose(level, jnp.exp(-0.5 * log_snr), rtol=1e-4)
    np.testing.assert_allclose(schedule.inverse_noise_level(level), t, rtol=2e-4)


@each_schedule
def test_inverse_is_exact_in_double_precision(schedule, x64):
    t = jnp.linspace(schedule.t_min, schedule.t_max, 65)
    np.testing.assert_allclose(schedule.inverse_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-13)


def test_closed_forms_of_alpha_and_sigma():
    t = np.linspace(0.01, 0.99, 9)
    alpha = np.exp(-0.5 * rate_integral(VP(), t))
    expected = {
        VP(): (alpha, np.sqrt(1 - alpha**2)),
        SubVP(): (alpha, 1 - alpha**2),
        VE(): (np.ones(9), 0.002 * 40_000.0**t),
        Cosine(): (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
        Rectified(): (1 - t, t),
    }
    for schedule, (alpha, sigma) in expected.items():
        np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-4, err_msg=str(schedule))
        np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-4, err_msg=str(schedule))


@each_schedule
def test_perturb_has_the_moments_of_the_definition(schedule):
    """Mean alpha x and variance sigma^2, each within 4.5 standard errors of 20,000 draws."""
    n, t, x = 20_000, 0.4, 3.0
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = perturb(jax.random.key(0), schedule, jnp.full(n, x), t)
    assert abs(x_t.mean() - alpha * x) < 4.5 * sigma / n**0.5
    assert abs(x_t.var() / sigma**2 - 1) < 4.5 * (2 / n) ** 0.5


def test_perturb_broadcasts_times():
    """One time per row; at t = 0 the straight path leaves the point where it is."""
    x = jnp.ones((2, 4))
    x_t = perturb(jax.random.key(0), Rectified(), x, jnp.array([[0.0], [1.0]]))
    assert (x_t[0] == 1.0).all()
    np.testing.assert_array_equal(x_t[1], jax.random.normal(jax.random.key(0), (2, 4))[1])


@each_grid
@each_schedule
def test_grids_decrease_between_exact_ends(schedule, grid):
    times = grid(schedule, 12)
    assert times.shape == (12,)
    assert (jnp.diff(times) < 0).all()
    assert times[0] == jnp.float32(schedule.t_max) and times[-1] == jnp.float32(schedule.t_min)
    assert grid(schedule, 2).shape == (2,)


@each_schedule
def test_grids_follow_their_formulas(schedule, x64):
    n = 9
    ends = np.array([schedule.noise_level(schedule.t_max), schedule.noise_level(schedule.t_min)])
    share = np.arange(n) / (n - 1)
    for rho in (7.0, 2.0):
        high, low = ends ** (1 / rho)
        levels = schedule.noise_level(Karras(rho)(schedule, n))
        np.testing.assert_allclose(levels, (high + share * (low - high)) ** rho, rtol=1e-8)
    levels = schedule.noise_level(UniformLogSNR()(schedule, n))
    np.testing.assert_allclose(levels, ends[0] * (ends[1] / ends[0]) ** share, rtol=1e-8)
    steps = jnp.diff(UniformTime()(schedule, n))
    np.testing.assert_allclose(steps, (schedule.t_min - schedule.t_max) / (n - 1), rtol=1e-12)


def test_tabulated_interpolates_and_preserves_variance(x64):
    """Between knots the log-SNR is linear; its slope is what the drift and the diffusion are made of."""
    schedule = Tabulated([12.0, 3.0, 1.0, -9.0])
    t = jnp.linspace(0.0, 1.0, 13)
    np.testing.assert_allclose(schedule.log_snr(t), np.interp(t, np.arange(4) / 3, schedule.knots), atol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)
    t = jnp.array([0.1, 0.5, 0.9])
    g2 = 3 * np.array([9.0, 2.0, 10.0]) * schedule.sigma(t) ** 2  # g^2 = -sigma^2 d(log SNR)/dt if variance is kept
    np.testing.assert_allclose(schedule.diffusion(t) ** 2, g2, rtol=1e-9)


def test_tabulated_from_density_spends_time_where_the_density_is(x64):
    """Uniform times: the share of them in a bin is its share of the mass; and any density but its factor."""
    edges, density = np.array([-8.0, -2.0, 0.0, 9.0]), np.array([1.0, 6.0, 2.0])
    schedule = Tabulated.from_density(edges, density, num_knots=37)  # mass 6 + 12 + 18: edges fall on knots
    assert (schedule.knots[0], schedule.knots[-1]) == (9.0, -8.0)
    np.testing.assert_allclose(schedule.inverse_log_snr(edges), [1.0, 5 / 6, 1 / 2, 0.0], atol=1e-12)
    np.testing.assert_allclose(Tabulated.from_density(edges, 7 * density, 37).knots, schedule.knots, rtol=1e-12)


@pytest.mark.parametrize("base", [VP(), VE(), Rectified()], ids=repr)
def test_scaled_is_the_base_in_other_units(base):
    """Noising c x by the scaled schedule is c times noising x by the base."""
    scaled, t = Scaled(base, 2.5), 0.3
    key, x = jax.random.key(1), jnp.arange(4.0)
    expected = 2.5 * perturb(key, base, x, t)
    np.testing.assert_allclose(perturb(key, scaled, 2.5 * x, t), expected, rtol=1e-5)
    assert (scaled.t_min, scaled.t_max) == (base.t_min, base.t_max)
    np.testing.assert_allclose(scaled.noise_level(t), 2.5 * base.noise_level(t), rtol=1e-6)
    slope = jax.grad(lambda c: jnp.log(Scaled(base, c).sigma(t)))(2.5)
    np.testing.assert_allclose(slope, 1 / 2.5, rtol=1e-6)  # the scale is data, the base is not
    assert jax.tree.leaves(scaled) == [2.5]


STATIC = {**{k: v for k, v in SCHEDULES.items() if not k.startswith("Scaled")}, **GRIDS}


@pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)
def test_configuration_is_static(config):
    """No leaves to train by accident; equal ones are one entry of the jit cache, unequal ones are not."""
    traces = []

    @jax.jit
    def traced(config):
        traces.append(config)
        return jnp.zeros(())

    twin = dataclasses.replace(config)
    assert jax.tree.leaves(config) == []
    assert config == twin and hash(config) == hash(twin)
    traced(config), traced(twin)
    assert len(traces) == 1
    for other in STATIC.values():
        if other != config:
            traced(other)
            break
    assert len(traces) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.t_min = 0.5


BAD = {
    "VE sigma_max": (lambda: VE(sigma_min=0.01, sigma_max=0.001), "sigma_max must exceed sigma_min=0.01; got 0.001"),
    "VE sigma_max equal": (lambda: VE(sigma_min=1.0, sigma_max=1.0), "sigma_max must exceed sigma_min=1.0; got 1.0"),
    "VE sigma_min": (lambda: VE(sigma_min=0.0), "sigma_min must be positive and finite; got 0.0"),
    "VE sigma_min NaN": (lambda: VE(sigma_min=float("nan")), "sigma_min must be positive and finite; got nan"),
    "VE t_max": (lambda: VE(t_max=1.5), r"t_max must lie in \[0, 1\]; got 1.5"),
    "VP beta_max": (lambda: VP(beta_min=2.0, beta_max=1.0), "beta_max must exceed beta_min=2.0; got 1.0"),
    "VP beta_min": (lambda: VP(beta_min=-1.0), "beta_min must be positive and finite; got -1.0"),
    "VP t_min": (lambda: VP(t_min=0.0), "t_min must be positive and finite; got 0.0"),
    "VP range": (lambda: VP(t_min=0.5, t_max=0.4), "t_max must exceed t_min=0.5; got 0.4"),
    "SubVP beta_max": (lambda: SubVP(beta_max=0.05), "beta_max must exceed beta_min=0.1; got 0.05"),
    "Cosine t_min": (lambda: Cosine(t_min=0.0), "t_min must exceed the noiseless end t=0.0; got 0.0"),
    "Cosine t_max": (lambda: Cosine(t_max=1.0), "1 must exceed t_max=1.0; got 1.0"),
    "Rectified t_max": (lambda: Rectified(t_max=1.0), "1 must exceed t_max=1.0; got 1.0"),
    "Rectified range": (lambda: Rectified(t_min=0.9, t_max=0.2), "t_max must exceed t_min=0.9; got 0.2"),
    "Tabulated rising": (lambda: Tabulated([3.0, 5.0]), "knots must be strictly decreasing; got 3.0 and then 5.0"),
    "Tabulated flat": (lambda: Tabulated([3.0, 3.0]), "knots must be strictly decreasing; got 3.0 and then 3.0"),
    "Tabulated short": (lambda: Tabulated([3.0]), "knots must be a list of two or more log-SNRs"),
    "Tabulated NaN": (lambda: Tabulated([3.0, float("nan")]), "knots"),
    "Tabulated range": (lambda: Tabulated([3.0, 0.0], t_min=0.9, t_max=0.2), "t_max must exceed t_min=0.9"),
    "Tabulated edges": (lambda: Tabulated.from_density([1.0, 0.0], [1.0]), "edges must increase"),
    "Tabulated empty bin": (lambda: Tabulated.from_density([0.0, 1.0, 2.0], [1.0, 0.0]), "density must be positive"),
    "Karras rho": (lambda: Karras(rho=0.0), "rho must be positive and finite; got 0.0"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_grid_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        TimeGrid()
