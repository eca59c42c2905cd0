r"""Looking ahead at data that are not Gaussian, no farther than the likelihood supports.

Guidance by the gradient of a log-likelihood at the predicted clean point $\hat x_0$, the "dps" form, shifts the
prediction by

$$\delta = V g, \qquad g = \nabla \log L(\hat x_0), \quad V = \frac{\sigma_t^2}{\alpha_t}
\frac{\partial \hat x_0}{\partial x_t} \approx \mathrm{Cov}[x \mid x_t].$$

That is right while the likelihood is wide compared with $V$. Where it is narrow, as at every high noise level, it
overshoots by the factor $V / (\text{width of } L)^2$: counts of 45 from a rate of 10 send the next prediction to where
the rate is $e^{60}$, and no weight brings such a particle back. The value $\log L(\hat x_0)$ is overconfident by as
much.

Under the Gaussian $N(\hat x_0, V)$ of the clean point, a shift $V w$ has the log-density of prior and data

$$\varphi(w) = \log L(\hat x_0 + V w) - \tfrac12 w^\top V w,$$

and both guidance and twisting function come from its maximum: a Laplace approximation without its determinant, which
for most likelihoods is nearly the same for all particles of a level. The search takes a few steps of conjugate
gradients, each with the best of a few lengths; a step costs a product with $V$ (one derivative of the network) and some
values of the likelihood. Any result is correct, as everywhere in `twisted`; a better one makes weights more even.

This is for any likelihood; for Gaussian observations `guidance.Guided` knows $V$ in all directions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.guidance import Guided, Likelihood
from numpyro_diffusion.guidance.guided import Outlook
from numpyro_diffusion.noise import Schedule

_NUM_STEPS = 4
_COARSE = (0.0, *(float(4.0**-k) for k in range(8)))
_FINE = tuple(np.geomspace(0.25, 4.0, 9).tolist())


@dataclass(frozen=True)
class LookAhead:
    """A guided denoiser for walks: how well a point will explain the data, and where it should go.

    Args:
        guided: the guided denoiser; its own formula is used for a Gaussian observation.
    """

    guided: Guided

    @property
    def base(self) -> Denoiser:
        return self.guided.base

    @property
    def schedule(self) -> Schedule:
        return self.guided.schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.guided.event_shape

    def outlook(self, x_t: jax.Array, t: ArrayLike) -> Outlook:
        """Both predictions and the log of the twisting function, minus infinity where the likelihood is zero or NaN.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.
        """
        observation = self.guided.observation
        if not isinstance(observation, Likelihood):
            return self.guided.outlook(x_t, t)

        def log_likelihood(x: jax.Array) -> jax.Array:
            return observation.log_density(x, observation.parameters)

        factor = (self.schedule.sigma(t) ** 2 / self.schedule.alpha(t)).astype(x_t.dtype)
        x0, jvp = jax.linearize(lambda x_t: self.base(x_t, t).x0.astype(x_t.dtype), x_t)
        transposed = jax.linear_transpose(jvp, x_t)
        shift, log_twist = _highest(log_likelihood, x0, lambda v: factor * transposed(v)[0])
        return Outlook(x0, x0 + shift, log_twist)


class _Climb(NamedTuple):
    """Where the search for the highest value is; each pair is a vector and its product with V."""

    at: tuple[jax.Array, jax.Array]
    direction: tuple[jax.Array, jax.Array]
    gradient: tuple[jax.Array, jax.Array]
    value: jax.Array


def _highest(
    log_likelihood: Callable[[jax.Array], jax.Array], x0: jax.Array, spread: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A shift of the clean point that prior and data together make likely, and the log-density there."""

    def value(w: jax.Array, shift: jax.Array) -> jax.Array:
        found = log_likelihood(x0 + shift) - 0.5 * jnp.sum(w * shift)
        return jnp.where(jnp.isnan(found) | jnp.isposinf(found), -jnp.inf, found)

    def step(_: int, climb: _Climb) -> _Climb:
        (w, shift), (p, v_p), (old, v_old) = climb.at, climb.direction, climb.gradient
        r = jax.grad(log_likelihood)(x0 + shift) - w
        v_r = spread(r)
        size, size_old = jnp.sum(r * v_r), jnp.sum(old * v_old)
        mixed = jnp.maximum((size - jnp.sum(r * v_old)) / jnp.where(size_old > 0.0, size_old, 1.0), 0.0)
        p, v_p = r + mixed * p, v_r + mixed * v_p
        usable = jnp.isfinite(p).all() & jnp.isfinite(v_p).all()
        p, v_p = jnp.where(usable, p, 0.0), jnp.where(usable, v_p, 0.0)

        def best(lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = jax.vmap(lambda c: value(w + c * p, shift + c * v_p))(lengths)
            return lengths[jnp.argmax(values)], jnp.max(values)

        length = best(jnp.asarray(_COARSE, x0.dtype))[0]
        length, found = best(jnp.minimum(length * jnp.asarray(_FINE, x0.dtype), 1.0))  # concave: 1 is the longest
        return _Climb((w + length * p, shift + length * v_p), (p, v_p), (r, v_r), found)

    zero = jnp.zeros_like(x0)
    none = zero, zero
    climb = jax.lax.fori_loop(0, _NUM_STEPS, step, _Climb(none, none, none, value(zero, zero)))
    return climb.at[1], climb.value
