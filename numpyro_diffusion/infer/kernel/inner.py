"""A kernel inside a kernel: given as a class, a factory or an instance, and bound to the model's arguments.

NumPyro's HMC keeps functions of the model from its `init`, so it must be started with arguments that still exist when
these are called. The tracers of a start that is being compiled do not. `bind` therefore starts a kernel abstractly,
with the arguments as they are and without computing anything, and `started` takes the state of a copy that is thrown
away.
"""

from collections.abc import Callable
from typing import Any

import jax
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.model.handlers import Model

KernelLike = MCMCKernel | Callable[..., MCMCKernel]
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


def bind(kernel: MCMCKernel, key: jax.Array, num_warmup: int, init_params: Any, args: tuple, kwargs: dict) -> None:
    """Binds a kernel to the model's arguments, which it may keep; nothing is computed."""

    def start(key: jax.Array, init_params: Any) -> Any:
        return kernel.init(key, num_warmup, init_params, model_args=args, model_kwargs=kwargs)

    jax.eval_shape(start, key, init_params)


def started(kernel: MCMCKernel, key: jax.Array, num_warmup: int, init_params: Any, args: tuple, kwargs: dict) -> Any:
    """The initial state of a kernel, which itself does not keep the arguments."""
    copy = kernel.wrap_model(lambda model: model)
    return copy.init(key, num_warmup, init_params, model_args=args, model_kwargs=kwargs)
