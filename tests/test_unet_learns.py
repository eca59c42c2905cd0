"""The U-Net learns images."""

import jax
import pytest
from flax import nnx

from numpyro_diffusion.data import digits
from numpyro_diffusion.nn import UNet
from numpyro_diffusion.train import fit


@pytest.mark.slow
def test_it_learns_digits():
    """In 150 steps the held-out loss is well below that of the linear guess, which is where it starts."""
    images, _ = digits(jax.random.key(0))
    backbone = UNet((8, 8), features=16, multipliers=(1, 2), num_blocks=1, rngs=nnx.Rngs(0))
    result = fit(jax.random.key(1), backbone, images, num_steps=150, batch_size=64, progress_bar=False)
    start = result.losses[:10].mean()
    assert result.held_out_losses[-1] < 0.75 * start, (start, result.held_out_losses)
