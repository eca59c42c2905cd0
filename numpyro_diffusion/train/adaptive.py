r"""Noise levels that follow the gradient, or the loss: importance sampling with a density learned on the way.

An integral is estimated with the least variance when its levels are drawn in proportion to the size of what they
contribute,

$$p(\lambda) \propto \sqrt{E \left[ g(\lambda)^2 \mid \lambda \right]}.$$

What varies in training is the gradient, $g = w\, \| D \nabla_\theta L \|$, and what its size is told in matters: Adam
divides the slope of each weight by a root mean square of its own, so $D$ does so for each array of weights, by the root
mean square of the batch's gradient. The size at a level is seen without forming the gradients: for random signs $v$ in
the space of the weights $E_v (v^\top D \nabla_\theta L)^2 = \| D \nabla_\theta L \|^2$, a Jacobian-vector product of a
batch, made in every eighth step. The customary proxy is the loss itself, $g = w L$. It costs nothing, and it is a poor
one: most of a denoising loss is what no network can remove, which sends the effort to levels where there is nothing to
learn. docs/concepts/training.md has both against fixed levels.

Sizes are measured against a start, the best law for the loss of standard normal data, $w(\lambda)\,
\mathrm{sigmoid}(\lambda)$, which for the EDM weighting is the log-normal one. With $r$ their ratio to it,

$$p(\lambda) \propto (1 - \mathrm{floor})\; w\, \mathrm{sigmoid}(\lambda)\; E[r^2 \mid \lambda]^{1/2}
+ \mathrm{floor}\; w\, \mathrm{sigmoid}(\lambda),$$

each part normalised. $E[r^2]$ is an exponential moving average in bins of the log-SNR. The floor keeps every bin fed,
and no weight $w / p$ is more than 1 / floor times what it is under the start.

The averages are a part of the state of training, moved in its compiled loop. A batch is drawn from what was known
before it, so each step's loss is unbiased.

References:
    Nichol and Dhariwal, Improved denoising diffusion probabilistic models, 2021, section 3.3 (by the loss),
    https://arxiv.org/abs/2102.09672.
    Kingma and Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, 2023, appendix F (by
    the loss), https://arxiv.org/abs/2303.00848.
    Alain et al., Variance reduction in SGD by distributed importance sampling, 2015 (by the gradient),
    https://arxiv.org/abs/1511.06481.
    Hesterberg, Weighted average importance sampling and defensive mixture distributions, 1995,
    https://doi.org/10.1080/00401706.1995.10484303.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise import Schedule
from numpyro_diffusion.train.levels import NoiseLaw, log_snr_range
from numpyro_diffusion.train.weighting import Weighting


class AdaptiveState(NamedTuple):
    """What has been seen so far."""

    log_scale: jax.Array  # log of the start's density at the bins' centres, but for a constant, (num_bins,)
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
        floor: share of the draws that keeps the law of the start, in (0, 1].

    Raises:
        ValueError: if a number is out of its range or `follows` unknown.

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
        )  # what is unseen is as the rest
        return (1.0 - self.floor) * learned / jnp.sum(learned) + self.floor * start

    def start(self, schedule: Schedule, weighting: Weighting) -> AdaptiveState:
        edges = self.edges(schedule)
        centres = 0.5 * (edges[1:] + edges[:-1])
        return AdaptiveState(
            weighting.log_weight(centres) + jax.nn.log_sigmoid(centres), *jnp.zeros((2, self.num_bins))
        )

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
