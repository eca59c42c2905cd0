r"""Conditioned denoisers: what is the clean point behind a noisy one, given an observation too?

Observe $y = A x + \text{noise}$ with covariance $S_y$, and let the denoiser say that $x$ given $x_t$ has mean
$\hat x_0$ and covariance $V$. Were that law Gaussian, the observation would shift the mean by one formula,

$$\hat x_0(x_t \mid y) = \hat x_0 + \frac{\sigma_t^2}{\alpha_t} J^\top A^\top
\left( S_y + A V A^\top \right)^{-1} (y - A \hat x_0), \qquad J = \frac{\partial \hat x_0}{\partial x_t},$$

which is Tweedie's formula with the score of $N(y; A \hat x_0, S_y + A V A^\top)$ added, its covariance held fixed. The
published methods are choices of $V$:

    dps     0                                    the clean point taken as known
    pigdm   (lambda^2 c^2 / (lambda^2 + c^2)) I  a Gaussian prior of the data's scale c
    tmpd    (sigma^2 / alpha) diag(J 1)          row sums of Tweedie's covariance
    mmps    (sigma^2 / alpha) J                  Tweedie's covariance itself, by conjugate gradients
    flat    lambda^2 I                           a flat prior: the clean point is x_t / alpha, J = I / alpha

"mmps" is exact if the prior is Gaussian. For other priors none is, and **nothing here corrects for it**: a guided
denoiser is a proposal, a twisting function or an approximation, and kernels that use one say which. "flat" needs no
derivative of the network; it is how MCGDiff looks ahead.

A nonlinear observation is linearised at $\hat x_0$. Of a likelihood that is not Gaussian only the gradient there is
used, which is the dps form; the other choices need a Gaussian. A guided denoiser is a denoiser: any solver can walk it.

The Gaussian behind the formula has a value too, the log of the *twisting function*
$\hat p(y \mid x_t) = N(y; A \hat x_0, S_y + A V A^\top)$, which says how well a noisy point will explain the data.

References:
    Chung et al., Diffusion posterior sampling for general noisy inverse problems, 2023,
    https://arxiv.org/abs/2209.14687.
    Song et al., Pseudoinverse-guided diffusion models for inverse problems, 2023,
    https://openreview.net/forum?id=9_gsMA8MRKQ.
    Boys et al., Tweedie moment projected diffusions for inverse problems, 2023, https://arxiv.org/abs/2310.06721.
    Rozet et al., Learning diffusion priors from observations by expectation maximization, 2024 (MMPS),
    https://arxiv.org/abs/2405.13712.
    Cardoso et al., Monte Carlo guided diffusion for Bayesian linear inverse problems, 2024 (MCGDiff),
    https://arxiv.org/abs/2308.07983.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.denoise.wrapped import Around
from numpyro_diffusion.guidance.observation import Likelihood, Observation

GUIDANCES = ("dps", "pigdm", "tmpd", "mmps", "flat")
LOG_FLOOR = -1e5
"""A twisting function is positive: where it is zero, or not a number, it counts as this much."""

LinearMap = Callable[[jax.Array], jax.Array]


class Outlook(NamedTuple):
    """What a noisy point tells about the clean one and about the data."""

    x0: jax.Array  # posterior mean under the prior, of `event_shape`
    guided: jax.Array  # posterior mean given the observation too
    log_twist: jax.Array  # log of the twisting function, in nats


class _View(NamedTuple):
    """A law of the clean point behind a noisy one, as far as the formula needs it."""

    prediction: Prediction  # under the prior
    centre: jax.Array  # mean of the law that the observation is predicted with
    spread: LinearMap  # its covariance V
    pull: LinearMap  # a gradient in the clean point, as a shift of its mean: (sigma^2 / alpha) J'

    @property
    def x0(self) -> jax.Array:
        return self.prediction.x0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guided(Around):
    """A denoiser given an observation, by the formula of this module.

    Args:
        base: the denoiser of the prior.
        observation: an `Observation`, or, for "dps" alone, a `Likelihood`.
        guidance: the choice of $V$: "dps", "pigdm", "tmpd", "mmps" or "flat".
        num_iterations: conjugate gradient steps of all but "dps"; as many as `y` has entries make them exact.

    Raises:
        ValueError: if the guidance is unknown, or is not "dps" for a likelihood that is not a Gaussian observation.

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
    guidance: str = field(default="mmps", metadata={"static": True})
    num_iterations: int = field(default=8, metadata={"static": True})

    def __post_init__(self) -> None:
        _checks.one_of("guidance", self.guidance, GUIDANCES)
        _checks.at_least(1, num_iterations=self.num_iterations)
        if isinstance(self.observation, Likelihood) and self.guidance != "dps":
            raise ValueError(
                f'guidance must be "dps" for a Likelihood: {self.guidance!r} needs the noise of a Gaussian Observation'
            )

    @_precision.highest()
    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        """The prediction given the observation."""
        view = self._view(x_t, t)
        return view.prediction.shifted(view.pull(self._slope(view)))

    def means(self, x_t: jax.Array, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The posterior means under the prior and given the observation, by one call of the network."""
        view = self._view(x_t, t)
        return view.x0, view.x0 + view.pull(self._slope(view))

    def _slope(self, view: _View) -> jax.Array:
        if isinstance(self.observation, Likelihood):
            return jax.grad(self.observation.log_density)(view.centre, self.observation.parameters)
        return self._direction(view, self.observation)

    def outlook(self, x_t: jax.Array, t: ArrayLike) -> Outlook:
        """Both predictions and the twisting function, the latter by a dense matrix of the observation's size.

        The matrix of "mmps" costs a derivative of the network for each entry of `y`; that of the others costs
        derivatives of the observation alone.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.

        Returns:
            An `Outlook`.
        """
        view, observation = self._view(x_t, t), self.observation
        if isinstance(observation, Likelihood):
            log_density, direction = jax.value_and_grad(observation.log_density)(view.centre, observation.parameters)
        else:
            log_density, direction = self._solve(view, observation)
        log_twist = jnp.maximum(jnp.nan_to_num(log_density, nan=LOG_FLOOR, posinf=LOG_FLOOR), LOG_FLOOR)
        return Outlook(view.x0, view.x0 + view.pull(direction), log_twist)

    def _view(self, x_t: jax.Array, t: ArrayLike) -> _View:
        schedule = self.schedule
        if self.guidance == "flat":
            level = schedule.noise_level(t).astype(x_t.dtype)
            centre = x_t / schedule.alpha(t).astype(x_t.dtype)
            return _View(self.base(x_t, t), centre, lambda v: level**2 * v, lambda v: level**2 * v)
        factor = (schedule.sigma(t) ** 2 / schedule.alpha(t)).astype(x_t.dtype)

        def predict(x_t: jax.Array) -> tuple[jax.Array, Prediction]:
            prediction = self.base(x_t, t)
            return prediction.x0.astype(x_t.dtype), prediction

        x0, jvp, prediction = jax.linearize(predict, x_t, has_aux=True)
        transposed = jax.linear_transpose(jvp, x_t)
        spread = self._spread(x0, lambda v: factor * jvp(v), t)
        return _View(prediction, x0, spread, lambda v: factor * transposed(v)[0])

    def _spread(self, x0: jax.Array, covariance: LinearMap, t: ArrayLike) -> LinearMap:
        """The second moment V as a linear map of `event_shape`."""
        if self.guidance == "mmps":
            return covariance
        if self.guidance == "tmpd":
            rows = jnp.maximum(covariance(jnp.ones_like(x0)), 0.0)
            return lambda v: rows * v
        if self.guidance == "dps":
            return jnp.zeros_like
        level, scale = self.schedule.noise_level(t), self.scale
        width = ((level * scale) ** 2 / (level**2 + scale**2)).astype(x0.dtype)
        return lambda v: width * v

    def _linearised(self, view: _View, observation: Observation) -> tuple[jax.Array, jax.Array, LinearMap, LinearMap]:
        """The residual and the noise of each entry of the observation, its tangent map and the transpose of that."""
        dtype = view.centre.dtype
        seen, see = jax.linearize(lambda x: observation.mean_of(x).astype(dtype), view.centre)
        transposed = jax.linear_transpose(see, view.centre)
        residual = (observation.y - seen).astype(dtype)
        scale = jnp.broadcast_to(observation.scale, residual.shape).astype(dtype)
        return residual, scale, see, lambda v: transposed(v)[0]

    def _direction(self, view: _View, observation: Observation) -> jax.Array:
        """The gradient of the observation's log-density in the clean point's mean, of `event_shape`."""
        residual, scale, see, unsee = self._linearised(view, observation)
        if self.guidance == "dps":
            return unsee(residual / scale**2)
        inner = lambda v: scale**2 * v + see(view.spread(unsee(v)))  # noqa: E731
        return unsee(jax.scipy.sparse.linalg.cg(inner, residual, maxiter=self.num_iterations)[0])

    def _solve(self, view: _View, observation: Observation) -> tuple[jax.Array, jax.Array]:
        r"""The log-density of the observation and its gradient, through $S^{1/2} (I + Q \Lambda Q^\top) S^{1/2}$."""
        residual, scale, see, unsee = self._linearised(view, observation)
        shape, whitened = residual.shape, (residual / scale).reshape(-1)
        whiten = lambda v: (see(view.spread(unsee(v.reshape(shape) / scale))) / scale).reshape(-1)  # noqa: E731
        matrix = jax.vmap(whiten)(jnp.eye(whitened.size, dtype=whitened.dtype))
        values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
        growth = 1.0 + jnp.maximum(values, 0.0)  # a network's covariance may have negative eigenvalues
        turned = vectors.T @ whitened
        log_scale = jnp.sum(jnp.log(scale)) + 0.5 * whitened.size * jnp.log(2.0 * jnp.pi)
        log_density = -0.5 * jnp.sum(turned**2 / growth + jnp.log(growth)) - log_scale
        return log_density, unsee((vectors @ (turned / growth)).reshape(shape) / scale)
