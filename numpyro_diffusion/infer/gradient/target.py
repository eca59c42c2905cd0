r"""The posterior of a model as a function of one vector.

In NumPyro's unconstrained coordinates $q$ of all latent sites, flattened,

$$\log \pi(q) = \sum_i \log p_i(x_i(q)) + \log L(x(q), \theta(q)) + \log |\det J(q)|,$$

with a `LogPrior` for the $\log p_i$ of the diffusion sites, and the rest of the model $L$ with the Jacobian of every
constrained support as NumPyro computes them. A model without diffusion sites has an empty sum, so the
kernels on top serve ordinary models too. The same vector and the same law as in NumPyro's HMC and NUTS: kernels on
them can be mixed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.model import checks
from numpyro_diffusion.infer.model.density import LogPrior
from numpyro_diffusion.infer.model.record import Evaluation as Parts
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite


class Evaluation(NamedTuple):
    """The target at a point."""

    log_density: jax.Array  # of the target; without a density, of the model without its diffusion priors
    gradient: jax.Array  # of the log-density of the target, (D,)


class Target:
    """The target of a model at given arguments, over vectors of shape (D,).

    Args:
        reading: the model at its arguments.
        density: what stands for the log-densities of its diffusion priors.
        z: a point as NumPyro has it, unconstrained values by site; it gives the coordinates their order.
    """

    def __init__(self, reading: Reading, density: LogPrior, z: dict[str, jax.Array]) -> None:
        self._reading, self._density = reading, density
        self.flat, self.unflatten = ravel_pytree(z)

    def _log_priors(self, parts: Parts, z: dict[str, jax.Array]) -> jax.Array:
        """The diffusion priors' part, in unconstrained coordinates."""
        total = jnp.zeros(())
        for name, prior in parts.priors.items():
            site = PriorSite.of(prior, jnp.shape(parts.values[name]))
            u = site.to_denoiser(z[name])
            total += jnp.sum(self._density.value(site.prior, u))
            if not site.same_coordinates:
                total += parts.log_jacobian.get(name, 0.0) - jnp.sum(site.log_det(u))
        return total

    def _log_rest(self, parts: Parts) -> jax.Array:
        others = [value for name, value in parts.log_jacobian.items() if name not in parts.priors]
        return parts.log_rest + sum(others, start=jnp.zeros(()))

    def _log_target(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = self.unflatten(q)
        parts = self._reading.evaluate(z)
        rest, priors = self._log_rest(parts), self._log_priors(parts, z)
        return (rest + priors).astype(q.dtype), rest.astype(q.dtype)

    def log_target(self, q: jax.Array) -> jax.Array:
        """A scalar with the gradient of the target's log-density; the log-density itself if the priors have one."""
        return self._log_target(q)[0]

    def evaluate(self, q: jax.Array) -> Evaluation:
        """The gradient at one point, and the log-density as far as the priors have one."""
        (value, rest), gradient = jax.value_and_grad(self._log_target, has_aux=True)(q)
        return Evaluation(value if self._density.has_density else rest, gradient)

    def _prior_gradient(self, q: jax.Array) -> jax.Array:
        """The gradient of the diffusion priors alone."""

        def log_priors(q: jax.Array) -> jax.Array:
            z = self.unflatten(q)
            return self._log_priors(self._reading.evaluate(z), z).astype(q.dtype)

        return jax.grad(log_priors)(q)

    def log_ratio(self, here: Evaluation, there: Evaluation, q: jax.Array, q_new: jax.Array) -> jax.Array:
        """The log-density of the target at `q_new` minus that at `q`."""
        return there.log_density - here.log_density + self._density.work(self._prior_gradient, q, q_new)

    def circulation(self, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """The work of the priors' scores around a triangle, in nats; NaN where it is not measured."""
        return self._density.work_around(self._prior_gradient, a, b, c)


def check(reading: Reading, density: LogPrior, kernel: str) -> None:
    """Raises unless every latent site is continuous and differentiable, and its prior has what the kernel needs.

    Args:
        reading: the model at its arguments.
        density: what stands for the log-densities of its diffusion priors.
        kernel: name of the kernel that asks.

    Raises:
        ValueError: if there is no latent site, one is discrete, a diffusion prior lacks what the kernel needs, or the
            model cannot be differentiated.
    """
    structure = reading.structure
    if not structure.latent:
        raise ValueError(f"{kernel} needs a latent site; the model has none")
    checks.check_fixed(kernel, structure)
    checks.check_continuous(kernel, structure)
    for name, site in reading.sites_in_the_abstract().items():
        density.check(name, site.prior, name in structure.dependent, kernel)
    try:
        target = Target(reading, density, reading.origin())
        jax.eval_shape(jax.grad(target.log_target), target.flat)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{kernel} needs a model that JAX can differentiate. Use DiffusionPCN or DiffusionGibbs for one that it "
            f"cannot: {error}"
        ) from error
