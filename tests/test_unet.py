"""Conditional networks and the U-Net: shapes, what they see, what they learn, how fast they are batched."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion import checkpoint
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.nn import MLP, Condition, ConditionEmbedding, UNet

SMALL = {"features": 8, "multipliers": (1, 2), "num_blocks": 1, "embed_features": 8}


def awake(network, seed=0):
    """The network with every weight random: at birth the output layer is zero and would hide everything."""
    graphdef, weights = nnx.split(network)
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


@jax.jit
def call(graphdef, weights, *inputs):
    return nnx.merge(graphdef, weights)(*inputs)


@jax.jit
def slope(graphdef, weights, x, of):
    return jax.grad(lambda x: jnp.vdot(of, nnx.merge(graphdef, weights)(x, 0.1)))(x)


def run(network, *inputs):
    return call(*nnx.split(network), *inputs)


NETWORKS = {
    "signal": lambda **o: UNet((8,), spatial=1, **SMALL, **o),
    "signal with channels": lambda **o: UNet((8, 3), spatial=1, **SMALL, **o),
    "image": lambda **o: UNet((8, 4), **SMALL, **o),
    "image with channels and attention": lambda **o: UNet((4, 8, 3), **SMALL, attention=(1,), **o),
    "MLP": lambda **o: MLP((3,), features=8, num_blocks=1, embed_features=8, **o),
}
SLOW = "signal with channels", "image", "image with channels and attention"
each_network = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, make in NETWORKS.items()],
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signal", "image with channels and attention", "MLP"])
def test_shape_rest_and_rebuilding(name, tmp_path):
    """Zero at birth; every pixel and the noise level count once awake; a checkpoint brings it back."""
    network = NETWORKS[name](rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), network.event_shape)
    out = run(network, x, 0.1)
    assert out.shape == network.event_shape and (out == 0).all()
    network = awake(network)
    assert (run(network, x, 0.1) != run(network, x, 0.5)).any()
    weights = jax.random.normal(jax.random.key(2), x.shape)
    assert (slope(*nnx.split(network), x, weights) != 0).all()  # of a random sum of all values, in each pixel
    checkpoint.save(tmp_path / "saved", NetworkDenoiser(network))
    again = checkpoint.load(tmp_path / "saved").backbone
    np.testing.assert_array_equal(run(again, x, 0.1), run(network, x, 0.1))


@each_network
@jax.default_matmul_precision("highest")  # a GPU rounds to ten bits otherwise, batch and single differently
def test_conditions(make):
    """A present condition counts, an absent one does not, and None is the absent one; row by row under vmap."""
    network = awake(make(rngs=nnx.Rngs(0), cond_shape=(2,)))
    x, cond, other = jnp.ones(network.event_shape), jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    seen, seen_other = run(network, x, 0.1, cond), run(network, x, 0.1, other)
    assert (seen != seen_other).any()
    np.testing.assert_array_equal(run(network, x, 0.1, Condition(cond, jnp.asarray(True))), seen)
    absent = run(network, x, 0.1, None)
    for value in (cond, other):
        np.testing.assert_allclose(run(network, x, 0.1, Condition(value, jnp.asarray(False))), absent, rtol=1e-6)
    rows = Condition(jnp.stack([cond, cond]), jnp.array([True, False]))
    batch = jax.jit(jax.vmap(partial(run, network, x, 0.1)))(rows)
    np.testing.assert_allclose(batch, jnp.stack([seen, absent]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradient_in_the_condition_of_a_frozen_denoiser(x64):
    """Against central differences, through the preconditioning too: freezing stops the weights, not the condition."""
    denoiser = NetworkDenoiser(awake(MLP((3,), features=8, cond_shape=(2,), rngs=nnx.Rngs(0))), scale=2.0)
    x_t, cond = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.5, -0.4])

    @jax.jit
    def total(cond):
        return (denoiser(x_t, 0.5, Condition(cond, jnp.asarray(True))).x0 ** 2).sum()

    gradient, h = jax.jit(jax.grad(total))(cond), 1e-3  # the network runs in single precision
    for i in range(2):
        step = jnp.zeros(2).at[i].set(h)
        np.testing.assert_allclose(gradient[i], (total(cond + step) - total(cond - step)) / (2 * h), rtol=2e-2)
    assert (np.abs(gradient) > 1e-2).all()


def test_shifts_are_followed_inside():
    """Convolutions commute with shifts: far from the edge, by as many places as the coarsest level has stride."""
    network = awake(UNet((64,), spatial=1, **SMALL, rngs=nnx.Rngs(0)))
    x = jnp.zeros(64).at[30:34].set(jnp.array([1.0, -2.0, 3.0, 0.5]))
    # the normalisation sees the whole signal, which a shift inside leaves as it is but for the edges
    here, there = run(network, x, 0.1), run(network, jnp.roll(x, 2), 0.1)
    assert np.abs(here).max() > 1e-2
    np.testing.assert_allclose(there[18:48], here[16:46], rtol=1e-3, atol=1e-3 * float(np.abs(here).max()))


def test_a_million_weights():
    backbone = jax.eval_shape(lambda: nnx.split(UNet((28, 28), rngs=nnx.Rngs(0)))[1])
    count = sum(leaf.size for leaf in jax.tree.leaves(backbone))
    assert 0.9e6 < count < 1.3e6, count


def test_a_batch_is_one_convolution():
    """Under vmap no convolution is grouped over the batch or repeats its weights."""
    network = UNet((8, 8), **SMALL, rngs=nnx.Rngs(0))
    graphdef, weights = nnx.split(network)
    jaxpr = jax.make_jaxpr(lambda x: jax.vmap(lambda x: nnx.merge(graphdef, weights)(x, 0.1))(x))(jnp.ones((5, 8, 8)))
    programs = [jaxpr, *(e.params["call_jaxpr"] for e in jaxpr.eqns if "call_jaxpr" in e.params)]
    found = [e for program in programs for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(found) > 5
    for equation in found:
        assert equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1
        assert equation.invars[0].aval.ndim == 4 and 5 in equation.invars[0].aval.shape


BAD = {
    "odd": (lambda r: UNet((28, 30), rngs=r), r"size 30 .* cannot be halved 2 times. Pad it to 32, or give fewer"),
    "no channels": (lambda r: UNet((8,), rngs=r), "event_shape must have 2 sizes and, if any, channels"),
    "spatial": (lambda r: UNet((8, 8, 8), spatial=3, rngs=r), "spatial must be one of 1, 2; got 3"),
    "blocks": (lambda r: UNet((8, 8), num_blocks=0, rngs=r), "num_blocks must be at least 1"),
    "attention": (lambda r: UNet((8, 8), attention=(3,), rngs=r), "attention level must be one of 0, 1, 2; got 3"),
    "cond": (lambda r: UNet((8, 8), **SMALL, rngs=r)(jnp.ones((8, 8)), 0.1, jnp.ones(2)), "this UNet is unconditional"),
    "cond shape": (lambda r: ConditionEmbedding((2,), 4, rngs=r)(jnp.ones(3)), r"cond must have shape \(2,\); got"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))
