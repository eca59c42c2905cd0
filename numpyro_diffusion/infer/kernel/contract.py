r"""NumPyro's contract, written once for all kernels; a kernel adds the mathematics of one chain.

A kernel is two pure functions of one chain, `_start(key, init_params, reading) -> state` and
`_step(state, reading) -> state`, where a `Reading` is the model at its arguments, read once a run (`model.record`).
This class gives them to `numpyro.infer.MCMC`: many chains at once (`chain_method="vectorized"`), conditioning by
composite kernels, continuation from a state, pickling, and a start that is compiled once for all runs on data of one
shape.

Chains that run together may share a random number (`shared`), so that a loop has the same length for all of them;
otherwise every chain would wait for the longest. They may also pool a statistic that warm-up adapts to (`pooled`). What
is shared does not depend on where a chain is, so each chain by itself is as valid as before.
"""

import abc
import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import jax
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_diffusion import _precision
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.kernel.stand_in import StandIn
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.checks import check_supports
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading, Record

_CHAINS = "numpyro_diffusion_chains"
State = TypeVar("State", bound=NamedTuple)
"""What a kernel carries from draw to draw: `class MALA(MetropolisKernel[MALAState])`."""


def shared(value: jax.Array) -> jax.Array:
    """The first chain's value, for all chains that run together."""
    return _across_chains(lambda v: jax.lax.all_gather(v, _CHAINS)[0], value)


def pooled(value: jax.Array) -> jax.Array:
    """The mean over all chains that run together."""
    return _across_chains(lambda v: jax.lax.pmean(v, _CHAINS), value)


def number_together() -> int:
    """How many chains run together; one for a chain by itself."""
    try:
        return jax.lax.axis_size(_CHAINS)
    except NameError:
        return 1


def _across_chains(collective: Callable[[jax.Array], jax.Array], value: jax.Array) -> jax.Array:
    try:
        return collective(value)
    except NameError:  # no such axis: the chain runs alone
        return value


def _any_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def hand_on(kernels: Iterable[MCMCKernel], reading: Reading) -> None:
    """Lets kernels read the model through the record of a run, by their stand-in of it or by themselves."""
    for kernel in kernels:
        reads = kernel.model if isinstance(kernel.model, StandIn) else kernel
        if isinstance(reads, StandIn | DiffusionKernel):
            reads.use(reading)


class DiffusionKernel(MCMCKernel, abc.ABC, Generic[State]):
    """Base of the kernels: fulfils NumPyro's contract, leaves the mathematics to `_start` and `_step`.

    Args:
        model: NumPyro model, a callable.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` or `init_strategy` is not callable.
    """

    sample_field = "z"
    statistics: tuple[str, ...] = ("accept_prob", "num_score_evals")
    """State fields collected on every draw, besides the sites and `diverging`."""
    takes_point: ClassVar[bool] = False
    """Whether a state continues from another `z` after `refresh`, as `Cycle` and `Mixture` need it to."""

    reversible: ClassVar[bool] = False
    """Whether a step, while nothing adapts, is known to be reversible with respect to the law that it keeps."""

    holds_values: ClassVar[bool] = False
    """Whether the sample field has values on the supports."""

    def __init__(self, model: Model, init_strategy: Strategy | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        if not (init_strategy is None or callable(init_strategy)):
            raise TypeError(
                f"init_strategy must be one of NumPyro's, such as init_to_sample; got {type(init_strategy).__name__}"
            )
        self._model = model
        self._init_strategy = init_strategy
        self._forget()

    def _forget(self) -> None:
        self._sample_fn: Callable[[State, Reading], State] | None = None
        self._compiled_start = Compiled(self._model, self._start_all)
        self._record: Record | None = None
        self._lent: Record | None = None
        self._num_warmup = 0
        self._vectorized, self._num_chains = False, 1

    @abc.abstractmethod
    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> State:
        """The initial state of one chain."""

    @abc.abstractmethod
    def _step(self, state: State, reading: Reading) -> State:
        """The next state of one chain."""

    def _check_model(self, reading: Reading) -> None:
        """Raises if the kernel cannot sample the model."""

    def _check_start(self, state: State) -> None:
        """Raises if a concrete initial state, of one chain or of many, cannot be sampled from."""

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        """Prepares inner kernels, at arguments that are not tracers of the compiled start."""

    def use(self, reading: Reading) -> None:
        """Reads the model through the record of the composite kernel that holds this one."""
        self._lent = self._record = reading.record
        self._hand_on(reading)

    def _hand_on(self, reading: Reading) -> None:
        """Lets the kernels that are held read the model through the record of this run."""
        hand_on(self.held, reading)

    def read(self, args: tuple, kwargs: dict | None) -> Reading:
        """The model at its arguments."""
        if self._record is None:
            self._record = Record(self._model)
        return self._record.at(args, {} if kwargs is None else kwargs)

    @property
    def model(self) -> Model:
        """The model as the user wrote it."""
        return self._model

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The kernels that this one holds."""
        return ()

    @property
    def default_fields(self) -> tuple[str, ...]:
        return (self.sample_field, "diverging", *self.statistics)

    def init(
        self, rng_key: jax.Array, num_warmup: int, init_params: Any, model_args: tuple, model_kwargs: dict | None
    ) -> State:
        """Called by `MCMC`: the initial state, batched over chains if `rng_key` is."""
        mode = num_warmup, not is_prng_key(rng_key)
        if mode != (self._num_warmup, self._vectorized):
            self._num_warmup, self._vectorized = mode
            self._compiled_start = Compiled(self._model, self._start_all)
        self._num_chains = len(rng_key) if self._vectorized else 1
        self._record = self._lent  # anew for every run: variables that the model reads may have changed
        reading = self.read(model_args, model_kwargs)
        check_supports(type(self).__name__, reading.structure)
        self._check_model(reading)
        first = (lambda leaf: leaf[0]) if self._vectorized else (lambda leaf: leaf)
        self._hand_on(reading)
        self._bind(first(rng_key), jax.tree.map(first, init_params), reading)
        state = self._run_start(rng_key, init_params, reading)
        if not _any_traced(state):
            self._check_start(state)
        self._sample_fn = self._step  # MCMC starts afresh on every run where this is None
        return state

    def _run_start(self, keys: jax.Array, init_params: Any, reading: Reading) -> State:
        """The compiled start, which a second run on new data finds; not compiled inside of another program."""
        arguments = keys, init_params, reading.args, reading.kwargs
        if _any_traced(arguments):
            return self._start_all(*arguments)
        (compiled,) = self._compiled_start.bind(reading.args, reading.kwargs)
        return compiled(keys, init_params)

    def _start_all(self, keys: jax.Array, init_params: Any, args: tuple, kwargs: dict) -> State:
        reading = self.read(args, kwargs)

        @_precision.highest()
        def start(key: jax.Array, init_params: Any) -> State:
            return self._start(key, init_params, reading)

        if not self._vectorized:
            return start(keys, init_params)
        in_axes = (0, None if init_params is None else 0)
        return jax.vmap(start, in_axes=in_axes, axis_name=_CHAINS)(keys, init_params)

    def sample(self, state: State, model_args: tuple, model_kwargs: dict | None) -> State:
        """Called by `MCMC`: the next state."""
        reading = self.read(model_args, model_kwargs)

        @_precision.highest()
        def step(state: State) -> State:
            return self._step(state, reading)

        return jax.vmap(step, axis_name=_CHAINS)(state) if self._vectorized else step(state)

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports."""
        reading = self.read(model_args, model_kwargs)
        return lambda z: reading.constrain(z)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports and the model's deterministic sites."""
        reading = self.read(model_args, model_kwargs)
        return lambda z: reading.constrain(z, deterministic=True)

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> Self:
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._forget()
        return kernel

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sample_fn": None, "_record": None, "_lent": None}
