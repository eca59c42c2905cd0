"""A condition that may be absent, for networks that are trained with and without one.

`Condition(value, present)` is an array and a switch. The switch is an array too, so that in one batch some rows keep
their condition and some lose it, as the training of classifier-free guidance needs. `None` is the absence of one.

References:
    Ho and Salimans, Classifier-free diffusion guidance, 2022, https://arxiv.org/abs/2207.12598.
"""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """A condition with a switch.

    Args:
        value: what the network is conditioned on, of any shape.
        present: whether the network sees it, a scalar truth value.
    """

    value: jax.Array
    present: jax.Array
