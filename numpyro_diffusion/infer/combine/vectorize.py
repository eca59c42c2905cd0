r"""A kernel for one chain, run on many chains at once.

NumPyro's `chain_method="vectorized"` hands a kernel all chains in one batch. A kernel that was written for one chain
(`Gibbs`, `BarkerMH`) refuses it, while HMC and NUTS fail on a second run with new data. This wrapper gives a kernel one
chain at a time, under `jax.vmap`. Each chain runs as it would alone.

Kernels that bind the model's arguments when they start, and therefore cannot `refresh`, are started again wherever the
program of a step is built, and the result is thrown away. They are then bound to the arguments of that program,
including new data under `jit_model_args=True`, and the compiler removes the start.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.combine.composed import status_of
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, hand_on
from numpyro_diffusion.infer.kernel.inner import bind, bound
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.record import Reading


class Vectorize(DiffusionKernel):
    """Runs a kernel for single chains with `chain_method="vectorized"`, and as before with the other chain methods.

    Sites, state and extra fields are the kernel's own.

    Args:
        kernel: a kernel on a NumPyro model.

    Raises:
        TypeError: if `kernel` is not a kernel.
        ValueError: if it moves an ensemble of chains itself, or was built on a potential function.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, BarkerMH
        >>> from numpyro_diffusion.infer import Vectorize
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> options = {"num_warmup": 200, "num_samples": 200, "num_chains": 4, "progress_bar": False}
        >>> mcmc = MCMC(Vectorize(BarkerMH(model)), **options, chain_method="vectorized")
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> mcmc.get_samples(group_by_chain=True)["x"].shape
        (4, 200)
    """

    statistics = ()

    def __init__(self, kernel: MCMCKernel) -> None:
        if not isinstance(kernel, MCMCKernel):
            raise TypeError(f"kernel must be an MCMCKernel such as BarkerMH(model); got {kernel!r}")
        name = type(kernel).__name__
        if kernel.is_ensemble_kernel:
            raise ValueError(f"{name} moves an ensemble of chains together and needs no Vectorize")
        if getattr(kernel, "model", None) is None:
            raise ValueError(f"Vectorize needs a kernel that is built on a model; got {name} on a potential function")
        super().__init__(kernel.model)
        self._kernel = kernel
        self._binds_arguments = type(kernel).refresh is MCMCKernel.refresh

    @property
    def kernel(self) -> MCMCKernel:
        """The kernel for one chain."""
        return self._kernel

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The kernel for one chain."""
        return (self._kernel,)

    @property
    def status(self) -> Status:
        """The kernel's own."""
        return status_of(self._kernel)

    @property
    def sample_field(self) -> str:  # type: ignore[override]
        """The kernel's own."""
        return self._kernel.sample_field

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The kernel's own."""
        return self._kernel.default_fields

    def _check_model(self, reading: Reading) -> None:
        if isinstance(self._kernel, DiffusionKernel):
            self._kernel._check_model(reading)

    def _check_start(self, state: Any) -> None:
        if isinstance(self._kernel, DiffusionKernel):
            self._kernel._check_start(state)

    def _bind(self, key: jax.Array, init_params: Any, reading: Reading) -> None:

        def start_kernel(key: jax.Array, init_params: Any) -> Any:
            return bound(self._kernel, key, self._num_warmup, init_params, reading.args, reading.kwargs)

        bind(start_kernel, [self._kernel], key, init_params)

    def _start(self, key: jax.Array, init_params: Any, reading: Reading) -> Any:
        kernel = copy.copy(self._kernel) if self._binds_arguments else self._kernel.wrap_model(lambda model: model)
        hand_on((kernel,), reading)
        return kernel.init(key, self._num_warmup, init_params, model_args=reading.args, model_kwargs=reading.kwargs)

    def _step(self, state: Any, reading: Reading) -> Any:
        kernel = self._kernel
        if self._binds_arguments:
            kernel = copy.copy(kernel)
            kernel.init(state.rng_key, self._num_warmup, None, model_args=reading.args, model_kwargs=reading.kwargs)
        return kernel.sample(state, reading.args, reading.kwargs)

    def wrap_model(self, wrapper: Callable) -> "Vectorize":
        """A copy of this kernel on a wrapped model."""
        return Vectorize(self._kernel.wrap_model(wrapper))

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[Any], Any]:
        """The kernel's own."""
        return self._kernel.postprocess_fn(model_args, model_kwargs or {})

    def get_diagnostics_str(self, state: Any) -> str:
        """The kernel's own."""
        return self._kernel.get_diagnostics_str(state)
