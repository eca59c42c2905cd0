r"""What `Cycle` and `Mixture` have in common: kernels that hand a point to each other.

Kernels share a point in NumPyro's unconstrained coordinates. A composed kernel keeps the point and every kernel's own
state. To make a move it gives the kernel the point, has it evaluate its caches anew if another has moved since, lets it
move, and takes the point back. One number in the state (`fresh`) says whose caches are up to date, so nothing is
evaluated for a kernel that does not move, and an outer composite kernel, such as NumPyro's `Gibbs`, marks them all as
old at no cost.

That works for kernels that keep their point in the sample field: HMC and NUTS, and those of this library that declare
`takes_point`. A kernel that keeps its point elsewhere, in blocks (`Gibbs`) or as noise (`NoiseSpace`), would not notice
that it was moved, and is refused.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.hmc import HMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, hand_on, shared
from numpyro_diffusion.infer.kernel.inner import arguments, begin, bind, keeps_arguments, on_stand_in, takes_point
from numpyro_diffusion.infer.kernel.start import start
from numpyro_diffusion.infer.model.checks import check_fixed
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading

Factory = Callable[[Model], MCMCKernel]
_NONE = -1


class ComposedState(NamedTuple):
    """State of `Cycle` and `Mixture`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        kernel_states: each kernel's own state, where it moved last; `kernel_states.0.step_size` and the like are
            fields to collect.
        fresh: index of the kernel whose caches are those of the current point, -1 for none.
        kernel_index: index of the kernel that moved last.
        accept_prob: its acceptance probability, NaN if it has none; in a cycle one for each kernel, (num_kernels,).
        num_score_evals: its denoiser evaluations, per point, as far as it counts them; in a cycle, of all kernels.
        diverging: whether it diverged; in a cycle, whether any did.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    kernel_states: tuple[Any, ...]
    fresh: jax.Array
    kernel_index: jax.Array
    accept_prob: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class Composed(DiffusionKernel[ComposedState]):
    """Base of `Cycle` and `Mixture`: builds and checks the kernels, starts them at one point, lets one of them move.

    Args:
        kernels: kernels on the same model object and the same sites; or classes or factories, if `model` is given.
        model: NumPyro model for classes and factories.

    Raises:
        ValueError: if there is no kernel, if models differ, or a kernel cannot be handed a point.
        TypeError: if something is neither a kernel nor makes one.
    """

    takes_point = True

    def __init__(self, kernels: Sequence[MCMCKernel | Factory], model: Model | None = None) -> None:
        name = type(self).__name__
        self._given = tuple(_built(kernel, model, name) for kernel in kernels)
        if not self._given:
            raise ValueError(f"{name} needs at least one kernel; got none")
        super().__init__(self._given[0].model)
        if any(kernel.model is not self._model for kernel in self._given):
            raise ValueError(
                f"the kernels of {name} must be built on one and the same model object; got different ones. Make it "
                "once, such as model = infer.with_density(model), and give it to every kernel"
            )
        self._kernels = self._given

    @property
    def kernels(self) -> tuple[MCMCKernel, ...]:
        """The kernels as they run."""
        return self._kernels

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The kernels as they run."""
        return self._kernels

    @property
    def status(self) -> Status:
        """Exact if all kernels are, for the laws in their statements."""
        parts = [(type(kernel).__name__, status_of(kernel)) for kernel in self._given]
        needs = ", ".join(dict.fromkeys(part.needs for _, part in parts))
        statement = "; ".join(dict.fromkeys(f"{name} {part.statement}" for name, part in parts))
        return Status(needs, all(part.exact for _, part in parts), statement)

    @abc.abstractmethod
    def _warmups(self) -> Sequence[int]:
        """How many moves each kernel makes in warm-up."""

    def _check_model(self, reading: Reading) -> None:
        dropped = [name for name, site in reading.structure.latent.items() if site.is_dropped]
        for kernel in self._given:
            if isinstance(kernel, DiffusionKernel):
                kernel._check_model(reading)
            elif dropped:
                raise ValueError(
                    f"the priors of sites {dropped} are dropped from the model that {type(kernel).__name__} is given, "
                    "and it would sample without them. Inside DiffusionGibbs, mix kernels of this library, such as MALA"
                )
            else:
                check_fixed(type(self).__name__, reading.structure)

    def _check_start(self, state: ComposedState) -> None:
        for kernel, kernel_state in zip(self._kernels, state.kernel_states, strict=True):
            if isinstance(kernel, DiffusionKernel):
                kernel._check_start(kernel_state)

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        if any(map(keeps_arguments, self._kernels)):
            self._kernels = self._unbound(reading)

            def start_all(key: jax.Array, init_params: dict | None) -> Any:
                return self._start_kernels(self._kernels, key, init_params, reading)

            bind(start_all, self._kernels, key, init_params)

    def _unbound(self, reading: Reading) -> tuple[MCMCKernel, ...]:
        """Copies of the kernels that have bound nothing, which read the model through this kernel's record."""
        kernels = tuple(on_stand_in(kernel.wrap_model(lambda model: model), self._model) for kernel in self._given)
        hand_on(kernels, reading)
        return kernels

    def _hand_on(self, reading: Reading) -> None:
        if self._kernels is self._given:
            self._kernels = self._unbound(reading)
        super()._hand_on(reading)

    def _start_kernels(
        self, kernels: Sequence[MCMCKernel], key: jax.Array, init_params: dict | None, reading: Reading
    ) -> tuple[dict, list]:
        """The point where all kernels start, and their states there."""
        keys = jax.random.split(key, len(kernels))
        z = None if init_params is None else start(key, reading, init_params)
        states: list = []
        for kernel, key_start, num_warmup in zip(kernels, keys, self._warmups(), strict=True):
            state = begin(kernel, key_start, num_warmup, z, reading)
            here = getattr(state, kernel.sample_field)
            if z is not None and states and set(here) != set(z):
                raise ValueError(
                    f"the kernels of {type(self).__name__} must move the same sites; {type(kernel).__name__} moves "
                    f"{sorted(here)}, those before it {sorted(z)}. For kernels on different sites use "
                    "numpyro.infer.Gibbs"
                )
            z = here if z is None or not states else z
            states.append(state)
        return z, states  # type: ignore[return-value]  # there is a kernel, and a point

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> ComposedState:
        key, key_start = jax.random.split(key)
        kernels = self._unbound(reading) if any(map(keeps_arguments, self._kernels)) else self._kernels
        z, states = self._start_kernels(kernels, key_start, init_params, reading)
        none = jnp.full((), _NONE, jnp.int32)
        return ComposedState(
            i=jnp.zeros((), jnp.int32),
            z=z,
            kernel_states=tuple(states),
            fresh=none,
            kernel_index=none,
            accept_prob=jnp.zeros((), jnp.result_type(float)),
            num_score_evals=jnp.zeros((), jnp.int32),
            diverging=jnp.array(False),
            rng_key=key,
        )

    def _move(self, index: int, state: ComposedState, key: jax.Array, reading: Reading) -> ComposedState:
        """One move of one kernel from the current point, its caches brought up to date if another moved before it."""
        kernel, states = self._kernels[index], list(state.kernel_states)
        own = states[index]._replace(**{kernel.sample_field: state.z, "rng_key": key})
        args, kwargs = arguments(kernel, reading)
        refresh = lambda own: kernel.refresh(own, args, kwargs)  # noqa: E731
        if isinstance(state.fresh, int):
            own = own if state.fresh == index else refresh(own)
        else:
            own = jax.lax.cond(shared(state.fresh) == index, lambda own: own, refresh, own)
        states[index] = own = kernel.sample(own, args, kwargs)
        accept_prob = jnp.mean(jnp.asarray(getattr(own, "accept_prob", jnp.nan)))
        return state._replace(
            z=getattr(own, kernel.sample_field),
            kernel_states=tuple(states),
            fresh=jnp.full((), index, jnp.int32),
            kernel_index=jnp.full((), index, jnp.int32),
            accept_prob=accept_prob.astype(jnp.result_type(float)),
            num_score_evals=jnp.asarray(getattr(own, "num_score_evals", 0), jnp.int32),
            diverging=jnp.any(jnp.asarray(getattr(own, "diverging", False))),
        )

    def refresh(self, state: ComposedState, model_args: tuple, model_kwargs: dict | None) -> ComposedState:
        """Marks the caches of all kernels as old; each is evaluated anew when its kernel moves."""
        return state._replace(fresh=jnp.full_like(state.fresh, _NONE))

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "Composed":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._given = tuple(part.wrap_model(lambda _: kernel._model) for part in self._given)
        kernel._kernels = kernel._given
        return kernel

    def get_diagnostics_str(self, state: ComposedState) -> str:
        """The diagnostics of all kernels."""
        parts = zip(self._kernels, state.kernel_states, strict=True)
        return " | ".join(kernel.get_diagnostics_str(kernel_state) for kernel, kernel_state in parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernels": self._given}


def _built(kernel: Any, model: Model | None, name: str) -> MCMCKernel:
    """A kernel that can be handed a point, made from the model if need be."""
    if not isinstance(kernel, MCMCKernel):
        if not callable(kernel) or model is None:
            raise TypeError(
                f"{name} takes kernels, or model= and classes or factories of kernels; got {kernel!r}"
                f"{'' if model is not None else ' and no model'}"
            )
        kernel = kernel(model)
    kind = type(kernel).__name__
    if not isinstance(kernel, MCMCKernel):
        raise TypeError(f"what {name} is given must make an MCMCKernel from a model; got {kind}")
    if not takes_point(kernel):
        raise ValueError(
            f"{kind} cannot be handed a point by {name}: it does not keep its point in its state's "
            f"{kernel.sample_field!r}, or does not refresh. Nest the other way round, with {name} as its x_kernel, its "
            "inner kernel or its block, or take DiffusionPCN, MALA, Independence, HMC or NUTS"
        )
    if getattr(kernel, "model", None) is None:
        raise ValueError(f"{name} needs kernels that are built on a model; got {kind} on a potential function")
    return kernel


def status_of(kernel: MCMCKernel) -> Status:
    """The status of a kernel, also of NumPyro's HMC and NUTS."""
    if isinstance(kernel, HMC):
        return Status("density", True, "leaves the model's own law invariant")
    return getattr(kernel, "status", None) or Status("unknown", False, "does not say what law it leaves invariant")
