r"""Noise, denoise, accept by the likelihood: Metropolis moves that need no density of the prior.

Noise the current point to a level $t$, exactly, and denoise it by the stochastic reverse process. Since the pair
$(x, x_t)$ has the joint law $p(x)\, q(x_t \mid x) = p_t(x_t)\, p(x \mid x_t)$, the move $x \to x_t \to x'$ is
reversible with respect to the prior, so a Metropolis test on the rest of the model $L$ alone targets the posterior
$p(x) L(x)$:

$$a = \min\left(1, \frac{L(x')}{L(x)}\right).$$

$\log L$ may be any function: not differentiable, the result of a simulator, $-\infty$ outside a constraint. For a
Gaussian prior this is the preconditioned Crank-Nicolson move with
$\rho = \alpha_t^2 \Sigma (\alpha_t^2 \Sigma + \sigma_t^2)^{-1}$, hence the name.

With $M$ candidates $x'_1 \dots x'_M \sim p(x \mid x_t)$ from the same noised point, the current point is one more draw
of the same law, so choosing candidate $j$ with probability $L_j / \sum_{i \ge 1} L_i$ and accepting it with

$$a = \min\left(1, \frac{\sum_{i \ge 1} L_i}{\sum_{i \ge 0, i \ne j} L_i}\right), \qquad L_0 = L(x),$$

keeps the posterior too (Metropolised Gibbs over the $M + 1$ points; $M = 1$ is the test above).

**What is approximate.** Only the draw of the clean point *given* the noisy one, by a solver in finitely many steps.
With the right prior but the wrong conditional law, the move is not reversible and the test wrong. The default follows
the flow of that law (`solve.draw_given`): its variance is within .5 % on the mixtures of `benchmarks/reverse_law.py`.
`DPMSolverPP(eta=1)` walks the reverse process and is off by about two per cent in 64 steps; other solvers of that
process are far from it (`docs/concepts/exactness.md`). Solvers of the marginals alone are refused, and those of first
order cause a warning. A `solve.GivenMap` draws in two evaluations from a law of its own: approximate for ever, but
`screen=` takes it, or a solver of few steps, for the choice of a candidate, and restores the law of the solver by a
test (`screened`).

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, 2013, https://arxiv.org/abs/1202.0709.
    Liu, Peskun's theorem and a modified discrete-state Gibbs sampler, 1996, https://doi.org/10.1093/biomet/83.3.681.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.infer.kernel.adapt import Tally, running_mean
from numpyro_diffusion.infer.kernel.choose import metropolised_gibbs, without_improper
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel, pooled, shared
from numpyro_diffusion.infer.kernel.start import MAX_TRIES, Strategy, start
from numpyro_diffusion.infer.model.checks import check_reverse, check_walk, check_walkable
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.infer.reverse.screened import Draws, screened
from numpyro_diffusion.noise import UniformLogSNR
from numpyro_diffusion.solve import Adams, GivenMap, Solver, draw_given, evaluations_given, solve
from numpyro_diffusion.solve.flow import check_flow

_MIN_STEPS = 4
"""Number of steps in the smallest move of a solver of the reverse process."""
_NUM_LEVELS = 64
"""Number of levels in the ladder of moves by a flow, which takes the same steps from each."""
_LEVEL_WIDTH = 0.7
"""Spread of the adapted levels about their centre, in natural logarithms: a factor of two either way."""


class PCNState(NamedTuple):
    """State of `DiffusionPCN`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        log_likelihood: log-density of the rest of the model there.
        accept_prob: acceptance probability of the last step.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        noise_level: noise-to-signal ratio of the last step, in the units of the data.
        log_level: centre of the adapted levels, as a natural logarithm.
        tally: acceptance of the other moves in the second half of warm-up, by their level.
        num_score_evals: denoiser evaluations of the last step, per point.
        diverging: whether the log-density of a candidate was NaN or plus infinity; it was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    log_likelihood: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    noise_level: jax.Array
    log_level: jax.Array
    tally: Tally
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class DiffusionPCN(DiffusionKernel[PCNState]):
    r"""Moves all diffusion sites of a model by noising, denoising and a test on the likelihood.

    Exact up to the discretisation of the law of $x$ given $x_t$; needs neither a density nor gradients. A share
    `global_fraction` of the steps draws its noise level log-uniformly from the whole ladder, the highest levels less
    often once warm-up has seen that hardly any such move is accepted; the others draw it around a centre that warm-up
    adapts to `target_accept_prob`. Both are then left alone. All sites, and all points in plates,
    move together at one level.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites; `DiffusionGibbs` takes the others.
        num_proposals: candidates per step, denoised in one batch.
        global_fraction: share of steps with a log-uniform level, in [0, 1].
        target_accept_prob: acceptance to which the centre of the levels adapts, in (0, 1).
        solver: draws the clean point given the noisy one. A deterministic solver follows the flow of that law, by all
            of its steps at any level; one of the reverse process, such as `DPMSolverPP(eta=1)`, walks down from a level
            of its own grid, so that a small move costs few steps. A `GivenMap` takes two evaluations and has a law of
            its own. None takes the priors' own `sampler`.
        screen: a `GivenMap`, or a deterministic solver of few steps, that chooses among the candidates; the solver, a
            deterministic one, confirms the choice and decides the law. None denoises all candidates by the solver.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for a number out of its range; when run, for a model without a latent `DiffusionPrior` site, with
            other latent sites, or whose likelihood is zero at 100 draws of the prior, and for a solver that keeps the
            marginals only or has steps of its own choice.
        TypeError: for a model that is not callable or what is not a solver.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import DiffusionPCN
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(DiffusionPCN(model), num_warmup=100, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "noise_level", "num_score_evals")
    takes_point = True

    @property
    def status(self) -> Status:
        """What the kernel is exact for, by its solver."""
        statement = (
            "exact in the limit of a finely solved law of x given x_t; in few steps the prior is kept to the order"
        )
        if isinstance(self._solver, GivenMap):
            statement = "approximate: x given x_t is drawn by a learned map, whose law is its own; see its quality"
        return Status("reverse process", False, statement)

    def __init__(
        self,
        model: Model,
        *,
        num_proposals: int = 1,
        global_fraction: float = 0.5,
        target_accept_prob: float = 0.4,
        solver: Solver | GivenMap | None = Adams(30),  # noqa: B008
        screen: Solver | GivenMap | None = None,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, init_strategy)
        _checks.at_least(1, num_proposals=num_proposals)
        _checks.fraction(global_fraction=global_fraction, target_accept_prob=target_accept_prob)
        if not (solver is None or isinstance(solver, Solver | GivenMap)):
            raise TypeError(f"solver must be a solver such as solve.Adams(); got {solver!r}")
        if screen is not None:
            check_flow(solver, name="solver, under a screen,")
            if not isinstance(screen, GivenMap):
                check_flow(screen, name="screen")
        self._num_proposals = num_proposals
        self._global_fraction = global_fraction
        self._target_accept_prob = target_accept_prob
        self._solver, self._screen = solver, screen

    def _check_model(self, reading: Reading) -> None:
        kernel = type(self).__name__
        check_walk(kernel, reading)
        sites = reading.sites_in_the_abstract()
        check_walkable(kernel, sites)
        for solver in (self._solver_of(sites), self._screen):
            if solver is not None:
                check_reverse(kernel, solver, sites)

    def _check_start(self, state: PCNState) -> None:
        bad = int(jnp.sum(~jnp.isfinite(state.log_likelihood)))
        if bad:
            raise ValueError(
                f"the log-density of the model without its diffusion priors is not finite at {MAX_TRIES} draws of "
                f"the prior, in {bad} of {state.log_likelihood.size} chains: the data contradict the prior, or the "
                "model returns NaN. Pass init_params where it is finite"
            )

    def _solver_of(self, sites: dict[str, PriorSite]) -> Solver | GivenMap:
        kernel = type(self).__name__
        if isinstance(self._solver, GivenMap):
            return self._solver
        solvers = {site.prior.sampler for site in sites.values()} if self._solver is None else {self._solver}
        if len(solvers) > 1:
            raise ValueError(f"diffusion sites have different samplers; give one for all by {kernel}(solver=...)")
        solver = solvers.pop()
        if solver.stochastic and solver.num_times < _MIN_STEPS + 2:
            raise ValueError(f"{kernel} needs a solver with num_times >= {_MIN_STEPS + 2}; got {solver.num_times}")
        return solver

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> PCNState:
        key, key_start = jax.random.split(key)

        def valid(z: dict[str, jax.Array]) -> jax.Array:
            return jnp.isfinite(reading.log_rest(z))

        z = start(key_start, reading, init_params, self._init_strategy, valid)
        log_likelihood = without_improper(reading.log_rest(z))
        zero = jnp.zeros_like(log_likelihood)
        sites = reading.sites(z)
        centre = jnp.mean(jnp.log(_ladder(self._solver_of(sites), sites))).astype(zero.dtype)
        count = jnp.zeros((), jnp.int32)
        tally = Tally.empty(zero.dtype)
        return PCNState(count, z, log_likelihood, zero, zero, zero, centre, tally, count, jnp.array(False), key)

    def _step(self, state: PCNState, reading: Reading) -> PCNState:
        sites = reading.sites(state.z)
        solver = self._solver_of(sites)
        key, key_level, key_move, key_choice = jax.random.split(state.rng_key, 4)
        levels = _ladder(solver, sites)
        first, is_global = self._draw_level(key_level, levels, state)
        if self._screen is None:
            candidates = _candidates(key_move, solver, sites, state.z, first, self._num_proposals)
            log_likelihoods = jax.vmap(reading.log_rest)(candidates)
            new, old = (candidates, log_likelihoods), (state.z, state.log_likelihood)
            choice = metropolised_gibbs(key_choice, log_likelihoods, state.log_likelihood, new, old)
            evaluations = _evaluations(solver, first, self._num_proposals)
        else:
            draws = Draws(cast(Solver, solver), self._screen, lambda denoiser: _times(solver, denoiser)[first])
            choice, evaluations = screened(
                key_move, draws, sites, state.z, state.log_likelihood, self._num_proposals, reading
            )
        (z, log_likelihood), accept_prob = choice.point, choice.accept_prob
        i = state.i + 1
        warming, counts = i <= self._num_warmup, (2 * i > self._num_warmup) & (i <= self._num_warmup)
        gain = jnp.where(warming & ~is_global, 2.0 / (1.0 + i) ** 0.6, 0.0)
        log_level = state.log_level + gain * (pooled(accept_prob) - self._target_accept_prob)
        return PCNState(
            i=i,
            z=z,
            log_likelihood=log_likelihood,
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, accept_prob, state.i, self._num_warmup),
            noise_level=levels[first].astype(accept_prob.dtype),
            log_level=jnp.clip(log_level, jnp.log(levels[-1]), jnp.log(levels[0])).astype(accept_prob.dtype),
            tally=state.tally.add(_heights(levels)[first], accept_prob, counts & is_global),
            num_score_evals=jnp.asarray(evaluations, jnp.int32),
            diverging=choice.diverging,
            rng_key=key,
        )

    def _draw_level(self, key: jax.Array, levels: jax.Array, state: PCNState) -> tuple[jax.Array, jax.Array]:
        """An index into the ladder, and whether it was drawn from all of it; the same for chains that run together."""
        key_kind, key_level = jax.random.split(key)
        log_levels = jnp.log(levels)
        log_uniform = jnp.log(-jnp.asarray(jnp.gradient(log_levels)))
        around = log_uniform - 0.5 * ((log_levels - state.log_level) / _LEVEL_WIDTH) ** 2
        over_all = log_uniform + jnp.log(state.tally.weights()[state.tally.part_of(_heights(levels))])
        is_global = jax.random.uniform(key_kind) < self._global_fraction
        first = jax.random.categorical(key_level, jnp.where(is_global, over_all, around))
        return shared(first), shared(is_global)

    def refresh(self, state: PCNState, model_args: tuple, model_kwargs: dict | None) -> PCNState:
        """Recomputes the likelihood after a composite kernel has moved what it is conditioned on."""
        log_likelihood = self.read(model_args, model_kwargs).log_rest(state.z)
        return state._replace(log_likelihood=without_improper(log_likelihood))

    def get_diagnostics_str(self, state: PCNState) -> str:
        """For the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}, level {jnp.exp(state.log_level):.2g}"


def _ladder(solver: Solver | GivenMap, sites: dict[str, PriorSite]) -> jax.Array:
    """Noise levels from which a move may start, decreasing, in the units of the first site's data."""
    denoiser = next(iter(sites.values())).denoiser
    return denoiser.schedule.noise_level(_times(solver, denoiser))


def _heights(levels: jax.Array) -> jax.Array:
    """Heights of the levels on their ladder, in logarithms: 0 the lowest, 1 the highest."""
    return jnp.log(levels / levels[-1]) / jnp.log(levels[0] / levels[-1])


def _times(solver: Solver | GivenMap, denoiser: Denoiser) -> jax.Array:
    """The times of the ladder: those of a solver that walks down from there, or any for one that follows a flow."""
    if isinstance(solver, Solver) and solver.stochastic:
        return solver.times(denoiser)[: solver.num_times - _MIN_STEPS]
    return UniformLogSNR()(denoiser.schedule, _NUM_LEVELS)


def _evaluations(solver: Solver | GivenMap, first: jax.Array, count: int) -> int | jax.Array:
    """Denoiser evaluations for `count` candidates, which share the mean of a flow's law."""
    if isinstance(solver, Solver) and solver.stochastic:
        return count * solver.evaluations(first)  # type: ignore[operator]  # `check_reverse` has refused None
    return count * (evaluations_given(solver) - 1) + 1  # type: ignore[operator]


def _candidates(
    key: jax.Array,
    solver: Solver | GivenMap,
    sites: dict[str, PriorSite],
    z: dict[str, jax.Array],
    first: jax.Array,
    count: int,
) -> dict[str, jax.Array]:
    """Noises every site once and denoises it `count` times, all points in one batch."""
    moved = {}
    for key_site, (name, site) in zip(jax.random.split(key, len(sites)), sites.items(), strict=True):
        key_noise, key_solve = jax.random.split(key_site)
        u = site.to_denoiser(z[name])
        noise = jax.random.normal(key_noise, u.shape, u.dtype)
        keys = jax.random.split(key_solve, (*site.batch_shape, count))

        def denoise(denoiser: Denoiser, u: jax.Array, noise: jax.Array, keys: jax.Array) -> jax.Array:
            t = _times(solver, denoiser)[first]
            schedule = denoiser.schedule
            x_t = (schedule.alpha(t) * u + schedule.sigma(t) * noise).astype(u.dtype)
            if isinstance(solver, Solver) and solver.stochastic:
                return jax.vmap(lambda key: solve(solver, denoiser, x_t, key, first))(keys)
            return jax.vmap(lambda key: draw_given(solver, denoiser, x_t, t, key))(keys)

        clean = jnp.moveaxis(site.over_points(denoise, u, noise, keys), len(site.batch_shape), 0)
        moved[name] = jax.vmap(site.from_denoiser)(clean.astype(u.dtype))
    return moved
