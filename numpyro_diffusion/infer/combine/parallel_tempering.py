r"""Parallel tempering: a chain at every power of the likelihood, from the prior to the posterior, that swap points.

At the inverse temperatures $0 = \beta_0 < \dots < \beta_{K - 1} = 1$ points move by any kernel that leaves

$$\pi_\beta(x, \theta) \propto p(x, \theta)\, L(x, \theta)^\beta$$

invariant (`model.handlers.temper`), all of them in one batch. At $\beta = 0$ the point is drawn anew from the prior in
every step. Then neighbours swap (`ladder`). What the prior draws is handed up rung by rung and arrives at $\beta = 1$
in any mode that has mass there, and no chain need cross between modes. The point at $\beta = 1$ is the draw.

The product $\prod_k \pi_{\beta_k}$ is invariant for any ladder, so that each draw has the posterior's law as exactly as
with the kernel alone. In the first half of warm-up the ladder adapts to equal rejection, from the mean over chains that
run together; the kernel at each temperature adapts by its own rule. Nothing adapts after warm-up.

How well it works is told by the *round trips*: how often a point has come from the prior to $\beta = 1$. They are the
number of independent looks at where the modes are and how heavy. Far fewer than draws is the rule; a handful is too few
for weights of modes, whatever R-hat says. With $d$ dimensions that narrow from the prior to the posterior a round trip
takes a number of rungs of order $\sqrt d$ and as many steps.

The evidence comes with it, by stepping stones over the draws after warm-up.

Not possible is a chain that is a block of another: points at other temperatures would be those of old values of the
sites that are given. Give the composite kernel to this one instead.

References:
    Syed, Bouchard-Côté, Deligiannidis, Doucet, Non-reversible parallel tempering: a scalable highly parallel MCMC
    scheme, 2022, https://arxiv.org/abs/1905.02939.
    Geyer, Markov chain Monte Carlo maximum likelihood, 1991, https://hdl.handle.net/11299/58440.
    Xie et al., Improving marginal likelihood estimation for Bayesian phylogenetic model selection, 2011 (stepping
    stones), https://doi.org/10.1093/sysbio/syq085.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.combine.composed import status_of
from numpyro_diffusion.infer.combine.ladder import Ladder, ParallelTemperingState, Point, first_ladder, first_spread
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, hand_on, pooled
from numpyro_diffusion.infer.kernel.inner import (
    KernelLike,
    arguments,
    begin,
    bind,
    build,
    keeps_arguments,
    on_stand_in,
    takes_point,
)
from numpyro_diffusion.infer.kernel.stand_in import StandIn
from numpyro_diffusion.infer.kernel.start import MAX_TRIES, is_block, start, strategy_of
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import TEMPERATURE, Model, draw_prior, temper
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.solve.base import total_evaluations


class ParallelTempering(DiffusionKernel[ParallelTemperingState]):
    r"""Non-reversible parallel tempering over powers of the likelihood, with any kernel.

    Args:
        model: NumPyro model, with diffusion sites or without, all of them continuous. Its observations and factors are
            what is tempered.
        kernel: moves the points: a kernel class such as `NUTS` or `MALA`, a `functools.partial` of one, a function of
            a model, or a kernel, which is moved to this model. It must keep its point in its state, as HMC, NUTS and
            those do that can be in a `Cycle`.
        num_temperatures: how many, at least 2. About twice the sum of the rejections of swaps is a good number, and
            rates of swaps near 1/2 or above are the sign of it.
        temperatures: inverse temperatures to begin with, rising to 1, in place of `num_temperatures` of them that are
            chosen from draws of the prior. The first is 0, and the prior is drawn there; or above 0, for priors that
            cannot be drawn, and the kernel moves the points there too.
        adapt_temperatures: whether those between the ends are adapted in warm-up.

    Raises:
        TypeError: if `kernel` does not make a kernel.
        ValueError: for fewer than 2 temperatures, or `temperatures` that do not rise from 0 or above to 1; for a kernel
            that cannot be handed a point; when run, for a model without latent sites or with discrete ones, a prior
            that cannot be drawn, a likelihood that is zero at a hundred draws of it, or inside a composite kernel on
            other sites.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.infer import MALA, ParallelTempering
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 10.0))
        ...     numpyro.sample("y", dist.Normal(jnp.abs(x), 0.5), obs=y)
        >>> kernel = ParallelTempering(model, MALA, num_temperatures=5)
        >>> mcmc = MCMC(kernel, num_warmup=300, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 6.0)
        >>> bool(abs((mcmc.get_samples()["x"] > 0.0).mean() - 0.5) < 0.2)
        True
    """

    statistics = ("accept_prob", "swap_rates", "round_trips", "log_evidence", "num_score_evals")
    takes_point = True

    def __init__(
        self,
        model: Model,
        kernel: KernelLike = NUTS,
        *,
        num_temperatures: int = 8,
        temperatures: Sequence[float] | None = None,
        adapt_temperatures: bool = True,
    ) -> None:
        super().__init__(model)
        self._user_model, self._model = model, temper(model)
        _checks.at_least(2, num_temperatures=num_temperatures)
        self._given = None if temperatures is None else _ladder(temperatures)
        self._count = num_temperatures if self._given is None else len(self._given)
        self._adapts = adapt_temperatures
        self._kernel_given = kernel
        self._lowest = int(self._given is None or self._given[0] == 0.0)  # index of the lowest that the kernel moves
        self._forget()
        self._kernel = self._built()
        kind = type(self._kernel).__name__
        if not takes_point(self._kernel):
            raise ValueError(
                f"{kind} cannot be handed a point by ParallelTempering: it does not keep its point in its state's "
                f"{self._kernel.sample_field!r}, or does not refresh. Take NUTS, HMC, MALA, DiffusionPCN or a Cycle of "
                "such kernels; for noise space give a model under NoiseReparam"
            )

    @property
    def model(self) -> Model:
        """The model as the user wrote it."""
        return self._user_model

    @property
    def kernel(self) -> MCMCKernel:
        """The kernel that moves the points."""
        return self._kernel

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The kernel that moves the points."""
        return (self._kernel,)

    @property
    def status(self) -> Status:
        """That of the kernel."""
        return status_of(self._kernel)

    def _built(self) -> MCMCKernel:
        return build("kernel", self._kernel_given, self._model)

    def read(self, args: tuple, kwargs: dict | None) -> Reading:
        """The model at its arguments, at temperature 1."""
        return super().read(args, {**(kwargs or {}), TEMPERATURE: jnp.ones(())})

    def use(self, reading: Reading) -> None:
        """Reads the model anew: the record of a composite kernel has no temperatures."""
        self._record = Record(self._model)
        self._hand_on(self.read(reading.args, reading.kwargs))

    def _hand_on(self, reading: Reading) -> None:
        self._kernel = self._unbound(reading)

    def _unbound(self, reading: Reading) -> MCMCKernel:
        """A copy of the kernel that has bound nothing, which reads the model through this kernel's record."""
        kernel = on_stand_in(self._built(), self._model)
        hand_on((kernel,), reading)
        return kernel

    def _bind(self, key: jax.Array, init_params: Point | None, reading: Reading) -> None:
        if keeps_arguments(self._kernel):
            origin = reading.origin()
            bind(lambda key: begin(self._kernel, key, self._num_warmup, origin, reading), [self._kernel], key)

    def _check_model(self, reading: Reading) -> None:
        name, structure = "ParallelTempering", reading.structure
        if is_block(reading) or isinstance(self._user_model, StandIn):
            raise ValueError(
                "ParallelTempering cannot be a block or an inner kernel: its points at other temperatures would be "
                "those of old values of the other sites. Make it the outer kernel, on a model under NoiseReparam for "
                "noise space"
            )
        if not structure.latent:
            raise ValueError(f"{name} needs a latent site; the model has none")
        check_fixed(name, structure)
        check_continuous(name, structure)
        if isinstance(self._kernel, DiffusionKernel):
            self._kernel._check_model(reading)
        if self._lowest:
            try:
                jax.eval_shape(lambda key: self._draw(key, reading), jax.random.key(0))
            except ValueError as error:
                raise ValueError(
                    f"{error}; or begin above 0, ParallelTempering(model, temperatures=jnp.geomspace(0.01, 1.0, 8))"
                ) from error

    def _check_start(self, state: ParallelTemperingState) -> None:
        bad = int(jnp.sum(~jnp.isfinite(state.log_likelihood)))
        if bad:
            raise ValueError(
                f"the likelihood is zero, NaN or infinite at {bad} of the {state.log_likelihood.size} points where "
                f"chains start, after {MAX_TRIES} draws for each where none was given. Tempering cannot soften a "
                "likelihood of zero: pass init_params where it is positive, or write a likelihood that falls off with "
                "the distance"
            )
        if isinstance(self._kernel, DiffusionKernel):
            axes = 2 if state.i.ndim else 1
            self._kernel._check_start(jax.tree.map(lambda v: v.reshape(-1, *v.shape[axes:]), state.kernel_states))

    def _at(self, reading: Reading, temperature: jax.Array) -> Reading:
        """The model at another temperature."""
        return reading.record.at(reading.args, {**reading.kwargs, TEMPERATURE: temperature})

    def _draw(self, key: jax.Array, reading: Reading) -> Point:
        """A draw of the prior, unconstrained."""
        values = reading.unconstrain(reading.run(_prior, key))
        return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in values.items()}

    def _start(self, key: jax.Array, init_params: Point | None, reading: Reading) -> ParallelTemperingState:
        key, key_points, key_kernel = jax.random.split(key, 3)
        kernel = self._unbound(reading) if keeps_arguments(self._kernel) else self._kernel

        def draw(key: jax.Array) -> Point:
            valid = lambda z: jnp.isfinite(_log_likelihood(reading, z))  # noqa: E731
            if self._lowest:
                return start(key, reading, None, None, valid, lambda key: self._draw(key, reading))
            return start(key, reading, None, strategy_of(kernel), valid)

        def first(key: jax.Array, z: Point, temperature: jax.Array) -> Any:
            return begin(kernel, key, self._num_warmup, z, self._at(reading, temperature))

        points = drawn = jax.vmap(draw)(jax.random.split(key_points, self._count))
        if init_params is not None:
            given = start(key_points, reading, init_params)
            points = jax.tree.map(lambda z: jnp.broadcast_to(z, (self._count, *z.shape)), given)
        temperatures = jnp.asarray(self._given, float) if self._given is not None else self._first(drawn, reading)
        keys, moving = jax.random.split(key_kernel, self._count - self._lowest), self._moving(points)
        states = jax.vmap(first)(keys, moving, temperatures[self._lowest :])
        log_likelihood = jax.vmap(partial(_log_likelihood, reading))(points)
        zero = jnp.zeros((), jnp.int32)
        return ParallelTemperingState.of(
            key, zero, points, log_likelihood, Ladder.of(temperatures), states, zero, jnp.array(False)
        )

    def _first(self, drawn: Point, reading: Reading) -> jax.Array:
        """The temperatures to begin with, from draws of the prior."""
        spread = first_spread(jax.vmap(partial(_log_likelihood, reading))(drawn))
        return first_ladder(self._count, jnp.exp(pooled(jnp.log(spread))))

    def _moving(self, points: Point) -> Point:
        """Those that the kernel moves."""
        return jax.tree.map(lambda z: z[self._lowest :], points)

    def _moved(self, key: jax.Array, state: ParallelTemperingState, reading: Reading) -> tuple[Point, Any, jax.Array]:
        """All points after a move at their temperatures, the kernel's states, and its evaluations of denoisers."""
        kernel, field = self._kernel, self._kernel.sample_field
        key_prior, key_moves = jax.random.split(key)

        def move(own: Any, key: jax.Array, z: Point, temperature: jax.Array) -> Any:
            given = arguments(kernel, self._at(reading, temperature))
            return kernel.sample(kernel.refresh(own._replace(**{field: z, "rng_key": key}), *given), *given)

        points = jax.tree.map(lambda all_, one: all_.at[-1].set(one), state.points, state.z)  # as it may be handed one
        keys = jax.random.split(key_moves, self._count - self._lowest)
        states = jax.vmap(move)(
            state.kernel_states, keys, self._moving(points), state.ladder.temperatures[self._lowest :]
        )
        evaluations = jnp.sum(jnp.asarray(getattr(states, "num_score_evals", 0), jnp.int32))
        points = getattr(states, field)
        if self._lowest:
            fresh = self._draw(key_prior, reading)
            points = jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), fresh, points)
            sites = reading.sites_in_the_abstract().values()
            evaluations += total_evaluations(site.prior.sampler.evaluations() for site in sites)
        return points, states, evaluations

    def _step(self, state: ParallelTemperingState, reading: Reading) -> ParallelTemperingState:
        key, key_moves, key_swap = jax.random.split(state.rng_key, 3)
        points, states, evaluations = self._moved(key_moves, state, reading)
        log_likelihood = jax.vmap(partial(_log_likelihood, reading))(points)
        ladder, order, diverging = state.ladder.step(key_swap, log_likelihood, state.i, self._num_warmup, self._adapts)
        points = jax.tree.map(lambda z: z[order], points)
        return ParallelTemperingState.of(
            key, state.i + 1, points, log_likelihood[order], ladder, states, evaluations, diverging
        )

    def refresh(
        self, state: ParallelTemperingState, model_args: tuple, model_kwargs: dict | None
    ) -> ParallelTemperingState:
        """Nothing: every step begins by evaluating all points anew."""
        return state

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "ParallelTempering":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(lambda _: temper(wrapper(self._user_model)))
        kernel._user_model = kernel._model._model  # type: ignore[attr-defined]  # inside the handler
        kernel._kernel = kernel._built()
        return kernel

    def get_diagnostics_str(self, state: ParallelTemperingState) -> str:
        """For the progress bar."""
        return f"{state.round_trips} round trips, swaps {state.swap_rates.min():.2f} to {state.swap_rates.max():.2f}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": self._built()}


def _prior(model: Model, args: tuple, kwargs: dict[str, Any], key: jax.Array) -> Point:
    return draw_prior(model, key, args, kwargs)


def _log_likelihood(reading: Reading, z: Point) -> jax.Array:
    return jnp.asarray(reading.evaluate(z).log_likelihood, jnp.result_type(float))


def _ladder(temperatures: Sequence[float]) -> np.ndarray:
    """Inverse temperatures as an array, or an error."""
    given = np.asarray(temperatures, np.float32)
    if given.ndim != 1 or len(given) < 2 or (np.diff(given) <= 0.0).any() or given[0] < 0.0 or given[-1] != 1.0:
        raise ValueError(f"temperatures must be at least two that rise from 0 or above to 1; got {temperatures}")
    return given
