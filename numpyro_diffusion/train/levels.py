r"""Where noise levels are drawn: importance sampling, which changes the variance of a loss but not its mean.

The objective is an integral over the log-SNR in the range of a schedule (`weighting`), and each example of a batch
estimates it at one level,

$$2 \mathcal L_w / d = E_{\lambda \sim p} \left[ \frac{w(\lambda)}{p(\lambda)}\,
\tfrac1d \| \varepsilon - \hat\varepsilon \|^2 \right],$$

with any density $p > 0$ there. A law is given by the inverse of its distribution function and by its log-density, both
in $\lambda$; the levels of a whole batch are drawn at once, because levels that are spread evenly (`LowDiscrepancy`)
have less variance than independent ones. Levels are those of standardised data,
$\lambda = \log \mathrm{SNR} + 2 \log c$ with $c$ the data's standard deviation: schedules here are in these units.

The variance is least with levels in proportion to the size of what they contribute, $p \propto E[g^2 \mid
\lambda]^{1/2}$, a density that `Adaptive` learns on the way. What varies in training is the gradient, $g = w\, \| D
\nabla_\theta L \|$, with $D$ one over the root mean square of the batch's gradient in each array of weights, as Adam
scales it. Its size at a level is estimated without forming the gradients: for random signs $v$ in the space of the
weights $E_v (v^\top D \nabla_\theta L)^2 = \| D \nabla_\theta L \|^2$, a Jacobian-vector product for a batch in every
eighth step. The usual proxy, the loss $g = w L$, costs nothing but is poor: most of a denoising loss cannot be removed
by any network. docs/concepts/training.md compares both with fixed levels.

Sizes are relative to an initial law, the best one for the loss of standard normal data, $w(\lambda)\,
\mathrm{sigmoid}(\lambda)$, which for the EDM weighting is the log-normal one. With $r$ their ratio to it,

$$p(\lambda) \propto (1 - \mathrm{floor})\; w\, \mathrm{sigmoid}(\lambda)\; E[r^2 \mid \lambda]^{1/2}
+ \mathrm{floor}\; w\, \mathrm{sigmoid}(\lambda),$$

each part normalised. $E[r^2]$ is an exponential moving average in bins of the log-SNR. With the floor every bin gets
draws, and no weight $w / p$ is more than 1 / floor times that under the initial law. A batch is drawn from the law
known before it, so each step's loss is unbiased.

References:
    Kingma et al., Variational diffusion models, 2021, appendix I (low discrepancy), https://arxiv.org/abs/2107.00630.
    Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021, section 3.3 (by the loss),
    https://arxiv.org/abs/2102.09672.
    Alain et al., Variance reduction in SGD by distributed importance sampling, 2015 (by the gradient),
    https://arxiv.org/abs/1511.06481.
    Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995,
    https://doi.org/10.1080/00401706.1995.10484303.
"""

import abc
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise import Schedule, value_and_slope
from numpyro_diffusion.train import weighting as weightings
from numpyro_diffusion.train.weighting import Weighting

__all__ = ["Adaptive", "AdaptiveState", "LogNormal", "LogitNormal", "LowDiscrepancy", "NoiseLaw", "Uniform"]

State = Any  # what a law has learned from the losses so far, a pytree of arrays


def log_snr_range(schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """The log-SNR at the noisiest and at the cleanest time used."""
    return schedule.log_snr(schedule.t_max), schedule.log_snr(schedule.t_min)


def spread_evenly(key: jax.Array, num: int) -> jax.Array:
    """Numbers, each of them uniform, that together leave no gap: one offset for all, shape (num,)."""
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
        r"""$\log p(\lambda)$ for $\lambda$ in the schedule's range, over which it is normalised, elementwise."""

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
        """The state before the first batch."""
        return ()

    def update(self, state: State, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> State:
        r"""The state after one more batch.

        Args:
            state: the state before.
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
    r"""Log-normal noise levels, $\log (\sigma_t / (\alpha_t c)) \sim N(\mathrm{mean}, \mathrm{std}^2)$, truncated.

    It is the normal law given that the level lies in the schedule's range, which should have some of its mass.
    With `weighting.EDM` of the same numbers all examples count alike, up to the factor $1 + e^{-\lambda}$.

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
        low, high, sign = self._ends(schedule)
        u = jnp.where(sign > 0.0, u, 1.0 - u)  # so that it is always from low noise to high
        z = sign * ndtri(ndtr(low) + u * (ndtr(high) - ndtr(low)))
        return jnp.clip(-2.0 * (self.mean + self.std * z), *log_snr_range(schedule))  # removes rounding errors

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        low, high, _ = self._ends(schedule)
        log_mass = log_ndtr(high) + jnp.log1p(-jnp.exp(log_ndtr(low) - log_ndtr(high)))
        return norm.logpdf(log_snr, -2.0 * self.mean, 2.0 * self.std) - log_mass

    def _ends(self, schedule: Schedule) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The range in standard deviations from the centre, mirrored by the sign if most of it is in the upper tail.

        In the lower tail the normal distribution function has all its digits.
        """
        high, low = (-(0.5 * end + self.mean) / self.std for end in log_snr_range(schedule))
        sign = jnp.where(low + high > 0.0, -1.0, 1.0)
        return jnp.minimum(sign * low, sign * high), jnp.maximum(sign * low, sign * high), sign


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

    Each level by itself has the given law; together they leave no gaps.

    Args:
        law: the law to spread over; uniform times are those of Kingma et al.
    """

    law: NoiseLaw = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_noise_law(self.law)

    def sample(self, key: jax.Array, num: int, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.quantile(spread_evenly(key, num), schedule, state)

    @property
    def follows(self) -> str:  # type: ignore[override]
        return self.law.follows

    def quantile(self, u: jax.Array, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.quantile(u, schedule, state)

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: State = ()) -> jax.Array:
        return self.law.log_density(log_snr, schedule, state)

    def start(self, schedule: Schedule, weighting: Weighting) -> State:
        return self.law.start(schedule, weighting)

    def update(self, state: State, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> State:
        return self.law.update(state, log_snr, values, schedule)


def suited_to(weighting: Weighting) -> NoiseLaw:
    """The law that belongs to a weighting: that of an `EDM` or `LogitNormal` weighting, with its numbers.

    For any other weighting it is `LogNormal()`, a good start. Raises `TypeError` unless it is a `Weighting`.
    """
    weightings.check_weighting(weighting)
    if isinstance(weighting, weightings.LogitNormal):
        return LogitNormal(weighting.mean, weighting.std)
    return LogNormal(weighting.mean, weighting.std) if isinstance(weighting, weightings.EDM) else LogNormal()


class AdaptiveState(NamedTuple):
    """What `Adaptive` has learned so far."""

    log_scale: jax.Array  # log of the initial density at the bins' centres, up to a constant, (num_bins,)
    moments: jax.Array  # moving average of the squared ratio to it, from zero, (num_bins,)
    weights: jax.Array  # moving average of one, in the bins that were seen, from zero, (num_bins,)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Adaptive(NoiseLaw):
    """Noise levels from a histogram of the gradient or the loss, of equal bins over the schedule's log-SNR.

    Args:
        num_bins: number of bins.
        follows: whether the size of the "gradient" or of the "loss" is followed.
        decay: of the moving average, for each example that falls into a bin, in (0, 1).
        floor: share of the draws from the initial law, in (0, 1].

    Raises:
        ValueError: if a number is out of its range or `follows` unknown.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.noise import VE
        >>> from numpyro_diffusion.train import weighting
        >>> from numpyro_diffusion.train.levels import Adaptive
        >>> law = Adaptive()
        >>> state = law.start(VE(), weighting.EDM())
        >>> law.sample(jax.random.key(0), 5, VE(), state).shape
        (5,)
    """

    num_bins: int = 32
    follows: Literal["gradient", "loss"] = "gradient"
    decay: float = 0.99
    floor: float = 0.1

    def __post_init__(self) -> None:
        _checks.at_least(1, num_bins=self.num_bins)
        _checks.one_of("follows", self.follows, ("gradient", "loss"))
        _checks.fraction(decay=self.decay, floor=self.floor)
        _checks.positive(decay=self.decay, floor=self.floor)
        _checks.exceeds("1", 1.0, "decay", self.decay)

    def edges(self, schedule: Schedule) -> jax.Array:
        """Edges of the bins, increasing, shape (num_bins + 1,)."""
        return jnp.linspace(*log_snr_range(schedule), self.num_bins + 1)

    def masses(self, state: AdaptiveState) -> jax.Array:
        """Probability of each bin, shape (num_bins,)."""
        start, tiny = jax.nn.softmax(state.log_scale), jnp.finfo(state.moments.dtype).tiny
        overall = jnp.sum(start * state.moments) / jnp.maximum(jnp.sum(start * state.weights), tiny)
        learned = start * jnp.sqrt(
            state.moments + (1.0 - state.weights) * overall + tiny
        )  # bins that were not seen are like the others
        return (1.0 - self.floor) * learned / jnp.sum(learned) + self.floor * start

    def start(self, schedule: Schedule, weighting: Weighting) -> AdaptiveState:
        edges = self.edges(schedule)
        centres = 0.5 * (edges[1:] + edges[:-1])
        return AdaptiveState(
            weighting.log_weight(centres) + jax.nn.log_sigmoid(centres), *jnp.zeros((2, self.num_bins))
        )

    def quantile(self, u: jax.Array, schedule: Schedule, state: AdaptiveState = ()) -> jax.Array:  # type: ignore[assignment]
        masses, (low, high) = self.masses(state), log_snr_range(schedule)
        upper = jnp.cumsum(masses)
        u = u * upper[-1]  # one, up to rounding
        k = jnp.clip(jnp.searchsorted(upper, u, side="right"), 0, self.num_bins - 1)
        place = k + jnp.clip((u - upper[k] + masses[k]) / masses[k], 0.0, 1.0)
        return low + (high - low) * place / self.num_bins

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: AdaptiveState = ()) -> jax.Array:  # type: ignore[assignment]
        low, high = log_snr_range(schedule)
        return jnp.log(self.masses(state)[self._bin(log_snr, schedule)] * self.num_bins / (high - low))

    def update(self, state: AdaptiveState, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> AdaptiveState:
        k = self._bin(log_snr, schedule)
        squares = (values * jnp.exp(-state.log_scale[k])) ** 2
        counts = jnp.zeros(self.num_bins).at[k].add(1.0)
        means = jnp.zeros(self.num_bins).at[k].add(squares) / jnp.maximum(counts, 1.0)
        gain = 1.0 - self.decay**counts
        moments = state.moments + gain * (means - state.moments)
        return state._replace(moments=moments, weights=state.weights + gain * (1.0 - state.weights))

    def _bin(self, log_snr: ArrayLike, schedule: Schedule) -> jax.Array:
        low, high = log_snr_range(schedule)
        place = self.num_bins * (jnp.asarray(log_snr) - low) / (high - low)
        return jnp.clip(jnp.floor(place).astype(int), 0, self.num_bins - 1)
