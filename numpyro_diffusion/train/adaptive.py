r"""Noise levels that follow the loss: importance sampling with a density learned on the way.

The gradient of a training step has the least variance when levels are drawn in proportion to the size of what they
contribute,

$$p(\lambda) \propto \sqrt{E \left[ g(\lambda)^2 \mid \lambda \right]}.$$

With $g$ the loss's integrand $w \| \varepsilon - \hat\varepsilon \|^2 / d$ this is the rule of Nichol and Dhariwal. It
is a proxy, since what varies in training is the gradient. A gradient of a squared error goes with the error itself, not
with its square: against the scale that standard normal data would have, $w(\lambda)\, \mathrm{sigmoid}(\lambda)$, the
ratio $r$ of the integrand to it is a square, and so the law is

$$p(\lambda) \propto w(\lambda)\, \mathrm{sigmoid}(\lambda)\; \left( E[r^2 \mid \lambda] \right)^{\mathrm{power} / 2},$$

where power 1 is that rule, power 1/2 follows the gradient of a network whose output has unit variance at every level
(the "edm" target), and power 0 keeps the start. $E[r^2]$ is an exponential moving average in bins of the log-SNR. A
share of the draws, the floor, keeps the law of the start: no bin starves, and no weight $w / p$ is more than 1 / floor
times what it is under that law. Loss that no network can remove counts like any other, so where most of it is of that
kind, following it all the way is a mistake.

The moments are a part of the state of training, moved in its compiled loop. A batch is drawn from what was known before
it, so each step's loss is unbiased.

References:
    Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021, section 3.3,
    https://arxiv.org/abs/2102.09672.
    Kingma and Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, 2023, appendix F,
    https://arxiv.org/abs/2303.00848.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.train.levels import NoiseLaw, log_snr_range, spread_evenly
from numpyro_diffusion.train.weighting import Weighting


class AdaptiveState(NamedTuple):
    """What the losses have shown so far."""

    log_scale: jax.Array  # log of the integrand's size for standard normal data at the bins' centres, (num_bins,)
    moments: jax.Array  # moving average of the squared ratio of the integrand to it, (num_bins,)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Adaptive(NoiseLaw):
    """Noise levels from a histogram of the loss, of equal bins over the schedule's log-SNR.

    The levels of a batch are spread evenly over it, as those of `LowDiscrepancy` are.

    Args:
        num_bins: number of bins.
        decay: of the moving average, for each example that falls into a bin, in (0, 1).
        floor: share of the draws that keeps the law of the start, in (0, 1].
        power: how far the law follows the loss: 1 all the way, 0 not at all.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.noise import VE
        >>> from numpyro_diffusion.train import weighting
        >>> from numpyro_diffusion.train.adaptive import Adaptive
        >>> law = Adaptive()
        >>> state = law.start(VE(), weighting.EDM())
        >>> law.sample(jax.random.key(0), 5, VE(), state).shape
        (5,)
    """

    num_bins: int = 64
    decay: float = 0.998
    floor: float = 0.5
    power: float = 1.0

    def __post_init__(self) -> None:
        _checks.at_least(1, num_bins=self.num_bins)
        _checks.fraction(decay=self.decay, floor=self.floor, power=self.power)
        _checks.positive(decay=self.decay, floor=self.floor)
        _checks.exceeds("1", 1.0, "decay", self.decay)

    def edges(self, schedule: Schedule) -> jax.Array:
        """Edges of the bins, increasing, shape (num_bins + 1,)."""
        return jnp.linspace(*log_snr_range(schedule), self.num_bins + 1)

    def masses(self, state: AdaptiveState) -> jax.Array:
        """Probability of each bin, shape (num_bins,)."""
        learned = jax.nn.softmax(state.log_scale + 0.5 * self.power * jnp.log(state.moments))
        return (1.0 - self.floor) * learned + self.floor * jax.nn.softmax(state.log_scale)

    def start(self, schedule: Schedule, weighting: Weighting) -> AdaptiveState:
        edges = self.edges(schedule)
        centres = 0.5 * (edges[1:] + edges[:-1])
        return AdaptiveState(weighting.log_weight(centres) + jax.nn.log_sigmoid(centres), jnp.ones(self.num_bins))

    def sample(self, key: jax.Array, num: int, schedule: Schedule, state: AdaptiveState = ()) -> jax.Array:
        return self.quantile(spread_evenly(key, num), schedule, state)

    def quantile(self, u: jax.Array, schedule: Schedule, state: AdaptiveState = ()) -> jax.Array:
        masses, (low, high) = self.masses(state), log_snr_range(schedule)
        upper = jnp.cumsum(masses)
        u = u * upper[-1]  # which is one, but for rounding
        k = jnp.clip(jnp.searchsorted(upper, u, side="right"), 0, self.num_bins - 1)
        place = k + jnp.clip((u - upper[k] + masses[k]) / masses[k], 0.0, 1.0)
        return low + (high - low) * place / self.num_bins

    def log_density(self, log_snr: ArrayLike, schedule: Schedule, state: AdaptiveState = ()) -> jax.Array:
        low, high = log_snr_range(schedule)
        return jnp.log(self.masses(state)[self._bin(log_snr, schedule)] * self.num_bins / (high - low))

    def update(self, state: AdaptiveState, log_snr: jax.Array, values: jax.Array, schedule: Schedule) -> AdaptiveState:
        k = self._bin(log_snr, schedule)
        ratios = values * jnp.exp(-state.log_scale[k])
        counts = jnp.zeros(self.num_bins).at[k].add(1.0)
        means = jnp.zeros(self.num_bins).at[k].add(ratios**2) / jnp.maximum(counts, 1.0)
        moments = state.moments + (1.0 - self.decay**counts) * (means - state.moments)
        return state._replace(moments=jnp.maximum(moments, jnp.finfo(moments.dtype).tiny))

    def _bin(self, log_snr: ArrayLike, schedule: Schedule) -> jax.Array:
        low, high = log_snr_range(schedule)
        place = self.num_bins * (jnp.asarray(log_snr) - low) / (high - low)
        return jnp.clip(jnp.floor(place).astype(int), 0, self.num_bins - 1)
