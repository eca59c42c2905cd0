r"""A network in evaluation and in training: the same weights, without and with random layers.

In evaluation a network is a function $F_\theta(x)$. In training a layer such as dropout draws a mask $m$, so that the
loss is

$$E_m\, L(F_{\theta, m}), \qquad m \sim \text{the streams of keys that the layers were built with},$$

a fresh mask for each example and each step. In flax a layer's stream is a variable of the network. Here it is not part
of the weights but is made anew from one key, so that the same key always gives the same function and nothing has to be
carried from step to step, saved or averaged.

Layers that learn statistics of a batch (`nnx.BatchNorm`) do not fit: their answer at a point depends on other points,
and a denoiser is a function of one point.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class TrainingMode:
    """The structure of a network whose random layers act; static and hashable.

    Args:
        graphdef: its structure, in training mode.
        streams: path, shape and tag of each variable of its streams, and whether it is a key or a counter.
    """

    graphdef: nnx.GraphDef
    streams: tuple[tuple[tuple[Any, ...], tuple[int, ...], Any, bool], ...]

    def merge(self, key: jax.Array, weights: nnx.State) -> nnx.Module:
        """The network with these weights and with streams from a key.

        Args:
            key: random key.
            weights: those of the network in evaluation.

        Returns:
            A new module in training mode.
        """
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        keys = jax.random.split(key, len(self.streams)) if self.streams else ()
        flat = [
            (
                path,
                nnx.RngKey(_spread(own, shape), tag=tag)
                if is_key
                else nnx.RngCount(jnp.zeros(shape, jnp.uint32), tag=tag),
            )
            for own, (path, shape, tag, is_key) in zip(keys, self.streams, strict=True)
        ]
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), weights, copy=True)


def evaluation(backbone: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode, without the random streams that dropout would draw from."""
    backbone = nnx.clone(backbone)
    backbone.eval()
    for _, node in list(nnx.iter_graph(backbone)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Rngs | nnx.RngStream):
                    setattr(node, name, None)
    return backbone


def training(backbone: nnx.Module) -> TrainingMode | None:
    """The training mode of a network, or None if it is the same as its evaluation.

    Args:
        backbone: any network, which is left as it is.

    Returns:
        Its structure in training.
    """
    trained, evaluated = nnx.clone(backbone), nnx.clone(backbone)
    trained.train()
    evaluated.eval()
    graphdef, streams, *_ = nnx.split(trained, nnx.RngState, ...)
    if graphdef == nnx.graphdef(evaluated):
        return None
    found = [(path, leaf.shape, leaf.tag, isinstance(leaf, nnx.RngKey)) for path, leaf in nnx.to_flat_state(streams)]
    return TrainingMode(graphdef, tuple(found))


def batch_statistics(weights: nnx.State) -> list[str]:
    """Paths of the variables that layers such as `nnx.BatchNorm` would fill from batches."""
    return ["/".join(map(str, path)) for path, leaf in nnx.to_flat_state(weights) if isinstance(leaf, nnx.BatchStat)]


def without_stream(backbone: nnx.Module) -> list[str]:
    """Paths of the dropout layers that have no stream of keys to draw from."""
    return [
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(backbone)
        if isinstance(node, nnx.Dropout) and node.rate > 0.0 and node.rngs is None
    ]


def _spread(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.split(key, shape) if shape else key
