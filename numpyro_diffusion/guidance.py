r"""Conditioned denoisers: what is the clean point behind a noisy one, given an observation too?

Observe $y = A x + \text{noise}$ with covariance $S_y$, and let the denoiser say that $x$ given $x_t$ has mean
$\hat x_0$ and covariance $V$. Were that law Gaussian, the observation would shift the mean by one formula,

$$\hat x_0(x_t \mid y) = \hat x_0 + \frac{\sigma_t^2}{\alpha_t} J^\top A^\top
\left( S_y + A V A^\top \right)^{-1} (y - A \hat x_0), \qquad J = \frac{\partial \hat x_0}{\partial x_t},$$

which is Tweedie's formula with the score of $N(y; A \hat x_0, S_y + A V A^\top)$ added, its covariance held. The
published methods are choices of $V$:

    dps     0                                    the clean point taken for known
    pigdm   (lambda^2 c^2 / (lambda^2 + c^2)) I  a Gaussian prior of the data's scale c
    tmpd    (sigma^2 / alpha) diag(J 1)          row sums of Tweedie's covariance
    mmps    (sigma^2 / alpha) J                  Tweedie's covariance itself, by conjugate gradients

The last is exact if the prior is Gaussian. None is for other priors, and **nothing here corrects for it**: a guided
denoiser is a proposal, a twisting function or an approximation, and kernels that use one say which.

A nonlinear observation is linearised at $\hat x_0$. A likelihood that is no Gaussian has its gradient there, which is
the dps form; the other moments need a Gaussian. A guided denoiser is a denoiser: any solver walks it.

References:
    Chung et al., Diffusion posterior sampling for general noisy inverse problems, 2023,
    https://arxiv.org/abs/2209.14687.
    Song et al., Pseudoinverse-guided diffusion models for inverse problems, 2023,
    https://openreview.net/forum?id=9_gsMA8MRKQ.
    Boys et al., Tweedie moment projected diffusions for inverse problems, 2023, https://arxiv.org/abs/2310.06721.
    Rozet et al., Learning diffusion priors from observations by expectation maximization, 2024 (MMPS),
    https://arxiv.org/abs/2405.13712.
    Ho and Salimans, Classifier-free diffusion guidance, 2022, https://arxiv.org/abs/2207.12598.
    Lugmayr et al., RePaint: inpainting using denoising diffusion probabilistic models, 2022,
    https://arxiv.org/abs/2201.09865.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.noise import Schedule

MOMENTS = ("dps", "pigdm", "tmpd", "mmps")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    r"""A Gaussian observation of a clean point, $y = h(x) + s \varepsilon$.

    Args:
        y: what was observed, of any shape.
        scale: its standard deviation $s$, a scalar or of the shape of `y`.
        mean: the map $h$, from a point of `event_shape` and `parameters` to the shape of `y`.
        parameters: arrays that the map needs, such as a matrix; a pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.guidance import linear
        >>> linear(jnp.ones((1, 2)), jnp.array([3.0]), 0.5).mean_of(jnp.ones(2)).tolist()
        [2.0]
    """

    y: jax.Array
    scale: jax.Array
    mean: Callable[[jax.Array, Any], jax.Array] = field(metadata={"static": True})
    parameters: Any = None

    def mean_of(self, x: jax.Array) -> jax.Array:
        """What is observed of a clean point without noise."""
        return self.mean(x, self.parameters)


def linear(matrix: ArrayLike, y: ArrayLike, scale: ArrayLike) -> Observation:
    r"""The observation $y = A x + s \varepsilon$ of a flattened point.

    Args:
        matrix: A, shape (m, d) with d the size of an event.
        y: shape (m,).
        scale: standard deviation, a scalar or (m,).

    Raises:
        ValueError: if shapes do not agree or a scale is not positive.
    """
    matrix, y, scale = (jnp.asarray(v, jnp.result_type(float)) for v in (matrix, y, scale))
    if matrix.ndim != 2 or y.shape != matrix.shape[:1]:
        raise ValueError(f"matrix must be (m, d) and y (m,); got {matrix.shape} and {y.shape}")
    if scale.shape not in ((), y.shape):
        raise ValueError(f"scale must be a scalar or of shape {y.shape}; got {scale.shape}")
    if not isinstance(scale, jax.core.Tracer) and not bool((scale > 0).all()):
        raise ValueError("scale must be positive. For a hard constraint on entries use `reconstructed`")
    return Observation(y, scale, _apply_matrix, matrix)


def _apply_matrix(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return matrix @ x.reshape(-1)


class _Around:
    """What a denoiser made from another has in common with it."""

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Likelihood:
    """Any log-likelihood of a clean point that can be differentiated.

    Args:
        log_density: a function of the point and of `parameters`, up to a constant.
        parameters: arrays that it needs; a pytree.
    """

    log_density: Callable[[jax.Array, Any], jax.Array] = field(metadata={"static": True})
    parameters: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guided(_Around):
    """A denoiser given an observation, by the formula of this module.

    Args:
        base: the denoiser of the prior.
        observation: an `Observation`, or, for "dps" alone, a `Likelihood`.
        moment: the second moment: "dps", "pigdm", "tmpd" or "mmps".
        num_iterations: conjugate gradient steps of all but "dps"; as many as `y` has entries make them exact.

    Raises:
        TypeError: if `observation` is neither.
        ValueError: if the moment is unknown, or is not "dps" for a likelihood that is no Gaussian observation.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.guidance import Guided, linear
        >>> guided = Guided(Gaussian([0.0, 0.0]), linear(jnp.eye(2), jnp.array([2.0, 0.0]), 1.0), "mmps")
        >>> [round(v, 3) for v in guided(jnp.zeros(2), 1.0).x0.tolist()]  # much noise: the posterior mean, y / 2
        [1.0, 0.0]
    """

    base: Denoiser
    observation: Observation | Likelihood
    moment: str = field(default="mmps", metadata={"static": True})
    num_iterations: int = field(default=8, metadata={"static": True})

    def __post_init__(self) -> None:
        _checks.one_of("moment", self.moment, MOMENTS)
        _checks.at_least(1, num_iterations=self.num_iterations)
        if isinstance(self.observation, Likelihood) and self.moment != "dps":
            raise ValueError(
                f'moment must be "dps" for a Likelihood: {self.moment!r} needs the noise of a Gaussian Observation'
            )

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> Prediction:
        """The prediction given the observation."""
        schedule = self.schedule
        factor = (schedule.sigma(t) ** 2 / schedule.alpha(t)).astype(x_t.dtype)
        x0, jvp = jax.linearize(lambda x_t: self.base(x_t, t, cond).x0, x_t)
        transposed = jax.linear_transpose(jvp, x_t)
        direction = self._direction(x0, lambda v: factor * jvp(v), t)
        return Prediction(x0 + factor * transposed(direction)[0], x_t, t, schedule)

    def _direction(self, x0: jax.Array, covariance: Callable[[jax.Array], jax.Array], t: ArrayLike) -> jax.Array:
        """The gradient of the observation's log-density in the clean point's mean, of `event_shape`."""
        observation = self.observation
        if isinstance(observation, Likelihood):
            return jax.grad(observation.log_density)(x0, observation.parameters)
        seen, see = jax.linearize(observation.mean_of, x0)
        unsee = jax.linear_transpose(see, x0)
        residual = (observation.y - seen).astype(x0.dtype)
        variance = jnp.broadcast_to(observation.scale**2, residual.shape).astype(x0.dtype)
        if self.moment == "dps":
            return unsee(residual / variance)[0]
        moment = self._moment(x0, covariance, t)
        inner = lambda v: variance * v + see(moment(unsee(v)[0]))  # noqa: E731
        return unsee(jax.scipy.sparse.linalg.cg(inner, residual, maxiter=self.num_iterations)[0])[0]

    def _moment(
        self, x0: jax.Array, covariance: Callable[[jax.Array], jax.Array], t: ArrayLike
    ) -> Callable[[jax.Array], jax.Array]:
        """The second moment V as a linear map of `event_shape`."""
        if self.moment == "mmps":
            return covariance
        if self.moment == "tmpd":
            rows = jnp.maximum(covariance(jnp.ones_like(x0)), 0.0)
            return lambda v: rows * v
        level, scale = self.schedule.noise_level(t), self.scale
        width = ((level * scale) ** 2 / (level**2 + scale**2)).astype(x0.dtype)
        return lambda v: width * v


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassifierFree(_Around):
    r"""Guidance without a likelihood: $\hat x_0(\varnothing) + w \left( \hat x_0(c) - \hat x_0(\varnothing) \right)$.

    At $w = 1$ it is the conditional denoiser, at $w = 0$ the unconditional one. Above 1 it sharpens, and is then the
    denoiser of no law: the product $p_t(x_t)\, p_t(c \mid x_t)^w$ at each time is not the noised version of one.

    Args:
        base: a denoiser trained with conditions and without.
        cond: the condition.
        weight: $w$, a scalar.
    """

    base: Denoiser
    cond: ArrayLike
    weight: ArrayLike = 1.0

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: None = None) -> Prediction:
        """The prediction under the condition held."""
        without, given = self.base(x_t, t).x0, self.base(x_t, t, self.cond).x0
        return Prediction(without + jnp.asarray(self.weight, x_t.dtype) * (given - without), x_t, t, self.schedule)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reconstructed(_Around):
    """Entries that are known without noise, put in the place of their predictions (RePaint).

    Walked by a solver, the known entries end where they should and the others see them through $x_t$ alone: an
    approximation, like its model.

    Args:
        base: the denoiser of the prior.
        known: which entries are known, truth values of `event_shape`.
        y: their values, of `event_shape`; what stands at the others does not matter.
    """

    base: Denoiser
    known: jax.Array
    y: jax.Array

    def __call__(self, x_t: jax.Array, t: ArrayLike, cond: ArrayLike | None = None) -> Prediction:
        """The prediction with the known entries in place."""
        x0 = self.base(x_t, t, cond).x0
        return Prediction(jnp.where(self.known, jnp.asarray(self.y, x0.dtype), x0), x_t, t, self.schedule)
