r"""What is not to be trusted in a run: a training that has failed, weights on few walks, modes that are lost.

A walk that never goes to a mode has no weight that says so: all of its weights agree on an evidence that is too small.
Plain importance sampling from $N(0, I)$, in units of the prior,

$$\hat Z_0 = \frac1M \sum_i \frac{\pi(\xi_i)}{N(\xi_i; 0, I)}, \qquad \xi_i \sim N(0, I),$$

goes everywhere and is too noisy to be of use in many dimensions. In few it is not, and shows what the walks have lost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_diffusion.infer.kernel.choose import effective_size, next_temperature, without_improper
from numpyro_diffusion.infer.particles.trained.training import Trace

NUM_DRAWS = 5000
"""Draws of N(0, I) by which the first power of the target, and the evidence, are found."""
_FEW = 10.0
"""Number of effective walks of an island below which its estimate is not reliable."""
_LEFT_OUT = 0.01
"""Share of the steps of training, whose loss was not finite, above which it has failed."""
_TRUSTED = 25.0
"""Effective draws of N(0, I) from which on their evidence counts."""
_ERRORS = 4.0


class Reference(NamedTuple):
    """What draws of N(0, I) say of a target."""

    lowest: jax.Array  # the power of the target at which half of them are effective; 0 if none is
    log_evidence: jax.Array
    relative_error: jax.Array  # of the evidence
    effective_size: jax.Array  # at power 1


def reference_of(log_tilts: jax.Array) -> Reference:
    """From the log-density of the target over N(0, I) at draws of the latter, (NUM_DRAWS,)."""
    tilts = without_improper(log_tilts)
    power = next_temperature(tilts, jnp.zeros(()), 0.5)
    value = logsumexp(tilts) - jnp.log(tilts.size)
    error = jnp.std(jnp.exp(tilts - value)) / jnp.sqrt(tilts.size)
    lowest = jnp.where(jnp.isfinite(tilts).any(), power, 0.0)
    return Reference(lowest, value, error, effective_size(tilts))


def problems_of(log_weights: np.ndarray, trace: Trace, reference: Reference) -> tuple[str, ...]:
    """Messages if training has failed, few walks (islands, n) have all the weight, or modes have been lost."""
    problems, steps, n = [], len(trace.loss), log_weights.shape[1]
    left_out = int(np.isnan(trace.loss).sum())
    if left_out > _LEFT_OUT * steps:
        problems.append(
            f"training has failed: {left_out} of {steps} steps had a loss or a gradient that is not finite and were "
            "left out. Look for a factor of the model that is not finite, or lower learning_rate"
        )
    smallest = float(jax.vmap(effective_size)(jnp.asarray(log_weights)).min())
    if smallest < min(_FEW, 0.25 * n):
        last = trace.loss[-max(1, steps // 10) :]
        how = f"loss {np.nanmean(last):.3g} at the end" if np.isfinite(last).any() else "nothing learned"
        problems.append(
            f"the weights degenerate: of the {n} walks of an island only {smallest:.1f} are effective, after {steps} "
            f"steps of training ({how}). Draws are copies of a few and modes may be lost; the log evidence is most "
            "likely too small by more than islands show, so its error is infinite. Raise num_training_steps, "
            "batch_size or num_levels, or use TemperedSMC(model)"
        )
    if reference.effective_size < _TRUSTED:
        return tuple(problems)
    shares = np.exp(log_weights.reshape(-1).astype(float) - float(reference.log_evidence))
    held, error = shares.mean(), np.hypot(shares.std() / np.sqrt(shares.size), float(reference.relative_error))
    if 1.0 - held > _ERRORS * error:
        problems.append(
            f"modes are lost: the walks hold {held:.2f} +- {error:.2f} of the evidence that {NUM_DRAWS} draws about "
            "the prior have found. Draws and evidence are wrong by more than islands show, so its error is infinite. "
            "Take guided=True, more training, or TemperedSMC(model)"
        )
    return tuple(problems)
