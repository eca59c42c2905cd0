r"""A population of Hamiltonian chains in noise space, from the prior to the posterior, until it has converged.

Walkers start as draws of the prior and are carried through $\pi_\beta \propto p\, L^\beta$ to $\beta = 1$, as in
`tempered`: reweighted, resampled on their island, and moved until they have forgotten where they were. Here the moves
are Hamiltonian trajectories in noise space (`walkers`). Their step size, and for each island a metric from the walkers
of the others, go on from temperature to temperature. At $\beta = 1$ adaptation ends, and every walker is a chain.

One run cannot show what all of its islands have in common. So a run is followed by another with twice the moves, and
the result counts as converged if, for every site,

* islands agree: nested R-hat below 1.01, and the walkers are stationary: R-hat between early and late draws too;
* the effective sample size exceeds 400, and hardly any walker is stuck where its steps are too long;
* both runs agree in means and in the log evidence, within their errors.

If walkers drift or runs disagree, the moves are doubled; if stationary islands disagree, modes are kept apart, and the
walkers are doubled. When the budget is spent first, the run says so and why: its draws are marked as not converged.

In the last phase, with nothing adapting, the chains leave the model's posterior in noise space invariant: exact for the
prior that the flow's solver pushes forward. A model without diffusion sites serves as well: any sites whose
priors can be drawn and whose densities can be differentiated.

References:
    Margossian et al., Nested R-hat, 2022, https://arxiv.org/abs/2110.13017.
    Buchholz, Chopin, Jacob, Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo, 2021,
    https://arxiv.org/abs/1808.07730.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.choose import effective_size, next_temperature, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed, check_names, check_walkable
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model, draw_prior
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.noise.vector import NoiseVector, in_noise
from numpyro_diffusion.infer.particles.evidence import Draws, Outcome, ParticleSampler, evidence_of, resample_islands
from numpyro_diffusion.infer.particles.mutate import least_correlation
from numpyro_diffusion.infer.particles.rounds import CURE, Look, Round, Temperature, look
from numpyro_diffusion.infer.particles.tempered import lag_of, look_at_start, widened
from numpyro_diffusion.infer.particles.tempering import check_climb
from numpyro_diffusion.infer.particles.walkers import Moves, Tuning, Walker, joined, make_moves, metric_of, walker_at
from numpyro_diffusion.reparam import noise_name


class _Stage(NamedTuple):
    """The population at a temperature."""

    walkers: Walker
    log_evidence: jax.Array  # of each island so far, (islands,)
    temperature: jax.Array  # inverse
    tuning: Tuning


class PopulationHMC(ParticleSampler):
    r"""Samples a posterior by a tempered population of Hamiltonian chains, run again until its results agree.

    Args:
        model: NumPyro model whose latent sites can all be drawn from their priors.
        num_walkers: chains in all, at least 2 an island.
        num_draws: draws of each chain, at least 2.
        num_islands: independent parts of the population, at least 2.
        num_steps: leapfrog steps of a move.
        ess_threshold: share of the walkers that a step of the temperature leaves effective, in (0, 0.999].
        correlation: largest correlation with their ancestors that walkers may have, in any coordinate, when the moves
            at a temperature end, in (0, 1). Smaller ones than the noise of the estimate count as that.
        max_moves: largest number of moves at a temperature, in the first round.
        max_gradients: budget: no round begins that is expected to exceed this number of gradients of the model, all
            walkers together; the first always runs.
        max_seconds: budget in seconds of wall time, compilation included, in the same way; None for no limit.
        progress_bar: whether to show the progress.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: for a number out of its range; when run, for a model without latent sites, with discrete ones or
            with one that cannot be drawn, or a likelihood that is zero at all walkers.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import PopulationHMC
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> population = PopulationHMC(model, 256, progress_bar=False).run(jax.random.key(0), 3.0)
        >>> bool(abs(population.get_samples()["x"].mean() - 1.5) < 0.1), population.converged
        (True, True)
    """

    cure = CURE
    """What `verdict` advises about chains that are too short."""
    _members = "num_walkers"
    status = Status("flow", True, "exact for the prior that the deterministic solver pushes forward, in its steps")

    def __init__(
        self,
        model: Model,
        num_walkers: int = 256,
        num_draws: int = 24,
        *,
        num_islands: int = 4,
        num_steps: int = 8,
        ess_threshold: float = 0.5,
        correlation: float = 0.3,
        max_moves: int = 64,
        max_gradients: int = 5_000_000,
        max_seconds: float | None = None,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_walkers, num_islands, ess_threshold, progress_bar)
        _checks.at_least(2, num_islands=num_islands, num_draws=num_draws)
        _checks.at_least(1, num_steps=num_steps, max_gradients=max_gradients)
        check_climb(ess_threshold, correlation, max_moves)
        if max_seconds is not None:
            _checks.positive(max_seconds=max_seconds)
        self._num_draws, self._num_steps = num_draws, num_steps
        self._limits = {"correlation": correlation, "max_moves": max_moves}
        self._max_gradients, self._max_seconds = max_gradients, max_seconds
        self._compiled: dict[int, Compiled] = {}
        self._looks: list[Look] = []

    @property
    def converged(self) -> bool:
        """Whether the last run has converged; if not, `problems` says why."""
        return not self.problems

    @property
    def rounds(self) -> list[Look]:
        """What each round of the last run looked like."""
        _ = self._ran
        return self._looks

    @property
    def temperatures(self) -> list[Temperature]:
        """What happened at each temperature of the last round."""
        return self._ran.history

    @property
    def num_gradients(self) -> int:
        """Gradients of the model in all rounds, of all walkers together."""
        _ = self._ran
        return sum(round.num_gradients for round in self._looks)

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        reading = Record(self._model).at(args, kwargs)
        _check(reading)
        names, started = NoiseVector(reading).names, time.monotonic()
        number, factor, last, self._looks = self._shape[1], 1, None, []
        while True:
            this = self._round(jax.random.fold_in(rng_key, len(self._looks)), number, factor, args, kwargs)
            seen = look(this, last, names)
            self._looks.append(seen)
            last = this
            if seen.converged:
                break
            if seen.is_apart and len(self._looks) > 1:  # stationary, and yet kept apart by modes
                number *= 2
            else:
                factor *= 2
            gradients = this.num_gradients * number * factor // (this.num_walkers * this.factor)
            seconds = gradients * this.seconds_each
            if number not in self._compiled:
                seconds += self._looks[0].seconds  # of which compiling is the greater part where seconds count
            spent = sum(look.num_gradients for look in self._looks), time.monotonic() - started
            if not self._affords(spent, (gradients, seconds)):
                break
        values = {name: value.reshape(-1, *value.shape[3:]) for name, value in last.values.items()}
        indices = np.arange(len(next(iter(values.values()))))
        draws = Draws(values, indices, indices.reshape(self._shape[0], -1))
        return Outcome(draws, last.evidence, last.history, seen.problems)

    def _affords(self, spent: tuple[float, float], next_round: tuple[float, float]) -> bool:
        """Whether gradients and seconds suffice for another round."""
        limits = self._max_gradients, np.inf if self._max_seconds is None else self._max_seconds
        return all(s + n <= limit for s, n, limit in zip(spent, next_round, limits, strict=True))

    def _round(self, key: jax.Array, number: int, factor: int, args: tuple, kwargs: dict[str, Any]) -> Round:
        """From the prior to draws of the posterior, with `number` walkers on each island."""
        started, islands = time.monotonic(), self._shape[0]
        if number not in self._compiled:
            functions = partial(self._start, number), self._reweigh, self._at, self._move, self._report
            self._compiled[number] = Compiled(self._model, *functions)
        programs = _Programs(*self._compiled[number].bind(args, kwargs))
        key_start, key_climb, key_draw = jax.random.split(key, 3)
        stage, history = programs.start(key_start), []
        if not self._looks:
            look_at_start(np.asarray(stage.walkers.log_likelihood))
        with self._bar(1.0, f"round {len(self._looks) + 1}, temperature") as bar:
            while float(stage.temperature) < 1.0:
                stage, happened = self._climb(jax.random.fold_in(key_climb, len(history)), programs, stage, factor)
                history.append(happened)
                bar.set_postfix_str(f"ESS {happened.effective_size:.0f}, moves {happened.num_moves}", refresh=False)
                bar.update(float(happened.temperature) - bar.n)
        draws_started = time.monotonic()
        between = max(factor, -(-int(history[-1].num_moves) // self._num_draws))  # draws span as many as it took
        draws, moves = self._draw(key_draw, programs, stage, between)
        each = (time.monotonic() - draws_started) / (int(moves.num_moves) * self._num_steps * islands * number)
        values = {n: np.stack([draw[n] for draw in draws], 1) for n in draws[0]}
        values = {n: v.reshape(islands, number, *v.shape[1:]) for n, v in values.items()}
        total = sum(int(h.num_moves) * self._num_steps + 1 for h in history) + int(moves.num_moves) * self._num_steps
        evidence = widened(evidence_of(stage.log_evidence), history)
        spent = total * islands * number, time.monotonic() - started
        return Round(values, evidence, history, moves, *spent, each, number, factor)

    def _climb(self, key: jax.Array, programs: "_Programs", stage: _Stage, factor: int) -> tuple[_Stage, Temperature]:
        """To the next temperature that the walkers allow: they are resampled, and moved until they have forgotten."""
        key_resample, key_moves = jax.random.split(key)
        stage, effective, enough = programs.reweigh(key_resample, stage)
        before = stage.walkers.log_likelihood
        walkers, blind = programs.at(stage.walkers.q, stage.temperature)
        origin, tuning, moves, needed = walkers.q, stage.tuning, None, self._limits["max_moves"]
        while (done := 0 if moves is None else int(moves.num_moves)) < needed * factor:
            operands = walkers, origin, stage.temperature, tuning, np.array(True), np.int32(_AT_ONCE)
            walkers, tuning, some = programs.move(jax.random.fold_in(key_moves, done), *operands)
            moves = joined(moves, some)
            if float(moves.correlation) <= float(enough) and needed == self._limits["max_moves"]:
                needed = done + _AT_ONCE
        happened = Temperature(
            stage.temperature,
            effective,
            **moves._replace(accept_prob=moves.accept_prob.mean())._asdict(),
            step_size=tuning.step_size,
            lag=_lag(before, walkers.log_likelihood),
            num_blind=blind,
        )
        return stage._replace(walkers=walkers, tuning=tuning), Temperature(*map(np.asarray, happened))

    def _draw(
        self, key: jax.Array, programs: "_Programs", stage: _Stage, between: int
    ) -> tuple[list[dict[str, np.ndarray]], Moves]:
        """Every walker goes on as a chain at temperature 1, with nothing adapting."""
        walkers, draws, moves = stage.walkers, [], None
        with self._bar(self._num_draws, f"round {len(self._looks) + 1}, draws") as bar:
            for k in range(self._num_draws):
                operands = stage.walkers.q, stage.temperature, stage.tuning, np.array(False), np.int32(between)
                walkers, _, some = programs.move(jax.random.fold_in(key, k), walkers, *operands)
                draws.append({name: np.asarray(value) for name, value in programs.report(walkers.q).items()})
                moves = joined(moves, some)
                bar.update(1)
        return draws, moves

    def _coordinates(self, args: tuple, kwargs: dict[str, Any]) -> NoiseVector:
        return NoiseVector(Record(self._model).at(args, kwargs))

    def _start(self, number: int, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> _Stage:
        """Draws of the prior."""
        coordinates, model = self._coordinates(args, kwargs), in_noise(self._model)

        def one(key: jax.Array) -> Walker:
            q = coordinates.flatten(draw_prior(model, key, args, kwargs))
            return Walker(q, *(jnp.zeros(()), jnp.zeros_like(q)), coordinates.log_density(q).likelihood)

        walkers = jax.vmap(one)(jax.random.split(key, self._shape[0] * number))
        zero = jnp.zeros((), walkers.q.dtype)
        tuning = Tuning(metric_of(walkers, self._shape[0]), jnp.asarray(_FIRST_STEP, zero.dtype))
        return _Stage(walkers, jnp.zeros(self._shape[0]), zero, tuning)

    def _reweigh(
        self, key: jax.Array, stage: _Stage, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[_Stage, jax.Array, jax.Array]:
        """Resampled to the next temperature, the effective size, and the correlation that counts as forgotten."""
        islands, values = self._shape[0], without_improper(stage.walkers.log_likelihood)
        new = next_temperature(values, stage.temperature, self._ess_threshold)
        log_weights = jnp.where(jnp.isfinite(values), (new - stage.temperature) * values, -jnp.inf)
        by_island = log_weights.reshape(islands, -1)
        ancestors = resample_islands(key, by_island).reshape(-1)
        walkers = jax.tree.map(lambda leaf: leaf[ancestors], stage.walkers)
        log_evidence = stage.log_evidence + logsumexp(by_island, axis=1) - jnp.log(by_island.shape[1])
        enough = jnp.maximum(self._limits["correlation"], least_correlation(walkers.q))
        return _Stage(walkers, log_evidence, new, stage.tuning), effective_size(log_weights), enough

    def _at(
        self, q: jax.Array, temperature: jax.Array, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Walker, jax.Array]:
        """Walkers at a temperature, and how many lack a gradient in each coordinate."""
        coordinates = self._coordinates(args, kwargs)
        walkers = jax.vmap(lambda q: walker_at(coordinates, q, temperature))(q)
        return walkers, jnp.sum(~jnp.isfinite(walkers.gradient), axis=0)

    def _move(self, key: jax.Array, *operands: Any) -> tuple[Walker, Tuning, Moves]:
        *operands, args, kwargs = operands
        return make_moves(key, self._coordinates(args, kwargs), *operands, num_steps=self._num_steps)

    def _report(self, q: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        return jax.vmap(self._coordinates(args, kwargs).report)(q)

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        for round in self.rounds:
            print(round)


class _Programs(NamedTuple):
    """What is compiled: one program moves the walkers at all temperatures, and between draws."""

    start: Callable[..., Any]
    reweigh: Callable[..., Any]
    at: Callable[..., Any]
    move: Callable[..., Any]
    report: Callable[..., Any]


@jax.jit
def _lag(before: jax.Array, after: jax.Array) -> jax.Array:
    return lag_of(without_improper(before), without_improper(after))


_AT_ONCE = 4
"""Moves between two estimates of the metric."""
_FIRST_STEP = 0.3
"""Leapfrog step in units of the metric's root, to begin with."""


def _check(reading: Reading) -> None:
    """Raises unless the population can sample a model."""
    structure = reading.structure
    if not structure.latent:
        raise ValueError("PopulationHMC needs a latent site; the model has none")
    check_fixed("PopulationHMC", structure)
    check_continuous("PopulationHMC", structure)
    check_names("PopulationHMC", structure, map(noise_name, structure.diffusion))
    check_walkable("PopulationHMC", reading.sites_in_the_abstract())
    try:
        coordinates = NoiseVector(reading)
        jax.eval_shape(jax.grad(lambda q: sum(coordinates.log_density(q))), jnp.zeros(coordinates.size))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            "PopulationHMC needs a model that JAX can differentiate. Use TemperedSMC(model) for one that it cannot: "
            f"{error}"
        ) from error
