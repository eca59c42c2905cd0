r"""The base of kernels whose state is a whole walk of the solver, from noise to data.

With the walk as state, $\pi(x_{T:0}) \propto p(x_T) \prod p(x_s \mid x_t)\, L(x_0)$ can be evaluated up to a constant,
and a kernel can leave it invariant for any number of steps. A clean point alone would not be enough: the law of a
solver's walk given its end is not known, and the noising process run backwards equals it only in the limit of many
steps. `guided_pcn` and `particle_gibbs` say how the walk moves.
"""

import jax
import jax.numpy as jnp

from numpyro_diffusion.guidance import Likelihood, Observation
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, State
from numpyro_diffusion.infer.kernel.start import Strategy, start
from numpyro_diffusion.infer.model.checks import check_walk
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.observation import GuidedSites, check_guidance, guided_sites
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.reverse.walk import check_solver
from numpyro_diffusion.solve import GaussianSolver, Solver


class WalkKernel(DiffusionKernel[State]):
    """Base of the kernels that keep a walk of all diffusion sites as their state.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites.
        guidance: one of `guidance.GUIDANCES`, or None.
        observation: what steers, or None to read the model.
        solver: a solver whose steps have a density; None takes the priors' own `sampler`.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for an unknown guidance; when run, for a model or a guidance that the kernel cannot handle.
        TypeError: for a model that is not callable or a solver whose steps have no density.
    """

    status = Status("reverse process", True, "exact for the law of the solver's walk, which is the prior to its order")

    def __init__(
        self,
        model: Model,
        *,
        guidance: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, init_strategy)
        check_guidance(guidance)
        self._look_ahead = guidance, observation
        self._solver = None if solver is None else check_solver(solver)

    def _check_model(self, reading: Reading) -> None:
        check_walk(type(self).__name__, reading)
        self._parts(reading)

    def refresh(self, state: tuple, model_args: tuple, model_kwargs: dict | None) -> tuple:
        """The identity: nothing that depends on the conditioning is kept between draws."""
        return state

    def _parts(self, reading: Reading) -> tuple[GuidedSites, GaussianSolver]:
        """The guided sites, and how to walk."""
        found = guided_sites(reading, *self._look_ahead)
        return found, solver_of(found, self._solver, type(self).__name__)

    def _start_walk(
        self, key: jax.Array, init_params: dict | None, reading: Reading
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Where a chain begins, in NumPyro's unconstrained coordinates, and the noising process of it."""
        key_point, key_noise = jax.random.split(key)
        z = start(key_point, reading, init_params, self._init_strategy)
        found, solver = self._parts(reading)
        return z, noised(key_noise, found, z, solver)

    def _weigh(
        self, found: GuidedSites, ends: jax.Array, t: jax.Array, reading: Reading
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """The clean ends of walks, in NumPyro's coordinates, and the log-density of the rest of the model there."""

        def one(x_t: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
            z = found.from_denoiser(found.guided.base(x_t, t).x0)
            return z, reading.log_rest(z)

        return jax.vmap(one)(ends)


def solver_of(found: GuidedSites, solver: Solver | None, kernel: str) -> GaussianSolver:
    """The given solver, or the sampler that all sites share.

    Raises:
        ValueError: if sites have different samplers and none is given.
        TypeError: if its steps have no density.
    """
    solvers = {site.prior.sampler for site in found.sites.values()} if solver is None else {solver}
    if len(solvers) > 1:
        raise ValueError(f"diffusion sites have different samplers; give one for all by {kernel}(solver=...)")
    return check_solver(solvers.pop())


def noised(key: jax.Array, found: GuidedSites, z: dict[str, jax.Array], solver: Solver) -> jax.Array:
    """The noising process of a clean point at all times of the solver's grid, noisiest first."""
    x, schedule, times = found.to_denoiser(z), found.guided.schedule, solver.times(found.guided)
    levels = jax.vmap(schedule.noise_level)(times)
    growth = jnp.sqrt(jnp.maximum(levels**2 - jnp.append(levels[1:], 0.0) ** 2, 0.0))
    steps = jax.vmap(lambda g, key: g * jax.random.normal(key, x.shape))(growth, jax.random.split(key, len(times)))
    noise = jnp.cumsum(steps[::-1], axis=0)[::-1]
    return jax.vmap(lambda t, noise: schedule.alpha(t) * (x + noise))(times, noise).astype(x.dtype)
