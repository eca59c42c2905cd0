"""Moments of draws against known ones, within Monte Carlo standard errors."""

import numpy as np
from numpyro.diagnostics import effective_sample_size


def assert_moments(draws, mean, variance, errors=4.0):
    """Mean and variance of (chains, draws, ...) within Monte Carlo standard errors, by effective sample size."""
    draws = np.asarray(draws, np.float64)
    mean, variance = np.broadcast_to(mean, draws.shape[2:]), np.broadcast_to(variance, draws.shape[2:])
    for values, truth, name in [(draws, mean, "mean"), ((draws - mean) ** 2, variance, "variance")]:
        size = values.shape[0] * values.shape[1]  # anticorrelated draws have a larger or negative effective size
        effective = effective_sample_size(values)
        effective = np.where((effective > 0) & (effective < size), effective, size)
        error = values.std((0, 1)) / np.sqrt(effective)
        off = np.abs(values.mean((0, 1)) - truth) / error
        assert (off < errors).all(), f"{name}: {values.mean((0, 1))} against {truth}, {off} standard errors"
