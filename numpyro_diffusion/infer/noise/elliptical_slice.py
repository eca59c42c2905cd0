r"""Elliptical slice sampling: moves on ellipses that keep N(0, I), of a size that the data choose.

A target is written as $\pi(z) \propto N(z; 0, I)\, L(z)$, which can be done with any density by $L = \pi / N$. With
$\nu \sim N(0, I)$ the ellipse

$$z'(\theta) = z \cos\theta + \nu \sin\theta$$

keeps N(0, I) invariant for every $\theta$. A slice level $u\, L(z)$ is drawn, and $\theta$ from a bracket around 0 that
shrinks towards it until $L(z'(\theta))$ lies above the level. There is no step size, no gradient and no rejection.

In noise space N(0, I) *is* the prior and L the likelihood: `NoiseSpace(model, EllipticalSlice)`. For other latent sites
see `reference`.

References:
    Murray, Adams, MacKay, Elliptical slice sampling, 2010, https://arxiv.org/abs/1001.0175.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.kernel.choose import is_density, select, without_improper
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.noise.reference import ReferenceKernel

_MAX_STEPS = 100
"""Shrinkages of a bracket; a hundred of them leave an angle of 1e-15, on average, and the point stays where it is."""


class EllipticalSliceState(NamedTuple):
    """State of `EllipticalSlice`.

    Args:
        z: unconstrained values by site.
        potential_energy: negative log-density of the model there.
        accept_prob: one over the number of points tried in the last step.
        num_steps: that number: evaluations of the model.
        diverging: whether the density was NaN or infinite at a point tried, which was not taken.
        rng_key: random key.
    """

    z: dict[str, jax.Array]
    potential_energy: jax.Array
    accept_prob: jax.Array
    num_steps: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class EllipticalSlice(ReferenceKernel[EllipticalSliceState]):
    """Elliptical slice sampling about N(0, I) in unconstrained coordinates: for noise space, or models near that law.

    Args:
        model: NumPyro model without diffusion sites; for one with them take `NoiseSpace(model, EllipticalSlice)`.
        init_strategy: where chains start, as in NumPyro; None starts uniformly on (-2, 2), as NumPyro does.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: when run, for a model with diffusion sites, with discrete sites, or without latent sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import EllipticalSlice, NoiseSpace
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(NoiseSpace(model, EllipticalSlice), num_warmup=100, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "potential_energy", "num_steps")
    reversible = True

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> EllipticalSliceState:
        key, key_start = jax.random.split(key)
        z = self._first(key_start, init_params, reading)
        log_density = self._log_density(reading, z)
        none, one = jnp.zeros((), jnp.int32), jnp.ones_like(log_density)
        return EllipticalSliceState(z, -log_density, one, none, jnp.array(False), key)

    def _step(self, state: EllipticalSliceState, reading: Reading) -> EllipticalSliceState:
        key, key_ellipse, key_level, key_angle, key_shrink = jax.random.split(state.rng_key, 5)
        q, unflatten = ravel_pytree(state.z)
        other = jax.random.normal(key_ellipse, q.shape, q.dtype)

        here = -state.potential_energy.astype(q.dtype)
        level = here + 0.5 * jnp.sum(q**2) + jnp.log(1.0 - jax.random.uniform(key_level, (), q.dtype))
        angle = jax.random.uniform(key_angle, (), q.dtype, 0.0, 2.0 * jnp.pi)
        count = jnp.zeros((), jnp.int32)
        first = angle, angle - 2.0 * jnp.pi, angle, q, here, jnp.array(False), count, jnp.array(False)

        def going(carry: tuple) -> jax.Array:
            *_, found, tried, _ = carry
            return ~found & (tried < _MAX_STEPS)

        def shrink(carry: tuple) -> tuple:
            angle, low, high, _, _, _, tried, bad = carry
            new = q * jnp.cos(angle) + other * jnp.sin(angle)
            likelihood, log_density = self._log_likelihood(reading, unflatten, new)
            found = without_improper(likelihood) > level
            low, high = jnp.where(angle < 0.0, angle, low), jnp.where(angle < 0.0, high, angle)
            key = jax.random.fold_in(key_shrink, tried)
            next_angle = jax.random.uniform(key, (), q.dtype, low, high)
            return next_angle, low, high, new, log_density, found, tried + 1, bad | ~is_density(log_density)

        _, _, _, new, log_density, found, tried, bad = jax.lax.while_loop(going, shrink, first)
        point, log_density = select(found, (new, log_density), (q, here))
        return EllipticalSliceState(
            z=unflatten(point),
            potential_energy=-log_density.astype(state.potential_energy.dtype),
            accept_prob=(1.0 / tried).astype(state.accept_prob.dtype),
            num_steps=tried,
            diverging=bad,
            rng_key=key,
        )

    def refresh(
        self, state: EllipticalSliceState, model_args: tuple, model_kwargs: dict | None
    ) -> EllipticalSliceState:
        """Evaluates the model anew after a composite kernel has moved what it is conditioned on."""
        log_density = self._log_density(self.read(model_args, model_kwargs), state.z)
        return state._replace(potential_energy=-log_density)

    def get_diagnostics_str(self, state: EllipticalSliceState) -> str:
        """For the progress bar."""
        return f"{state.num_steps} points tried"
