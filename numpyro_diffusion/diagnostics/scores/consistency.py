r"""Is a score a gradient, and the Jacobian of its denoiser a covariance? Two tests that need no truth.

* Circulation. The line integral of a gradient round a closed triangle is zero. A network that predicts a vector need
  not be a gradient: then no density has this score, and the difference of two log-densities depends on the path.
* Tweedie's formulas. The Jacobian $J$ of an exact denoiser is symmetric and positive, and with it is $\mathrm{Cov}[x |
  x_t] = (\sigma_t^2 / \alpha_t) J$, whose trace is on average the squared error $|x - \hat x_0|^2$ at held-out data.

Both are measured where the denoiser is used: at data noised to a level $\lambda = \sigma_t / \alpha_t$, in the units of
the data.

References:
    Chao et al., On investigating the conservative property of score-based generative models, 2023,
    https://arxiv.org/abs/2209.12753.
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, covariance
from numpyro_diffusion.diagnostics.scores.quality import ERRORS, check, named, over_levels, standard_error
from numpyro_diffusion.noise import perturb

_NATS = 0.1
"""Circulation that is named."""
_ASYMMETRY = 0.1
"""Asymmetry that is named."""


class Circulation(NamedTuple):
    """Line integrals of a score round triangles, in nats; arrays of shape (levels,)."""

    noise_level: np.ndarray  # in units of the data
    value: np.ndarray  # root mean square over the triangles
    work: np.ndarray  # the same along a single edge, for comparison
    quadrature_error: np.ndarray  # of the value, by a rule with half the points
    problems: tuple[str, ...]  # where it is not zero, or not known


class Consistency(NamedTuple):
    """Whether the Jacobian of a denoiser is that of a posterior mean; arrays of shape (levels,)."""

    noise_level: np.ndarray  # in units of the data
    asymmetry: np.ndarray  # the size of the antisymmetric part of J over that of J, both Frobenius; 0 to 1
    negative: np.ndarray  # share of random directions v with v'Jv < 0; 0 for a covariance, but 0 does not prove it
    lowest: np.ndarray  # least v'Jv / v'v found, times alpha: between 0 and 1 for the exact denoiser of N(m, s^2)
    variance: np.ndarray  # trace of Cov[x | x_t] per dimension by the Jacobian, mean over the points
    squared_error: np.ndarray  # mean |x - x0|^2 per dimension: the same if the denoiser is exact
    error: np.ndarray  # the standard error of their difference
    problems: tuple[str, ...]  # what is not to be trusted


def circulation(
    denoiser: Denoiser,
    key: jax.Array,
    x: ArrayLike,
    noise_levels: Sequence[float] | None = None,
    *,
    num_points: int = 16,
) -> Circulation:
    r"""The line integral of the score round triangles, $\oint s(x_t)^\top \mathrm{d}x_t$, at each noise level.

    The corners are three noisy versions of one point, so that each is where the score is used; sides are by the rule of
    Gauss and Legendre.

    Args:
        denoiser: the model.
        key: random key of the noises.
        x: clean points, one triangle each, shape (n, *event_shape).
        noise_levels: in the units of the data; None for eight of the schedule, evenly spaced in their logarithm.
        num_points: points of the rule on each side, an even number; half as many for the error.

    Returns:
        A `Circulation`. More than .1 nats, by which a test along one path would differ from one along another, is a
        problem.

    Raises:
        TypeError: if `denoiser` is not one.
        ValueError: as `quality.denoising_losses`, and if `num_points` is odd.
    """
    x, levels, t = check(denoiser, x, noise_levels, "x", num_points=num_points)
    if num_points % 2:
        raise ValueError(f"num_points must be even, for a rule of half the points beside; got {num_points}")
    rules = tuple(_rule(n, x.dtype) for n in (num_points, num_points // 2))
    found = over_levels(_round, (denoiser, rules), key, x, t, 1)[:, :, 0]
    value, work, error = np.sqrt(np.mean(np.square(found), 1)).T
    cases = {
        "the quadrature is too rough (raise num_points)": error > _NATS,
        "the score is not a gradient": (value > _NATS) & (value > 2.0 * error),
    }
    return Circulation(levels, value, work, error, named(cases, levels, value))


def tweedie_consistency(
    denoiser: Denoiser,
    key: jax.Array,
    held_out: ArrayLike,
    noise_levels: Sequence[float] | None = None,
    *,
    num_probes: int = 4,
) -> Consistency:
    r"""Whether the Jacobian of a denoiser is that of a posterior mean, by products with random vectors.

    Args:
        denoiser: the model.
        key: random key of noises and vectors.
        held_out: points that it has not seen, shape (n, *event_shape).
        noise_levels: in the units of the data; None for eight of the schedule, evenly spaced in their logarithm.
        num_probes: pairs of vectors at each point, two Jacobian-vector products a pair.

    Returns:
        A `Consistency`. An asymmetry of more than .1, a negative direction, and a difference of variance and squared
        error by more than four standard errors are problems.

    Raises:
        TypeError: if `denoiser` is not one.
        ValueError: as `quality.denoising_losses`.
    """
    x, levels, t = check(denoiser, held_out, noise_levels, "held_out", num_probes=num_probes)
    found = over_levels(_probe, (denoiser,), key, x, t, num_probes)
    difference, product, *ratios, variance, squared = np.moveaxis(found, -1, 0)  # (levels, points, probes)
    ratio = np.stack(ratios, -1)
    asymmetry = np.sqrt(difference.mean((1, 2)) / np.maximum(2.0 * product.mean((1, 2)), 1e-300))
    negative, lowest = (ratio < 0).mean((1, 2, 3)), ratio.min((1, 2, 3))
    error = standard_error((variance - squared).mean(2))
    of_model, of_data = variance.mean((1, 2)), squared.mean((1, 2))
    cases = {
        "the Jacobian is not symmetric": asymmetry > _ASYMMETRY,
        "the Jacobian has negative directions": negative > 0,
        "its variance is not the squared error of held-out data": np.abs(of_model - of_data) > ERRORS * error,
    }
    problems = named(cases, levels, of_model)
    return Consistency(levels, asymmetry, negative, lowest, of_model, of_data, error, problems)


def _round(models: Any, key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    denoiser, rules = models
    corners = [perturb(k, denoiser.schedule, x, t).astype(x.dtype) for k in jax.random.split(key, 3)]

    def work(start: jax.Array, end: jax.Array, rule: tuple[jax.Array, jax.Array]) -> jax.Array:
        along = lambda s: jnp.vdot(denoiser(start + s * (end - start), t).score, end - start)  # noqa: E731
        return rule[1] @ jax.vmap(along)(rule[0])

    sides = list(zip(corners, [*corners[1:], corners[0]], strict=True))
    fine, rough = (jnp.stack([work(*side, rule) for side in sides]) for rule in rules)
    return jnp.stack([fine.sum(), fine[0], fine.sum() - rough.sum()])


def _probe(models: Any, key: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    (denoiser,), (key_noise, key_v, key_w) = models, jax.random.split(key, 3)
    x_t = perturb(key_noise, denoiser.schedule, x, t).astype(x.dtype)
    at_point, square = covariance(denoiser, x_t, t), denoiser.schedule.noise_level(t) ** 2
    v, w = (jax.random.normal(k, x.shape, x.dtype) for k in (key_v, key_w))
    cv, cw = at_point @ v, at_point @ w
    forms = jnp.stack([jnp.vdot(v, cv), jnp.vdot(w, cw)])
    vw, wv = jnp.vdot(v, cw), jnp.vdot(w, cv)
    lengths = jnp.stack([jnp.vdot(v, v), jnp.vdot(w, w)])
    error = jnp.mean((denoiser(x_t, t).x0 - x) ** 2)
    return jnp.stack([(vw - wv) ** 2, vw**2 + wv**2, *(forms / lengths / square), forms.mean() / x.size, error])


def _rule(num: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Places in [0, 1] and weights of Gauss and Legendre's rule."""
    places, weights = np.polynomial.legendre.leggauss(num)
    return jnp.asarray(0.5 * (places + 1.0), dtype), jnp.asarray(0.5 * weights, dtype)
