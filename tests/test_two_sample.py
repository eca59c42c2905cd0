"""Distances of two samples against closed forms and other implementations, levels and power of their tests."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance

from numpyro_diffusion.diagnostics import (
    classifier_test,
    compare,
    energy_distance,
    memorisation,
    mmd,
    sliced_wasserstein,
)
from numpyro_diffusion.diagnostics.distances import directions, sliced

KEY = jax.random.key(0)
DISTANCES = "energy", "sliced_wasserstein", "mmd"


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 90), (7, 12)])
def test_sliced_wasserstein_is_the_mean_of_scipys(n, m):
    """Of samples of any sizes, as quantiles and as distribution functions."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)) + 0.3
    u = np.asarray(directions(KEY, 5, 3), float)
    truth = np.mean([wasserstein_distance(x @ v, y @ v) for v in u])
    np.testing.assert_allclose(sliced(u, x, y), truth, rtol=1e-10)
    np.testing.assert_allclose(jax.jit(sliced_wasserstein, static_argnums=3)(x, y, KEY, 5), truth, rtol=1e-5)


def test_sliced_wasserstein_of_a_shift():
    """Of a shift by m in d dimensions it is |m| E|u_1|: 2 / pi in two."""
    x = np.random.default_rng(1).normal(size=(50, 2))
    found = sliced_wasserstein(x, x + np.array([3.0, 0.0]), KEY, 4000)
    assert abs(float(found) - 6.0 / np.pi) < 4.0 * 3.0 * np.sqrt(0.5 - 4.0 / np.pi**2) / np.sqrt(4000)


def test_energy_distance_against_scipy_and_closed_form():
    """SciPy's is the root of the one with bias; of N(0, 1) and N(m, 1) it is known."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=300), rng.normal(size=200) + 1.0
    inside = [np.abs(z[:, None] - z).sum() / len(z) ** 2 / (len(z) - 1) for z in (x, y)]  # by which the bias differs
    np.testing.assert_allclose(energy_distance(x, y), scipy_energy(x, y) ** 2 - sum(inside), rtol=1e-10)
    # E|x - y| of a difference N(1, 2), against 2 / sqrt(pi) for N(0, 2)
    mean = 2.0 / np.sqrt(np.pi) * np.exp(-0.25) + 0.5204998778130465  # erf(1 / 2)
    found = [energy_distance(*rng.normal(size=(2, 50)) + np.array([[0.0], [1.0]])) for _ in range(200)]
    assert abs(np.mean(found) - 2.0 * (mean - 2.0 / np.sqrt(np.pi))) < 4.0 * np.std(found) / np.sqrt(200)


def test_mmd_has_its_closed_form_mean():
    """Of N(0, I) and N(m, s^2 I) in two dimensions, kernel by kernel."""
    rng, scale, m2, s2 = np.random.default_rng(3), 1.3, 0.5, 2.0

    def mean(spread, squared):
        l2 = (np.array([0.25, 0.5, 1.0, 2.0, 4.0]) * scale) ** 2
        return np.mean(l2 / (l2 + spread) * np.exp(-0.5 * squared / (l2 + spread)))

    truth = mean(2.0, 0.0) + mean(2.0 * s2, 0.0) - 2.0 * mean(1.0 + s2, m2)
    found = []
    for _ in range(200):
        x, y = rng.normal(size=(40, 2)), np.sqrt(s2) * rng.normal(size=(60, 2)) + np.sqrt([m2, 0.0])
        found.append(mmd(x, y, scale))
    assert abs(np.mean(found) - truth) < 4.0 * np.std(found) / np.sqrt(200)


@pytest.mark.parametrize("distance", DISTANCES)
def test_level_and_power(distance):
    """p-values of equal laws have mean 1/2 within 4 errors and a ratio about one; a shift is caught in every run."""
    rng, exact, shifted = np.random.default_rng(4), [], []
    for seed in range(40):
        data, draws = rng.normal(size=(120, 2)), rng.normal(size=(60, 2))
        options = {"num_permutations": 39, "num_projections": 20}
        exact.append(compare(draws, data, jax.random.key(seed), distance, **options))
        if seed < 5:
            shifted.append(compare(draws + 0.8, data, jax.random.key(seed), distance, **options))
    p = np.array([found.p_value for found in exact])
    assert abs(p.mean() - 0.5) < 4.0 / np.sqrt(12 * 40) and np.sum(p <= 0.05) <= 7  # 7 or more of 40: probability .4 %
    assert np.sqrt(np.mean([found.value**2 for found in exact]) / np.mean([found.floor**2 for found in exact])) < 1.3
    assert all(found.p_value == 1 / 40 and found.ratio > 1.5 for found in shifted), shifted


def test_permutations_cover_the_given_labels():
    """The first column of a test is the distance itself, and a swap of both samples changes nothing."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=(30, 2)) + 0.5
    labels = np.stack([np.arange(60) < 30, np.arange(60) >= 30], 1)
    found = sliced(np.eye(2), x, y, labels)
    np.testing.assert_allclose(found, sliced(np.eye(2), x, y), rtol=1e-12)


@pytest.mark.slow
def test_classifier():
    """Equal laws: 1/2 within 4 binomial errors; a ring and a Gaussian with its covariance are told apart."""
    rng = np.random.default_rng(6)
    data, draws = rng.normal(size=(800, 2)), rng.normal(size=(400, 2))
    exact = classifier_test(draws, data, KEY)
    assert abs(exact.value - 0.5) < 4.0 * 0.5 / np.sqrt(400) and exact.p_value > 1e-3
    ring = np.sqrt(2.0) * draws / np.linalg.norm(draws, axis=1, keepdims=True)
    found = classifier_test(ring, data, KEY)
    assert found.p_value < 1e-6 and found.value > 0.7 and found.ratio > 1.3


def test_classifier_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "numpyro-diffusion\[classifier\]", or use compare'):
        classifier_test(np.zeros((9, 1)), np.zeros((9, 1)), KEY)


def test_copies_are_found_and_fresh_draws_are_not():
    """p-values of fresh draws have mean 1/2; draws of which four fifths are near copies are caught in every run."""
    rng, fresh, copied = np.random.default_rng(7), [], []
    for seed in range(40):
        train, held_out, draws = (rng.normal(size=(size, 3)) for size in (150, 60, 80))
        copies = np.where(np.arange(80)[:, None] < 64, train[:80] + 0.02 * draws, draws)
        for found, x in ((fresh, draws), (copied, copies)):
            found.append(memorisation(x, train, held_out, jax.random.key(seed), num_permutations=99))
    p = np.array([each.p_value for each in fresh])
    assert abs(p.mean() - 0.5) < 4.0 / np.sqrt(12 * 40)
    assert abs(np.mean([each.share for each in fresh]) - 150 / 210) < 4.0 * 0.05 / np.sqrt(40)
    assert 0.85 < np.mean([each.ratio for each in fresh]) < 1.15
    assert all(each.p_value <= 0.05 for each in copied), [each.p_value for each in copied]
    whole = memorisation(train, train, held_out, KEY)
    assert whole.share == 1.0 and whole.ratio == 0.0 and whole.expected == 150 / 210


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("distance must be one of 'energy', 'sliced_wasserstein', 'mmd'; got 'w2'", lambda x: compare(x, x, KEY, "w2")),
        ("draws must be finite; got 1 non-finite", lambda x: compare(x.at[2, 1].set(jnp.nan), x, KEY)),
        ("data must be at least 4 draws", lambda x: compare(x, x[:3], KEY)),
        ("draws must be at least 4 draws", lambda x: classifier_test(x[:3], x, KEY)),
        ("both samples must have events of one size; got 2 and 1 numbers", lambda x: energy_distance(x, x[:, :1])),
        ("both samples must have events of one size", lambda x: sliced_wasserstein(x, x[:, 0], KEY)),
        ("held_out must be at least 2 draws", lambda x: memorisation(x, x, x[:1], KEY)),
        ("length_scale must be positive", lambda x: mmd(x, x, 0.0)),
        ("median distance between draws is zero", lambda x: mmd(0 * x, 0 * x)),
    ],
)
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=message):
        call(jnp.arange(12.0).reshape(6, 2))


def test_what_is_not_to_be_trusted_is_said():
    x = np.random.default_rng(8).normal(size=(60, 2))
    assert compare(np.r_[x, x + 1e-3], np.r_[x, x], KEY).problems == ()
    few = compare(x, x[:20], KEY)
    assert few.problems == (
        "only 10 rows in half of the data, of at least 50: distances are rough and little can be seen",
    )
    assert few.problems[0] in str(few)
    constant = compare(np.zeros((60, 2)), np.r_[x, x], KEY)
    assert constant.problems == ("all draws are equal",) and constant.p_value < 0.01
    assert "copies of training points" in memorisation(x, x, x, KEY).problems[0]
