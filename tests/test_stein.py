"""Kernel Stein discrepancies: against autodiff, against expectations in closed form, levels and power of the test."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_diffusion.denoise import FromFunction, Gaussian
from numpyro_diffusion.diagnostics import score_function, stein_discrepancy, stein_test, stein_thin
from numpyro_diffusion.diagnostics.distances import quadratic_forms
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import Score, joint_scores
from numpyro_diffusion.noise import VE, VP
from numpyro_diffusion.solve import Heun

KEY = jax.random.key(0)


def autoregressive(rng, chains, draws, dimension, rho):
    """Stationary chains of N(0, I), shape (chains * draws, dimension)."""
    x = rng.normal(size=(chains, draws, dimension))
    for i in range(1, draws):
        x[:, i] = rho * x[:, i - 1] + np.sqrt(1 - rho**2) * x[:, i]
    return x.reshape(-1, dimension)


def test_closed_form_expectations():
    """Two points of known scores by hand, and E k_p(x, x) = E |s|^2 + d of exact draws, beta = -1/2."""
    x, s = np.array([[0.0], [3.0]]), np.array([[1.0], [-2.0]])
    u = 1.0 + 9.0 / 4.0  # in units of 2
    s_u = 2.0 * s
    between = (
        u**-0.5 * s_u[0, 0] * s_u[1, 0]
        + u**-1.5 * ((s_u[0, 0] - s_u[1, 0]) * (-1.5) + 1.0)
        - 3.0 * (9.0 / 4.0) * u**-2.5
    )
    found = stein_discrepancy(x, s, length_scale=2.0)
    np.testing.assert_allclose(found.u_statistic, between, rtol=1e-12)
    np.testing.assert_allclose(found.v_statistic, (2 * between + 4.0 + 16.0 + 2.0) / 4.0, rtol=1e-12)
    x = np.random.default_rng(0).normal(size=(2000, 3))
    found = stein_discrepancy(x, -x, length_scale=1.0)
    bias = len(x) * found.v_statistic - (len(x) - 1) * found.u_statistic  # mean of k_p(x, x): 3 + 3
    assert abs(bias - 6.0) < 4.0 * np.sqrt(6.0 / len(x))  # |s|^2 is chi squared with 3 degrees


def test_the_unbiased_statistic_is_centred_and_finds_a_shift():
    """The mean over replications is zero within 4 errors; of shifted draws it is the closed-form |m|^2 E k."""
    rng, shift = np.random.default_rng(1), np.array([0.6, 0.0])
    exact = [stein_discrepancy(x, -x, length_scale=1.0).u_statistic for x in rng.normal(size=(200, 60, 2))]
    assert abs(np.mean(exact)) < 4.0 * np.std(exact) / np.sqrt(200)
    # draws of N(m, I) and the score -x = -(x - m) - m: KSD^2 = |m|^2 E (1 + |x - y|^2)^(-1/2)
    y = rng.normal(size=(200, 60, 2)) + shift
    found = [stein_discrepancy(x, -x, length_scale=1.0).u_statistic for x in y]
    r2 = np.linspace(0.0, 200.0, 400_001)  # |x - y|^2 / 4 is exponential in two dimensions
    truth = 0.36 * np.trapezoid((1.0 + r2) ** -0.5 * np.exp(-r2 / 4.0) / 4.0, r2)
    assert abs(np.mean(found) - truth) < 4.0 * np.std(found) / np.sqrt(200)


def test_blocks_do_not_matter():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(101, 3)) + 50.0  # far from zero: rows are centred before distances are taken
    whole, parts = (stein_discrepancy(x, 50.0 - x, block_size=size) for size in (1000, 7))
    np.testing.assert_allclose(whole, parts, rtol=1e-11)
    k = x @ x.T
    w = rng.integers(-1, 2, size=(101, 4)).astype(np.int8)
    np.testing.assert_allclose(
        quadratic_forms(lambda i, j: k[i, j], w, 13), np.einsum("ib,ij,jb->b", w.astype(float), k, w), rtol=1e-10
    )


def test_length_scale_and_units():
    """In other units nothing changes, and the default is the median distance."""
    x = np.random.default_rng(3).normal(size=(300, 2))
    one, other = stein_discrepancy(x, -x), stein_discrepancy(1e3 * x, -1e-3 * x)
    np.testing.assert_allclose(one[:2], other[:2], rtol=1e-10)
    distances = np.sqrt(((x[:, None] - x) ** 2).sum(-1))[np.triu_indices(300, 1)]
    np.testing.assert_allclose(one.length_scale, np.median(distances), rtol=1e-12)


@pytest.mark.slow
def test_level_and_power_for_chains():
    """Of 40 runs of dependent chains at level .05; independent signs call many exact ones wrong.

    With the rate of .1 that an estimated block length leaves (docs/concepts/discrepancies.md), ten or more of 40 have
    probability .5 %.
    """
    rng = np.random.default_rng(4)
    caught = {"exact": 0, "shifted": 0, "independent signs": 0}
    for seed in range(40):
        x, key = autoregressive(rng, 4, 150, 1, 0.5), jax.random.key(seed)
        options = {"num_chains": 4, "num_bootstrap": 100}
        caught["exact"] += stein_test(x, -x, key, **options).p_value <= 0.05
        caught["shifted"] += stein_test(x + 0.35, -x - 0.35, key, **options).p_value <= 0.05
        caught["independent signs"] += stein_test(x, -x, key, block_length=1, **options).p_value <= 0.05
    assert caught["exact"] <= 9 and caught["shifted"] >= 36 and caught["independent signs"] > caught["exact"] + 3, (
        caught
    )


def test_p_values_of_exact_draws_are_uniform():
    """The mean of 150 p-values is 1/2 within 4 standard errors."""
    rng = np.random.default_rng(5)
    p = [
        stein_test(x, -x, jax.random.key(i), block_length=1, num_bootstrap=99).p_value
        for i, x in enumerate(rng.normal(size=(150, 80, 2)))
    ]
    assert abs(np.mean(p) - 0.5) < 4.0 / np.sqrt(12 * 150) and np.mean(np.array(p) <= 0.1) < 0.2


def test_thinning_removes_a_bias():
    """Half of the draws are of another law: chosen ones are nearer to the truth than as many taken evenly."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(400, 2))
    x[::2] = 0.5 * x[::2] + 2.0
    chosen = stein_thin(x, -x, 40, length_scale=1.0)
    assert len(chosen) == 40
    subsets = chosen, np.arange(0, 400, 10)
    thinned, even = (stein_discrepancy(x[i], -x[i], length_scale=1.0).v_statistic for i in subsets)
    assert thinned < 0.05 * even
    assert np.abs(x[chosen].mean(0)).max() < 0.15 < x.mean(0).min()
    # the first one is nearest to the mode, and the second the one that makes the pair best
    pairs = [stein_discrepancy(x[[chosen[0], i]], -x[[chosen[0], i]], length_scale=1.0).v_statistic for i in range(400)]
    assert chosen[0] == np.argmin((x**2).sum(1)) and chosen[1] == np.argmin(pairs)


def test_scores_of_a_denoiser():
    """Of N(1, 4) at level 2 the score is that of N(1, 8), whatever the schedule; draws with that noise agree with it.

    Each of the two tests goes wrong for less than one key in a thousand.
    """
    for schedule in (VE(0.01, 40.0), VP()):
        score = score_function(Gaussian([1.0], 4.0, schedule), 2.0)
        assert abs(float(score(jnp.array([3.0]))[0]) + 2.0 / 8.0) < 1e-4
    z = np.random.default_rng(7).normal(size=(300, 1))
    noisy, clean = (stein_test(1.0 + sd * z, score, KEY, block_length=1, num_bootstrap=2000) for sd in (8**0.5, 2.0))
    assert noisy.p_value > 1e-3 > clean.p_value
    with pytest.raises(ValueError, match=r"noise_level must lie in \[0.00318, 152\], .*; got 1000.0"):
        score_function(Gaussian([1.0], 4.0, VP()), 1e3)


def test_scores_of_a_model():
    """Of a joint density with a positive site: those of NumPyro's potential; of a prior alone, its own."""

    def model(y, prior):
        x = numpyro.sample("x", prior)
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
        numpyro.deterministic("twice", 2.0 * x)
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    prior, y = DiffusionPrior(Gaussian([1.0, 1.0], 1.0, VE(1e-3, 40.0))), jnp.array([3.0, -1.0])
    plain = dist.Normal(jnp.ones(2), 1.0).to_event(1)
    draws = {"x": jnp.array([[0.5, 1.0], [2.0, -1.0]]), "noise": jnp.array([0.5, 2.0]), "twice": jnp.zeros((2, 2))}
    found, truth = (joint_scores(model, draws, y, law) for law in (prior, plain))
    np.testing.assert_allclose(found.points, np.c_[np.log(draws["noise"]), draws["x"]], rtol=1e-6)
    log_noise, x = found.points[:, :1], draws["x"]
    by_x = (1.0 - x) + (y - x) / np.exp(2 * log_noise)
    by_noise = -4.0 * log_noise - 2.0 + np.sum((y - x) ** 2, 1, keepdims=True) / np.exp(2 * log_noise)
    np.testing.assert_allclose(truth.scores, np.c_[by_noise, by_x], rtol=1e-5)
    np.testing.assert_allclose(found.scores, truth.scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(joint_scores(prior, draws["x"]).scores, 1.0 - draws["x"], atol=1e-4)
    with pytest.raises(ValueError, match="draws must hold all latent sites of the model; noise are missing"):
        joint_scores(model, {"x": draws["x"]}, y, plain)


LEVELS = VE(0.02, 40.0)


def askew(x_t, t, _):
    """The noise in draws of N(0, 1), with an error that does not fall with the level below 1, as a network's."""
    sigma = LEVELS.sigma(t)
    return (x_t * sigma + 0.1) / (1.0 + sigma**2)


def test_scores_of_a_learned_prior():
    r"""Of its flow, whose draws agree with it; the denoiser's at the smallest level is of another law.

    Paths of the flow are x = c (1 + sigma^2)^(1/2) + .1 sigma, so that noise N(0, 1 + 40^2) ends at N(-.098, 1), while
    the score at .02 is off by .1 / .02. The first of the two tests goes wrong for one key in a thousand.
    """
    denoiser = FromFunction(askew, (1,), "eps", LEVELS)
    prior = DiffusionPrior(denoiser, flow_solver=Heun(48), density_solver=Heun(48))
    draws = prior.flow(jax.random.normal(KEY, (400, 1)))
    own, other = joint_scores(prior, draws), joint_scores(prior, draws, density=Score())
    np.testing.assert_allclose(own.scores, -(draws + 0.098), atol=0.01)  # the order of the solve
    np.testing.assert_allclose(other.scores, -(draws + 5.0), atol=0.01)
    first, second = (
        stein_test(found.points, found.scores, KEY, block_length=1, num_bootstrap=2000) for found in (own, other)
    )
    assert first.p_value > 1e-3 > second.p_value
    refuses = DiffusionPrior(denoiser, density="none")
    np.testing.assert_allclose(joint_scores(refuses, draws).scores, other.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"scores must have the shape of x, \(3, 2\); got \(3,\)", lambda x: stein_discrepancy(x, x[:, 0])),
        (r"x must be finite; got 1 non-finite values, the first at index \(1, 0\)", lambda x: stein_discrepancy(
            np.where(np.arange(6).reshape(3, 2) == 2, np.nan, x), x)),
        ("scores must be finite", lambda x: stein_discrepancy(x, np.full_like(x, np.inf))),
        (r"x must be at least 2 draws, shape \(draws, ...\); got shape \(1,", lambda x: stein_discrepancy(x[:1], x)),
        ("median distance between draws is zero: .* Give length_scale", lambda x: stein_discrepancy(0 * x, x)),
        (r"beta must lie in \(-1, 0\)", lambda x: stein_discrepancy(x, x, beta=0.5)),
        ("length_scale must be positive", lambda x: stein_discrepancy(x, x, length_scale=0.0)),
        ("num_points must be at least 1; got 0", lambda x: stein_thin(x, x, 0)),
        ("num_chains=2 chains of one length, .*; got 3", lambda x: stein_test(x, x, KEY, num_chains=2)),
        ("block_length must be at least 1", lambda x: stein_test(np.tile(x, (2, 1)), np.tile(x, (2, 1)), KEY,
            block_length=0)),
    ],
)  # fmt: skip
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).normal(size=(3, 2)))


def test_what_is_not_to_be_trusted_is_said():
    """Few blocks of a slow chain, and draws that do not move."""
    x = np.cumsum(np.random.default_rng(8).normal(size=(200, 1)), 0) / 14.0
    found = stein_test(x, -x, KEY, num_bootstrap=20)
    assert "the p-value is rough. Run longer" in found.problems[0] and "rough" in str(found)
    stuck = stein_test(np.full((60, 1), 0.5), np.full((60, 1), -0.5), KEY, length_scale=1.0, num_bootstrap=20)
    assert "all draws are equal" in stuck.problems[0]


@pytest.mark.slow
def test_ten_thousand_draws_take_little_memory():
    """1e4 draws in ten dimensions in 0.2 GB beside them; the matrix of all pairs would take 0.8."""
    x = np.random.default_rng(0).normal(size=(10_000, 10))
    tracemalloc.start()
    try:
        stein_test(x, -x, KEY, block_length=1)
        assert tracemalloc.get_traced_memory()[1] < 0.2e9
    finally:
        tracemalloc.stop()


def test_agrees_with_autodiff(x64):
    """The Stein kernel by derivatives of the kernel itself, pair by pair, to 1e-10."""
    rng, scale, beta = np.random.default_rng(9), 1.7, -0.3
    x, s = rng.normal(size=(2, 25, 3))

    def kernel(a, b):
        return (1.0 + jnp.sum((a - b) ** 2) / scale**2) ** beta

    def stein(a, b, s_a, s_b):
        cross = jnp.trace(jax.jacfwd(jax.grad(kernel, 0), 1)(a, b))
        return kernel(a, b) * s_a @ s_b + s_a @ jax.grad(kernel, 1)(a, b) + s_b @ jax.grad(kernel, 0)(a, b) + cross

    one, x_s = jax.jit(stein), list(zip(jnp.array(x), jnp.array(s), strict=True))
    pairs = scale**2 * np.array([[one(a, b, s_a, s_b) for b, s_b in x_s] for a, s_a in x_s])
    found = stein_discrepancy(x, s, length_scale=scale, beta=beta, block_size=7)
    np.testing.assert_allclose(found.v_statistic, pairs.mean(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.u_statistic, (pairs.sum() - np.trace(pairs)) / 600.0, rtol=0, atol=1e-10)
