"""A condition that may be absent, for networks that are trained with and without one.

`Condition(value, present)` is an array and a switch. The switch is an array too, so that in one batch some rows keep
their condition and some lose it, as the training of classifier-free guidance needs. `None` means no condition, and an
array means one that is present; the network learns what to take in place of an absent one.

Conditions come in any units. The embedding standardises each entry, $(c - m) / s$, by a location and a scale that it
holds beside its weights: `fit` sets them to the mean and the standard deviation of the conditions that it is given.

References:
    Ho and Salimans, Classifier-free diffusion guidance, 2022, https://arxiv.org/abs/2207.12598.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


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


class Absent(nnx.Param):
    """What a network takes in place of a condition: zeros until it has been trained without one."""


class Unit(nnx.Variable):
    """Location or scale of conditions; not trained."""


class ConditionEmbedding(nnx.Module):
    """Two layers from a standardised condition to features, and a learned vector for its absence.

    Args:
        cond_shape: shape of a condition.
        features: number of features.
        rngs: source of the initial weights.
    """

    def __init__(self, cond_shape: tuple[int, ...], features: int, *, rngs: nnx.Rngs) -> None:
        self.cond_shape = tuple(cond_shape)
        self.first = nnx.Linear(math.prod(self.cond_shape), features, rngs=rngs)
        self.second = nnx.Linear(features, features, rngs=rngs)
        self.absent = Absent(jnp.zeros(features))
        self.location, self.scale = Unit(jnp.zeros(self.cond_shape)), Unit(jnp.ones(self.cond_shape))

    def __call__(self, cond: Condition | jax.Array | None) -> jax.Array:
        """Maps one condition, present or not, to features.

        Raises:
            ValueError: if the condition is not of `cond_shape`.
        """
        if cond is None:
            return self.absent[...]
        if not isinstance(cond, Condition):
            cond = Condition(cond, jnp.asarray(True))
        if jnp.shape(cond.value) != self.cond_shape:
            raise ValueError(f"cond must have shape {self.cond_shape}; got {jnp.shape(cond.value)}. Use jax.vmap")
        standard = (cond.value - self.location[...]) / self.scale[...]
        embedded = self.second(jax.nn.silu(self.first(jnp.reshape(standard, (-1,)))))
        return jnp.where(cond.present, embedded, self.absent[...])


def embed_condition(
    embedding: ConditionEmbedding | None, cond: Condition | jax.Array | None, network: str
) -> jax.Array | float:
    """What to add to the embedding of the noise level: zero for an unconditional network.

    Raises:
        ValueError: if an unconditional network is given a condition.
    """
    if embedding is not None:
        return embedding(cond)
    if cond is not None:
        raise ValueError(f"cond must be None: this {network} is unconditional. Make it with cond_shape=")
    return 0.0
