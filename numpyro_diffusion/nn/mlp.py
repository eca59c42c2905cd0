r"""A residual multilayer perceptron: the backbone for vectors and small fields.

The event is flattened to a vector $x$, lifted to `features` hidden units, passed through residual blocks and read out:

$$h \leftarrow h + W_2\, \mathrm{silu}\!\left( W_1 \left[ (1 + a)\, \mathrm{norm}(h) + b \right] \right), \qquad
(a, b) = W_e\, \mathrm{silu}(e),$$

where norm is layer normalisation without parameters of its own and $e$ embeds the noise level: each block is scaled and
shifted by the noise level it works at (FiLM). Sines and cosines of $x$ may join it (`input_frequencies`), without which
fine detail is learned slowly. The output layer starts at zero, so that an untrained denoiser under EDM
preconditioning returns the best linear guess for isotropic data, and the first gradient steps are tame.

Every backbone of this library has the same call, `backbone(x, c_noise, cond=None)`, for ONE point: `x` of
`event_shape`, `c_noise` a scalar, no batch axis; `jax.vmap` makes the batch. It also has `event_shape` and `config`,
the plain arguments from which a checkpoint rebuilds it. Backbones know nothing of schedules or targets: for the meaning
of the output see `denoise.network`.

References:
    He et al., Identity mappings in deep residual networks, 2016, https://arxiv.org/abs/1603.05027.
    Perez et al., FiLM: visual reasoning with a general conditioning layer, 2018, https://arxiv.org/abs/1709.07871.
    Tancik et al., Fourier features let networks learn high frequency functions in low dimensional domains, 2020,
    https://arxiv.org/abs/2006.10739.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.nn.condition import Condition, ConditionEmbedding, embed_condition
from numpyro_diffusion.nn.embed import FourierEmbedding


class MLP(nnx.Module):
    """A residual perceptron on a flattened event, told the noise level by scale and shift in every block.

    Args:
        event_shape: shape of one point; `()` is a scalar.
        features: width of the hidden layers.
        num_blocks: number of residual blocks, of two layers each.
        embed_features: number of Fourier features of the noise level, even.
        embed_frequency: the highest frequency of these features; a lower one makes neighbouring levels more alike.
        cond_shape: shape of a condition, None for an unconditional network.
        scalar: whether to return one number, for the "energy" target, instead of an array of `event_shape`.
        input_frequencies: frequencies, in radians per unit of an input of unit variance, of sines and cosines of every
            entry that join the input; for few dimensions with detail much finer than their spread.
        rngs: source of the initial weights.

    Raises:
        ValueError: if a size is below one.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.nn import MLP
        >>> backbone = MLP((8, 8), features=32, rngs=nnx.Rngs(0))
        >>> backbone(jnp.ones((8, 8)), 0.0).shape
        (8, 8)
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        features: int = 128,
        num_blocks: int = 3,
        embed_features: int = 64,
        *,
        embed_frequency: float = 32.0,
        cond_shape: tuple[int, ...] | None = None,
        scalar: bool = False,
        input_frequencies: Sequence[float] = (),
        rngs: nnx.Rngs,
    ) -> None:
        for size in event_shape:
            _checks.at_least(1, **{"every entry of event_shape": size})
        _checks.at_least(1, features=features, num_blocks=num_blocks)
        self.event_shape = tuple(event_shape)
        self.features = features
        self.num_blocks = num_blocks
        self.embed_features = embed_features
        self.embed_frequency = float(embed_frequency)
        self.cond_shape = None if cond_shape is None else tuple(cond_shape)
        self.scalar = scalar
        self.input_frequencies = tuple(float(f) for f in input_frequencies)
        _checks.positive(**{"every one of input_frequencies": min(self.input_frequencies, default=1.0)})
        event_size = math.prod(self.event_shape)
        self.embed = FourierEmbedding(embed_features, self.embed_frequency)
        self.embed_layer = nnx.Linear(embed_features, embed_features, rngs=rngs)
        self.cond_embed = None if cond_shape is None else ConditionEmbedding(cond_shape, embed_features, rngs=rngs)
        self.input_layer = nnx.Linear(event_size * (1 + 2 * len(self.input_frequencies)), features, rngs=rngs)
        self.blocks = nnx.List([Block(features, embed_features, rngs=rngs) for _ in range(num_blocks)])
        self.output_norm = nnx.LayerNorm(features, rngs=rngs)
        outward = 1 if scalar else event_size
        self.output_layer = nnx.Linear(features, outward, kernel_init=nnx.initializers.zeros, rngs=rngs)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this network, all but the random ones, as plain JSON values."""
        return {
            "event_shape": list(self.event_shape),
            "features": self.features,
            "num_blocks": self.num_blocks,
            "embed_features": self.embed_features,
            "embed_frequency": self.embed_frequency,
            "cond_shape": None if self.cond_shape is None else list(self.cond_shape),
            "scalar": self.scalar,
            "input_frequencies": list(self.input_frequencies),
        }

    def __call__(self, x: jax.Array, c_noise: ArrayLike, cond: Condition | jax.Array | None = None) -> jax.Array:
        """Maps one point at one noise level.

        Args:
            x: one point of `event_shape`.
            c_noise: the noise coordinate, a scalar.
            cond: a condition of `cond_shape`, or None for its absence.

        Returns:
            An array of `event_shape`, or a scalar if `scalar`.

        Raises:
            ValueError: if `cond` has another shape, or the network is unconditional.
        """
        embedding = self.embed_layer(self.embed(c_noise)) + embed_condition(self.cond_embed, cond, "MLP")
        embedding = jax.nn.silu(embedding)
        x = jnp.reshape(x, (-1,))
        angles = jnp.outer(jnp.asarray(self.input_frequencies, x.dtype), x).reshape(-1)
        h = self.input_layer(jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)]))
        for block in self.blocks:
            h = block(h, embedding)
        out = self.output_layer(jax.nn.silu(self.output_norm(h)))
        return out.reshape(() if self.scalar else self.event_shape)


class Block(nnx.Module):
    """One residual block of `MLP`: normalise, scale and shift by the noise level, two layers, add.

    Args:
        features: width.
        embed_features: width of the noise level's embedding.
        rngs: source of the initial weights.
    """

    def __init__(self, features: int, embed_features: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(features, use_bias=False, use_scale=False, rngs=rngs)
        self.modulation = nnx.Linear(embed_features, 2 * features, rngs=rngs)
        self.first = nnx.Linear(features, features, rngs=rngs)
        self.second = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, h: jax.Array, embedding: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.modulation(embedding), 2)
        return h + self.second(jax.nn.silu(self.first((1.0 + scale) * self.norm(h) + shift)))
