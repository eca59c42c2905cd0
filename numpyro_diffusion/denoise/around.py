"""What a denoiser that is made from another has in common with it: all but the answer."""

from jax.typing import ArrayLike

from numpyro_diffusion.denoise.prediction import Denoiser
from numpyro_diffusion.noise import Schedule


class Around:
    """Base of the denoisers that hold another as `base`, of the same schedule, event shape, location and scale."""

    base: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    @property
    def location(self) -> ArrayLike:
        return self.base.location

    @property
    def scale(self) -> ArrayLike:
        return self.base.scale
