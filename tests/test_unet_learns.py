"""The U-Net learns images; compiled as users compile it, since unoptimised convolutions are far slower."""

import jax
import pytest
from flax import nnx

from numpyro_diffusion.data import digits
from numpyro_diffusion.nn import UNet
from numpyro_diffusion.train import fit

OPTIMISED = True


@pytest.mark.slow
def test_it_learns_digits():
    """In 150 steps a small one takes a tenth off the held-out loss of the linear guess, where it starts (0.17 off)."""
    images, _ = digits(jax.random.key(0))
    backbone = UNet((8, 8), features=8, multipliers=(1, 2), num_blocks=1, rngs=nnx.Rngs(0))
    result = fit(jax.random.key(1), backbone, images, num_steps=150, batch_size=64, progress_bar=False)
    start = result.losses[:10].mean()
    assert result.held_out_losses[-1] < 0.9 * start, (start, result.held_out_losses)
