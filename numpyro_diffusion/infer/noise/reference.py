r"""The base of kernels whose proposals keep N(0, I), so that they test the rest of the density alone.

Any target is $\pi(z) \propto N(z; 0, I)\, L(z)$ with $L = \pi / N$, in unconstrained coordinates $z$. In noise space
N(0, I) *is* the prior of the diffusion sites, and $L$ the likelihood. What a move does to $N$ cancels in its
acceptance, so that what is left does not grow with the dimension: with few data a move costs the same in a thousand
dimensions as in ten, where moves that do not keep N(0, I) become shorter.

Other latent sites move in the same way, in their unconstrained coordinates. That is exact, and good if they vary on a
scale of one. If they do not, alternate with a kernel that adapts to scales. A function that makes
`Cycle([EllipticalSlice, NUTS], ...)` moves all sites by both. NumPyro's `Gibbs([(CrankNicolson(model), ["x_noise"]),
(NUTS(model), ["scale"])])` leaves the noise to one kernel and the other sites to the other.

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, 2013, https://arxiv.org/abs/1202.0709.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, State
from numpyro_diffusion.infer.kernel.start import start
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.record import Reading

Point = dict[str, jax.Array]


class ReferenceKernel(DiffusionKernel[State]):
    """Base of the kernels about N(0, I), on models without diffusion sites: `NoiseSpace` makes such a model."""

    status: ClassVar[Status] = Status("density", True, "leaves the model's law invariant")
    takes_point = True

    def _check_model(self, reading: Reading) -> None:
        structure, name = reading.structure, type(self).__name__
        if structure.diffusion:
            raise ValueError(
                f"{name} moves about N(0, I), the law of noise; the model has diffusion sites {structure.diffusion}. "
                f"Use NoiseSpace(model, {name})"
            )
        if not structure.latent:
            raise ValueError(f"{name} needs a latent site; the model has none")
        check_fixed(name, structure)
        check_continuous(name, structure)

    def _check_start(self, state: State) -> None:
        energy = state.potential_energy  # type: ignore[attr-defined]
        bad = int(jnp.sum(~jnp.isfinite(energy)))
        if bad:
            raise ValueError(
                f"the log-density is not finite at the start of {bad} of {energy.size} chains. Pass "
                "init_params where it is finite"
            )

    def _log_density(self, reading: Reading, z: Point) -> jax.Array:
        parts = reading.evaluate(z)
        return parts.log_rest + sum(parts.log_jacobian.values(), start=jnp.zeros(()))

    def _log_likelihood(self, reading: Reading, unflatten: Callable, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The density beside N(0, I) at a vector (D,), and the whole of it; logarithms."""
        log_density = self._log_density(reading, unflatten(q)).astype(q.dtype)
        return log_density + 0.5 * jnp.sum(q**2), log_density

    def _first(self, key: jax.Array, init_params: dict | None, reading: Reading) -> Point:
        """Where a chain starts."""
        return start(key, reading, init_params, self._init_strategy, partial(self._is_valid, reading))

    def _is_valid(self, reading: Reading, z: Point) -> jax.Array:
        """Whether the kernel can go on from a point."""
        return jnp.isfinite(self._log_density(reading, z))
