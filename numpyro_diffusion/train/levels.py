r"""Where noise levels are drawn: importance sampling, which changes a loss's variance and never its value.

The objective is an integral over the log-SNR (`weighting`), and each example of a batch estimates it at one level,

$$2 \mathcal L_w / d = E_{\lambda \sim p} \left[ \frac{w(\lambda)}{p(\lambda)}\,
\tfrac1d \| \varepsilon - \hat\varepsilon \|^2 \right],$$

with any density $p > 0$. A law is given by the inverse of its distribution function and by its log-density, both in
$\lambda$, for the range of a schedule; the levels of a whole batch are drawn at once, because a batch that spreads them
evenly (`LowDiscrepancy`) has less variance than independent ones. The best $p$ follows the loss: see `adaptive`.

Levels are those of standardised data, $\lambda = \log \mathrm{SNR} + 2 \log c$ with $c$ the data's standard deviation:
the schedule given here is the one in these units.

References:
    Kingma et al., Variational diffusion models, 2021, appendix I (low discrepancy), https://arxiv.org/abs/2107.00630.
    Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021, section 3.3 (importance sampling),
    https://arxiv.org/abs/2102.09672.
"""

import abc
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise import Schedule, value_and_slope
from numpyro_diffusion.train.weighting import Weighting

State = Any  # what a law has learned from the losses so far, a pytree of arrays


def log_snr_range(schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """The log-SNR at the noisiest and at the cleanest time used."""
    return schedule.log_snr(schedule.t_max), schedule.log_snr(schedule.t_min)


def spread_evenly(key: jax.Array, num: int) -> jax.Array:
    """Uniform numbers, each by itself, that together leave no gap: one offset for all, shape (num,)."""
    return (jax.random.uniform(key) + jnp.arange(num) / num) % 1.0


class NoiseLaw(abc.ABC):
    """A law of the noise level: a frozen dataclass of plain numbers, registered as a static pytree.

    Attributes:
        follows: what it learns from: "nothing", the "loss" of each batch, or the size of the "gradient".
    """

    follows: str = "nothing"

    @abc.abstractmethod
    def quantile(self, u: jax.Array, schedule: Schedule, state: State = ()) -> jax.Array:
        """The log-SNR below or above which the share `u` of the levels lies, elementwise, in the schedule's range."""

    @abc.abstractmethod
    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        r"""$\log p(\lambda)$, elementwise."""

    def sample(self, key: jax.Array, num: int, schedule: Schedule, state: State = ()) -> jax.Array:
        """Draws the levels of a batch.

        Args:
            key: random key.
            num: how many.
            schedule: the noising process in standardised units.
            state: what the law has learned; () for a law that learns nothing.

        Returns:
            Log-SNRs, shape (num,).
        """
        return self.quantile(jax.random.uniform(key, (num,)), schedule, state)

    def start(self, schedule: Schedule, weighting: Weighting) -> State:
        """What is known before the first batch."""
        return ()

    def update(self, state: State, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> State:
        r"""What is known after one more batch.

        Args:
            state: what was known before.
            log_snr: the levels of the batch, shape (batch,).
            values: $w(\lambda)$ times what is followed there, shape (batch,); for a gradient, its product with a random
                direction.
            schedule: the noising process in standardised units.

        Returns:
            The new state.
        """
        return state


def check_noise_law(noise_levels: NoiseLaw) -> NoiseLaw:
    """Raises `TypeError` unless it is a `NoiseLaw`."""
    if not isinstance(noise_levels, NoiseLaw):
        raise TypeError(f"noise_levels must be a train.levels.NoiseLaw such as LogNormal(); got {noise_levels!r}")
    return noise_levels


@jax.tree_util.register_static
@dataclass(frozen=True)
class LogNormal(NoiseLaw):
    r"""Log-normal noise levels: $\log (\sigma_t / (\alpha_t c)) \sim N(\mathrm{mean}, \mathrm{std}^2)$.

    What falls outside the schedule's range is moved to its ends. With `weighting.EDM` of the same numbers all examples
    count alike, but for $1 + e^{-\lambda}$.

    Args:
        mean: centre of the log noise level, in units of the data's standard deviation $c$.
        std: its standard deviation, positive.

    Raises:
        ValueError: if `std` is not positive or `mean` not finite.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.noise import VE
        >>> from numpyro_diffusion.train.levels import LogNormal
        >>> LogNormal().sample(jax.random.key(0), 5, VE()).shape
        (5,)
    """

    mean: float = -0.5
    std: float = 1.5

    def __post_init__(self) -> None:
        _checks.finite("mean", self.mean)
        _checks.positive(std=self.std)

    def quantile(self, u: jax.Array, schedule: Schedule, state: State = ()) -> jax.Array:
        return jnp.clip(-2.0 * (self.mean + self.std * ndtri(u)), *log_snr_range(schedule))

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        return norm.logpdf(log_snr, -2.0 * self.mean, 2.0 * self.std)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LogitNormal(LogNormal):
    r"""Times of the straight path with $\log (t / (1 - t)) \sim N(\mathrm{mean}, \mathrm{std}^2)$, as levels.

    On that path $\sigma / \alpha = t / (1 - t)$: logit-normal times are log-normal noise levels, with other numbers.

    Args:
        mean: centre; larger is noisier.
        std: spread, positive.

    References:
        Esser et al., Scaling rectified flow transformers for high-resolution image synthesis, 2024,
        https://arxiv.org/abs/2403.03206.
    """

    mean: float = 0.0
    std: float = 1.0


@jax.tree_util.register_static
@dataclass(frozen=True)
class Uniform(NoiseLaw):
    r"""Uniform times, $p(\lambda) = |\mathrm{d}t / \mathrm{d}\lambda| / (t_{\max} - t_{\min})$."""

    def quantile(self, u: jax.Array, schedule: Schedule, state: State = ()) -> jax.Array:
        return schedule.log_snr(schedule.t_min + (schedule.t_max - schedule.t_min) * u)

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        slope = value_and_slope(schedule.inverse_log_snr, log_snr)[1]
        return jnp.log(-slope / (schedule.t_max - schedule.t_min))


@jax.tree_util.register_static
@dataclass(frozen=True)
class LowDiscrepancy(NoiseLaw):
    r"""Another law, with the levels of a batch spread evenly over it: quantiles of $(u + i / B) \bmod 1$ for one $u$.

    Each level alone has the law given; together they leave no gaps.

    Args:
        law: the law to spread over; uniform times are those of Kingma et al.
    """

    law: NoiseLaw = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_noise_law(self.law)

    def sample(self, key: jax.Array, num: int, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.quantile(spread_evenly(key, num), schedule, state)

    @property
    def follows(self) -> str:
        return self.law.follows

    def quantile(self, u: jax.Array, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.quantile(u, schedule, state)

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.log_density(log_snr, schedule, state)

    def start(self, schedule: Schedule, weighting: Weighting) -> State:
        return self.law.start(schedule, weighting)

    def update(self, state: State, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> State:
        return self.law.update(state, log_snr, values, schedule)


NoiseLevels = LogNormal  # the default law under the name that `fit` gives it
