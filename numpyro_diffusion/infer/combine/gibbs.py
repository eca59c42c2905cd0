r"""Diffusion sites by one kernel, every other latent site by another, in turn.

NumPyro's own `Gibbs` does the sweeping, refreshing and conditioning. This kernel adds the split: it finds the diffusion
sites. If their priors do not depend on the other sites, the block of the others runs on the model without these priors,
since $p(\theta \mid x, y) \propto p(\theta)\, p(y \mid x, \theta)$ does not contain $p(x)$: no probability flow is
solved to move a noise level.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import HMC, NUTS
from numpyro.infer.gibbs import Gibbs, with_conditioning
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.combine.composed import status_of
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.inner import KernelLike, bind, bound, build
from numpyro_diffusion.infer.kernel.start import start
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed, check_has_prior
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model, drop_prior
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN


class DiffusionGibbsState(NamedTuple):
    """State of `DiffusionGibbs`.

    Args:
        z: current values by site, in each block's own coordinates.
        gibbs_state: state of NumPyro's `Gibbs`; its `block_states` are those of the x-kernel and the rest-kernel.
        accept_prob: acceptance probability of the x-kernel's last step, NaN if it has none.
        noise_level: noise-to-signal ratio of the x-kernel's last step, NaN if it has none.
        num_score_evals: denoiser evaluations of the x-kernel's last step, per point.
        diverging: whether the last step of either block diverged.
        rng_key: random key.
    """

    z: dict[str, jax.Array]
    gibbs_state: Any
    accept_prob: jax.Array
    noise_level: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class DiffusionGibbs(DiffusionKernel):
    """Alternates a kernel on the diffusion sites and a kernel on all other latent sites.

    Args:
        model: NumPyro model with diffusion sites and other latent sites.
        x_kernel: the kernel of the diffusion sites: a class such as `DiffusionPCN` or `NoiseSpace`, a
            `functools.partial` of one, or a kernel, which is moved to this model. NumPyro's own kernels are given the
            model with its priors' densities.
        rest_kernel: the kernel of the other sites, given in the same ways; it must be usable as a block of `Gibbs`.

    Raises:
        ValueError: when run, for a model without diffusion sites or with nothing else to sample, or for a kernel in
            noise space where a prior depends on other latent sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import DiffusionGibbs
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(x[0], noise), obs=y)
        >>> mcmc = MCMC(DiffusionGibbs(model), num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> sorted(mcmc.get_samples())
        ['noise', 'x']
    """

    statistics = ("accept_prob", "noise_level", "num_score_evals")

    def __init__(
        self,
        model: Model,
        x_kernel: KernelLike = DiffusionPCN,
        rest_kernel: KernelLike = NUTS,
    ) -> None:
        super().__init__(model)
        self._given = x_kernel, rest_kernel
        self._gibbs = None
        self._x_kernel = build("x_kernel", x_kernel, model)
        build("rest_kernel", rest_kernel, model)

    @property
    def status(self) -> Status:
        """That of the x-kernel; the rest-kernel is NumPyro's."""
        return status_of(self._x_kernel)

    def _check_model(self, reading: Reading) -> None:
        structure = reading.structure
        check_has_prior(structure)
        check_fixed("DiffusionGibbs", structure)
        check_continuous("DiffusionGibbs", structure)
        if not structure.others:
            raise ValueError("the model has no latent sites besides its diffusion sites; use the x_kernel alone")
        if structure.dependent and isinstance(self._x_kernel, NoiseSpace):
            raise ValueError(
                f"the priors of {structure.dependent} depend on other latent sites: moving those would move x, while "
                "the x-kernel keeps its noise. Use NoiseSpace(model) on all sites, or x_kernel=DiffusionPCN"
            )

    def _blocks(self, reading: Reading) -> Gibbs:
        """NumPyro's kernel on the two blocks, with nothing bound."""
        x_kernel, rest_kernel = self._given
        alone = isinstance(self._x_kernel, DiffusionKernel) and not reading.structure.dependent
        model = drop_prior(self._model) if alone else self._model  # other kernels evaluate the priors themselves
        sites = tuple(reading.structure.diffusion)
        return Gibbs([(build("x_kernel", x_kernel, model), sites), (build("rest_kernel", rest_kernel, model), None)])

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        self._gibbs = self._blocks(reading)
        params = None if init_params is None else self._params_of_blocks(self._gibbs, init_params, reading)

        def start_blocks(key: jax.Array, params: dict | None) -> Any:
            return bound(self._gibbs, key, self._num_warmup, params, reading.args, reading.kwargs)

        bind(start_blocks, [self._gibbs], key, params)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> DiffusionGibbsState:
        gibbs = self._blocks(reading)
        params = None if init_params is None else self._params_of_blocks(gibbs, init_params, reading)
        state = gibbs.init(key, self._num_warmup, params, model_args=reading.args, model_kwargs=reading.kwargs)
        return self._report(state)

    def _params_of_blocks(self, gibbs: Gibbs, init_params: dict, reading: Reading) -> dict:
        """Initial values as NumPyro's `Gibbs` takes them: unconstrained for HMC, constrained for other kernels."""
        unconstrained = start(jax.random.key(0), reading, init_params)
        constrained = reading.constrain(unconstrained)
        values = {}
        for (kernel, _), owns in zip(gibbs.blocks, (True, False), strict=True):
            given = unconstrained if isinstance(kernel, HMC) else constrained
            values |= {name: given[name] for name in init_params if (name in reading.structure.diffusion) == owns}
        return values

    def _step(self, state: DiffusionGibbsState, reading: Reading) -> DiffusionGibbsState:
        gibbs_state = state.gibbs_state._replace(rng_key=state.rng_key)
        return self._report(self._gibbs.sample(gibbs_state, reading.args, reading.kwargs))

    def _report(self, gibbs_state: Any) -> DiffusionGibbsState:
        x_state, rest_state = gibbs_state.block_states
        missing = jnp.full((), jnp.nan)
        return DiffusionGibbsState(
            z=gibbs_state.z,
            gibbs_state=gibbs_state,
            accept_prob=getattr(x_state, "accept_prob", missing),
            noise_level=getattr(x_state, "noise_level", missing),
            num_score_evals=jnp.asarray(getattr(x_state, "num_score_evals", 0), jnp.int32),
            diverging=jnp.asarray(getattr(x_state, "diverging", False)) | getattr(rest_state, "diverging", False),
            rng_key=gibbs_state.rng_key,
        )

    def _check_start(self, state: DiffusionGibbsState) -> None:
        kernel, _ = self._gibbs.blocks[0]
        if isinstance(kernel, DiffusionKernel):
            kernel._check_start(state.gibbs_state.block_states[0])

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "DiffusionGibbs":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._gibbs = None
        kernel._x_kernel = build("x_kernel", kernel._given[0], kernel._model)
        return kernel

    def refresh(self, state: DiffusionGibbsState, model_args: tuple, model_kwargs: dict | None) -> DiffusionGibbsState:
        """Refreshes both blocks, each given the other.

        NumPyro's `Gibbs` refreshes a block when another of its blocks has moved, but does not see moves outside of it.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        blocks, gibbs_state = self._gibbs.blocks, state.gibbs_state
        values = self._gibbs.get_constrain_fn(model_args, kwargs)(gibbs_state.z)

        def refreshed(kernel: MCMCKernel, sites: tuple[str, ...], block_state: Any) -> Any:
            others = {name: value for name, value in values.items() if name not in sites}
            return kernel.refresh(block_state, model_args, with_conditioning(kwargs, others))

        block_states = tuple(
            refreshed(kernel, tuple(getattr(block_state, kernel.sample_field)), block_state)
            for (kernel, _), block_state in zip(blocks, gibbs_state.block_states, strict=True)
        )
        return state._replace(gibbs_state=gibbs_state._replace(block_states=block_states))

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports."""
        return self._gibbs.get_constrain_fn(model_args, model_kwargs)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports and the model's deterministic sites."""
        return self._gibbs.postprocess_fn(model_args, model_kwargs)

    def get_diagnostics_str(self, state: DiffusionGibbsState) -> str:
        """The diagnostics of both blocks."""
        return self._gibbs.get_diagnostics_str(state.gibbs_state)
