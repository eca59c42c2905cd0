r"""The base of the kernels on a model's joint posterior: a target, a start, and the way back to the model.

A kernel here moves all latent sites of a model at once, in NumPyro's unconstrained coordinates, by the gradient of a
`Target`, in which `density=` stands for the log-densities of the diffusion priors. It starts at a draw of these priors,
reports sites on their supports, and can be a block of NumPyro's `Gibbs`. `langevin`, `hmc` and `diffusive_gibbs` say
how to move.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.gradient import target
from numpyro_diffusion.infer.gradient.target import Evaluation, Target
from numpyro_diffusion.infer.kernel.choose import all_finite
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, State
from numpyro_diffusion.infer.kernel.start import MAX_TRIES, Strategy, start
from numpyro_diffusion.infer.model.density import LogPrior, Source, Status, log_prior_of
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading


class GradientKernel(DiffusionKernel[State]):
    """Base of the kernels that move by the gradient of the joint posterior.

    Args:
        model: NumPyro model, with diffusion sites or without.
        density: what stands for the log-densities of the diffusion priors: a `LogPrior`, or "auto", "denoiser" or
            "flow", short for `Density` of these.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` is not callable or `density` is of another type.
        ValueError: if `density` is an unknown string.
    """

    takes_point = True

    def __init__(self, model: Model, density: LogPrior | Source, init_strategy: Strategy | None = None) -> None:
        super().__init__(model, init_strategy)
        self._density = log_prior_of(density)

    @property
    def status(self) -> Status:
        """What the kernel is exact for, or what is approximate."""
        return self._density.status

    @property
    def density(self) -> LogPrior:
        """What stands for the log-densities of the diffusion priors."""
        return self._density

    def _check_model(self, reading: Reading) -> None:
        target.check(reading, self._density, type(self).__name__)

    def _target(self, z: dict[str, jax.Array], reading: Reading) -> Target:
        return Target(reading, self._density, z)

    def _first(self, key: jax.Array, init_params: dict | None, reading: Reading) -> tuple[dict, Evaluation]:
        """Where a chain starts, and the target there."""

        def evaluate(z: dict[str, jax.Array]) -> Evaluation:
            at = self._target(z, reading)
            return at.evaluate(at.flat)

        def valid(z: dict[str, jax.Array]) -> jax.Array:
            at = evaluate(z)
            return jnp.isfinite(at.log_density) & all_finite(at.gradient)

        z = start(key, reading, init_params, self._init_strategy, valid)
        return z, evaluate(z)

    def _evaluations(self, reading: Reading, targets: int = 1, tests: int = 0) -> int:
        """Denoiser evaluations behind some evaluations of the target and some tests, per point."""
        sites = reading.sites_in_the_abstract().values()
        return sum(self._density.evaluations(site.prior, targets, tests) for site in sites)

    def _check_start(self, state: State) -> None:
        density, gradient = state.evaluation  # type: ignore[attr-defined]
        bad = ~(jnp.isfinite(density) & jnp.isfinite(gradient).all(-1))
        if not bool(bad.any()):
            return
        one = (lambda leaf: leaf[int(jnp.argmax(bad))]) if bad.ndim else (lambda leaf: leaf)  # noqa: E731
        z = jax.tree.map(one, state.z)  # type: ignore[attr-defined]
        by_site = ravel_pytree(z)[1](one(gradient))
        culprits = sorted(name for name, value in by_site.items() if not bool(jnp.isfinite(value).all()))
        where = f"in the gradient of sites {culprits}" if culprits else "in the value"
        raise ValueError(
            f"the log-density or its gradient is not finite at the start of {int(bad.sum())} of {bad.size} chains, "
            f"{where}, after {MAX_TRIES} draws where none was given. Pass init_params where it is finite"
        )

    def refresh(self, state: State, model_args: tuple, model_kwargs: dict | None) -> State:
        """Evaluates the target anew after a composite kernel has moved the point or what it is conditioned on."""
        at = self._target(state.z, self.read(model_args, model_kwargs))  # type: ignore[attr-defined]
        return state._replace(evaluation=at.evaluate(at.flat))


class MetropolisKernel(GradientKernel[State]):
    """Base of those whose test is that of the density, or of what stands for it.

    Args:
        model: NumPyro model, with diffusion sites or without.
        density: as in `GradientKernel`, but not `Score`.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` is not callable or `density` is of another type.
        ValueError: if `density` is an unknown string or `Score`.
    """

    def __init__(self, model: Model, density: LogPrior | Source, init_strategy: Strategy | None = None) -> None:
        super().__init__(model, density, init_strategy)
        if not self._density.can_test:
            raise ValueError(
                f"{type(self).__name__} tests its moves; {density} has nothing to test with. Use "
                'density="auto" or LineIntegral()'
            )
        absent = "circulation" if self._density.has_density else "potential_energy"
        self.statistics = tuple(name for name in type(self).statistics if name != absent)


def flatten(z: dict[str, jax.Array]) -> jax.Array:
    """The vector of a point, shape (D,)."""
    return ravel_pytree(z)[0]
