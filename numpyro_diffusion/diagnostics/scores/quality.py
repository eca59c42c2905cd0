r"""How good is a learned score, where the truth is not known? What can be seen from data and from the model itself.

At a noise level $\lambda = \sigma_t / \alpha_t$, with $x$ held-out data and $\hat x_0$ the denoiser:

* Denoising loss. $E |\hat x_0(x_t) - x|^2 / d$ is least for the true posterior mean; how small that is, is not known.
  So it stands beside that of the best constant, the mean of the data, and that of the best linear denoiser, which is
  the exact one of the Gaussian with the data's mean and covariance.
* Fisher divergence of two models, $E_p |s_p - s_q|^2$, in nats per squared unit of the noisy data. With $\tau =
  \lambda^2$, $\mathrm{KL}(p_0 \| q_0) = \mathrm{KL}(p_\tau \| q_\tau) + \frac12 \int E_p |s_p - s_q|^2 d\tau$.
* Mass. The density of the flow integrates to one, if its solver and its trace are precise enough.

The first two take denoisers, and levels in the units of the data; a conditional one is made a denoiser by
`denoise.Conditioned`. Nothing here sees a mode that both model and held-out data lack. Whether the score is a gradient,
and the Jacobian a covariance: see `consistency`.

References:
    Song, Durkan, Murray, Ermon, Maximum likelihood training of score-based diffusion models, 2021 (the divergences),
    https://arxiv.org/abs/2101.09258.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.integrate import trapezoid

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise import Denoiser, require_denoiser
from numpyro_diffusion.diagnostics.distances import as_rows, generator
from numpyro_diffusion.noise import Schedule, perturb

_CHUNK = 1024
"""Points that are evaluated at once."""
ERRORS = 4.0
"""Standard errors beyond which a difference is named."""
_FEWEST_EFFECTIVE = 100.0


class DenoisingLosses(NamedTuple):
    """Mean squared errors of the clean point per dimension, in squared units of the data; arrays of shape (levels,)."""

    noise_level: np.ndarray  # in units of the data
    denoiser: np.ndarray  # its loss, in squared units of the data per dimension
    error: np.ndarray  # its standard error
    gaussian: np.ndarray  # of the Gaussian with the mean and covariance of the data
    constant: np.ndarray  # of the mean of the data
    difference_error: np.ndarray  # the standard error of denoiser - gaussian
    problems: tuple[str, ...]  # where the denoiser is no better than these


class Divergence(NamedTuple):
    """The Fisher divergence of two models; arrays of shape (levels,)."""

    noise_level: np.ndarray  # in units of the data
    value: np.ndarray  # E_p |s_p - s_q|^2
    error: np.ndarray  # its standard error
    kl: float  # half its integral over the squared levels given, in nats, by the trapezoidal rule


class Mass(NamedTuple):
    """What a density integrates to."""

    value: float  # 1 for a normalised density
    error: float  # its standard error
    effective_size: float  # of the weights: below 100, neither of the two can be trusted
    problems: tuple[str, ...]  # what is not to be trusted


def denoising_losses(
    denoiser: Denoiser,
    key: jax.Array,
    held_out: ArrayLike,
    data: ArrayLike,
    noise_levels: Sequence[float] | None = None,
    *,
    num_noises: int = 4,
) -> DenoisingLosses:
    """The denoising loss at each noise level on held-out data, beside those of a constant and of a Gaussian.

    Args:
        denoiser: the model.
        key: random key of the noises, which all three share.
        held_out: points that it has not seen, shape (n, *event_shape).
        data: points that mean and covariance are taken from, such as the training data, shape (m, *event_shape).
        noise_levels: in the units of the data; None for eight of the schedule, evenly spaced in their logarithm.
        num_noises: noises for each point and level.

    Returns:
        `DenoisingLosses`. A difference is a problem if it exceeds four standard errors.

    Raises:
        TypeError: if `denoiser` is not one.
        ValueError: if shapes do not agree, there are fewer than two points, one is not finite, or a level is not among
            those of the schedule.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.denoise import GaussianMixture
        >>> from numpyro_diffusion.diagnostics import denoising_losses
        >>> law = GaussianMixture([0.5, 0.5], [[-2.0], [2.0]], 0.1)
        >>> data, held_out = (law.sample(key, (200,)) for key in jax.random.split(jax.random.key(0)))
        >>> found = denoising_losses(law, jax.random.key(1), held_out, data, [0.5])
        >>> bool(found.denoiser < found.gaussian) and bool(found.gaussian < found.constant)
        True
    """
    x, levels, t = check(denoiser, held_out, noise_levels, "held_out", num_noises=num_noises)
    rows = as_rows("data", data)
    _checks.shape("data", jnp.asarray(data), denoiser.event_shape)
    mean, (values, vectors) = rows.mean(0), np.linalg.eigh(np.atleast_2d(np.cov(rows.T)))
    law = tuple(jnp.asarray(a, x.dtype) for a in (mean, np.maximum(values, 0.0), vectors))
    of_points = over_levels(_losses, (denoiser, law), key, x, t, num_noises).mean(2)  # (levels, points, 3)
    ours, gaussian, constant = of_points.mean(1).T
    error = standard_error(of_points[:, :, 0])
    worse = {}
    for name, column, value in (("the Gaussian", 1, gaussian), ("a constant", 2, constant)):
        rounding = 1e-5 * value
        error_of_difference = standard_error(of_points[:, :, 0] - of_points[:, :, column])
        worse[f"the denoiser is worse than {name}"] = ours - value > ERRORS * error_of_difference + rounding
    difference_error = standard_error(of_points[:, :, 0] - of_points[:, :, 1])
    problems = named(worse, levels, ours)
    return DenoisingLosses(levels, ours, error, gaussian, constant, difference_error, problems)


def fisher_divergence(
    first: Denoiser, second: Denoiser, key: jax.Array, x: ArrayLike, noise_levels: Sequence[float] | None = None
) -> Divergence:
    """The mean squared difference of the scores of two models, at each noise level.

    The divergence of p and q is a mean over p: `x` must be draws of the first model for it to be that, but the number
    is of use at data too.

    Args:
        first: a model p.
        second: another model q of points of the same shape; its schedule may differ.
        key: random key of the noises.
        x: points at which to compare, shape (n, *event_shape).
        noise_levels: in the units of the data; None for 16 between the lowest and the highest that both have.

    Returns:
        A `Divergence`.

    Raises:
        TypeError: if one of the models is not a denoiser.
        ValueError: as `denoising_losses`, and if event shapes differ.
    """
    if tuple(first.event_shape) != tuple(require_denoiser(second, "second").event_shape):
        raise ValueError(f"both must have one event_shape; got {first.event_shape} and {second.event_shape}")
    if noise_levels is None:
        ends = [_ends(d.schedule) for d in (first, second)]
        noise_levels = np.geomspace(max(low for low, _ in ends), min(high for _, high in ends), 16).tolist()
    x, levels, t = check(first, x, noise_levels, "x", "first")
    _, _, other_t = check(second, x, levels, "x", "second")
    found = over_levels(_gap, (first, second), key, x, jnp.stack([t, other_t], 1), 1)[:, :, 0]
    value = found.mean(1)
    kl = float(trapezoid(value * levels**2, np.log(levels)))  # d tau / 2 = level^2 d log level
    return Divergence(levels, value, standard_error(found), kl)


def mass(
    log_prob: Callable[[jax.Array], jax.Array],
    data: ArrayLike,
    key: jax.Array,
    num_draws: int = 4096,
    *,
    inflation: float = 1.5,
) -> Mass:
    r"""What a density integrates to, by importance sampling from a wide Gaussian that is fitted to data.

    Args:
        log_prob: points (n, *event_shape) -> their log-densities (n,), such as that of a `DiffusionPrior`.
        data: shape (m, *event_shape), which gives the Gaussian its mean and covariance.
        key: random key.
        num_draws: how many points.
        inflation: factor of the Gaussian's standard deviations. Weights are bounded where it is wider than the density.

    Returns:
        A `Mass`. Its effective size falls with the dimension: beyond ten or twenty there is little to be seen.

    Raises:
        ValueError: if there are fewer than two data, one is not finite, `inflation` is not positive, or `log_prob` does
            not return one number for each point.
    """
    _checks.at_least(2, num_draws=num_draws)
    _checks.positive(inflation=inflation)
    rows, event_shape = as_rows("data", data), np.shape(data)[1:]
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(rows.T)))
    if not values[-1] > 0:
        raise ValueError("data must not all be equal: their covariance makes the Gaussian to draw from; got one point")
    deviations = inflation * np.sqrt(np.maximum(values, 1e-6 * values[-1]))
    noise = generator(key).normal(size=(num_draws, len(values)))
    points = rows.mean(0) + (noise * deviations) @ vectors.T
    log_q = -0.5 * np.sum(noise**2 + np.log(2.0 * np.pi * deviations**2), 1)
    points = jnp.asarray(points.reshape(num_draws, *event_shape), jnp.result_type(float))
    parts = [points[i : i + _CHUNK] for i in range(0, num_draws, _CHUNK)]
    log_p = np.concatenate([np.asarray(log_prob(part), np.float64).reshape(-1) for part in parts])
    if log_p.shape != (num_draws,):
        raise ValueError(f"log_prob must return one number for each of {num_draws} points; got {log_p.size}")
    lost = np.isnan(log_p) | (log_p == np.inf)
    weights = np.exp(np.where(lost, -np.inf, log_p) - log_q)
    value, error = weights.mean(), weights.std(ddof=1) / np.sqrt(num_draws)
    size = float(weights.sum() ** 2 / np.sum(weights**2)) if weights.any() else 0.0
    problems = [f"{lost.sum()} values of log_prob are NaN or +inf, and count as zero mass"] if lost.any() else []
    if size < _FEWEST_EFFECTIVE:
        problems.append(f"the effective size is {size:.0f}, of at least {_FEWEST_EFFECTIVE:.0f}: raise num_draws")
    elif abs(value - 1.0) > ERRORS * error:
        problems.append(f"the density integrates to {value:.3g} +- {error:.1g}. Use a finer density_solver")
    return Mass(float(value), float(error), size, tuple(problems))


def _losses(models: Any, key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    denoiser, (mean, values, vectors) = models
    schedule = denoiser.schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = perturb(key, schedule, x, t).astype(x.dtype)
    gains = alpha * values / (alpha**2 * values + sigma**2)
    linear = mean + vectors @ (gains * (vectors.T @ (x_t.reshape(-1) - alpha * mean)))
    guesses = jnp.stack([denoiser(x_t, t).x0.reshape(-1), linear.astype(x.dtype), mean])
    return jnp.mean((guesses - x.reshape(-1)) ** 2, 1)


def _gap(models: Any, key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    noisy = x + models[0].schedule.noise_level(t[0]) * jax.random.normal(key, x.shape, x.dtype)
    alphas = [denoiser.schedule.alpha(time) for denoiser, time in zip(models, t, strict=True)]
    scores = [a * d((a * noisy).astype(x.dtype), time).score for d, a, time in zip(models, alphas, t, strict=True)]
    return jnp.sum((scores[0] - scores[1]) ** 2)


# Shared with `consistency`


def check(
    denoiser: Denoiser,
    x: Any,
    noise_levels: Sequence[float] | np.ndarray | None,
    name: str,
    of: str = "denoiser",
    **counts: int,
) -> tuple[jax.Array, np.ndarray, jax.Array]:
    """Points (n, *event_shape), levels and their times, both (levels,), if all are as they must be."""
    require_denoiser(denoiser, of)
    _checks.at_least(1, **counts)
    x = jnp.asarray(x, jnp.result_type(x, float))
    if x.ndim != 1 + len(denoiser.event_shape) or x.shape[1:] != tuple(denoiser.event_shape) or len(x) < 2:
        raise ValueError(f"{name} must be at least 2 points, shape (n, *{tuple(denoiser.event_shape)}); got {x.shape}")
    _checks.finite(name, x)
    lowest, highest = _ends(denoiser.schedule)
    levels = np.geomspace(lowest, highest, 8) if noise_levels is None else np.asarray(noise_levels, float).reshape(-1)
    inside = (levels > 0.999 * lowest) & (levels < 1.001 * highest)
    if not (levels.size and inside.all()):
        raise ValueError(
            f"noise_levels must lie in [{lowest:.3g}, {highest:.3g}], the schedule's of {of}; got {levels.tolist()}"
        )
    schedule = denoiser.schedule
    t = jnp.clip(schedule.inverse_noise_level(jnp.asarray(levels)), schedule.t_min, schedule.t_max)
    return x, levels, t.astype(x.dtype)


def over_levels(
    function: Callable, models: Any, key: jax.Array, x: jax.Array, times: jax.Array, num: int
) -> np.ndarray:
    """What a function of one point returns at each level, point and noise, shape (levels, n, num, ...)."""
    keys = jax.random.split(key, (len(times), len(x)))
    parts = [slice(i, i + _CHUNK) for i in range(0, len(x), _CHUNK)]
    with _precision.highest():
        found = [
            [np.asarray(_mapped(function, models, keys[i, part], x[part], t, num), np.float64) for part in parts]
            for i, t in enumerate(times)
        ]
    return np.stack([np.concatenate(level) for level in found])


@partial(jax.jit, static_argnums=(0, 5))
def _mapped(function: Callable, models: Any, keys: jax.Array, x: jax.Array, t: jax.Array, num: int) -> jax.Array:
    def at_point(key: jax.Array, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: function(models, key, x, t))(jax.random.split(key, num))

    return jax.vmap(at_point)(keys, x)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the second axis of (levels, points)."""
    return values.std(1, ddof=1) / np.sqrt(values.shape[1])


def named(cases: dict[str, np.ndarray], levels: np.ndarray, values: np.ndarray) -> tuple[str, ...]:
    """Each case with the levels that have it, and one more for levels where the values are not finite."""
    cases = {**cases, "the denoiser is not finite": ~np.isfinite(values)}
    lists = {case: ", ".join(f"{level:.3g}" for level in levels[at]) for case, at in cases.items()}
    return tuple(f"{case} at noise levels {those}" for case, those in lists.items() if those)


def _ends(schedule: Schedule) -> tuple[float, float]:
    return float(schedule.noise_level(schedule.t_min)), float(schedule.noise_level(schedule.t_max))
