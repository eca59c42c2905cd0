"""Convolutions with derivatives of their own, against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from numpyro_diffusion.nn import UNet
from numpyro_diffusion.nn.convolve import convolve


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spatial", [1, 2])
def test_values_and_derivatives_are_those_of_jax(spatial, stride, padding):
    """Values, both first derivatives in reverse and forward, and a second one, at odd sizes."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = jax.random.normal(keys[0], (2, 2, *(7, 6)[:spatial], 3))
    kernel, d_kernel = jax.random.normal(keys[1], (2, *(3,) * spatial, 3, 4))
    places = "HW"[-spatial:]
    order = f"N{places}C", f"{places}IO", f"N{places}C"

    def jax_own(x, kernel):
        return lax.conv_general_dilated(x, kernel, (stride,) * spatial, padding, dimension_numbers=order)

    def own(x, kernel):
        return convolve(x, kernel, (stride,) * spatial, padding, dimension_numbers=order)

    def everything(convolution):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolution(x, kernel)))

        point, direction = (x, kernel), (dx, d_kernel)
        reverse = jax.grad(loss, (0, 1))
        return convolution(*point), reverse(*point), jax.jvp(loss, point, direction), jax.jvp(reverse, point, direction)

    found, truth = jax.jit(lambda: (everything(own), everything(jax_own)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, truth)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere derivatives are JAX's")
def test_no_gradient_is_a_convolution_in_another_order():
    """The step of a U-Net has as many convolutions as its values: they are quick in a loop only in that order."""
    graph, params = nnx.split(UNet((8, 8), features=8, num_blocks=1, multipliers=(1, 2), rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.sum(jax.vmap(lambda x: nnx.merge(graph, params)(x, 0.0))(x) ** 2)

    x = jnp.ones((2, 8, 8))
    number = [
        jax.jit(f).lower(params, x).as_text().count("stablehlo.convolution") for f in (loss, jax.grad(loss, (0, 1)))
    ]
    assert number[0] == number[1] > 5
