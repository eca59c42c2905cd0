"""A kernel inside a kernel: given as a class, a factory or an instance, bound where it can be used.

NumPyro's HMC keeps functions of the model from its `init`, so that it must be started where these will be called. A
start that is being compiled is no such place: its arguments are gone afterwards. `bind` therefore starts a kernel in
the abstract, with the arguments as they are and nothing computed, and `started` starts a copy that is thrown away after
its state has been taken.
"""

from collections.abc import Callable
from typing import Any

import jax
from numpyro.handlers import seed
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.hmc import HMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn

from numpyro_diffusion.infer.model.handlers import Model

KernelLike = MCMCKernel | Callable[..., MCMCKernel]
"""A kernel, or what makes one from a model: a kernel class, a `functools.partial` of one, a function."""


def build(argument: str, kernel: KernelLike, model: Model, **options: Any) -> MCMCKernel:
    """A kernel on a model.

    Args:
        argument: under whose name the kernel was given, for errors.
        kernel: a kernel class, a factory, or a kernel that is built on any model and moves to this one.
        model: the model.
        **options: passed on to a class or a factory.

    Returns:
        The kernel.

    Raises:
        TypeError: if it is no kernel and makes none.
        ValueError: for options beside an instance.
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
    """Lets a kernel keep what it needs of a model, at arguments that it may keep; nothing is computed."""
    jax.eval_shape(lambda key, params: bound(kernel, key, num_warmup, params, args, kwargs), key, init_params)


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
