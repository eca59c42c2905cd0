r"""The noising process: one Gaussian family, many clocks.

A clean point $x$ is noised to time $t \in [0, 1]$ by

$$x_t = \alpha_t\, x + \sigma_t\, \varepsilon, \qquad \varepsilon \sim N(0, I),$$

where $t = 0$ is clean, $t = 1$ is noise and $s < t$ is an earlier, cleaner time. A `Schedule` is a pair
$(\alpha, \sigma)$; variance preserving, variance exploding, sub-VP, cosine and rectified flow differ in nothing else.
What is known of $x$ at time $t$ depends only on

$$\log \mathrm{SNR}(t) = \log \frac{\alpha_t^2}{\sigma_t^2},$$

which falls with $t$: up to the scale $x_t / \alpha_t$ every schedule walks down the same ladder of noise levels
$\sigma / \alpha$. As a stochastic differential equation, $dx_t = f(t)\, x_t\, dt + g(t)\, dw$ with
$f = \mathrm{d} \log \alpha / \mathrm{d}t$ and $g^2 = \mathrm{d} \sigma^2 / \mathrm{d}t - 2 f \sigma^2$; both come
from automatic differentiation, so that a new schedule is two functions and an inverse.

Some schedules reach $\sigma = 0$ or $\alpha = 0$ at the ends, where the SNR is infinite or zero: `t_min` and `t_max`
bound the part that is used for training and sampling. For the times that a solver visits see `grid`, for its steps see
`solve`.

References:
    Song et al., Score-based generative modeling through stochastic differential equations, 2021,
    https://arxiv.org/abs/2011.13456.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks


class Schedule(abc.ABC):
    r"""A noising process $x_t = \alpha_t x + \sigma_t \varepsilon$ for $t$ in [0, 1].

    A subclass is a frozen dataclass of plain numbers, registered as a static pytree. It gives `alpha`, `sigma` and
    `inverse_log_snr`; everything else follows. All methods act elementwise on `t`.

    Attributes:
        t_min: the cleanest time used for training and sampling.
        t_max: the noisiest time used.
    """

    t_min: float
    t_max: float

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> jax.Array:
        r"""The signal's coefficient $\alpha_t$."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> jax.Array:
        r"""The noise's standard deviation $\sigma_t$, in the units of the data."""

    @abc.abstractmethod
    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        """The time `t` at which `log_snr(t)` has the given value."""

    def log_snr(self, t: ArrayLike) -> jax.Array:
        r"""$\log \alpha_t^2 / \sigma_t^2$, strictly decreasing in `t`."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def noise_level(self, t: ArrayLike) -> jax.Array:
        r"""$\sigma_t / \alpha_t$: the standard deviation of the noise in $x_t / \alpha_t$."""
        return self.sigma(t) / self.alpha(t)

    def inverse_noise_level(self, level: ArrayLike) -> jax.Array:
        r"""The time at which $\sigma_t / \alpha_t$ has the given value."""
        return self.inverse_log_snr(-2.0 * jnp.log(level))

    def drift(self, t: ArrayLike) -> jax.Array:
        r"""$f(t) = \mathrm{d} \log \alpha_t / \mathrm{d}t$, the linear drift of the forward process."""
        alpha, slope = value_and_slope(self.alpha, t)
        return slope / alpha

    def diffusion(self, t: ArrayLike) -> jax.Array:
        r"""$g(t)$ with $g^2 = \mathrm{d}\sigma_t^2 / \mathrm{d}t - 2 f(t) \sigma_t^2$."""
        sigma, slope = value_and_slope(self.sigma, t)
        return jnp.sqrt(2.0 * sigma * (slope - self.drift(t) * sigma))


def value_and_slope(function: Callable[[jax.Array], jax.Array], t: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """A function of time and its derivative there, elementwise.

    Args:
        function: of time, elementwise.
        t: times, any shape.

    Returns:
        Values and slopes, each of the shape of `t`.
    """
    t = jnp.asarray(t, dtype=jnp.result_type(float))
    return jax.jvp(function, (t,), (jnp.ones_like(t),))


def _check_range(t_min: float, t_max: float) -> None:
    _checks.fraction(t_min=t_min, t_max=t_max)
    _checks.exceeds("t_max", t_max, "t_min", t_min)


@jax.tree_util.register_static
@dataclass(frozen=True)
class VP(Schedule):
    r"""Variance preserving: $\alpha_t^2 = e^{-B(t)}$, $\sigma_t^2 = 1 - \alpha_t^2$, with a linear rate.

    $B(t) = \beta_{\min} t + (\beta_{\max} - \beta_{\min}) t^2 / 2$; with the defaults $\alpha_1 = 0.0066$.

    Args:
        beta_min: rate of noising at t = 0.
        beta_max: rate of noising at t = 1.
        t_min: cleanest time used, where $\sigma$ is about 0.003 by default.
        t_max: noisiest time used.

    Raises:
        ValueError: if a rate or `t_min` is not positive, or one of the two ranges is empty.

    References:
        Song et al. 2021, appendix C, https://arxiv.org/abs/2011.13456.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-4
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _checks.positive(beta_min=self.beta_min, t_min=self.t_min)
        _checks.exceeds("beta_max", self.beta_max, "beta_min", self.beta_min)
        _check_range(self.t_min, self.t_max)

    def _rate_integral(self, t: ArrayLike) -> jax.Array:
        return jnp.asarray(t) * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * jnp.asarray(t))

    def _inverse_rate_integral(self, integral: jax.Array) -> jax.Array:
        slope = self.beta_max - self.beta_min
        return 2.0 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2.0 * slope * integral))

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.exp(-0.5 * self._rate_integral(t))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(-self._rate_integral(t)))

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return self._inverse_rate_integral(jax.nn.softplus(-jnp.asarray(log_snr)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-variance preserving: $\alpha$ of `VP`, $\sigma_t = 1 - \alpha_t^2$.

    Args:
        beta_min: rate of noising at t = 0.
        beta_max: rate of noising at t = 1.
        t_min: cleanest time used, where $\sigma$ is about 0.002 by default.
        t_max: noisiest time used.

    References:
        Song et al. 2021, appendix C, https://arxiv.org/abs/2011.13456.
    """

    t_min: float = 1e-2

    def sigma(self, t: ArrayLike) -> jax.Array:
        return -jnp.expm1(-self._rate_integral(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        root = jnp.exp(0.5 * jnp.asarray(log_snr))  # alpha / (1 - alpha^2)
        alpha = 2.0 * root / (1.0 + jnp.sqrt(1.0 + 4.0 * root**2))
        one_minus_square = alpha / root
        near_one = -jnp.log1p(-jnp.minimum(one_minus_square, 0.5))  # each form where it does not cancel
        return self._inverse_rate_integral(jnp.where(one_minus_square < 0.5, near_one, -2.0 * jnp.log(alpha)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding: $\alpha_t = 1$, $\sigma_t = \sigma_{\min} (\sigma_{\max} / \sigma_{\min})^t$.

    Args:
        sigma_min: smallest noise standard deviation.
        sigma_max: largest noise standard deviation; it should be well above the spread of the data.
        t_min: cleanest time used.
        t_max: noisiest time used.

    Raises:
        ValueError: if `sigma_min` is not positive, or one of the two ranges is empty.

    References:
        Song et al. 2021, appendix C, https://arxiv.org/abs/2011.13456.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _checks.positive(sigma_min=self.sigma_min)
        _checks.exceeds("sigma_max", self.sigma_max, "sigma_min", self.sigma_min)
        _check_range(self.t_min, self.t_max)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.ones_like(t, dtype=jnp.result_type(float, t))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** jnp.asarray(t)

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        log_ratio = -0.5 * jnp.asarray(log_snr) - jnp.log(self.sigma_min)
        return log_ratio / jnp.log(self.sigma_max / self.sigma_min)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Cosine: $\alpha_t = \cos(\pi t / 2)$, $\sigma_t = \sin(\pi t / 2)$.

    Args:
        t_min: cleanest time used; $\sigma / \alpha$ is 0.0016 there by default.
        t_max: noisiest time used; $\sigma / \alpha$ is 127 there by default.

    References:
        Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021,
        https://arxiv.org/abs/2102.09672.
    """

    t_min: float = 1e-3
    t_max: float = 0.995

    def __post_init__(self) -> None:
        _check_open_range(self.t_min, self.t_max)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.cos(0.5 * jnp.pi * jnp.asarray(t))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.sin(0.5 * jnp.pi * jnp.asarray(t))

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return 2.0 / jnp.pi * jnp.arctan(jnp.exp(-0.5 * jnp.asarray(log_snr)))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rectified(Schedule):
    r"""Rectified flow (the straight interpolant): $\alpha_t = 1 - t$, $\sigma_t = t$.

    Args:
        t_min: cleanest time used; $\sigma / \alpha$ is 0.002 there by default.
        t_max: noisiest time used; $\sigma / \alpha$ is 199 there by default.

    References:
        Liu et al., Flow straight and fast, 2023, https://arxiv.org/abs/2209.03003.
        Lipman et al., Flow matching for generative modeling, 2023, https://arxiv.org/abs/2210.02747.
    """

    t_min: float = 2e-3
    t_max: float = 0.995

    def __post_init__(self) -> None:
        _check_open_range(self.t_min, self.t_max)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return 1.0 - jnp.asarray(t)

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.asarray(t)

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return jax.nn.sigmoid(-0.5 * jnp.asarray(log_snr))


def _check_open_range(t_min: float, t_max: float) -> None:
    _check_range(t_min, t_max)
    _checks.exceeds("t_min", t_min, "the noiseless end t", 0.0)
    _checks.exceeds("1", 1.0, "t_max", t_max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled(Schedule):
    r"""A schedule whose noise is measured in units of `scale` $= c$: $x_t = \alpha_t x + c\, \sigma_t\, \varepsilon$.

    A network that standardises its data keeps its schedule in those units; this is the same schedule seen by the user,
    in the units of the data. The scale belongs to the trained weights, so it is a leaf of the pytree.

    Args:
        base: the schedule in standardised units.
        scale: standard deviation of the data, a positive scalar.
    """

    base: Schedule
    scale: ArrayLike

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.base.t_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.base.t_max

    def alpha(self, t: ArrayLike) -> jax.Array:
        return self.base.alpha(t)

    def sigma(self, t: ArrayLike) -> jax.Array:
        return self.base.sigma(t) * self.scale

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return self.base.inverse_log_snr(log_snr + 2.0 * jnp.log(self.scale))


def perturb(key: jax.Array, schedule: Schedule, x: jax.Array, t: ArrayLike) -> jax.Array:
    r"""Draws $x_t \sim N(\alpha_t x, \sigma_t^2 I)$.

    Args:
        key: random key.
        schedule: the noising process.
        x: clean point, any shape.
        t: time, a scalar or an array that broadcasts against `x`.

    Returns:
        The noisy point, of the shape of `x`.
    """
    return schedule.alpha(t) * x + schedule.sigma(t) * jax.random.normal(key, jnp.shape(x), jnp.result_type(x))
