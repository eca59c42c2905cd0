r"""An exponential moving average of the weights, which is what is kept after training.

The last iterate of a stochastic optimiser jitters around the solution; an average over its recent past does not:

$$\bar\theta_{n} = \beta_n \bar\theta_{n - 1} + (1 - \beta_n)\, \theta_n, \qquad
\beta_n = \min\!\left( \beta, \frac{1 + n}{10 + n} \right).$$

The average starts at the initial weights, which are worth nothing. With a constant $\beta$ they would keep the share
$\beta^n$; with the growing $\beta_n$ it falls like $n^{-9}$, and the average always spans about the last tenth of the
run until $\beta$ takes over. So short runs need no other setting than long ones.

This file knows nothing of networks: weights are any pytree of arrays.

References:
    Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046.
    Song and Ermon, Improved techniques for training score-based generative models, 2020 (averaging for score models),
    https://arxiv.org/abs/2006.09011.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Tree = TypeVar("Tree")


def decay_at(num_updates: ArrayLike, decay: float) -> jax.Array:
    r"""The decay $\beta_n$ of update number $n$: small at the start, `decay` in the end.

    Args:
        num_updates: number of updates made before this one, a scalar.
        decay: its limit $\beta$, in [0, 1].

    Returns:
        A scalar in [0.1, `decay`], or `decay` if that is smaller.
    """
    n = jnp.asarray(num_updates, jnp.float32)
    return jnp.minimum(decay, (1.0 + n) / (10.0 + n))


def update(average: Tree, weights: Tree, num_updates: ArrayLike, decay: float) -> Tree:
    """The average after one more iterate.

    Args:
        average: the average so far; before the first update, the initial weights.
        weights: the new iterate, of the same structure.
        num_updates: number of updates made before this one, a scalar.
        decay: limit of the decay, in [0, 1].

    Returns:
        The new average, every leaf in its own precision.
    """
    beta = decay_at(num_updates, decay)
    return jax.tree.map(lambda a, w: a + ((1.0 - beta) * (w - a)).astype(a.dtype), average, weights)
