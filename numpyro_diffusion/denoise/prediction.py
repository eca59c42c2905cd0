r"""The posterior mean $\hat x_0 = E[x \mid x_t]$ and its views.

A denoiser answers one question: what is the clean point behind this noisy one? Everything else that the diffusion
literature asks of a network is the same answer in another dress. With $x_t = \alpha_t x + \sigma_t \varepsilon$,

$$\hat\varepsilon = \frac{x_t - \alpha_t \hat x_0}{\sigma_t}, \qquad
\nabla_{x_t} \log p_t(x_t) = -\frac{\hat\varepsilon}{\sigma_t}, \qquad
v = \alpha_t \hat\varepsilon - \sigma_t \hat x_0, \qquad
\dot x_t = \dot\alpha_t \hat x_0 + \dot\sigma_t \hat\varepsilon.$$

The second is Tweedie's formula; the last, the velocity, is the drift of the probability-flow ODE.

This file holds the answer (`Prediction`) and the question (`Denoiser`); who answers is in `analytic` (closed form) and
`network` (learned). All of it is written for one point of `event_shape`; batching is `jax.vmap`.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
    Salimans and Ho, Progressive distillation for fast sampling of diffusion models, 2022 (v),
    https://arxiv.org/abs/2202.00512.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from jax.typing import ArrayLike

from numpyro_diffusion.noise import Schedule, value_and_slope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    r"""The posterior mean at a noisy point, with its views.

    Args:
        x0: posterior mean $E[x \mid x_t]$, of `event_shape`.
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        schedule: the noising process.
    """

    x0: jax.Array
    x_t: jax.Array
    t: ArrayLike
    schedule: Schedule

    @property
    def eps(self) -> jax.Array:
        r"""The noise, $(x_t - \alpha_t \hat x_0) / \sigma_t$."""
        return (self.x_t - self.schedule.alpha(self.t) * self.x0) / self.schedule.sigma(self.t)

    @property
    def score(self) -> jax.Array:
        r"""The score of the noisy law, $\nabla \log p_t(x_t) = -\hat\varepsilon / \sigma_t$."""
        return -self.eps / self.schedule.sigma(self.t)

    @property
    def v(self) -> jax.Array:
        r"""$\alpha_t \hat\varepsilon - \sigma_t \hat x_0$."""
        return self.schedule.alpha(self.t) * self.eps - self.schedule.sigma(self.t) * self.x0

    @property
    def velocity(self) -> jax.Array:
        r"""The drift of the probability flow, $\dot\alpha_t \hat x_0 + \dot\sigma_t \hat\varepsilon$."""
        alpha_slope = value_and_slope(self.schedule.alpha, self.t)[1]
        sigma_slope = value_and_slope(self.schedule.sigma, self.t)[1]
        return alpha_slope * self.x0 + sigma_slope * self.eps


@runtime_checkable
class Denoiser(Protocol):
    r"""Anything that predicts the clean point behind a noisy one: a pytree whose leaves are its arrays.

    Attributes:
        schedule: the noising process, in the units of the data.
        event_shape: shape of one point.
        location: a centre of the data, of `event_shape` or a scalar.
        scale: a typical standard deviation of the data, a scalar. Location and scale set the terminal law
            $N(\alpha_1 \mathrm{location}, \alpha_1^2 \mathrm{scale}^2 + \sigma_1^2)$ from which solvers start.
    """

    @property
    def schedule(self) -> Schedule: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    @property
    def location(self) -> ArrayLike: ...

    @property
    def scale(self) -> ArrayLike: ...

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: jax.Array | None = None) -> Prediction:
        r"""Predicts the clean point.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar in [`schedule.t_min`, `schedule.t_max`].
            cond: what a conditional denoiser is conditioned on; the others take None.

        Returns:
            The prediction at `x_t`.
        """
        ...
