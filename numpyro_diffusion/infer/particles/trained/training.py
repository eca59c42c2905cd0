r"""Training a walk on a density: the spread of its log-weights, or their mean.

A walk of `walk` has the weight $W$, whose logarithm is $\log Z$ on every walk if and only if the walk's law is the
noised target. Two objectives measure how far it is from that:

$$L_{\mathrm{var}} = \mathrm{Var} \log W, \qquad L_{\mathrm{KL}} = - E \log W .$$

The first takes the walks as given, so that nothing is differentiated through them or through the target, and its
gradient has no noise left at the optimum. Early in training a few log-weights are off by hundreds, so those that are
far from the median count by their distance (Huber's loss), which has the same minimum. The second, the bound on the
evidence, goes through walk and target.

A target that is much narrower than the prior, or has several modes, is not met at once: in the first half of the steps
it is $N(x; 0, I)\,(\pi(x) / N(x; 0, I))^\beta$, with $\beta$ rising geometrically to 1 from where half of the draws of
$N(0, I)$ are effective.

References:
    Vargas, Grathwohl, Doucet, Denoising diffusion samplers, 2023, https://arxiv.org/abs/2302.13834.
    Zhang, Chen, Path integral sampler, 2022, https://arxiv.org/abs/2111.15141.
    Richter, Berner, Improved sampling via learned diffusions, 2024 (the log-variance),
    https://arxiv.org/abs/2307.01198.
    Nüsken, Richter, Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural networks, 2021 (its
    derivation), https://arxiv.org/abs/2005.05409.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from numpyro_diffusion.infer.kernel.choose import effective_size, is_density, keep_finite
from numpyro_diffusion.infer.particles.trained.walk import Learned, LogDensity, Walk, Walked

OBJECTIVES = ("log_variance", "kl")
_CLIMB, _WARMUP = 0.5, 0.05
"""Shares of the steps in which the target is tempered, and in which the learning rate rises."""
_LONGEST = 1.0
"""Norm to which longer gradients are shortened."""
_BEYOND = 10.0
"""Nats below the least finite one of a batch that a walk counts with which ends where the target is zero."""
_FAR = 3.0
"""Medians from the median beyond which the distance of a log-weight counts, and not its square."""


class Trace(NamedTuple):
    """Training, step by step, (num_training_steps,) each."""

    loss: jax.Array  # NaN where the step was left out
    bound: jax.Array  # mean log-weight for the tempered target
    effective_share: jax.Array  # of the walks of a batch
    power: jax.Array  # beta


class Trained(NamedTuple):
    """What training has left."""

    units: tuple[jax.Array, jax.Array]  # location and scale, (D,) each
    learned: Learned
    trace: Trace
    num_target_evals: int


class Training(NamedTuple):
    """The state of training."""

    learned: Learned
    optimizer: optax.OptState
    trace: Trace


class Trainer:
    """Makes steps of training.

    Args:
        walk: how walks go down.
        objective: "log_variance" or "kl".
        num_steps: of training.
        batch_size: walks in a step.
        learning_rate: the largest of Adam.
    """

    def __init__(self, walk: Walk, objective: str, num_steps: int, batch_size: int, learning_rate: float) -> None:
        self._walk, self._objective, self._num_steps, self._batch_size = walk, objective, num_steps, batch_size
        self._learning_rate = learning_rate

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        """Made anew, since it does not pickle."""
        largest, warmup = self._learning_rate, max(1, int(_WARMUP * self._num_steps))
        rate = optax.warmup_cosine_decay_schedule(0.1 * largest, largest, warmup, max(self._num_steps, warmup + 1))
        return optax.chain(optax.clip_by_global_norm(_LONGEST), optax.adam(rate))

    def start(self, learned: Learned) -> Training:
        """Before the first step."""
        empty = jnp.full(self._num_steps, jnp.nan)
        return Training(learned, self._optimizer.init(learned), Trace(empty, empty, empty, empty))

    def steps(
        self, key: jax.Array, training: Training, log_tilt: LogDensity, lowest: jax.Array, first: int, end: int
    ) -> Training:
        """The steps from one number to another; `lowest` is the power of the first step of all."""

        def once(i: jax.Array, training: Training) -> Training:
            climbed = jnp.minimum(i / (_CLIMB * self._num_steps), 1.0)
            power = lowest ** (1.0 - climbed)
            keys = jax.random.split(jax.random.fold_in(key, i), self._batch_size)
            derivative = jax.value_and_grad(self._loss, has_aux=True)
            (loss, log_weights), gradient = derivative(training.learned, keys, log_tilt, power)
            updates, optimizer = self._optimizer.update(gradient, training.optimizer, training.learned)
            new = optax.apply_updates(training.learned, updates), optimizer, loss
            (learned, optimizer, _), wrong = keep_finite(new, (*training[:2], jnp.zeros_like(loss)))
            mean = jnp.mean(log_weights, where=jnp.isfinite(log_weights))
            said = jnp.where(wrong, jnp.nan, loss), mean, effective_size(log_weights) / self._batch_size, power
            trace = Trace(*(a.at[i].set(v.astype(a.dtype)) for a, v in zip(training.trace, said, strict=True)))
            return Training(learned, optimizer, trace)

        return jax.lax.fori_loop(first, end, once, training)

    def _loss(
        self, learned: Learned, keys: jax.Array, log_tilt: LogDensity, power: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The objective, and the log-weights."""
        walked: Walked = jax.vmap(lambda key: self._walk(learned, key, log_tilt, power))(keys)
        values = walked.log_rest + power * walked.log_tilt
        proper = is_density(walked.log_tilt)
        inside = proper & jnp.isfinite(walked.log_tilt)
        log_weights = jnp.where(inside, jax.lax.stop_gradient(values), -jnp.inf)
        if self._objective == "kl":
            return -jnp.mean(values, where=inside), log_weights
        tilt = jax.lax.stop_gradient(walked.log_tilt)
        least = jnp.min(tilt, where=inside, initial=jnp.inf) - _BEYOND
        values = walked.log_rest + power * jnp.where(inside, tilt, jnp.where(jnp.isfinite(least), least, 0.0))
        off = values - jax.lax.stop_gradient(_median(values, proper))
        bend = jnp.maximum(_FAR * jax.lax.stop_gradient(_median(jnp.abs(off), proper)), 1.0)
        return 2.0 * jnp.mean(optax.losses.huber_loss(off, delta=bend), where=proper), log_weights


def _median(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.nanmedian(jnp.where(where, values, jnp.nan))
