r"""Diffusion sites by one kernel, every other latent site by another, in turn.

A sweep moves the diffusion sites given the others, and the others given the diffusion sites. Each kernel is conditioned
as NumPyro's `Gibbs` does it, and brought up to date (`refresh`) when the other has moved. If the priors of the
diffusion sites do not depend on the other sites, the block of the others runs on the model without these priors, since
$p(\theta \mid x, y) \propto p(\theta)\, p(y \mid x, \theta)$ does not contain $p(x)$: no probability flow is solved
to move a noise level.

References:
    Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images, 1984,
    https://doi.org/10.1109/TPAMI.1984.4767596.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import NUTS
from numpyro.infer.gibbs import with_conditioning
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.combine.composed import status_of
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, hand_on
from numpyro_diffusion.infer.kernel.inner import KernelLike, arguments, begin, bind, build, keeps_arguments, on_stand_in
from numpyro_diffusion.infer.kernel.start import start, uniform
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed, check_has_prior, check_supports
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model, drop_prior
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN

Kernels = tuple[MCMCKernel, MCMCKernel]


class DiffusionGibbsState(NamedTuple):
    """State of `DiffusionGibbs`.

    Args:
        z: current values by site, in each kernel's own coordinates.
        values: the same on the supports.
        x_state: state of the x-kernel.
        rest_state: state of the rest-kernel.
        accept_prob: acceptance probability of the x-kernel's last step, NaN if it has none.
        noise_level: noise-to-signal ratio of the x-kernel's last step, NaN if it has none.
        num_score_evals: denoiser evaluations of the x-kernel's last step, per point.
        diverging: whether the last step of either block diverged.
        rng_key: random key.
    """

    z: dict[str, jax.Array]
    values: dict[str, jax.Array]
    x_state: Any
    rest_state: Any
    accept_prob: jax.Array
    noise_level: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class DiffusionGibbs(DiffusionKernel[DiffusionGibbsState]):
    """Alternates a kernel on the diffusion sites and a kernel on all other latent sites.

    Args:
        model: NumPyro model with diffusion sites and other latent sites.
        x_kernel: the kernel of the diffusion sites: a class such as `DiffusionPCN` or `NoiseSpace`, a
            `functools.partial` of one, or a kernel, which is moved to this model. NumPyro's own kernels are given the
            model with its priors' densities.
        rest_kernel: the kernel of the other sites, given in the same ways; it must be usable as a block of `Gibbs`.

    Raises:
        ValueError: for a kernel that has no `refresh`; when run, for a model without diffusion sites or with nothing
            else to sample, or for a kernel in noise space where a prior depends on other latent sites.

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
        self._kernels = self._built()
        self._unbound_kernels: dict[bool, Kernels] = {}
        self._record_of_blocks: Record = None  # type: ignore[assignment]  # each run makes its own
        for kernel in self._kernels:
            if type(kernel).refresh is MCMCKernel.refresh:
                raise ValueError(
                    f"{type(kernel).__name__} cannot be a block of DiffusionGibbs: it has no `refresh`, by which it "
                    "would notice that the other block has moved. Use NUTS, HMC or a kernel of this library"
                )

    @property
    def held(self) -> Kernels:
        """The kernel of the diffusion sites and that of the others."""
        return self._kernels

    @property
    def status(self) -> Status:
        """That of the x-kernel; the rest-kernel is NumPyro's."""
        return status_of(self._kernels[0])

    def _check_model(self, reading: Reading) -> None:
        structure = reading.structure
        check_has_prior(structure)
        check_fixed("DiffusionGibbs", structure)
        check_continuous("DiffusionGibbs", structure)
        for names in (structure.diffusion, structure.others):
            check_supports("DiffusionGibbs", structure.given(names))
        if not structure.others:
            raise ValueError("the model has no latent sites besides its diffusion sites; use the x_kernel alone")
        if structure.dependent and isinstance(self._kernels[0], NoiseSpace):
            raise ValueError(
                f"the priors of {structure.dependent} depend on other latent sites: moving those would move x, while "
                "the x-kernel keeps its noise. Use NoiseSpace(model) on all sites, or x_kernel=DiffusionPCN"
            )

    def _built(self) -> Kernels:
        """The two kernels on the model."""
        x_kernel, rest_kernel = self._given
        return build("x_kernel", x_kernel, self._model), build("rest_kernel", rest_kernel, self._model)

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        if any(map(keeps_arguments, self._kernels)):
            self._kernels = self._unbound(reading)
            bind(lambda key: self._start_blocks(self._kernels, key, init_params, reading), self._kernels, key)

    def _unbound(self, reading: Reading) -> Kernels:
        """The two kernels with nothing bound, on the model of the blocks, which both read through one record."""
        model = self._record_of_blocks.model
        kernels = tuple(on_stand_in(kernel.wrap_model(lambda _: model), model) for kernel in self._built())
        hand_on(kernels, self._block(reading, {}))
        return kernels

    def _hand_on(self, reading: Reading) -> None:
        """Both kernels read one model, without the priors of the diffusion sites if neither needs them."""
        alone = isinstance(self._kernels[0], DiffusionKernel) and not reading.structure.dependent
        model = drop_prior(self._model) if alone else self._model  # other kernels evaluate the priors themselves
        self._record_of_blocks = Record(model)
        if alone not in self._unbound_kernels:
            self._unbound_kernels[alone] = self._unbound(reading)
        self._kernels = self._unbound_kernels[alone]
        hand_on(self._kernels, self._block(reading, {}))

    def _block(self, reading: Reading, given: dict[str, jax.Array]) -> Reading:
        """The model of the blocks at the arguments of a reading, with some of its sites given."""
        return self._record_of_blocks.at(reading.args, with_conditioning(reading.kwargs, given))

    def _start_blocks(
        self, kernels: Kernels, key: jax.Array, init_params: dict | None, reading: Reading
    ) -> DiffusionGibbsState:
        """The states of the two kernels, each at the other's point."""
        diffusion, others = reading.structure.diffusion, reading.structure.others
        keys = jax.random.split(key, 4)
        if init_params is None:
            z, x_params, rest_params = {**reading.origin(), **uniform(keys[0], reading, others)}, None, None
        else:
            z = start(keys[0], reading, init_params)
            x_params, rest_params = {n: z[n] for n in diffusion}, {n: z[n] for n in others}
        values = reading.constrain(z)
        x_kernel, rest_kernel = kernels
        around_x = self._block(reading, {name: values[name] for name in others})
        x_state = begin(x_kernel, keys[1], self._num_warmup, x_params, around_x)
        around_rest = self._block(reading, _constrained(x_kernel, x_state, around_x))
        if rest_params is None and isinstance(rest_kernel, DiffusionKernel):
            rest_params = {name: z[name] for name in others}  # drawn again if they are not valid
        rest_state = begin(rest_kernel, keys[2], self._num_warmup, rest_params, around_rest)
        return self._both(keys[3], kernels, x_state, rest_state, around_rest, reading)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> DiffusionGibbsState:
        kernels = self._unbound(reading) if any(map(keeps_arguments, self._kernels)) else self._kernels
        return self._start_blocks(kernels, key, init_params, reading)

    def _step(self, state: DiffusionGibbsState, reading: Reading) -> DiffusionGibbsState:
        x_kernel, rest_kernel = self._kernels
        key, key_x, key_rest = jax.random.split(state.rng_key, 3)
        around_x = self._block(reading, {name: state.values[name] for name in reading.structure.others})
        x_state = x_kernel.sample(state.x_state._replace(rng_key=key_x), *arguments(x_kernel, around_x))
        around_rest = self._block(reading, _constrained(x_kernel, x_state, around_x))
        given = arguments(rest_kernel, around_rest)
        rest_state = rest_kernel.refresh(state.rest_state._replace(rng_key=key_rest), *given)
        rest_state = rest_kernel.sample(rest_state, *given)
        return self._both(key, (x_kernel, rest_kernel), x_state, rest_state, around_rest, reading)

    def _both(
        self, key: jax.Array, kernels: Kernels, x_state: Any, rest_state: Any, around_rest: Reading, reading: Reading
    ) -> DiffusionGibbsState:
        """The state after the rest-kernel has moved, with what the x-kernel keeps brought up to date."""
        (x_kernel, rest_kernel), diffusion = kernels, reading.structure.diffusion
        rest = _constrained(rest_kernel, rest_state, around_rest)
        x_state = x_kernel.refresh(x_state, *arguments(x_kernel, self._block(reading, rest)))
        missing = jnp.full((), jnp.nan)
        return DiffusionGibbsState(
            z={**_own(x_kernel, x_state, diffusion), **_own(rest_kernel, rest_state, rest)},
            values={**{name: around_rest.given[name] for name in diffusion}, **rest},
            x_state=x_state,
            rest_state=rest_state,
            accept_prob=getattr(x_state, "accept_prob", missing),
            noise_level=getattr(x_state, "noise_level", missing),
            num_score_evals=jnp.asarray(getattr(x_state, "num_score_evals", 0), jnp.int32),
            diverging=jnp.asarray(getattr(x_state, "diverging", False)) | getattr(rest_state, "diverging", False),
            rng_key=key,
        )

    def _check_start(self, state: DiffusionGibbsState) -> None:
        if isinstance(self._kernels[0], DiffusionKernel):
            self._kernels[0]._check_start(state.x_state)

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "DiffusionGibbs":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._kernels, kernel._unbound_kernels = kernel._built(), {}
        kernel._record_of_blocks = None  # type: ignore[assignment]
        return kernel

    def refresh(self, state: DiffusionGibbsState, model_args: tuple, model_kwargs: dict | None) -> DiffusionGibbsState:
        """Refreshes both kernels, each given the other's sites, after a composite kernel has moved others."""
        reading = self.read(model_args, model_kwargs)
        x_kernel, rest_kernel = self._kernels
        around_x = self._block(reading, {name: state.values[name] for name in reading.structure.others})
        around_rest = self._block(reading, {name: state.values[name] for name in reading.structure.diffusion})
        return state._replace(
            x_state=x_kernel.refresh(state.x_state, *arguments(x_kernel, around_x)),
            rest_state=rest_kernel.refresh(state.rest_state, *arguments(rest_kernel, around_rest)),
        )

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports."""
        reading = self.read(model_args, model_kwargs)
        return partial(self._constrain, reading, deterministic=False)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports and the model's deterministic sites."""
        reading = self.read(model_args, model_kwargs)
        return partial(self._constrain, reading, deterministic=True)

    def _constrain(self, reading: Reading, z: dict[str, jax.Array], *, deterministic: bool) -> dict[str, jax.Array]:
        x_names, structure = set(reading.structure.diffusion), reading.structure
        are_values = [getattr(kernel, "holds_values", False) for kernel in self._kernels]
        values = {name: value for name, value in z.items() if are_values[name not in x_names]}
        rest = {name: value for name, value in z.items() if name not in values}
        return reading.constrain(rest, deterministic and bool(structure.deterministic), values)

    def get_diagnostics_str(self, state: DiffusionGibbsState) -> str:
        """The diagnostics of both kernels."""
        x_kernel, rest_kernel = self._kernels
        return f"{x_kernel.get_diagnostics_str(state.x_state)} | {rest_kernel.get_diagnostics_str(state.rest_state)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernels": self._built(), "_unbound_kernels": {}, "_record_of_blocks": None}


def _own(kernel: MCMCKernel, state: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Sites of a kernel, in its own coordinates."""
    z = getattr(state, kernel.sample_field)
    return {name: z[name] for name in names}


def _constrained(kernel: MCMCKernel, state: Any, block: Reading) -> dict[str, jax.Array]:
    """Values of the sites of a kernel on their supports."""
    z = _own(kernel, state, block.structure.latent)
    return z if getattr(kernel, "holds_values", False) else block.constrain(z)
