r"""What a step of training minimises: a loss, the levels at which it is taken, and its weight there.

The levels of a batch of rows are drawn together, $\lambda_b \sim p$, and its loss is

$$\frac1B \sum_b \frac{w(\lambda_b)}{p(\lambda_b)}\, L(\theta; x_b, t(\lambda_b)), \qquad
E = \int w(\lambda)\, E\, L(\theta; x, t(\lambda))\, \mathrm{d}\lambda = 2 \mathcal L_w / d,$$

with $L$ of `losses`, $w$ of `weighting` and $p$ of `levels`: three independent choices.
With the defaults, the EDM weighting at log-normal levels, $w / p = 1 + e^{-\lambda}$, and data that are an isotropic
Gaussian have the loss one in any units.

If the condition is withheld from some rows, a conditional model learns the unconditional one too, which classifier-free
guidance needs.

References:
    Ho and Salimans, Classifier-free diffusion guidance, 2022, https://arxiv.org/abs/2207.12598.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _precision
from numpyro_diffusion.denoise import Denoiser, NetworkDenoiser
from numpyro_diffusion.nn.condition import Condition
from numpyro_diffusion.noise import Scaled
from numpyro_diffusion.train.levels import Adaptive, NoiseLaw, State, check_noise_law, suited_to
from numpyro_diffusion.train.losses import DenoisingScoreMatching, Loss
from numpyro_diffusion.train.weighting import EDM, Weighting, check_weighting

TINY = 1e-20  # added to the mean square of a gradient, which may be zero at the start


@jax.tree_util.register_static
@dataclass(frozen=True)
class Objective:
    """A loss under a weighting, estimated at levels drawn from a law.

    Args:
        loss: function `loss(denoiser, key, x, t, cond)` of one point.
        weighting: how much each log-SNR counts.
        noise_levels: where levels are drawn; by default the law that belongs to the weighting, `levels.suited_to`.
        cond_dropout: probability that a row's condition is withheld.

    Raises:
        TypeError: if one of them is of another kind.
        ValueError: if `cond_dropout` is not in [0, 1).
    """

    loss: Loss = field(default_factory=DenoisingScoreMatching)
    weighting: Weighting = field(default_factory=EDM)
    noise_levels: NoiseLaw = None  # type: ignore[assignment]  # `__post_init__` fills it in
    cond_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise TypeError(f"loss must be a function (denoiser, key, x, t, cond) of one point; got {self.loss!r}")
        check_weighting(self.weighting)
        if self.noise_levels is None:
            object.__setattr__(self, "noise_levels", suited_to(self.weighting))
        check_noise_law(self.noise_levels)
        if not 0.0 <= self.cond_dropout < 1.0:
            raise ValueError(f"cond_dropout must lie in [0, 1); got {self.cond_dropout}")

    def start(self, denoiser: Denoiser) -> State:
        """The state of the law of the levels before the first batch."""
        return self.noise_levels.start(_standardised(denoiser), self.weighting)

    def __call__(
        self,
        denoiser: Denoiser,
        key: jax.Array,
        x: jax.Array,
        cond: jax.Array | None,
        state: State,
        training: bool = False,
    ) -> tuple[jax.Array, State]:
        """The losses of a batch.

        Args:
            denoiser: any denoiser; its `scale` sets the unit.
            key: random key, for levels, noises, withheld conditions and random layers.
            x: clean points, shape (batch, *event_shape).
            cond: their conditions, (batch, *cond_shape), or None.
            state: what the law of the levels knows.
            training: whether random layers of a `NetworkDenoiser`, such as dropout, act; each row has its own draw.

        Returns:
            Weighted losses, shape (batch,), and what the law knows after them.
        """
        schedule = _standardised(denoiser)
        losses, log_snr = self._losses(denoiser, key, x, cond, state, training)
        log_weight = self.weighting.log_weight(log_snr)
        ratio = jnp.exp(log_weight - self.noise_levels.log_density(log_snr, schedule, state))
        if self.noise_levels.follows == "loss":
            values = jnp.exp(log_weight) * jax.lax.stop_gradient(losses)
            state = self.noise_levels.update(state, log_snr, values, schedule)
        return ratio.astype(x.dtype) * losses, state

    def follow_gradient(
        self,
        denoiser: NetworkDenoiser,
        key: jax.Array,
        x: jax.Array,
        cond: jax.Array | None,
        state: State,
        gradient: nnx.State,
    ) -> State:
        """The state of the law of the levels after the gradients of a batch, along one random direction.

        In each array of weights the direction is scaled by one over the size of its gradient, as are the steps of Adam
        and similar optimisers: what counts is how much an array's gradient varies relative to its size.

        Args:
            denoiser: the denoiser whose weights are trained, unfrozen.
            key: random key, for levels, noises, withheld conditions and the direction.
            x: clean points, shape (batch, *event_shape).
            cond: their conditions, (batch, *cond_shape), or None.
            state: the state before.
            gradient: of the loss of a batch; the root mean square of each array is its unit.

        Returns:
            The new state.
        """
        key, key_direction = jax.random.split(key)
        leaves, tree = jax.tree.flatten(denoiser.params)
        keys = jax.random.split(key_direction, len(leaves))
        along = [
            jax.random.rademacher(key, leaf.shape, leaf.dtype) / jnp.sqrt(jnp.mean(slope**2) + TINY)
            for key, leaf, slope in zip(keys, leaves, jax.tree.leaves(gradient), strict=True)
        ]

        def losses(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            return self._losses(denoiser.with_params(params), key, x, cond, state, training=True)

        _, slopes, log_snr = jax.jvp(losses, (denoiser.params,), (jax.tree.unflatten(tree, along),), has_aux=True)
        values = self.weighting(log_snr) * slopes
        return self.noise_levels.update(state, log_snr, values, _standardised(denoiser))

    @_precision.highest()
    def _losses(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, cond: jax.Array | None, state: State, training: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of each row at a level drawn for it, unweighted, and these log-SNRs."""
        key_levels, key_noise, key_cond, key_layers = jax.random.split(key, 4)
        schedule = _standardised(denoiser)
        log_snr = self.noise_levels.sample(key_levels, len(x), schedule, state)
        t = jnp.clip(schedule.inverse_log_snr(log_snr), schedule.t_min, schedule.t_max)
        keys, shown = jax.random.split(key_noise, len(x)), self._withhold(key_cond, cond)

        def one(key_layers: jax.Array, *args: Any) -> jax.Array:
            own = denoiser.in_training(key_layers) if training else denoiser  # type: ignore[attr-defined]  # a network
            return self.loss(own, *args)

        return jax.vmap(one)(jax.random.split(key_layers, len(x)), keys, x, t, shown), log_snr

    def held_out(self) -> "Objective":
        """The same loss and weighting with all conditions present, at levels drawn as if the data were Gaussian.

        So held-out losses compare whatever law the training uses and has learned.
        """
        return Objective(self.loss, self.weighting, Adaptive(floor=1.0))

    def _withhold(self, key: jax.Array, cond: jax.Array | None) -> jax.Array | Condition | None:
        if cond is None or self.cond_dropout == 0.0:
            return cond
        return Condition(cond, jax.random.bernoulli(key, 1.0 - self.cond_dropout, (len(cond),)))


def denoising_loss(
    denoiser: Denoiser,
    key: jax.Array,
    x: jax.Array,
    noise_levels: NoiseLaw | None = None,
    weighting: Weighting | None = None,
    cond: ArrayLike | None = None,
) -> jax.Array:
    r"""The denoising loss of one point, one noise level and one noise.

    $(w / p)(\lambda)\, \| \hat\varepsilon(x_t, t) - \varepsilon \|^2 / d$ with $\lambda \sim p$. The loss of an exact
    denoiser is the floor that a trained one is compared with.

    Args:
        denoiser: any denoiser; its `scale` sets the unit of the levels.
        key: random key, for the level and the noise.
        x: clean point of the denoiser's event shape, in the units of the data.
        noise_levels: law of the noise level; by default the one that belongs to the weighting.
        weighting: how much each log-SNR counts; `EDM()` by default.
        cond: what a conditional denoiser is conditioned on.

    Returns:
        A scalar; per dimension, so that events of different sizes compare.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.train import denoising_loss
        >>> bool(denoising_loss(Gaussian(jnp.zeros(2)), jax.random.key(0), jnp.ones(2)) > 0)
        True
    """
    weighting = EDM() if weighting is None else weighting
    law = suited_to(weighting) if noise_levels is None else noise_levels
    objective = Objective(noise_levels=law, weighting=weighting)
    rows, conds = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (x, cond))
    return objective(denoiser, key, rows, conds, objective.start(denoiser))[0][0]


def _standardised(denoiser: Denoiser) -> Scaled:
    """The schedule in units of the data's standard deviation, those of levels and weights."""
    return Scaled(denoiser.schedule, 1.0 / denoiser.scale)
