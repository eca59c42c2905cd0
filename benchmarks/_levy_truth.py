r"""The problems of `levy.py`, and what is known about them: exact denoisers, and draws of the exact posteriors.

Every law of increments is a Gaussian of random variance v,

$$p(u) = \int N(u; 0, v)\, w(v)\, \mathrm{d}v,$$

with v constant (Gauss), exponential (Laplace), inverse gamma (Student) or, with an atom at zero, the second of these
(Bernoulli-Laplace). A quadrature in log v gives the density under Gaussian noise, thereby the denoiser, to some 1e-4.
The Gibbs sampler uses no quadrature: it draws all u given v, and v given u. For spikes it draws first which increments
are zero, one by one with u integrated out.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

from numpyro_diffusion.denoise import Denoiser, FromDensity
from numpyro_diffusion.noise import VE

SIZE, DECIBELS, JUMPS = 64, 25.0, 0.1
INCREMENTS = ("gauss", "laplace", "student_3", "student_2", "student_1", "bernoulli_laplace")
OPERATORS = ("identity", "blur", "sampling", "fourier")


def draw_variances(key: jax.Array, increments: str, shape: tuple[int, ...]) -> jax.Array:
    """Variances of increments, which are Gaussian given them; zero where a Bernoulli-Laplace one is zero."""
    if increments == "gauss":
        return jnp.full(shape, 0.25)
    if increments.startswith("student"):
        half = 0.5 * int(increments[-1])
        return half / jax.random.gamma(key, half, shape)
    key_jump, key_size = jax.random.split(key)
    jumps = jax.random.bernoulli(key_jump, JUMPS, shape) if increments == "bernoulli_laplace" else 1.0
    return 2.0 * jax.random.exponential(key_size, shape) * jumps


class Law(NamedTuple):
    """Increments as a mixture of K Gaussians about zero."""

    log_weights: jax.Array  # (K,)
    variances: jax.Array  # (K,)


def law_of(increments: str) -> Law:
    """The law of one increment, by the trapezoidal rule in log v.

    The density in log v is smooth and falls off at both ends: a spacing h leaves an error of about exp(-pi^2 / h).
    """
    if increments == "gauss":
        return Law(np.zeros(1), np.full(1, 0.25))
    if increments.startswith("student"):
        nu = int(increments[-1])
        log_v = np.arange(-3.0, {1: 24.0, 2: 14.0, 3: 11.0}[nu])
        log_density = 0.5 * nu * (np.log(0.5 * nu) - log_v) - 0.5 * nu * np.exp(-log_v)
    else:  # v is twice an exponential variable
        log_v = np.arange(-10.0, 4.5, 0.7)
        log_density = log_v - 0.5 * np.exp(log_v)
    log_weights = log_density - np.logaddexp.reduce(log_density)
    if increments != "bernoulli_laplace":
        return Law(log_weights, np.exp(log_v))
    return Law(np.append(log_weights + np.log(JUMPS), np.log1p(-JUMPS)), np.append(np.exp(log_v), 0.0))


def log_density(u: np.ndarray, law: Law, noise: float = 0.0) -> np.ndarray:
    """Of increments (..., 64) with Gaussian noise of a standard deviation on them, (...)."""
    variances = law.variances + noise**2
    terms = law.log_weights - 0.5 * (u[..., None] ** 2 / variances + np.log(2.0 * np.pi * variances))
    return np.logaddexp.reduce(terms, axis=-1).sum(-1)


@jax.custom_jvp
def log_noised(x: jax.Array, law: Law, noise: jax.Array) -> jax.Array:
    """Log-density of one point with Gaussian noise of a variance on it; its derivatives are `slope` and the next."""
    variances = (law.variances + noise)[:, None]
    terms = law.log_weights[:, None] - 0.5 * (x**2 / variances + jnp.log(2.0 * jnp.pi * variances))
    return logsumexp(terms, axis=0).sum()


@jax.custom_jvp
def slope(x: jax.Array, law: Law, noise: jax.Array) -> jax.Array:
    """Minus the score."""
    return _slope(x, law, noise)[0]


def _slope(x: jax.Array, law: Law, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    precisions = (1.0 / (law.variances + noise))[:, None]
    weights = jax.nn.softmax(law.log_weights[:, None] + 0.5 * jnp.log(precisions) - 0.5 * precisions * x**2, axis=0)
    first, second = (weights * precisions).sum(0), (weights * precisions**2).sum(0)
    return x * first, first - x**2 * (second - first**2)


@log_noised.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:  # the law and the noise are constants
    return log_noised(*primals), -jnp.sum(slope(*primals) * tangents[0])


@slope.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    value, derivative = _slope(*primals)
    return value, derivative * tangents[0]


SCHEDULES = {
    "gauss": VE(0.01, 10.0),
    "laplace": VE(0.02, 30.0),
    "student_3": VE(0.02, 60.0),
    "student_2": VE(0.02, 200.0),
    "student_1": VE(0.02, 5000.0),
    "bernoulli_laplace": VE(0.005, 15.0),
}
"""Noise levels: from well below the width of a law to well above all that its 64 increments may be."""


def exact_denoiser(increments: str) -> Denoiser:
    """The exact denoiser of independent increments."""
    schedule = SCHEDULES[increments]

    def log_density(x_t: jax.Array, t: jax.Array, law: Law) -> jax.Array:
        return log_noised(x_t, law, schedule.sigma(t) ** 2)

    law = Law(*(jnp.asarray(v, float) for v in law_of(increments)))
    return FromDensity(log_density, (SIZE,), schedule, 0.0, schedule.sigma_max / 20.0, law, normalized=True)


def operator(name: str) -> np.ndarray:
    """A, (m, 64)."""
    random = np.random.default_rng(1)
    if name == "identity":
        return np.eye(SIZE)
    if name == "blur":
        kernel = norm.pdf(np.arange(-6, 7) / 2.0)
        return np.stack([np.convolve(row, kernel / kernel.sum(), "valid") for row in np.eye(SIZE)], 1)
    if name == "sampling":
        return np.eye(SIZE)[np.sort(random.permutation(SIZE)[:26])]
    waves = np.fft.rfft(np.eye(SIZE), axis=0, norm="ortho")
    rows = np.concatenate([waves.real, waves.imag[1:-1]]) * np.sqrt(2.0)
    rows[[0, SIZE // 2]] /= np.sqrt(2.0)
    low = [0, 1, 2, 3, SIZE // 2 + 1, SIZE // 2 + 2, SIZE // 2 + 3]
    others = random.permutation(np.setdiff1d(np.arange(SIZE), low))[: 26 - len(low)]
    return rows[np.sort(np.append(low, others))]


class Problem(NamedTuple):
    """Signals of a cell, the data in the principal coordinates of the operator, in units of what they vary by.

    There the data of a Gaussian prior are independent, which the conjugate gradients of a guidance need to be short.
    Operators of fewer rows than 64 are filled up with zeros, so that all cells share their programs.
    """

    u: np.ndarray  # true increments, (signals, 64)
    matrix: np.ndarray  # A times the cumulative sum, (64, 64)
    y: np.ndarray  # (signals, 64)
    sigma: np.ndarray  # (64,)


def pose(increments: str, name: str, num_signals: int) -> Problem:
    """The signals are the first of a hundred, by whose median power the noise is set."""
    key_size, key_sign, key_noise = jax.random.split(jax.random.key(INCREMENTS.index(increments)), 3)
    v = draw_variances(key_size, increments, (100, SIZE))
    u = np.asarray(jnp.sqrt(v) * jax.random.normal(key_sign, v.shape), float)
    A = operator(name)
    seen = np.cumsum(u, 1) @ A.T
    sigma = np.sqrt(np.median((seen**2).mean(1)) / 10 ** (DECIBELS / 10))
    noise = np.asarray(jax.random.normal(key_noise, (len(u), SIZE)), float)
    matrix, y = np.zeros((SIZE, SIZE)), np.zeros((len(u), SIZE))
    matrix[: len(A)], y[:, : len(A)] = A @ np.tri(SIZE), seen + sigma * noise[:, : len(A)]
    left, singular, _ = np.linalg.svd(matrix)
    unit = np.sqrt(sigma**2 + (np.median(np.abs(u)) / 0.6745 * singular) ** 2)
    return Problem(u[:num_signals], (left / unit).T @ matrix, (y @ left / unit)[:num_signals], sigma / unit)


def draw_increments(key: jax.Array, v: jax.Array, phi: jax.Array, alpha: jax.Array) -> jax.Array:
    """Increments given their variances and alpha = phi u + N(0, I), by Bhattacharya et al. (2016)."""
    key_u, key_noise = jax.random.split(key)
    u = jnp.sqrt(v) * jax.random.normal(key_u, v.shape, v.dtype)
    seen = phi @ u + jax.random.normal(key_noise, alpha.shape, v.dtype)
    factor = jax.scipy.linalg.cho_factor((phi * v) @ phi.T + jnp.eye(len(alpha)))
    return u + v * (phi.T @ jax.scipy.linalg.cho_solve(factor, alpha - seen))


def variances_given(key: jax.Array, u: jax.Array, increments: str) -> jax.Array:
    """The variances given increments that are not zero."""
    if increments == "gauss":
        return jnp.full_like(u, 0.25)
    if increments.startswith("student"):
        nu = int(increments[-1])
        return 0.5 * (nu + u**2) / jax.random.gamma(key, 0.5 * (nu + 1), u.shape, u.dtype)
    key_normal, key_root = jax.random.split(key)  # 1 / v is inverse Gaussian with mean 1 / |u| and shape 1
    mean = 1.0 / jnp.maximum(jnp.abs(u), 1e-12)
    half = 0.5 * mean * jax.random.normal(key_normal, u.shape, u.dtype) ** 2
    small = mean / (1.0 + half + jnp.sqrt(half**2 + 2.0 * half))
    is_small = jax.random.uniform(key_root, u.shape, u.dtype) * (mean + small) < mean
    return jnp.where(is_small, 1.0 / small, small / mean**2)


def draw_jumps(key: jax.Array, on: jax.Array, v: jax.Array, phi: jax.Array, alpha: jax.Array) -> jax.Array:
    """Which increments are not zero, one after the other, given the variances they would have; u integrated out."""
    inverse = jnp.linalg.inv((phi * (v * on)) @ phi.T + jnp.eye(len(alpha)))

    def flip(inverse: jax.Array, given: tuple) -> tuple[jax.Array, jax.Array]:
        column, v, on, logit = given
        w = inverse @ column
        q, a = column @ w, alpha @ w
        without = jnp.where(on, 1.0 - v * q, 1.0)  # takes column's own variance out
        q_off, a_off = q / without, a / without
        growth = 1.0 + v * q_off
        log_odds = jnp.log(JUMPS / (1.0 - JUMPS)) - 0.5 * jnp.log(growth) + 0.5 * v * a_off**2 / growth
        new = logit < log_odds
        change = v * (new.astype(v.dtype) - on)
        return inverse - change / (1.0 + change * q) * jnp.outer(w, w), new

    logits = jax.random.logistic(key, on.shape, v.dtype)
    return jax.lax.scan(flip, inverse, (phi.T, v, on.astype(v.dtype), logits))[1]


@partial(jax.jit, static_argnames=("increments", "num_draws", "thin"))
def gibbs(key: jax.Array, phi: jax.Array, alpha: jax.Array, *, increments: str, num_draws: int, thin: int) -> jax.Array:
    """Draws of the exact posterior of all signals, (signals, num_draws, 64); the first tenth of the sweeps is dropped.

    Args:
        key: random key.
        phi: matrix over the noise's standard deviation.
        alpha: data over the same, (signals, 64).
        increments: their law.
        num_draws: draws to keep.
        thin: sweeps between them.
    """
    has_jumps = increments == "bernoulli_laplace"

    def sweep(alpha: jax.Array, state: tuple, key: jax.Array) -> tuple:
        v, on = state
        keys = jax.random.split(key, 4)
        if has_jumps:
            on = draw_jumps(keys[0], on, v, phi, alpha)
        u = draw_increments(keys[1], v * on, phi, alpha)
        new = variances_given(keys[2], u, increments)
        if has_jumps:  # of those that are zero the variance is free
            new = jnp.where(on, new, draw_variances(keys[3], "laplace", u.shape))
        return (new.astype(v.dtype), on), u

    def chain(key: jax.Array, alpha: jax.Array) -> jax.Array:
        def one(state: tuple, key: jax.Array) -> tuple:
            state, u = jax.lax.scan(partial(sweep, alpha), state, jax.random.split(key, thin))
            return state, u[-1]

        v = draw_variances(key, "laplace" if has_jumps else increments, phi.shape[1:]).astype(phi.dtype)
        skipped = num_draws // 9
        keys = jax.random.split(jax.random.fold_in(key, 1), skipped + num_draws)
        return jax.lax.scan(one, (v, jnp.full(v.shape, True)), keys)[1][skipped:]

    return jax.vmap(chain)(jax.random.split(key, len(alpha)), alpha)


def exact_draws(seed: int, problem: Problem, increments: str, num_draws: int, thin: int) -> np.ndarray:
    """The Gibbs sampler in double precision; Gaussian increments need one sweep a draw."""
    thin = 1 if increments == "gauss" else thin
    with jax.enable_x64(True):
        phi, alpha = (jnp.asarray(v) for v in (problem.matrix / problem.sigma[:, None], problem.y / problem.sigma))
        draws = gibbs(jax.random.key(seed), phi, alpha, increments=increments, num_draws=num_draws, thin=thin)
        return np.asarray(draws)
