"""Each weighting against the loss that it is named after, as that is written, and against the published table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_diffusion import noise
from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.train import weighting as w

X, EPS = jnp.array([0.7, -1.1]), jnp.array([0.4, 1.3])


def views(schedule, t):
    """Squared errors of the views of a denoiser at one noisy point, and the squared scale of its network's output."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    answer = Gaussian(jnp.zeros(2), 0.6, schedule)(alpha * X + sigma * EPS, t)
    (_, a_slope), (_, s_slope) = (noise.value_and_slope(f, t) for f in (schedule.alpha, schedule.sigma))
    truths = {
        "x0": X,
        "eps": EPS,
        "v": alpha * EPS - sigma * X,
        "velocity": a_slope * X + s_slope * EPS,
    }
    errors = {name: jnp.sum((getattr(answer, name) - truth) ** 2) for name, truth in truths.items()}
    # the network's own output under the edm target is (x0 - linear guess) / its standard deviation
    return errors | {"F": errors["x0"] * (alpha**2 + sigma**2) / sigma**2}


def normal(value, mean, std):
    return jnp.exp(-0.5 * ((value - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


def log_normal_density(schedule, t, mean, std):
    """Density of t where log sigma / alpha is normal."""
    level, slope = noise.value_and_slope(lambda t: jnp.log(schedule.noise_level(t)), t)
    return normal(level, mean, std) * slope


def logit_normal_density(t, mean, std):
    return normal(jnp.log(t / (1.0 - t)), mean, std) / (t * (1.0 - t))


def snr(schedule, t):
    return jnp.exp(schedule.log_snr(t))


# The integrand over time of each named loss, as its paper writes it
NAMED = {
    "Simple": (w.Simple(noise.VP()), noise.VP(), lambda s, t, e: e["eps"]),
    "X0": (w.X0(noise.VP()), noise.VP(), lambda s, t, e: e["x0"]),
    "V": (w.V(noise.Cosine()), noise.Cosine(), lambda s, t, e: e["v"]),
    "V, variance not preserved": (w.V(noise.Rectified()), noise.Rectified(), lambda s, t, e: e["v"]),
    "MinSNR": (w.MinSNR(3.0), noise.Cosine(), lambda s, t, e: jnp.minimum(snr(s, t), 3.0) * e["x0"]),
    "FlowMatching": (w.FlowMatching(), noise.Rectified(), lambda s, t, e: e["velocity"]),
    "LogitNormal": (
        w.LogitNormal(0.3, 0.8),
        noise.Rectified(),
        lambda s, t, e: logit_normal_density(t, 0.3, 0.8) * e["velocity"],
    ),
    "EDM": (w.EDM(), noise.VE(), lambda s, t, e: log_normal_density(s, t, -0.5, 1.5) * e["F"]),
    # twice the diffusion term of the variational bound, Kingma et al. 2021, equation 17
    "Likelihood": (
        w.Likelihood(),
        noise.VP(),
        lambda s, t, e: -noise.value_and_slope(lambda t: snr(s, t), t)[1] * e["x0"],
    ),
    "Sigmoid": (
        w.Sigmoid(0.0),  # the variational bound times sigma_t^2
        noise.Cosine(),
        lambda s, t, e: -noise.value_and_slope(lambda t: snr(s, t), t)[1] * e["x0"] * s.sigma(t) ** 2,
    ),
}


@pytest.mark.slow
def test_weightings_are_those_of_the_losses_they_are_named_after(x64):
    """In one test, because each turn to double precision costs all compiled programs."""
    for name, (weighting, schedule, integrand) in NAMED.items():

        @jax.jit
        @jax.vmap
        def both(t, weighting=weighting, schedule=schedule, integrand=integrand):
            errors = views(schedule, t)
            log_snr, slope = noise.value_and_slope(schedule.log_snr, t)
            return weighting(log_snr) * errors["eps"] * -slope, integrand(schedule, t, errors)

        got, expected = both(jnp.linspace(schedule.t_min + 1e-3, schedule.t_max - 1e-3, 50))
        np.testing.assert_allclose(got, expected, rtol=1e-8, err_msg=name)


GRID = np.linspace(-9.0, 9.0, 181)


def sech(x):
    return 1.0 / np.cosh(x)


@pytest.mark.parametrize(
    ("weighting", "published"),
    [
        (w.Likelihood(), lambda snr: 1.0 + 0.0 * snr),
        (w.Simple(), lambda log_snr: sech(log_snr / 2)),
        (w.V(), lambda log_snr: np.exp(-log_snr / 2)),
        (w.FlowMatching(), lambda log_snr: np.exp(-log_snr / 2)),
        (w.MinSNR(5.0), lambda log_snr: sech(log_snr / 2) * np.minimum(1.0, 5.0 * np.exp(-log_snr))),
        (w.Sigmoid(1.5), lambda log_snr: 1.0 / (1.0 + np.exp(log_snr - 1.5))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weighting_is_that_of_the_published_table_up_to_a_factor(weighting, published):
    ratio = np.asarray(weighting(GRID)) / published(GRID)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_edm_is_that_of_the_published_table_in_units_of_the_data():
    # published for data of standard deviation 0.5: N(2.4, 2.4^2) (exp(-lambda) + 0.5^2) in the log-SNR of raw data
    c = 0.5
    raw = GRID - 2.0 * math.log(c)
    published = np.exp(-0.5 * ((raw - 2.4) / 2.4) ** 2) * (np.exp(-raw) + c**2)
    ratio = np.asarray(w.EDM(-1.2 - math.log(c), 1.2)(GRID)) / published
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


ALL = [
    (w.EDM(), False),
    (w.Simple(), False),
    (w.Simple(noise.VE()), True),  # uniform in log sigma: the variational bound
    (w.X0(), True),
    (w.V(), True),
    (w.V(noise.VP()), True),
    (w.MinSNR(), False),
    (w.Sigmoid(), True),
    (w.Likelihood(), True),
    (w.FlowMatching(), True),
    (w.LogitNormal(), False),
]


@pytest.mark.parametrize(("weighting", "monotonic"), ALL, ids=repr)
def test_flag_says_whether_the_weight_never_increases(weighting, monotonic):
    values = np.asarray(weighting(GRID), np.float64)
    assert np.isfinite(values).all() and (values > 0).all()
    assert weighting.monotonic == monotonic == bool((np.diff(values) <= 1e-4 * values[1:]).all())


def test_weightings_are_static_and_hashable():
    for weighting, _ in ALL:
        assert not jax.tree.leaves(weighting)
        assert hash(weighting) == hash(type(weighting)(**vars(weighting)))


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "std must be positive and finite; got 0.0", lambda: w.EDM(std=0.0)),
        (ValueError, "mean must be finite", lambda: w.EDM(mean=math.nan)),
        (ValueError, "std must be positive and finite; got -1.0", lambda: w.LogitNormal(std=-1.0)),
        (ValueError, "mean must be finite", lambda: w.LogitNormal(mean=math.inf)),
        (ValueError, "gamma must be positive and finite; got 0.0", lambda: w.MinSNR(gamma=0.0)),
        (ValueError, "bias must be finite", lambda: w.Sigmoid(math.nan)),
        (TypeError, "schedule must be a noise.Schedule; got 'cosine'", lambda: w.Simple("cosine")),
        (TypeError, "schedule must be a noise.Schedule; got 3", lambda: w.MinSNR(schedule=3)),
        (
            TypeError,
            r"weighting must be a train.weighting.Weighting such as EDM\(\); got 'edm'",
            lambda: w.check_weighting("edm"),
        ),
    ],
)
def test_mistakes_are_named(error, message, make):
    with pytest.raises(error, match=message):
        make()
