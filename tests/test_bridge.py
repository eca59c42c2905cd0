"""Bennett's acceptance ratio between the temperatures of a population, against closed forms; arrays of NumPy alone."""

import numpy as np
from scipy.special import logsumexp

from numpyro_diffusion.infer.particles.population.bridge import bridged, log_ratio
from numpyro_diffusion.infer.particles.population.rounds import Temperature

RNG = np.random.default_rng(0)
ISLANDS, SIZE, TIMES = 4, 64, 300


def history(*temperatures, lags=None):
    """What `bridged` reads of a climb: inverse temperatures, and what the log-likelihood lacks at each."""
    blank = Temperature(*np.ones(11), num_blind=np.zeros(1))._replace(lag=0.0)
    lags = lags or [0.0] * len(temperatures)
    return [blank._replace(temperature=t, lag=lag) for t, lag in zip(temperatures, lags, strict=True)]


def sure(found, truth=0.0):
    """Whether a mean is the truth, within 4 standard errors."""
    return abs(np.mean(found) - truth) < 4.0 * np.std(found, ddof=1) / np.sqrt(len(found))


def test_evidence_of_a_gaussian_and_its_error():
    """N(0, 1) times exp(-2 (x - 2)^2), in three steps of the temperature, by exact draws at each."""
    truth = -0.5 * np.log(5.0) - 0.5 * 4.0 / 1.25

    def values(beta):
        precision = 1.0 + 4.0 * beta
        x = RNG.normal(8.0 * beta / precision, precision**-0.5, (ISLANDS, SIZE))
        return -2.0 * (x - 2.0) ** 2

    ladder = (0.1, 0.4, 1.0)
    found = [bridged(history(*ladder), [values(beta) for beta in (0.0, *ladder)]) for _ in range(TIMES)]
    off, errors = (np.array([float(getattr(e, n)) for e in found]) for n in ("value", "standard_error"))
    assert sure(off, truth) and found[0].islands.shape == (ISLANDS,)
    spread = np.std(off, ddof=1)
    assert abs(np.sqrt(np.mean(errors**2)) / spread - 1.0) < 4.0 * np.sqrt(0.5 / TIMES + 0.5 / (3 * TIMES))


def test_a_posterior_wider_than_its_prior():
    """N(0, 9) from N(0, 1): weights have no variance, and draws of the prior miss the tails; the ratio does not."""

    def values(scale):
        x = RNG.normal(0.0, scale, (ISLANDS, SIZE))
        return 0.5 * x**2 * (1.0 - 1.0 / 9.0) - np.log(3.0)

    pairs = [(values(1.0), values(3.0)) for _ in range(TIMES)]
    assert sure([float(bridged(history(1.0), pair).value) for pair in pairs])
    assert not sure([logsumexp(before) - np.log(before.size) for before, _ in pairs])


def test_a_likelihood_of_zero():
    """Half of the prior is excluded, on one island all of it: the others stand in for that."""
    before = np.where(np.arange(SIZE) % 2, 0.0, -np.inf) * np.ones((ISLANDS, 1))
    before[0] = np.nan
    value, _, islands = bridged(history(1.0), [before, np.zeros((ISLANDS, 2 * SIZE))])
    np.testing.assert_allclose(value, np.log(3.0 / 8.0), atol=1e-6)
    np.testing.assert_allclose(islands, np.log([3.0 / 8.0, 0.5, 0.5, 0.5]), atol=1e-6)
    assert log_ratio(1.0, np.full(SIZE, -np.inf), np.zeros(SIZE)) == -np.inf


def test_what_log_likelihoods_lack_widens_the_error():
    """Half of each step's lags: draws of the prior lack nothing, and chains have gone on."""
    values = [np.zeros((ISLANDS, SIZE))] * 3
    errors = [bridged(history(0.4, 1.0, lags=lags), values).standard_error for lags in ([0.0, 0.0], [2.0, 5.0])]
    np.testing.assert_allclose(errors, [0.0, (0.4 + 0.6) * 2.0 / 2.0], atol=1e-6)


def test_many_nats():
    """A step over which all log-likelihoods are far from zero: the shift comes through, digit by digit."""
    values = RNG.normal(size=SIZE)
    near, far = (log_ratio(0.5, values + shift, values + 1.0 + shift) for shift in (0.0, -1e6))
    np.testing.assert_allclose(far, near - 0.5e6, rtol=1e-12)
