r"""The posterior mean $\hat x_0 = E[x \mid x_t]$, the noise $\hat\varepsilon$ beside it, and their views.

A denoiser answers one question: what is the clean point behind this noisy one? Everything else that networks in the
diffusion literature predict is another form of the same answer. With $x_t = \alpha_t x + \sigma_t \varepsilon$,

$$\hat\varepsilon = \frac{x_t - \alpha_t \hat x_0}{\sigma_t}, \qquad
\nabla_{x_t} \log p_t(x_t) = -\frac{\hat\varepsilon}{\sigma_t}, \qquad
v = \alpha_t \hat\varepsilon - \sigma_t \hat x_0, \qquad
\dot x_t = \dot\alpha_t \hat x_0 + \dot\sigma_t \hat\varepsilon.$$

The second is Tweedie's formula; the last, the velocity, is the drift of the probability-flow ODE.

In exact arithmetic one of the two determines the other. In floating point it does not: where the noise is small beside
the data's values, $x_t - \alpha_t \hat x_0$ is the difference of two nearly equal numbers, and its error is divided by
$\sigma_t^2$ in the score. For $N(1000, 1)$ and noise levels from .002, no digit of the score is left in single
precision. So a `Prediction` holds both, each from a formula of its denoiser that does not cancel.

This file has the answer (`Prediction`) and the protocol (`Denoiser`); denoisers are in `analytic` (closed form),
`network` (learned) and `from_function` (written by the user). All of it is written for one point of `event_shape`;
batching is `jax.vmap`.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
    Salimans and Ho, Progressive distillation for fast sampling of diffusion models, 2022 (v),
    https://arxiv.org/abs/2202.00512.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.noise import Schedule, value_and_slope

DensityKind = Literal["normalized", "unnormalized"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prediction:
    r"""The posterior mean at a noisy point and the noise that goes with it.

    Make it by `from_x0` or `from_eps`, which fill in the other; or give both, if each has a formula that does not
    cancel.

    Args:
        x0: posterior mean $\hat x_0 = E[x \mid x_t]$, of `event_shape`.
        eps: the noise $\hat\varepsilon = E[\varepsilon \mid x_t] = (x_t - \alpha_t \hat x_0) / \sigma_t$, of
            `event_shape`.
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        schedule: the noising process.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Prediction
        >>> from numpyro_diffusion.noise import Rectified
        >>> Prediction.from_x0(jnp.array([1.0]), jnp.array([2.0]), 0.5, Rectified()).eps.tolist()
        [3.0]
    """

    x0: jax.Array
    eps: jax.Array
    x_t: jax.Array
    t: ArrayLike
    schedule: Schedule

    @classmethod
    def from_x0(cls, x0: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> "Prediction":
        r"""From the posterior mean alone: $\hat\varepsilon = (x_t - \alpha_t \hat x_0) / \sigma_t$.

        The noise loses digits where it is small beside the values of the data; give `eps` itself if it is known.
        """
        eps = (x_t - schedule.alpha(t) * x0) / schedule.sigma(t)
        return cls(x0, eps.astype(jnp.result_type(x0)), x_t, t, schedule)

    @classmethod
    def from_eps(cls, eps: jax.Array, x_t: jax.Array, t: ArrayLike, schedule: Schedule) -> "Prediction":
        r"""From the noise alone: $\hat x_0 = (x_t - \sigma_t \hat\varepsilon) / \alpha_t$."""
        x0 = (x_t - schedule.sigma(t) * eps) / schedule.alpha(t)
        return cls(x0.astype(jnp.result_type(eps)), eps, x_t, t, schedule)

    def shifted(self, by: jax.Array) -> "Prediction":
        r"""The prediction after its posterior mean has moved by `by`, of `event_shape`; `eps` keeps its digits."""
        ratio = self.schedule.alpha(self.t) / self.schedule.sigma(self.t)
        x0, eps = (self.x0 + by).astype(self.x0.dtype), (self.eps - ratio * by).astype(self.eps.dtype)
        return replace(self, x0=x0, eps=eps)

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

    A conditional denoiser takes a third argument, `denoiser(x_t, t, cond)`, and stands for a family of laws;
    `Conditioned(denoiser, cond)` is the denoiser of one of them, which solvers, densities and kernels take.

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

    def __call__(self, x_t: jax.Array, t: ArrayLike, /) -> Prediction:
        r"""Predicts the clean point.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar in [`schedule.t_min`, `schedule.t_max`].

        Returns:
            The prediction at `x_t`.
        """
        ...


def require_denoiser(denoiser: Any, name: str = "denoiser") -> Denoiser:
    """The denoiser, if it is one that can pass through `jax.jit`.

    Args:
        denoiser: what the user gave as a denoiser.
        name: what to call it in the error.

    Returns:
        `denoiser`.

    Raises:
        TypeError: if it lacks an attribute of `Denoiser`, or is not a pytree whose leaves are arrays.
    """
    kind = type(denoiser).__name__
    if not isinstance(denoiser, Denoiser):
        cure = ". To make one of a function of your own use denoise.FromFunction" if inspect.isroutine(denoiser) else ""
        raise TypeError(f"{name} must be a Denoiser such as denoise.NetworkDenoiser; got {kind}{cure}")
    for leaf in jax.tree.leaves(denoiser):
        if not isinstance(leaf, bool | int | float | complex) and not hasattr(leaf, "dtype"):
            leaf_kind = type(leaf).__name__
            of = "" if leaf is denoiser else f" (found in {name}, a {kind})"
            raise TypeError(
                f"{leaf_kind}{of} is not a pytree: register it with jax.tree_util.register_dataclass, or with "
                "jax.tree_util.register_static if it holds no arrays, or use denoise.FromFunction"
            )
    return denoiser


def density_kind(denoiser: Denoiser) -> DensityKind | None:
    """Which `log_density` a denoiser has: a normalised one, one up to a constant that may depend on time, or none.

    Args:
        denoiser: any denoiser. It may have an attribute of this name; without it, a `log_density` counts as
            normalised.

    Returns:
        "normalized", "unnormalized" or None.
    """
    if hasattr(denoiser, "density_kind"):
        return denoiser.density_kind
    return "normalized" if hasattr(denoiser, "log_density") else None
