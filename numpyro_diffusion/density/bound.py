r"""Variational bounds on the log-density: the diffusion model as a hierarchy of latent points.

With $u = x_t / \alpha_t$ and noise levels $\lambda_0 < \dots < \lambda_T$ of a grid, noising draws $u_k \sim N(x,
\lambda_k^2 I)$ and the model runs back: $u_T \sim N(m, s^2 + \lambda_T^2)$, then for $t = k$, $s = k - 1$ and
$r = \lambda_s / \lambda_t$

$$p(u_s \mid u_t) = N\!\left( r^2 u_t + (1 - r^2)\, \hat x_0(u_t),\; v_k I \right), \qquad
p(x \mid u_0) = N(\hat x_0(u_0), \lambda_0^2 I).$$

The bound $\log p(x) \ge -(\text{prior} + \text{diffusion} + \text{reconstruction})$ has three terms,

$$\mathrm{KL}(q(u_T | x) \,\|\, p(u_T)), \qquad
\sum_k \frac{(1 - r^2)^2}{2 v_k} E\|x - \hat x_0(u_t)\|^2 + \frac d2 \left( \frac{\tilde\beta_k}{v_k} - 1
- \log \frac{\tilde\beta_k}{v_k} \right), \qquad -E \log p(x \mid u_0).$$

The variance of a transition lies between two: $\tilde\beta_k = \lambda_s^2 (1 - r^2)$ ("posterior"), right if $x$ were
known, and $\beta_k = \lambda_t^2 - \lambda_s^2$ ("beta"), right if nothing were known. The best isotropic one,
$\tilde\beta_k + (1 - r^2)^2\, \mathrm{tr}\, \mathrm{Cov}[x | u_t] / d$, lies between them on a logarithmic scale, where
`learn_variances` finds it. In the limit of many steps the choice does not matter, and the diffusion term becomes

$$\tfrac12 \int E\|\varepsilon - \hat\varepsilon\|^2 \, \mathrm{d} \log \mathrm{SNR} \qquad (\text{"continuous"}),$$

of which the sum with the posterior variance is an upper Riemann sum, as errors fall with the SNR.

This is a bound on the density of the *reverse process*. The probability flow (`flow`) has the same law only if the
score is exact; `elbo_gap` compares the two, and for a learned score the gap may have either sign.

References:
    Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, https://arxiv.org/abs/2006.11239.
    Kingma et al., Variational diffusion models, 2021, https://arxiv.org/abs/2107.00630.
    Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021 (variances on the log-line),
    https://arxiv.org/abs/2102.09672.
    Bao et al., Analytic-DPM, 2022 (the best variance), https://arxiv.org/abs/2201.06503.
    Burda, Grosse, Salakhutdinov, Importance weighted autoencoders, 2016, https://arxiv.org/abs/1509.00519.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Conditioned, Denoiser
from numpyro_diffusion.density.flow import LogProb, log_prob
from numpyro_diffusion.noise import TimeGrid, UniformLogSNR
from numpyro_diffusion.solve import Heun

_TRANSITIONS = ("continuous", "posterior", "beta")
GRID = UniformLogSNR()


class Elbo(NamedTuple):
    """A bound by its terms, all in nats; `value` is minus the sum of the three costs."""

    value: jax.Array  # the bound, a scalar
    standard_error: jax.Array  # of the mean over samples; NaN for a single one
    prior: jax.Array  # cost of the noisiest level
    diffusion: jax.Array  # cost of the transitions
    reconstruction: jax.Array  # cost of the step from the cleanest level to the data
    per_level: jax.Array  # cost of each transition, from the noisiest, (num_times - 1,)
    noise_levels: jax.Array  # the levels, from the noisiest, (num_times,)


class ElboGap(NamedTuple):
    """How far a bound lies below the flow's log-density."""

    value: jax.Array  # flow minus bound, nats
    standard_error: jax.Array  # of the bound's samples and the flow's probes together
    per_level: jax.Array  # what each transition costs beyond the continuous limit, from the noisiest, (num_times - 1,)
    noise_levels: jax.Array  # the levels, (num_times,)


def elbo(
    denoiser: Denoiser,
    x: jax.Array,
    key: jax.Array,
    *,
    transition: str | ArrayLike = "continuous",
    num_times: int = 64,
    num_samples: int = 8,
    grid: TimeGrid = GRID,
) -> Elbo:
    """The variational bound on the log-density of a clean point.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.
        key: random key.
        transition: variance of the transitions: "posterior", "beta", or places between the two on the log-line, 0 to 1,
            from the noisiest transition, shape (num_times - 1,); or "continuous", the limit of many steps, estimated
            with one noise level drawn in each interval of the grid.
        num_times: number of noise levels of the grid.
        num_samples: independent noises, num_times denoiser evaluations each.
        grid: where the levels lie.

    Returns:
        The bound, its terms and its standard error.

    Raises:
        ValueError: if `x` is not of `event_shape`, a number is out of range, or `transition` is unknown or of the wrong
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.density import elbo
        >>> bound = elbo(Gaussian([0.0, 0.0]), jnp.zeros(2), jax.random.key(0))
        >>> bool(bound.value < -1.83 + 4 * bound.standard_error)  # log p is -1.84
        True
    """
    x, levels, times = _check(denoiser, x, transition, num_times, grid, num_samples=num_samples)
    prior = _prior_cost(denoiser, x, levels[0])

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_transitions, key_last = jax.random.split(key)
        transitions = _transition_costs(denoiser, x, key_transitions, levels, times, transition)
        u_0 = x + levels[-1] * jax.random.normal(key_last, x.shape, x.dtype)
        x0 = denoiser(denoiser.schedule.alpha(times[-1]) * u_0, times[-1]).x0
        return transitions, -norm.logpdf(x, x0, levels[-1]).sum()

    per_level, reconstruction = jax.lax.map(sample, jax.random.split(key, num_samples))
    totals = per_level.sum(1) + reconstruction
    per_level, reconstruction = per_level.mean(0), reconstruction.mean()
    diffusion = per_level.sum()
    value = -(prior + diffusion + reconstruction)
    return Elbo(value, _standard_error(totals), prior, diffusion, reconstruction, per_level, levels)


def importance_weighted_bound(
    denoiser: Denoiser,
    x: jax.Array,
    key: jax.Array,
    *,
    transition: str | ArrayLike = "posterior",
    num_paths: int = 16,
    num_times: int = 64,
    grid: TimeGrid = GRID,
) -> jax.Array:
    r"""The bound $E \log \frac1K \sum_k p(x, u^{(k)}) / q(u^{(k)} | x)$ of the model in `num_times` steps.

    It grows with the number of paths $K$, from the bound of `elbo` at $K = 1$ to the log-density of the stepwise model.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.
        key: random key.
        transition: as in `elbo`, but not "continuous".
        num_paths: number of paths of latent points $K$.
        num_times: number of noise levels of the grid.
        grid: where the levels lie.

    Returns:
        An unbiased estimate of the bound, a scalar in nats.

    Raises:
        ValueError: as `elbo`, or if `transition` is "continuous".
    """
    if isinstance(transition, str) and transition == "continuous":
        raise ValueError(
            'transition must be "posterior", "beta" or an array: paths have steps, and "continuous" is their limit'
        )
    x, levels, times = _check(denoiser, x, transition, num_times, grid, num_paths=num_paths)
    variances = _variances(levels, transition)
    ratios = (levels[1:] / levels[:-1]) ** 2
    gaps = jnp.sqrt((levels[:-1] - levels[1:]) * (levels[:-1] + levels[1:]))

    def log_weight(key: jax.Array) -> jax.Array:
        steps = jax.random.normal(key, (num_times, *x.shape), x.dtype)
        scales = jnp.concatenate([gaps, levels[-1:]]).reshape(-1, *(1,) * x.ndim)
        u = x + jnp.cumsum((scales * steps)[::-1], 0)[::-1]  # from the noisiest, each a little noisier than the next
        x0 = _denoise(denoiser, u, times)
        shape = (-1, *(1,) * x.ndim)
        means = ratios.reshape(shape) * u[:-1] + (1.0 - ratios).reshape(shape) * x0[:-1]
        model = norm.logpdf(u[1:], means, jnp.sqrt(variances).reshape(shape)).sum()
        model += norm.logpdf(x, x0[-1], levels[-1]).sum()
        model += norm.logpdf(u[0], denoiser.location, jnp.hypot(denoiser.scale, levels[0])).sum()
        return model - norm.logpdf(scales * steps, 0.0, scales).sum()

    weights = jax.lax.map(log_weight, jax.random.split(key, num_paths))
    return logsumexp(weights) - jnp.log(num_paths)


def elbo_gap(
    denoiser: Denoiser,
    x: jax.Array,
    key: jax.Array,
    *,
    solver: Heun = Heun(64),  # noqa: B008
    num_probes: int | None = None,
    transition: str | ArrayLike = "posterior",
    num_times: int = 64,
    num_samples: int = 8,
    grid: TimeGrid = GRID,
) -> ElboGap:
    """How tight the bound is: the flow's log-density minus the bound, and which transitions lose it.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.
        key: random key.
        solver: of the probability flow, as in `log_prob`.
        num_probes: of its trace, as in `log_prob`.
        transition: as in `elbo`.
        num_times: as in `elbo`.
        num_samples: as in `elbo`.
        grid: as in `elbo`.

    Returns:
        The gap with its standard error, and the cost of each transition beyond the continuous limit. The rest of the
        gap is due to the terminal law, the reconstruction and the difference between flow and reverse process.
    """
    keys = jax.random.split(key, 3)
    key_probes = None if num_probes is None else keys[0]
    flow: LogProb = log_prob(denoiser, x, solver, num_probes=num_probes, key=key_probes)
    options: dict[str, Any] = {"num_times": num_times, "num_samples": num_samples, "grid": grid}
    bound = elbo(denoiser, x, keys[1], transition=transition, **options)
    limit = elbo(denoiser, x, keys[2], transition="continuous", **options)
    standard_error = jnp.hypot(flow.standard_error, bound.standard_error)
    return ElboGap(flow.value - bound.value, standard_error, bound.per_level - limit.per_level, bound.noise_levels)


def learn_variances(
    denoiser: Denoiser,
    data: jax.Array,
    key: jax.Array,
    *,
    num_times: int = 64,
    grid: TimeGrid = GRID,
    cond: ArrayLike | None = None,
) -> jax.Array:
    """The variances of the transitions under which the mean bound over the data is highest.

    Args:
        denoiser: the model.
        data: examples, shape (rows, *event_shape); each is noised once to every level.
        key: random key.
        num_times: number of noise levels of the grid.
        grid: where the levels lie.
        cond: conditions of the examples, (rows, ...), or None.

    Returns:
        Places between "posterior" (0) and "beta" (1) on the log-line, from the noisiest transition,
        shape (num_times - 1,): the `transition` of `elbo`.
    """
    _, levels, times = _check(denoiser, data[0], "posterior", num_times, grid)

    def squared_error(row: tuple[jax.Array, jax.Array, ArrayLike | None]) -> jax.Array:
        x, key, cond = row
        told = denoiser if cond is None else Conditioned(denoiser, cond)
        noise = jax.random.normal(key, (num_times - 1, *x.shape), x.dtype)
        u = x + levels[:-1].reshape(-1, *(1,) * x.ndim) * noise
        return jnp.mean((_denoise(told, u, times[:-1]) - x) ** 2, axis=tuple(range(1, x.ndim + 1)))

    errors = jax.lax.map(squared_error, (data, jax.random.split(key, len(data)), cond)).mean(0)
    ratios = (levels[1:] / levels[:-1]) ** 2
    low, high = _variances(levels, "posterior"), _variances(levels, "beta")
    best = low + (1.0 - ratios) ** 2 * errors
    return jnp.clip(jnp.log(best / low) / jnp.log(high / low), 0.0, 1.0)


def _check(
    denoiser: Denoiser, x: jax.Array, transition: str | ArrayLike, num_times: int, grid: TimeGrid, **counts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The point as floats, the noise levels from the noisiest and their times, both (num_times,)."""
    x = jnp.asarray(x, jnp.result_type(x, float))
    if x.shape != denoiser.event_shape:
        raise ValueError(f"x must be one point of shape {denoiser.event_shape}; got {x.shape}. Use jax.vmap")
    _checks.at_least(2, num_times=num_times)
    _checks.at_least(1, **counts)
    if isinstance(transition, str):
        _checks.one_of("transition", transition, _TRANSITIONS)
    elif jnp.shape(transition) != (num_times - 1,):
        raise ValueError(f"transition must have shape ({num_times - 1},); got {jnp.shape(transition)}")
    times = grid(denoiser.schedule, num_times)
    return x, denoiser.schedule.noise_level(times).astype(x.dtype), times


def _variances(levels: jax.Array, transition: str | ArrayLike) -> jax.Array:
    """Variance of each transition, from the noisiest, (num_times - 1,)."""
    high, low = levels[:-1], levels[1:]
    beta = (high - low) * (high + low)
    if isinstance(transition, str):
        return beta if transition == "beta" else beta * (low / high) ** 2
    return beta * (low / high) ** (2.0 * (1.0 - jnp.asarray(transition, levels.dtype)))


def _denoise(denoiser: Denoiser, u: jax.Array, times: jax.Array) -> jax.Array:
    """Posterior means of points `u = x_t / alpha_t`, one at each time."""
    return jax.vmap(lambda u, t: denoiser((denoiser.schedule.alpha(t) * u).astype(u.dtype), t).x0)(u, times)


def _prior_cost(denoiser: Denoiser, x: jax.Array, level: jax.Array) -> jax.Array:
    """KL divergence of N(x, level^2) from the terminal law."""
    spread = jnp.hypot(denoiser.scale, level)
    ratio = (level / spread) ** 2
    # ratio - 1 - log(ratio) for a ratio near one: the difference is (scale / spread)^2
    deficit = (denoiser.scale / spread) ** 2
    squares = jnp.sum(((x - denoiser.location) / spread) ** 2)
    return 0.5 * (squares + x.size * (-deficit - jnp.where(deficit < 0.5, jnp.log1p(-deficit), jnp.log(ratio))))


def _transition_costs(
    denoiser: Denoiser,
    x: jax.Array,
    key: jax.Array,
    levels: jax.Array,
    times: jax.Array,
    transition: str | ArrayLike,
) -> jax.Array:
    """One noise's estimate of the cost of every transition, (num_times - 1,)."""
    key_noise, key_place = jax.random.split(key)
    noise = jax.random.normal(key_noise, (len(levels) - 1, *x.shape), x.dtype)
    spans = 2.0 * jnp.log(levels[:-1] / levels[1:])  # in log-SNR
    if isinstance(transition, str) and transition == "continuous":
        places = jax.random.uniform(key_place, spans.shape, x.dtype)
        drawn = levels[:-1] * jnp.exp(-0.5 * places * spans)
        drawn_times = denoiser.schedule.inverse_noise_level(drawn)
        return 0.5 * spans * _squared_errors(denoiser, x, noise, drawn, drawn_times) / drawn**2
    variances = _variances(levels, transition)
    shrink = 1.0 - (levels[1:] / levels[:-1]) ** 2
    ratio = _variances(levels, "posterior") / variances
    errors = _squared_errors(denoiser, x, noise, levels[:-1], times[:-1])
    return 0.5 * shrink**2 / variances * errors + 0.5 * x.size * (ratio - 1.0 - jnp.log(ratio))


def _squared_errors(
    denoiser: Denoiser, x: jax.Array, noise: jax.Array, levels: jax.Array, times: jax.Array
) -> jax.Array:
    """Squared errors of the posterior mean at each level, (levels,)."""
    u = x + levels.reshape(-1, *(1,) * x.ndim) * noise
    return jnp.sum((_denoise(denoiser, u, times) - x) ** 2, axis=tuple(range(1, x.ndim + 1)))


def _standard_error(samples: jax.Array) -> jax.Array:
    if len(samples) == 1:
        return jnp.full((), jnp.nan, samples.dtype)
    return jnp.std(samples, ddof=1) / jnp.sqrt(jnp.asarray(len(samples), samples.dtype))
