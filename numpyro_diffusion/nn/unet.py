r"""A U-Net for signals and images: convolutions at several resolutions, joined across.

Going down, the outputs of residual blocks at each resolution are stored and the signal is halved; going up, they are
used again:

$$h_{i+1} = \mathrm{down}(B_i(h_i)), \qquad g_i = B'_i(\mathrm{up}(g_{i+1}), h_i),$$

so that the output sees every scale. A block normalises over groups of channels, convolves, is scaled and shifted by the
noise level (and the condition), convolves again, and adds its input. At chosen levels every place attends to all
others.

Written for one point without a batch axis: under `jax.vmap` each convolution becomes one convolution of the batch. The
output layer starts at zero, so that an untrained denoiser is the best linear guess.

References:
    Ronneberger, Fischer, Brox, U-Net, 2015, https://arxiv.org/abs/1505.04597.
    Dhariwal and Nichol, Diffusion models beat GANs on image synthesis, 2021, https://arxiv.org/abs/2105.05233.
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
from numpyro_diffusion.nn.convolve import convolve
from numpyro_diffusion.nn.embed import FourierEmbedding


class UNet(nnx.Module):
    """A U-Net in one or two dimensions.

    Args:
        event_shape: (*sizes) or (*sizes, channels), with one or two sizes.
        spatial: number of sizes in `event_shape`, 1 or 2.
        features: channels at the finest level.
        multipliers: channels of each level in units of `features`; each level after the first halves the sizes.
        num_blocks: residual blocks of each level, down and again up.
        attention: levels with self-attention, 0 the finest; its cost grows with the square of their number of places.
        embed_features: number of Fourier features of the noise level, even.
        cond_shape: shape of a condition, None for an unconditional network.
        scalar: whether to return one number, the sum over all places, for the "energy" target, instead of an array of
            `event_shape`.
        rngs: source of the initial weights.

    Raises:
        ValueError: if `event_shape` does not fit `spatial`, a size cannot be halved often enough, or a number is out of
            range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.nn import UNet
        >>> backbone = UNet((8, 8), features=8, multipliers=(1, 2), rngs=nnx.Rngs(0))
        >>> backbone(jnp.ones((8, 8)), 0.0).shape
        (8, 8)
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        *,
        spatial: int = 2,
        features: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 2,
        attention: Sequence[int] = (),
        embed_features: int = 64,
        cond_shape: tuple[int, ...] | None = None,
        scalar: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        _check_sizes(tuple(event_shape), spatial, len(multipliers))
        _checks.at_least(1, features=features, num_blocks=num_blocks, **{"every multiplier": min(multipliers)})
        for level in attention:
            _checks.one_of("attention level", level, range(len(multipliers)))
        self.event_shape, self.spatial, self.features = tuple(event_shape), spatial, features
        self.multipliers, self.num_blocks = tuple(multipliers), num_blocks
        self.attention, self.embed_features = tuple(attention), embed_features
        self.cond_shape, self.scalar = None if cond_shape is None else tuple(cond_shape), scalar

        def conv(inward: int, outward: int, size: int = 3, stride: int = 1, **options: Any) -> nnx.Conv:
            options |= {"conv_general_dilated": convolve, "rngs": rngs}
            return nnx.Conv(inward, outward, (size,) * spatial, strides=(stride,) * spatial, **options)

        def block(inward: int, outward: int, level: int) -> Block:
            return Block(conv, inward, outward, embed_features, attends=level in self.attention, rngs=rngs)

        channels = 1 if len(event_shape) == spatial else event_shape[-1]
        widths = [features * m for m in multipliers]
        self.embed = FourierEmbedding(embed_features)
        self.embed_layer = nnx.Linear(embed_features, embed_features, rngs=rngs)
        self.cond_embed = None if cond_shape is None else ConditionEmbedding(cond_shape, embed_features, rngs=rngs)
        self.input_layer = conv(channels, features)
        self.downs: nnx.List[nnx.List[Block]] = nnx.List([])
        self.ups: nnx.List[nnx.List[Block]] = nnx.List([])
        self.halve: nnx.List[nnx.Conv] = nnx.List([])
        self.double: nnx.List[nnx.Conv] = nnx.List([])
        width = features
        for level, wider in enumerate(widths):
            if level > 0:
                self.halve.append(conv(width, wider, stride=2))
                width = wider
            blocks = [block(width if k == 0 else wider, wider, level) for k in range(num_blocks)]
            self.downs.append(nnx.List(blocks))
            width = wider
        self.middle = block(width, width, len(widths) - 1)
        for level, wider in reversed(list(enumerate(widths))):
            blocks = [block((width if k == 0 else wider) + wider, wider, level) for k in range(num_blocks)]
            self.ups.append(nnx.List(blocks))
            width = widths[max(level - 1, 0)]
            if level > 0:
                self.double.append(conv(wider, width))
        outward = 1 if scalar else channels
        self.output_layer = conv(features * multipliers[0], outward, kernel_init=nnx.initializers.zeros)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this network, all but the random ones, as plain JSON values."""
        return {
            "event_shape": list(self.event_shape),
            "spatial": self.spatial,
            "features": self.features,
            "multipliers": list(self.multipliers),
            "num_blocks": self.num_blocks,
            "attention": list(self.attention),
            "embed_features": self.embed_features,
            "cond_shape": None if self.cond_shape is None else list(self.cond_shape),
            "scalar": self.scalar,
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
        embedding = self.embed_layer(self.embed(c_noise)) + embed_condition(self.cond_embed, cond, "UNet")
        embedding = jax.nn.silu(embedding)
        h = self.input_layer(jnp.reshape(x, (*self.event_shape[: self.spatial], -1)))
        kept = []
        for level, blocks in enumerate(self.downs):
            if level > 0:
                h = self.halve[level - 1](h)
            for block in blocks:
                h = block(h, embedding)
                kept.append(h)
        h = self.middle(h, embedding)
        for level, blocks in enumerate(self.ups):
            for block in blocks:
                h = block(jnp.concatenate([h, kept.pop()], -1), embedding)
            if level < len(self.double):
                h = self.double[level](h)  # before the places are doubled, at a fraction of the cost
                for axis in range(self.spatial):
                    h = jnp.repeat(h, 2, axis)
        out = self.output_layer(jax.nn.silu(_group_norm(h)))
        return out.sum() if self.scalar else out.reshape(self.event_shape)


class Block(nnx.Module):
    """One residual block of `UNet`, with self-attention after it or without.

    Args:
        conv: makes a convolution of the network's dimension.
        inward: channels in.
        outward: channels out.
        embed_features: width of the embedding of noise level and condition.
        attends: whether places attend to each other.
        rngs: source of the initial weights.
    """

    def __init__(
        self, conv: Any, inward: int, outward: int, embed_features: int, *, attends: bool, rngs: nnx.Rngs
    ) -> None:
        self.first, self.second = conv(inward, outward), conv(outward, outward)
        self.modulation = nnx.Linear(embed_features, 2 * outward, rngs=rngs)
        self.skip = None if inward == outward else conv(inward, outward, size=1)
        heads = math.gcd(4, outward)
        self.attend = nnx.MultiHeadAttention(heads, outward, decode=False, rngs=rngs) if attends else None

    def __call__(self, h: jax.Array, embedding: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.modulation(embedding), 2)
        inner = self.first(jax.nn.silu(_group_norm(h)))
        inner = self.second(jax.nn.silu((1.0 + scale) * _group_norm(inner) + shift))
        h = (h if self.skip is None else self.skip(h)) + inner
        if self.attend is None:
            return h
        places = _group_norm(h).reshape(-1, h.shape[-1])
        return h + self.attend(places).reshape(h.shape)


def _group_norm(h: jax.Array) -> jax.Array:
    """Mean zero and variance one over the places and each group of channels."""
    channels, groups, places = h.shape[-1], math.gcd(8, h.shape[-1]), tuple(range(h.ndim - 1))

    def group_mean(values: jax.Array) -> jax.Array:
        # places first and channels last: the sums run along memory
        return jnp.repeat(values.mean(places).reshape(groups, -1).mean(-1), channels // groups)

    centred = h - group_mean(h)
    return centred * jax.lax.rsqrt(group_mean(jnp.square(centred)) + 1e-5)


def _check_sizes(event_shape: tuple[int, ...], spatial: int, num_levels: int) -> None:
    _checks.one_of("spatial", spatial, (1, 2))
    if len(event_shape) not in (spatial, spatial + 1):
        raise ValueError(f"event_shape must have {spatial} sizes and, if any, channels; got {event_shape}")
    _checks.at_least(1, **{"number of multipliers": num_levels})
    for size in event_shape[:spatial]:
        if size % 2 ** (num_levels - 1):
            raise ValueError(
                f"size {size} of event_shape {event_shape} cannot be halved {num_levels - 1} times. "
                f"Pad it to {-(-size // 2 ** (num_levels - 1)) * 2 ** (num_levels - 1)}, or give fewer multipliers"
            )
