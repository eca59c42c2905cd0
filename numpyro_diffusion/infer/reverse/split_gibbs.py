r"""Split Gibbs: the prior and the likelihood each on a copy of its own, coupled by a Gaussian.

The posterior $p(x)\, L(x, \theta)$ is replaced by a law of two copies,

$$\pi_\rho(x, z, \theta) \propto p(x)\; N(z; x, \rho^2 I)\; L(z, \theta),$$

each side of which is easy to sample. Given $x$, the *likelihood side* $z$ and every other latent site $\theta$ are a
NumPyro model in which the diffusion prior is a Gaussian around $x$ (`split_model`): a few draws of NUTS. Given $z$, the
*prior side* $x$ has the density $p(x)\, N(z; x, \rho^2 I)$, and that is the law of the clean point behind a noisy one
at level $\sigma_t / \alpha_t = \rho$: the reverse process from $x_t = \alpha_t z$ at exactly that time draws it, with
no gradient of the likelihood, no guidance and no density of the prior.

**What is approximate.** The reverse process, solved in finitely many steps, and the split itself: the prior side has

$$\pi_\rho(x) \propto p(x) \int L(z)\, N(z; x, \rho^2 I)\, \mathrm{d}z,$$

the posterior under a likelihood smoothed by $\rho$: Gaussian noise of variance $s^2$ on $x$ itself acts like noise of
variance $s^2 + \rho^2$. For the likelihood side the prior is smoothed instead. Both tend to the posterior as
$\rho \to 0$, where the chain stops moving: the sweeps of a standard normal prior without data have the autocorrelation
$1 / (1 + \rho^2)$. Choose $\rho$ small compared with the likelihood's own scale, but no smaller than necessary. The
prior side is reported; `likelihood_side` is an extra field.

What matters in the solver is the law of the clean point *given* the noisy one, not the law of its draws. On a standard
normal prior at $\rho = 1/2$ with 16 steps the variance of that law is off by 40 % for `StochasticHeun` (2 evaluations a
step), which is refused, by 4 % for `EulerMaruyama` and by 0.1 % for `DPMSolverPP` with noise and for the default, the
flow of that law (`solve.draw_given`), which is better on laws that are not Gaussian.

Other sites belong to the likelihood side. So do not make this the x-kernel of `DiffusionGibbs`, where they would depend
on the prior side and the two conditionals would have no common law; give it the whole model.

With `couplings`, every draw passes through decreasing couplings before that at $\rho$ itself: decoupled annealing
(DAPS, whose inner Langevin steps are NUTS here and whose flow is the reverse process). A draw then forgets the last one
and can change mode, but has a second bias: the sweep at $\rho$ starts from the law of the coupling above it, and
forgets that only in part.

References:
    Vono, Dobigeon, Chainais, Split-and-augmented Gibbs sampler, 2019, https://arxiv.org/abs/1804.05809.
    Coeurdoux, Dobigeon, Chainais, Plug-and-play split Gibbs sampler, 2024, https://arxiv.org/abs/2304.11134.
    Wu et al., Principled probabilistic imaging using diffusion models as plug-and-play priors, 2024,
    https://arxiv.org/abs/2405.18782.
    Zhang et al., Improving diffusion inverse problem solving with decoupled noise annealing, 2024 (DAPS),
    https://arxiv.org/abs/2407.01521.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from numpyro.infer import NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.infer.kernel.choose import keep_finite
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.inner import KernelLike, bind, bound, build, keeps_arguments, started
from numpyro_diffusion.infer.kernel.start import Strategy, start, strategy_of
from numpyro_diffusion.infer.model.checks import (
    check_continuous,
    check_fixed,
    check_has_prior,
    check_names,
    check_reverse,
    check_walkable,
)
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.levels import check_within, decreasing, time_of
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.infer.reverse.split_model import Coupled, offset_name, with_coupling
from numpyro_diffusion.solve import Adams, GivenMap, Solver, draw_given, evaluations_given
from numpyro_diffusion.solve.base import total_evaluations


class SplitGibbsState(NamedTuple):
    """State of `SplitGibbs`.

    Args:
        i: number of draws done.
        z: the prior side of the diffusion sites and the other latent sites, in NumPyro's unconstrained coordinates.
        likelihood_side: the likelihood side of the diffusion sites, in their denoisers' own spaces.
        rest_state: states of the kernel of the likelihood side and of the other sites, one for each coupling of a draw.
        accept_prob: its mean acceptance statistic over the last draw, NaN if it has none.
        noise_level: the last coupling, rho.
        num_score_evals: denoiser evaluations of the last draw, per point.
        diverging: whether that kernel diverged, or a denoised point was not finite and was not taken.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    likelihood_side: dict[str, jax.Array]
    rest_state: Any
    accept_prob: jax.Array
    noise_level: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class SplitGibbs(DiffusionKernel[SplitGibbsState]):
    r"""Alternates the likelihood with every other latent site, by NUTS, and the prior, by the reverse process.

    Needs the gradient of the likelihood, and only the reverse process of the priors. Exact, up to the solver, for the
    law of the split, which is the posterior smoothed by `rho`.

    Args:
        model: NumPyro model with diffusion sites; other latent sites are sampled too.
        rho: the coupling $\rho$, in the units of the data; within each prior's schedule.
        rho_start: the coupling at the start of warm-up, which falls to `rho` in geometric progression over its first
            half; None takes the largest scale among the priors, if that exceeds `rho`.
        couplings: decreasing couplings above `rho` that every draw passes through first (DAPS); warm-up then has no
            annealing of its own.
        solver: draws the prior side: a deterministic solver by the flow of its law, one of the reverse process by a
            walk down from level `rho`; each draw takes all of its `num_times` times. A `GivenMap` takes two evaluations
            and has a law of its own.
        num_inner: draws of the rest-kernel for each denoising.
        rest_kernel: the kernel of the likelihood side: a class, a factory or a kernel that can be a block of NumPyro's
            `Gibbs`.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for a number out of its range, couplings that do not decrease to `rho`, or both `rho_start` and
            `couplings`; when run, for a coupling outside of a prior's schedule, a solver that keeps the marginals
            only, a model without a latent `DiffusionPrior` site, or priors that depend on other latent
            sites.
        TypeError: for a model that is not callable, what is not a solver, or a `rest_kernel` that does not
            make an `MCMCKernel`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import SplitGibbs
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.1))
        ...     numpyro.sample("y", dist.Normal(x[0], noise), obs=y)
        >>> mcmc = MCMC(SplitGibbs(model, rho=0.5), num_warmup=100, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> sorted(mcmc.get_samples())
        ['noise', 'x']
    """

    statistics = ("accept_prob", "noise_level", "num_score_evals")

    @property
    def status(self) -> Status:
        """What the kernel targets, by its solver."""
        up_to = "a learned map, whose law is its own" if isinstance(self._solver, GivenMap) else "the solver"
        statement = f"targets the posterior smoothed by rho, up to {up_to}; with more couplings, about that"
        return Status("reverse process", False, statement)

    def __init__(
        self,
        model: Model,
        *,
        rho: float,
        rho_start: float | None = None,
        couplings: Sequence[float] | None = None,
        solver: Solver | GivenMap = Adams(30),  # noqa: B008
        num_inner: int = 2,
        rest_kernel: KernelLike = NUTS,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, init_strategy)
        _checks.positive(rho=rho)
        _checks.at_least(1, num_inner=num_inner)
        if rho_start is not None:
            _checks.positive(rho_start=rho_start)
            if rho_start < rho:
                raise ValueError(f"rho_start must not lie below rho={rho}; got {rho_start}")
            if couplings is not None:
                raise ValueError("couplings anneal every draw and rho_start warm-up alone; give one of them")
        if not isinstance(solver, Solver | GivenMap):
            raise TypeError(f"solver must be a solver such as solve.Adams(); got {solver!r}")
        self._couplings = (rho,) if couplings is None else decreasing("couplings, then rho,", (*couplings, rho))
        self._rho_start = rho_start
        self._anneals_warmup = couplings is None
        self._solver = solver
        self._num_inner = num_inner
        self._rest_given = rest_kernel
        self._rest = self._build_rest()

    def _build_rest(self) -> MCMCKernel:
        return build("rest_kernel", self._rest_given, Coupled(self._model))

    @property
    def held(self) -> tuple[MCMCKernel, ...]:
        """The kernel of the likelihood side."""
        return (self._rest,)

    def _check_model(self, reading: Reading) -> None:
        structure = reading.structure
        check_has_prior(structure)
        check_fixed("SplitGibbs", structure)
        check_continuous("SplitGibbs", structure)
        check_names("SplitGibbs", structure, map(offset_name, structure.diffusion))
        sites = reading.sites()
        check_walkable("SplitGibbs", sites)
        check_reverse("SplitGibbs", self._solver, sites)
        if structure.dependent:
            raise ValueError(
                f"the priors of {structure.dependent} depend on other latent sites, whose law given x needs the "
                "prior's density. Use NoiseSpace(model) on all sites, or DiffusionGibbs(model)"
            )
        for name, site in sites.items():
            check_within("rho", [self._couplings[-1]], name, site)
            check_within("couplings", self._couplings[:-1], name, site)
            check_within("rho_start", [] if self._rho_start is None else [self._rho_start], name, site)

    def _coupling_at(self, i: jax.Array, sites: dict[str, PriorSite]) -> jax.Array:
        """The couplings of the `i`-th draw, shape (sweeps,)."""
        couplings = jnp.asarray(self._couplings, jnp.result_type(float))
        if not self._anneals_warmup:
            return couplings
        denoisers = [site.denoiser for site in sites.values()]
        start = jnp.asarray([d.scale for d in denoisers]).max() if self._rho_start is None else self._rho_start
        highest = jnp.asarray([d.schedule.noise_level(d.schedule.t_max) for d in denoisers]).min()
        ratio = jnp.maximum(jnp.minimum(start, highest) / couplings, 1.0)
        left = jnp.clip(1.0 - 2.0 * i / max(self._num_warmup, 1), 0.0, 1.0) if self._num_warmup > 0 else 0.0
        return (couplings * ratio**left).astype(couplings.dtype)

    def _bind(self, key: jax.Array, init_params: dict | None, reading: Reading) -> None:
        if keeps_arguments(self._rest):
            start_rest = partial(bound, self._rest)
            bind(lambda key: self._start_with(start_rest, key, init_params, reading), [self._rest], key)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> SplitGibbsState:
        begin = started if keeps_arguments(self._rest) else bound
        return self._start_with(partial(begin, self._rest), key, init_params, reading)

    def _start_with(
        self, start_rest: Callable, key: jax.Array, init_params: dict | None, reading: Reading
    ) -> SplitGibbsState:
        sites = reading.sites()
        key, key_x, key_rest = jax.random.split(key, 3)
        strategy = self._init_strategy or strategy_of(self._rest)
        point = start(key_x, reading, init_params, strategy)
        x = {name: point[name] for name in sites}
        u = {name: site.to_denoiser(x[name]) for name, site in sites.items()}
        i = jnp.zeros((), jnp.int32)
        rho = self._coupling_at(i, sites)[0]
        rest_params = None  # without given values, the other sites start where their kernel starts
        if init_params is not None or strategy is not None:
            others = {name: value for name, value in point.items() if name not in sites}
            rest_params = {**others, **{offset_name(name): jnp.zeros_like(value) for name, value in u.items()}}
        kwargs = with_coupling(reading.kwargs, u, rho)
        steps = self._num_warmup * self._num_inner
        rest_state = start_rest(key_rest, steps, rest_params, reading.args, kwargs)
        missing = jnp.full((), jnp.nan)
        side = self._likelihood_side(u, rho, rest_state)
        z = {**self._other_values(rest_state, u), **x}
        each = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(self._couplings), *leaf.shape)), rest_state)
        return SplitGibbsState(i, z, side, each, missing, rho, i, jnp.array(False), key)

    def _likelihood_side(self, u: dict, rho: ArrayLike, rest_state: Any) -> dict[str, jax.Array]:
        values = getattr(rest_state, self._rest.sample_field)
        return {name: centre + rho * values[offset_name(name)] for name, centre in u.items()}

    def _other_values(self, rest_state: Any, sites: Iterable[str]) -> dict[str, jax.Array]:
        """The other latent sites, in NumPyro's unconstrained coordinates."""
        offsets = {offset_name(name) for name in sites}
        return {n: value for n, value in getattr(rest_state, self._rest.sample_field).items() if n not in offsets}

    def _step(self, state: SplitGibbsState, reading: Reading) -> SplitGibbsState:
        sites = reading.sites()
        key, key_sweeps = jax.random.split(state.rng_key)
        couplings = self._coupling_at(state.i, sites)

        def sweep(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
            z, side = carry
            rho, rest_state, key = inputs
            key_rest, key_denoise = jax.random.split(key)
            u = {name: site.to_denoiser(z[name]) for name, site in sites.items()}
            others = {name: value for name, value in z.items() if name not in sites}
            offsets = {offset_name(name): (side[name] - u[name]) / rho for name in u}
            rest_state = rest_state._replace(rng_key=key_rest, **{self._rest.sample_field: {**others, **offsets}})
            rest_state, statistics = self._move_rest(rest_state, reading.args, with_coupling(reading.kwargs, u, rho))
            side = self._likelihood_side(u, rho, rest_state)
            x, bad = keep_finite(self._denoise(key_denoise, sites, side, rho), {name: z[name] for name in sites})
            return ({**self._other_values(rest_state, sites), **x}, side), (rest_state, *statistics, bad)

        inputs = couplings, state.rest_state, jax.random.split(key_sweeps, len(self._couplings))
        (z, side), outputs = jax.lax.scan(sweep, (state.z, state.likelihood_side), inputs)
        rest_state, accept_prob, rest_bad, bad = outputs
        of_draw = total_evaluations([evaluations_given(self._solver)])
        return SplitGibbsState(
            i=state.i + 1,
            z=z,
            likelihood_side=side,
            rest_state=rest_state,
            accept_prob=accept_prob.mean(),
            noise_level=couplings[-1],
            num_score_evals=jnp.asarray(len(self._couplings) * of_draw, jnp.int32),
            diverging=(rest_bad | bad).any(),
            rng_key=key,
        )

    def _move_rest(self, rest_state: Any, args: tuple, kwargs: dict) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        """Draws of the rest-kernel after its centre has moved; the last state, mean acceptance, and divergence."""
        rest_state = self._rest.refresh(rest_state, args, kwargs)

        def draw(rest_state: Any, _: None) -> tuple[Any, tuple]:
            rest_state = self._rest.sample(rest_state, args, kwargs)
            accept_prob = jnp.asarray(getattr(rest_state, "accept_prob", jnp.nan))
            return rest_state, (accept_prob, jnp.asarray(getattr(rest_state, "diverging", False)))

        rest_state, (accept_prob, bad) = jax.lax.scan(draw, rest_state, length=self._num_inner)
        return rest_state, (accept_prob.mean(), bad.any())

    def _denoise(self, key: jax.Array, sites: dict[str, PriorSite], side: dict, rho: jax.Array) -> dict[str, jax.Array]:
        """Draws the prior side given the likelihood side, in NumPyro's unconstrained coordinates."""
        denoised = {}
        for key_site, (name, site) in zip(jax.random.split(key, len(sites)), sites.items(), strict=True):

            def denoise(denoiser: Denoiser, centre: jax.Array, key: jax.Array) -> jax.Array:
                schedule = denoiser.schedule
                t = time_of(rho, schedule)
                x_t = (schedule.alpha(t) * centre).astype(centre.dtype)
                return draw_given(self._solver, denoiser, x_t, t, key)

            keys = jax.random.split(key_site, site.batch_shape)
            denoised[name] = site.from_denoiser(site.over_points(denoise, side[name], keys))
        return denoised

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "SplitGibbs":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._rest = kernel._build_rest()
        return kernel

    def refresh(self, state: SplitGibbsState, model_args: tuple, model_kwargs: dict | None) -> SplitGibbsState:
        """The identity: the rest-kernel is refreshed in every sweep."""
        return state

    def get_diagnostics_str(self, state: SplitGibbsState) -> str:
        """For the progress bar."""
        last = jax.tree.map(lambda leaf: leaf[-1], state.rest_state)
        return f"coupling {state.noise_level:.2g}, {self._rest.get_diagnostics_str(last)}"
