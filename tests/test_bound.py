"""Bounds against closed forms: Gaussian models in a few steps, exact reverse processes in many, discrete laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.density import (
    bits_per_dim,
    dequantize,
    elbo,
    elbo_gap,
    importance_weighted_bound,
    learn_variances,
    log_prob,
)
from numpyro_diffusion.density.bound import _variances
from numpyro_diffusion.noise import VE, VP, UniformLogSNR

LADDER = VE(0.02, 50.0)
MEAN, VARIANCES = np.array([1.0, -2.0]), np.array([0.25, 4.0])


def mixture(d, schedule=LADDER):
    rng = np.random.default_rng(d)
    return GaussianMixture([0.2, 0.3, 0.5], 2 * rng.normal(size=(3, d)), [0.1, 0.4, 1.0], schedule)


@partial(jax.jit, static_argnames=("num_times", "num_samples", "transition"))
def bound(denoiser, x, key, transition="continuous", num_times=64, num_samples=64):
    return elbo(denoiser, x, key, transition=transition, num_times=num_times, num_samples=num_samples)


def gaussian_bound(x, transition, num_times):
    """The stepwise bound for N(MEAN, VARIANCES) and its exact, linear denoiser: every expectation in closed form."""
    law = Gaussian(MEAN, VARIANCES, LADDER)
    levels = np.asarray(LADDER.noise_level(UniformLogSNR()(LADDER, num_times)), float)
    location, scale = np.asarray(law.location), float(law.scale)
    spread = scale**2 + levels[0] ** 2
    total = -0.5 * np.sum((levels[0] ** 2 + (x - location) ** 2) / spread - 1 - np.log(levels[0] ** 2 / spread))

    def mean_squared_error(level):  # of x0(x + level eps) - x, per dimension
        gain = VARIANCES / (VARIANCES + level**2)
        return ((1 - gain) * (MEAN - x)) ** 2 + (gain * level) ** 2

    for high, low in zip(levels[:-1], levels[1:], strict=True):
        r = (low / high) ** 2
        posterior = low**2 * (1 - r)
        variance = {"posterior": posterior, "beta": high**2 - low**2}[transition]
        ratio = posterior / variance
        total -= np.sum(0.5 * (1 - r) ** 2 / variance * mean_squared_error(high) + 0.5 * (ratio - 1 - np.log(ratio)))
    lowest = levels[-1]
    return total - np.sum(0.5 * mean_squared_error(lowest) / lowest**2 + 0.5 * np.log(2 * np.pi * lowest**2))


@pytest.mark.slow
@pytest.mark.parametrize("transition", ["posterior", "beta"])
def test_the_stepwise_bound_of_a_gaussian(transition, x64):
    """Against its closed form within 4 standard errors, which are themselves small enough to see a wrong term."""
    x = np.array([0.4, 1.0])
    got = bound(Gaussian(MEAN, VARIANCES, LADDER), x, jax.random.key(0), transition, 12, 8192)
    assert got.standard_error < 0.1
    assert abs(got.value - gaussian_bound(x, transition, 12)) < 4 * got.standard_error


@pytest.mark.parametrize("d, transition", [(2, "posterior"), (8, "continuous"), (32, "posterior")])
def test_the_bound_is_below_and_tight_for_an_exact_reverse_process(d, transition, x64):
    """In the mean over draws of the law, where the two agree: not above by 4 s.e., not below by what steps cost."""
    law = mixture(d)
    x = law.sample(jax.random.key(0), (16,))
    truth = jax.vmap(lambda x: law.log_density(x, 0.0))(x)
    run = jax.jit(jax.vmap(lambda x, key: elbo(law, x, key, transition=transition, num_times=513, num_samples=4)[:2]))
    value, error = run(x, jax.random.split(jax.random.key(1), 16))
    gap, error = (truth - value).mean(), np.sqrt((error**2).sum()) / 16
    assert gap > -4 * error, (gap, error)
    assert gap < 4 * error + (0.01 if transition == "continuous" else 0.016) * d, (gap, error)


def test_the_terms_add_up():
    """To the value, level by level; the standard error is that of independent samples."""
    law, x, keys = mixture(2), np.array([0.3, -0.4], np.float32), jax.random.split(jax.random.key(1), 200)
    for transition in ("continuous", "posterior", "beta"):
        got = jax.vmap(lambda key, how=transition: bound(law, x, key, how, 17, 64))(keys)
        np.testing.assert_allclose(got.value, -(got.prior + got.diffusion + got.reconstruction), rtol=1e-5)
        np.testing.assert_allclose(got.diffusion, got.per_level.sum(1), rtol=1e-5)
        assert got.per_level.shape == (200, 16) and got.noise_levels.shape == (200, 17)
        assert (np.diff(got.noise_levels) < 0).all() and (got.per_level > 0).all()
        ratio = np.mean(got.standard_error**2) / np.var(got.value)
        assert abs(ratio - 1) < 0.4  # a variance of 200 values has a relative error of 0.1


def test_more_steps_tighten_and_the_continuous_bound_is_their_limit(x64):
    """Of order one in the step: halving it halves the loss."""
    x = np.array([0.4, 1.0])
    limit = gaussian_bound(x, "posterior", 20_001)
    losses = [limit - gaussian_bound(x, "posterior", n) for n in (65, 129, 257)]
    assert losses[0] > losses[1] > losses[2] > 0
    np.testing.assert_allclose([losses[0] / losses[1], losses[1] / losses[2]], 2.0, atol=0.2)
    got = bound(Gaussian(MEAN, VARIANCES, LADDER), x, jax.random.key(0), "continuous", 65, 1024)
    assert abs(got.value - limit) < 4 * got.standard_error + 1e-2


@pytest.mark.slow
def test_learned_variances_are_the_best(x64):
    """On a Gaussian they are known, and the bound is above those of both ends."""
    law, steps = Gaussian(MEAN, VARIANCES, LADDER), 12
    data = law.sample(jax.random.key(0), (4_000,))
    places = jax.jit(lambda data, key: learn_variances(law, data, key, num_times=steps))(data, jax.random.key(1))
    levels = np.asarray(LADDER.noise_level(UniformLogSNR()(LADDER, steps)))
    high, low = levels[:-1, None], levels[1:, None]
    r, posterior = (low / high) ** 2, low**2 * (1 - (low / high) ** 2)
    best = (posterior + (1 - r) ** 2 * VARIANCES * high**2 / (VARIANCES + high**2)).mean(1)
    expected = np.log(best / posterior[:, 0]) / np.log((high**2 - low**2)[:, 0] / posterior[:, 0])
    np.testing.assert_allclose(places, expected, atol=0.02)
    run = jax.jit(
        jax.vmap(lambda x, key, places: elbo(law, x, key, transition=places, num_times=steps).value, (0, 0, None))
    )
    keys = jax.random.split(jax.random.key(2), 500)
    value = [run(data[:500], keys, p).mean() for p in (places, jnp.zeros(steps - 1), jnp.ones(steps - 1))]
    assert value[0] > value[1] + 0.1 and value[0] > value[2] + 0.1, value
    for k, name in ((0.0, "posterior"), (1.0, "beta")):  # the ends of the line are the named choices
        ladder = jnp.asarray(levels)
        np.testing.assert_allclose(_variances(ladder, jnp.full(steps - 1, k)), _variances(ladder, name), rtol=1e-9)


def stepwise_log_density(x, num_times):
    """Log p of the model in steps for a Gaussian denoiser in one dimension: a linear Gaussian chain."""
    levels = np.asarray(LADDER.noise_level(UniformLogSNR()(LADDER, num_times)), float)
    mean, variance = 0.0, 1.0 + levels[0] ** 2
    for high, low in zip(levels[:-1], levels[1:], strict=True):
        r, gain = (low / high) ** 2, 1.0 / (1.0 + high**2)
        slope = r + (1 - r) * gain
        mean, variance = slope * mean, slope**2 * variance + low**2 * (1 - r)
    gain = 1.0 / (1.0 + levels[-1] ** 2)
    return norm.logpdf(x, gain * mean, np.sqrt(gain**2 * variance + levels[-1] ** 2))


@pytest.mark.slow
def test_more_paths_tighten_the_bound_of_the_model_in_steps(x64):
    """K = 1 is the plain bound; the mean grows with K and approaches the log-density of the stepwise model."""
    law, x, steps = Gaussian([0.0], 1.0, LADDER), np.array([0.8]), 8
    run = jax.jit(
        lambda keys, k: jax.vmap(lambda key: importance_weighted_bound(law, x, key, num_paths=k, num_times=steps))(
            keys
        ),
        static_argnums=1,
    )
    truth, means, errors = stepwise_log_density(x[0], steps), [], []
    for k in (1, 16, 512):
        drawn = np.asarray(run(jax.random.split(jax.random.key(k), 400), k))
        means.append(drawn.mean())
        errors.append(drawn.std() / 20)
    plain = bound(law, x, jax.random.key(3), "posterior", steps, 4096)
    assert abs(means[0] - plain.value) < 4 * np.hypot(errors[0], plain.standard_error)
    assert means[0] + 4 * errors[0] < means[1] < means[2] + 4 * errors[2]
    assert means[2] < truth + 4 * errors[2] and truth - means[2] < 0.05 * (truth - means[0]) + 4 * errors[2]


@pytest.mark.slow
def test_gap_to_the_flow():
    """The difference of its two parts, with their errors together; averaged over the law, its levels add up to it.

    Flow and reverse process are one law there, so that what a level costs beyond the continuous limit is all of it.
    """
    law, options = mixture(2, VP()), {"num_times": 17, "num_samples": 4}
    xs, keys = law.sample(jax.random.key(1), (200,)), jax.random.split(jax.random.key(2), 200)

    @jax.jit
    @jax.vmap
    def parts(x, key):
        key_probes, key_bound, _ = jax.random.split(key, 3)
        return log_prob(law, x, num_probes=2, key=key_probes), elbo(
            law, x, key_bound, transition="posterior", **options
        )

    gap = jax.jit(jax.vmap(lambda x, key: elbo_gap(law, x, key, num_probes=2, **options)))(xs, keys)
    flow, plain = parts(xs, keys)
    np.testing.assert_allclose(gap.value, flow.value - plain.value, atol=1e-3)
    np.testing.assert_allclose(gap.standard_error, np.hypot(flow.standard_error, plain.standard_error), rtol=1e-3)
    assert (gap.standard_error > 0).all() and gap.per_level.shape == (200, 16)
    rest = gap.value - gap.per_level.sum(1)
    assert abs(rest.mean()) < 4 * rest.std() / 200**0.5 + 2e-2
    assert gap.value.mean() > 0.5


def test_bits_per_dim_of_a_quantised_law():
    """A normal law read to bins of a tenth: its mean cost is between its entropy and that plus what a bin hides."""
    width, n = 0.1, 20_000
    x = width * np.floor(np.random.default_rng(0).normal(size=(n, 2)) / width)
    edges = np.arange(-6, 6 + width, width)
    shares = np.diff(norm.cdf(edges))
    entropy = -np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))
    noisy = np.asarray(dequantize(jax.random.key(0), x, width))
    assert (noisy >= x - 1e-6).all() and (noisy < x + width + 1e-6).all()
    bits = np.asarray(bits_per_dim(multivariate_normal(np.zeros(2), np.eye(2)).logpdf(noisy), 2, width))
    error = bits.std() / n**0.5
    assert -4 * error < bits.mean() - entropy < 4 * error + 2e-3
    np.testing.assert_allclose(bits_per_dim(-2.0 * np.log(256), 2), 8.0, rtol=1e-6)


LAW, KEY, X = Gaussian([0.0, 0.0], 1.0, LADDER), jax.random.key(0), jnp.zeros(2)
BAD = {
    "samples": (lambda: elbo(LAW, X, KEY, num_samples=0), "num_samples must be at least 1; got 0"),
    "steps": (lambda: elbo(LAW, X, KEY, num_times=1), "num_times must be at least 2; got 1"),
    "transition": (lambda: elbo(LAW, X, KEY, transition="learned"), "transition must be one of"),
    "places": (lambda: elbo(LAW, X, KEY, transition=jnp.zeros(3)), r"transition must have shape \(63,\); got \(3,\)"),
    "paths": (lambda: importance_weighted_bound(LAW, X, KEY, num_paths=0), "num_paths must be at least 1; got 0"),
    "continuous": (lambda: importance_weighted_bound(LAW, X, KEY, transition="continuous"), "paths have steps"),
    "shape": (lambda: elbo(LAW, jnp.zeros((3, 2)), KEY), "Use jax.vmap"),
    "width": (lambda: bits_per_dim(0.0, 2, 0.0), "bin_width must be positive"),
    "dims": (lambda: bits_per_dim(0.0, 0), "num_dims must be at least 1"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
