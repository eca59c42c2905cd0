"""A kernel inside a kernel: given as a class, a factory or an instance, and bound to the model's arguments.

Kernels on a stand-in of the model (`stand_in`) that can `refresh`, as HMC can, keep nothing of the model's arguments,
and are started within the compiled start. Others keep functions of the model from their `init`, so they must be started
with arguments that still exist when these are called. The tracers of a start that is being compiled do not. `bind`
therefore starts a kernel abstractly, with the arguments as they are and without computing anything, and `started` takes
the state of a copy that is thrown away.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
from numpyro.handlers import seed
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.hmc import HMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn

from numpyro_diffusion.infer.kernel.choose import all_finite
from numpyro_diffusion.infer.kernel.stand_in import Unconstrained, inside
from numpyro_diffusion.infer.kernel.start import is_block, start, strategy_of
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading

KernelLike: TypeAlias = MCMCKernel | Callable[..., MCMCKernel]
"""A kernel, or a factory of one from a model: a kernel class, a `functools.partial` of one, a function."""


def build(argument: str, kernel: KernelLike, model: Model, **options: Any) -> MCMCKernel:
    """A kernel on a model.

    Args:
        argument: name of the argument by which the kernel was given, for errors.
        kernel: a kernel class, a factory, or a kernel on any model, which is moved to this one.
        model: the model.
        **options: passed on to a class or a factory.

    Returns:
        The kernel.

    Raises:
        TypeError: if it is not a kernel and does not make one.
        ValueError: for options given with an instance.
    """
    if isinstance(kernel, MCMCKernel):
        if options:
            raise ValueError(f"{argument} is a kernel already; give the options {sorted(options)} to it")
        return kernel.wrap_model(lambda _: model)
    if not callable(kernel):
        raise TypeError(f"{argument} must be a kernel or make one from a model, as NUTS does; got {kernel!r}")
    made = kernel(model, **options)
    if not isinstance(made, MCMCKernel):
        raise TypeError(f"{argument} must make an MCMCKernel from a model; got {type(made).__name__}")
    return made


def bind(start: Callable[..., Any], kernels: Iterable[MCMCKernel], *operands: Any) -> None:
    """Starts kernels in the abstract, so that they keep what they need of a model; nothing is computed if possible.

    Args:
        start: starts the kernels, at arguments of the model that they may keep.
        kernels: those that `start` starts. HMC keeps the bounds of its sites; where the model computes these, only a
            start that computes them too will do.
        *operands: what `start` is called with.
    """
    jax.eval_shape(start, *operands)
    if any(_holds_symbols(kernel) for kernel in kernels):
        start(*operands)


def keeps_arguments(kernel: MCMCKernel) -> bool:
    """Whether a kernel on a stand-in, or one that it holds, keeps the arguments that it was started with.

    Such kernels cannot `refresh`, or look for a step size in warm-up.
    """
    held = getattr(kernel, "held", getattr(kernel, "_kernels", ()))
    keeps = type(kernel).refresh is MCMCKernel.refresh or getattr(kernel, "_find_heuristic_step_size", False)
    return keeps or any(map(keeps_arguments, held))


def takes_point(kernel: MCMCKernel) -> bool:
    """Whether a kernel continues from a point that is put into its state, after `refresh`."""
    return getattr(kernel, "takes_point", isinstance(kernel, HMC))


def is_reversible(kernel: MCMCKernel) -> bool:
    """Whether a kernel is known to be reversible with respect to the law that it leaves invariant."""
    return getattr(kernel, "reversible", isinstance(kernel, HMC))


def on_stand_in(kernel: MCMCKernel, model: Model) -> MCMCKernel:
    """A kernel of NumPyro's on a stand-in of a model in the same coordinates; kernels of this library as they are."""
    return kernel if hasattr(kernel, "held") else kernel.wrap_model(lambda _: Unconstrained(model))


def begin(
    kernel: MCMCKernel,
    key: jax.Array,
    num_warmup: int,
    init_params: Mapping[str, jax.Array] | None,
    reading: Reading,
) -> Any:
    """The initial state of a kernel `on_stand_in`, given unconstrained values to start at, or None."""
    if not isinstance(kernel.model, Unconstrained):
        if init_params is not None and is_block(reading):
            init_params = reading.constrain(init_params)  # as composite kernels give them
        return kernel.init(key, num_warmup, init_params, model_args=reading.args, model_kwargs=reading.kwargs)
    stand_in = kernel.model
    strategy = strategy_of(kernel)
    if init_params is None and strategy is not None:
        valid = lambda z: all_finite(jax.value_and_grad(lambda z: stand_in.evaluate(reading, z).log_density)(z))  # noqa: E731
        key, key_start = jax.random.split(key)
        init_params = start(key_start, reading, None, strategy, valid)
    return kernel.init(key, num_warmup, init_params, model_args=reading.args, model_kwargs=inside(reading.kwargs))


def arguments(kernel: MCMCKernel, reading: Reading) -> tuple[tuple, dict[str, Any]]:
    """The model's arguments as a kernel `on_stand_in` takes them in `sample` and `refresh`."""
    return reading.args, inside(reading.kwargs) if isinstance(kernel.model, Unconstrained) else reading.kwargs


def _holds_symbols(kernel: MCMCKernel) -> bool:
    """Whether a kernel, or one inside, keeps bounds of sites that were never computed."""
    kept = jax.tree.leaves(getattr(kernel, "_inv_transforms", None))
    inside = [*getattr(kernel, "_kernels", ()), *filter(None, [getattr(kernel, "_kernel", None)])]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in kept) or any(map(_holds_symbols, inside))


def bound(kernel: MCMCKernel, key: jax.Array, num_warmup: int, init_params: Any, args: tuple, kwargs: dict) -> Any:
    """The initial state of a kernel, which keeps what it needs of the model at these arguments.

    Where a composite kernel conditions the model, kernels other than HMC take values to start at as constrained ones.
    """
    if init_params is not None and GIBBS_SITES_KWARG in kwargs and not isinstance(kernel, HMC):
        init_params = constrain_fn(seed(kernel.model, jax.random.key(0)), args, kwargs, init_params)
    return kernel.init(key, num_warmup, init_params, model_args=args, model_kwargs=kwargs)


def started(kernel: MCMCKernel, key: jax.Array, num_warmup: int, init_params: Any, args: tuple, kwargs: dict) -> Any:
    """The same of a copy: the kernel itself keeps nothing of the arguments."""
    return bound(kernel.wrap_model(lambda model: model), key, num_warmup, init_params, args, kwargs)
