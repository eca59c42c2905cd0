"""Backbones against their own formulas, written out in NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.nn import MLP, FourierEmbedding

EVENT_SHAPES = [(), (3,), (2, 3)]
SIZES = {"features": 8, "num_blocks": 2, "embed_features": 6}


def awake(event_shape, **options):
    """A small network with random weights everywhere, also where it starts at zero."""
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: MLP(event_shape, **SIZES, **options, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: jnp.asarray(0.4 * random.normal(size=leaf.shape), leaf.dtype), weights)
    return nnx.merge(graphdef, weights)


def numpy_mlp(backbone, x, c_noise):
    """The formulas of the module's docstring, in NumPy."""
    linear = lambda layer, h: h @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])  # noqa: E731
    norm = lambda h: (h - h.mean()) / np.sqrt(h.var() + 1e-6)  # noqa: E731
    silu = lambda h: h / (1.0 + np.exp(-h))  # noqa: E731
    angles = c_noise * backbone.embed_frequency ** (
        np.arange(backbone.embed_features // 2) / (backbone.embed_features // 2 - 1)
    )
    embedding = silu(linear(backbone.embed_layer, np.concatenate([np.sin(angles), np.cos(angles)])))
    waves = [f(w * np.ravel(x)) for f in (np.sin, np.cos) for w in backbone.input_frequencies]
    h = linear(backbone.input_layer, np.concatenate([np.ravel(x), *waves]))
    for block in backbone.blocks:
        scale, shift = np.split(linear(block.modulation, embedding), 2)
        h = h + linear(block.second, silu(linear(block.first, (1.0 + scale) * norm(h) + shift)))
    out_norm = norm(h) * np.asarray(backbone.output_norm.scale[...]) + np.asarray(backbone.output_norm.bias[...])
    return linear(backbone.output_layer, silu(out_norm)).reshape(() if backbone.scalar else np.shape(x))


def test_embedding_is_sines_and_cosines_of_a_geometric_ladder():
    got = FourierEmbedding(6, max_frequency=16.0)(0.3)
    np.testing.assert_allclose(got, [*np.sin([0.3, 1.2, 4.8]), *np.cos([0.3, 1.2, 4.8])], atol=1e-6)


def test_embedding_has_nothing_to_train_or_store():
    assert not jax.tree.leaves(nnx.state(FourierEmbedding(6)))


FORMS = [(shape, {}) for shape in EVENT_SHAPES]
FORMS += [
    ((2, 3), {"input_frequencies": (0.5, 3.0), "embed_frequency": 5.0}),
    ((3,), {"scalar": True, "input_frequencies": (2.0,)}),
]


@pytest.mark.parametrize("event_shape, options", FORMS, ids=str)
def test_mlp_is_what_its_docstring_says(event_shape, options):
    backbone = awake(event_shape, **options)
    x = np.random.default_rng(1).normal(size=event_shape).astype(np.float32)
    np.testing.assert_allclose(jax.jit(backbone)(x, 0.3), numpy_mlp(backbone, x, 0.3), rtol=1e-4, atol=1e-5)


def test_mlp_starts_at_zero():
    backbone = MLP((2, 3), **SIZES, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jax.jit(backbone)(jnp.ones((2, 3)), 0.5), np.zeros((2, 3)))


def test_mlp_maps_a_batch_under_vmap():
    backbone, one = awake((2, 3)), jax.jit(awake((2, 3)))
    x, c_noise = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32), np.linspace(-1.0, 1.0, 4)
    with jax.default_matmul_precision("highest"):  # a GPU rounds to ten bits otherwise, batch and single differently
        one_by_one = jnp.stack([one(*pair) for pair in zip(x, c_noise, strict=True)])
        batch = jax.jit(jax.vmap(backbone))(x, c_noise)
    np.testing.assert_allclose(batch, one_by_one, rtol=1e-4, atol=1e-5)


def test_config_is_json_and_rebuilds_the_network():
    backbone = MLP((2, 3), **SIZES, input_frequencies=(0.5, 2.0), embed_frequency=5.0, rngs=nnx.Rngs(3))
    again = MLP(**json.loads(json.dumps(backbone.config)), rngs=nnx.Rngs(3))
    (graphdef, weights), (graphdef_again, weights_again) = nnx.split(backbone), nnx.split(again)
    assert graphdef == graphdef_again and hash(graphdef) == hash(graphdef_again)
    jax.tree.map(np.testing.assert_array_equal, weights, weights_again)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FourierEmbedding(5), "features must be even, one sine and one cosine per frequency; got 5"),
        (lambda: FourierEmbedding(2), "features must be at least 4; got 2"),
        (lambda: FourierEmbedding(4, max_frequency=1.0), "max_frequency must exceed the lowest frequency=1.0; got 1.0"),
        (lambda: MLP((2,), features=0, rngs=nnx.Rngs(0)), "features must be at least 1; got 0"),
        (lambda: MLP((2,), num_blocks=0, rngs=nnx.Rngs(0)), "num_blocks must be at least 1; got 0"),
        (lambda: MLP((2, 0), rngs=nnx.Rngs(0)), "every entry of event_shape must be at least 1; got 0"),
        (
            lambda: MLP((2,), input_frequencies=(1.0, 0.0), rngs=nnx.Rngs(0)),
            "every one of input_frequencies must be positive and finite; got 0.0",
        ),
        (
            lambda: awake((3,))(jnp.ones(3), 0.0, jnp.ones(1)),
            "cond must be None: this MLP is unconditional. Make it with cond_shape=",
        ),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
