r"""Any NumPyro kernel in noise space, reporting the model as the user wrote it.

Every diffusion site $x$ is replaced by its noise, $x = F(z)$ with $z \sim N(0, I)$ (`reparam.NoiseReparam`), and the
inner kernel, NUTS by default, samples $z$ jointly with all other latent sites from

$$\pi(z, \theta) \propto N(z; 0, I)\; p(\theta)\, p(y \mid F(z), \theta).$$

It is exact for the prior that the deterministic solver pushes forward, whatever its number of steps. It is the best
choice where the likelihood is differentiable in $x$; modes that are far apart in $z$ are as hard to find as they are
for the inner kernel.

Chains that run together (`chain_method="vectorized"`) adapt together in warm-up: one step size by their mean
acceptance, and one mass matrix by the draws of all of them (`kernel.adapt.pool_chains`). With 16 chains or more, and
one for every four dimensions, that matrix is dense up to 200 dimensions, unless `dense_mass` is given. Nothing adapts
after warm-up, and a chain by itself adapts as in NumPyro.

The state holds the original sites: the flow is solved once per draw, in the step, and not again by post-processing,
`Predictive`, `log_likelihood` or ArviZ.

References:
    Hoffman et al., NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport, 2019,
    https://arxiv.org/abs/1903.03704.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import HMC, NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.kernel.adapt import pool_chains
from numpyro_diffusion.infer.kernel.choose import all_finite
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.inner import KernelLike, bind, bound, build, keeps_arguments, started
from numpyro_diffusion.infer.kernel.metric import DENSE_UP_TO
from numpyro_diffusion.infer.kernel.stand_in import inside
from numpyro_diffusion.infer.kernel.start import Strategy, by_strategy, start, strategy_of, values_of
from numpyro_diffusion.infer.model.checks import (
    check_continuous,
    check_fixed,
    check_has_prior,
    check_names,
    check_walkable,
)
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.noise.coordinates import InNoise
from numpyro_diffusion.infer.noise.encode import noise_behind
from numpyro_diffusion.reparam import noise_name
from numpyro_diffusion.solve.base import total_evaluations

_MANY = 16
"""Chains that run together from which on their mass matrix is dense."""
_PER_CHAIN = 4
"""Dimensions of it, at most, for each of them."""


class NoiseSpaceState(NamedTuple):
    """State of `NoiseSpace`; statistics that the inner kernel does not have are NaN.

    Args:
        z: constrained values of the original latent and deterministic sites.
        inner_state: state of the inner kernel.
        potential_energy: negative joint log-density of noise and other sites, unconstrained.
        accept_prob: acceptance statistic of the last step.
        step_size: the inner kernel's step size.
        num_steps: steps of the inner kernel's last trajectory, or points that it tried; 1 if it does not say.
        num_score_evals: denoiser evaluations of the last step, per point; a gradient counts as one solve.
        diverging: whether the inner kernel's trajectory diverged.
        rng_key: random key.
    """

    z: dict[str, jax.Array]
    inner_state: Any
    potential_energy: jax.Array
    accept_prob: jax.Array
    step_size: jax.Array
    num_steps: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class NoiseSpace(DiffusionKernel[NoiseSpaceState]):
    """Runs a NumPyro kernel on the noise of all diffusion sites and on all other latent sites.

    Args:
        model: NumPyro model with at least one latent `DiffusionPrior` site.
        inner: the inner kernel: a kernel class such as `numpyro.infer.NUTS`, a `functools.partial` of one, or a kernel
            on any model, which is moved to this one. HMC's default trajectory, 2 pi, is a whole period of a Gaussian
            whose mass matrix is right, and ends where it began: give it a `trajectory_length` of about 1.
        init_strategy: where chains start, as in NumPyro: values of a diffusion site are encoded by the inverse flow.
            None leaves the start to the inner kernel.
        **inner_options: passed on to a class. `dense_mass` is True for HMC and NUTS with many chains, see the module,
            and otherwise False, as in NumPyro.

    Raises:
        TypeError: if `inner` does not make an `MCMCKernel`.
        ValueError: when run, for a model without a latent `DiffusionPrior` site.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import NoiseSpace
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(NoiseSpace(model), num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> sorted(mcmc.get_samples())
        ['x']
    """

    statistics: tuple[str, ...] = ("accept_prob", "step_size", "num_steps", "num_score_evals")
    holds_values = True
    status = Status("flow", True, "exact for the prior that the deterministic solver pushes forward, in its steps")

    def __init__(
        self,
        model: Model,
        inner: KernelLike = NUTS,
        *,
        init_strategy: Strategy | None = None,
        **inner_options: Any,
    ) -> None:
        super().__init__(model, init_strategy)
        self._inner_given = inner, inner_options
        self._build_inner()

    def _build_inner(self) -> None:
        inner, options = self._inner_given
        self._in_noise = InNoise(self._model)
        law = self._inner_law()
        self._as_given = self._inner = build("inner", inner, law, **options)
        free = _leaves_metric_open(inner, options)
        self._dense = build("inner", inner, law, **options, dense_mass=True) if free else None

    def _inner_law(self) -> InNoise:
        """The model that the inner kernel leaves invariant."""
        return self._in_noise

    @property
    def _inner_warmup(self) -> int:
        """Steps of the inner kernel in warm-up."""
        return self._num_warmup

    def _hand_on(self, reading: Reading) -> None:
        self._inner = self._as_given
        if self._dense is not None and self._num_chains >= _MANY:
            size = sum(map(math.prod, self._in_noise.shapes(reading).values()))
            if size <= min(DENSE_UP_TO, _PER_CHAIN * self._num_chains):
                self._inner = self._dense
        super()._hand_on(reading)

    @property
    def inner(self) -> MCMCKernel:
        """The inner kernel, on the model in noise space."""
        return self._inner

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The inner kernel."""
        return (self._inner,)

    def _check_model(self, reading: Reading) -> None:
        check_has_prior(reading.structure)
        check_fixed("NoiseSpace", reading.structure)
        check_continuous("NoiseSpace", reading.structure)
        check_names("NoiseSpace", reading.structure, map(noise_name, reading.structure.diffusion))
        check_walkable("NoiseSpace", reading.sites_in_the_abstract())

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        if not keeps_arguments(self._inner):
            return  # it is started by `_start`
        inner_params = jax.eval_shape(partial(self._inner_params, reading=reading), key, init_params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inner_params)

        def start_inner(key: jax.Array, params: dict | None) -> Any:
            return bound(self._inner, key, self._inner_warmup, params, reading.args, inside(reading.kwargs))

        bind(start_inner, [self._inner], key, zeros)

    def _inner_params(self, key: jax.Array, init_params: dict | None, reading: Reading) -> dict | None:
        """Where the inner kernel starts, in its own coordinates; None leaves that to it."""
        if init_params is not None:
            return self._given(key, reading, init_params)
        if self._init_strategy is not None:
            return self._behind(
                reading, start(key, reading, None, self._init_strategy, partial(self._is_valid, reading))
            )
        strategy = strategy_of(self._inner)
        if strategy is None:
            return None
        draw = partial(self._by_inner_strategy, reading=reading, strategy=strategy)
        return start(key, reading, None, None, partial(self._is_valid_noise, reading), draw)

    def _by_inner_strategy(self, key: jax.Array, reading: Reading, strategy: Strategy) -> dict[str, jax.Array]:
        """Where the inner kernel's own strategy starts: noise at random, other sites as it says of the model's."""
        key_others, key_noise = jax.random.split(key)
        shapes, told = self._in_noise.normal_shapes(reading.structure), values_of(strategy)
        keys = jax.random.split(key_noise, len(shapes))
        noise = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
        noise |= {name: jnp.asarray(told[name], jnp.result_type(float)) for name in shapes if name in told}
        others = by_strategy(key_others, reading, strategy)
        return {**noise, **{name: others[name] for name in reading.structure.others}}

    def _given(self, key: jax.Array, reading: Reading, init_params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Where the inner kernel starts, in its own coordinates, for a chain that is told where to start."""
        if set(init_params) & set(map(noise_name, reading.structure.diffusion)):
            return {name: jnp.asarray(value, jnp.result_type(float)) for name, value in init_params.items()}
        return self._behind(reading, start(key, reading, init_params, None, partial(self._is_valid, reading)))

    def _is_valid(self, reading: Reading, z: dict[str, jax.Array]) -> jax.Array:
        """Whether the inner kernel can go on from the noise behind a point."""
        return self._is_valid_noise(reading, self._behind(reading, z))

    def _is_valid_noise(self, reading: Reading, point: dict[str, jax.Array]) -> jax.Array:
        """Whether log-density and gradient are finite at a point of the inner kernel's coordinates."""
        return all_finite(jax.value_and_grad(lambda w: self._in_noise.evaluate(reading, w).log_density)(point))

    def _behind(self, reading: Reading, z: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The noise behind diffusion sites, and the other sites, all unconstrained."""
        sites = reading.sites(z)
        noise = {noise_name(name): noise_behind(site, site.to_denoiser(z[name])) for name, site in sites.items()}
        return {**{name: value for name, value in z.items() if name not in sites}, **noise}

    def _start_inner(self, key: jax.Array, init_params: dict | None, reading: Reading) -> Any:
        begin = started if keeps_arguments(self._inner) else bound
        inner_params = self._inner_params(key, init_params, reading)
        return begin(self._inner, key, self._inner_warmup, inner_params, reading.args, inside(reading.kwargs))

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> NoiseSpaceState:
        return self._report(self._start_inner(key, init_params, reading), reading)

    def _check_start(self, state: NoiseSpaceState) -> None:
        bad = int(jnp.sum(~jnp.isfinite(state.potential_energy)))
        if bad and hasattr(state.inner_state, "potential_energy"):
            raise ValueError(
                f"the log-density is not finite at the start of {bad} of {state.potential_energy.size} chains. Pass "
                "init_params where it is finite"
            )

    def _step(self, state: NoiseSpaceState, reading: Reading) -> NoiseSpaceState:
        inner_state = state.inner_state._replace(rng_key=state.rng_key)
        moved = self._inner.sample(inner_state, reading.args, inside(reading.kwargs))
        return self._report(pool_chains(inner_state, moved, self._num_warmup), reading)

    def _report(self, inner_state: Any, reading: Reading) -> NoiseSpaceState:
        """Solves the flow for the current noise and gathers the statistics."""
        noise = getattr(inner_state, self._inner.sample_field)
        parts = self._in_noise.evaluate(reading, noise)
        num_steps = jnp.asarray(getattr(inner_state, "num_steps", 1), jnp.int32)
        evaluations = flow_evaluations(reading)
        return NoiseSpaceState(
            z={**parts.values, **parts.deterministic},
            inner_state=inner_state,
            potential_energy=jnp.asarray(getattr(inner_state, "potential_energy", jnp.nan)),
            accept_prob=jnp.asarray(getattr(inner_state, "accept_prob", jnp.nan)),
            step_size=jnp.asarray(getattr(getattr(inner_state, "adapt_state", None), "step_size", jnp.nan)),
            num_steps=num_steps,
            num_score_evals=jnp.asarray((num_steps + 1) * evaluations, jnp.int32),
            diverging=jnp.asarray(getattr(inner_state, "diverging", False)),
            rng_key=inner_state.rng_key,
        )

    def refresh(self, state: NoiseSpaceState, model_args: tuple, model_kwargs: dict | None) -> NoiseSpaceState:
        """Refreshes the inner kernel after a composite kernel has moved what it is conditioned on."""
        inner_state = self._inner.refresh(state.inner_state, model_args, inside(model_kwargs or {}))
        return state._replace(inner_state=inner_state)

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "NoiseSpace":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._build_inner()
        return kernel

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """The identity: the state holds constrained values."""
        return _identity

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """The identity: the state holds constrained values."""
        return _identity

    def get_diagnostics_str(self, state: NoiseSpaceState) -> str:
        """The inner kernel's."""
        return self._inner.get_diagnostics_str(state.inner_state)


def flow_evaluations(reading: Reading) -> int | jax.Array:
    """Denoiser evaluations in one flow of all sites; 0 if not known."""
    sites = reading.sites_in_the_abstract().values()
    return total_evaluations(site.prior.flow_solver.evaluations() for site in sites)


def _leaves_metric_open(inner: KernelLike, options: dict[str, Any]) -> bool:
    """Whether an inner kernel is NumPyro's HMC or NUTS with nothing said of its mass matrix."""
    if isinstance(inner, partial):
        options = {**inner.keywords, **options}
        inner = inner.func
    return inner in (HMC, NUTS) and not set(options) & {"dense_mass", "adapt_mass_matrix", "inverse_mass_matrix"}


def _identity(z: dict) -> dict:
    return z
