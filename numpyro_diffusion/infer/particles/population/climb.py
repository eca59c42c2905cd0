r"""The climb of a population from the prior to the posterior, and its chains there.

At each temperature walkers are reweighted, resampled on their island, and moved (`walkers`) until they have forgotten
where they were; if hardly in eight moves, the following ones are twice as long. At $\beta = 1$ adaptation ends,
and every walker goes on as a chain. The programs are compiled once for all temperatures, and driven from the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.infer.kernel.choose import effective_size, next_temperature, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.handlers import Model, draw_prior
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.infer.noise.vector import NoiseVector, in_noise
from numpyro_diffusion.infer.particles.evidence import resample_islands
from numpyro_diffusion.infer.particles.mutate import least_correlation
from numpyro_diffusion.infer.particles.population.parts import Parts
from numpyro_diffusion.infer.particles.population.rounds import Temperature
from numpyro_diffusion.infer.particles.population.walkers import (
    Move,
    Moves,
    Target,
    Tuning,
    Walker,
    followed,
    joined,
    make_moves,
    summary,
    tuned,
)
from numpyro_diffusion.infer.particles.tempered import lag_of

_AT_ONCE = 2
"""Moves between two estimates of the metric."""
_MANY, _MUCH = 8, 0.25
"""Moves, and the correlation left after them, from which on walkers go on in moves of twice the length."""
_FIRST_STEP = 0.3
"""Leapfrog step in units of the metric's root, to begin with."""


class Stage(NamedTuple):
    """The population at a temperature."""

    walkers: Walker
    temperature: jax.Array  # inverse
    tuning: Tuning
    num_steps: jax.Array  # leapfrog steps of a move


class Settings(NamedTuple):
    """How a population climbs."""

    num_islands: int
    num_steps: int  # leapfrog steps of a move, to begin with
    ess_threshold: float
    correlation: float  # that counts as forgotten
    max_moves: int
    summed: str | None  # site that moves are summed over, see `noise.lattice`


class Climb:
    """Programs that carry a population of a given size to the posterior.

    Args:
        model: NumPyro model.
        settings: how.
        number: walkers on each island.
    """

    def __init__(self, model: Model, settings: Settings, number: int) -> None:
        self._model, self._settings, self._number = model, settings, number
        self._parts = Parts(settings.num_islands)
        by_all, by_part = (self._start, self._reweigh, self._tune), (self._move, self._report)
        self._compiled = Compiled(model, *by_all, self._judge, *by_part)

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> "Programs":
        """The programs at the model's arguments."""
        start, reweigh, tune, judge, advance, report = self._compiled.bind(args, kwargs)
        return Programs(start, reweigh, tune, judge, advance, report, self._parts, self._settings)

    def _coordinates(self, args: tuple, kwargs: dict[str, Any]) -> NoiseVector:
        return NoiseVector(Record(self._model).at(args, kwargs))

    def _target(self, temperature: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Target:
        return Target(self._coordinates(args, kwargs), temperature, self._settings.summed)

    def _start(self, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Stage:
        """Draws of the prior."""
        coordinates, model, islands = self._coordinates(args, kwargs), in_noise(self._model), self._settings.num_islands

        keys = jax.random.split(key, islands * self._number)
        q = jax.vmap(lambda key: coordinates.flatten(draw_prior(model, key, args, kwargs)))(keys)
        unknown, zero = jnp.full(len(q), jnp.nan, q.dtype), jnp.zeros((), q.dtype)
        walkers = Walker(q, unknown, -q, unknown)  # the gradient as if the prior were N(0, I)
        tuning = tuned(self._target(zero, args, kwargs), walkers, jnp.asarray(_FIRST_STEP, zero.dtype), islands)
        return Stage(walkers, zero, tuning, jnp.asarray(self._settings.num_steps, jnp.int32))

    def _reweigh(
        self, key: jax.Array, stage: Stage, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Stage, jax.Array, jax.Array]:
        """Resampled to the next temperature, the effective size, and the correlation that counts as forgotten."""
        islands, values = self._settings.num_islands, without_improper(stage.walkers.log_likelihood)
        new = next_temperature(values, stage.temperature, self._settings.ess_threshold)
        log_weights = jnp.where(jnp.isfinite(values), (new - stage.temperature) * values, -jnp.inf)
        by_island = log_weights.reshape(islands, -1)
        ancestors = resample_islands(key, by_island).reshape(-1)
        walkers = jax.tree.map(lambda leaf: leaf[ancestors], stage.walkers)
        enough = jnp.maximum(self._settings.correlation, least_correlation(walkers.q))
        return stage._replace(walkers=walkers, temperature=new), effective_size(log_weights), enough

    def _tune(self, stage: Stage, args: tuple, kwargs: dict[str, Any]) -> Tuning:
        """How walkers move, from where they are."""
        target = self._target(stage.temperature, args, kwargs)
        return tuned(target, stage.walkers, stage.tuning.step_size, self._settings.num_islands)

    def _judge(
        self, stage: Stage, origin: jax.Array, sums: Move, num_moves: jax.Array, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[jax.Array, Moves]:
        """The step size that follows, and what happened in some moves."""
        step_size = followed(stage.tuning.step_size, sums, num_moves)
        return step_size, summary(origin, stage.walkers.q, sums, num_moves)

    def _move(
        self,
        operands: tuple[jax.Array, Walker, Any, Any],
        key: jax.Array,
        temperature: jax.Array,
        step_size: jax.Array,
        num_moves: jax.Array,
        num_steps: jax.Array,
        anew: jax.Array,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[Walker, Move]:
        """Walkers after some moves, and sums over these."""
        index, walkers, metric, lattice = operands
        target, tuning = self._target(temperature, args, kwargs), Tuning(metric, step_size, lattice)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)  # the same in whatever part an island is
        return make_moves(keys, target, walkers, tuning, num_moves, num_steps=num_steps, anew=anew)

    def _report(self, q: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        return jax.vmap(self._coordinates(args, kwargs).report)(q)


class Programs(NamedTuple):
    """What is compiled: one program moves the walkers at all temperatures, and between draws."""

    start: Callable[..., Any]
    reweigh: Callable[..., Any]
    tune: Callable[..., Any]
    judge: Callable[..., Any]
    advance: partial[Any]
    report: partial[Any]
    parts: Parts
    settings: Settings

    def gradients(self, stage: Stage) -> int:
        """Of the model, for a move of a walker."""
        return int(stage.num_steps) + (self.settings.summed is not None)

    def at(self, key: jax.Array, stage: Stage) -> Stage:
        """The walkers at the temperature of a stage: a move of no steps."""
        stage = stage._replace(tuning=self.tune(stage))
        return stage._replace(walkers=self._advance(key, stage, 1, 0, anew=1)[0])

    def move(
        self, key: jax.Array, stage: Stage, origin: jax.Array, num_moves: int, adapting: bool
    ) -> tuple[Stage, Moves]:
        """Moves all walkers, adapting or not; correlations are those with `origin`."""
        if adapting:
            stage = stage._replace(tuning=self.tune(stage))
        walkers, sums = self._advance(key, stage, num_moves, int(stage.num_steps), anew=0)
        stage = stage._replace(walkers=walkers)
        step_size, moves = self.judge(stage, origin, sums, np.int32(num_moves))
        tuning = stage.tuning._replace(step_size=step_size)
        return stage._replace(tuning=tuning) if adapting else stage, moves

    def _advance(
        self, key: jax.Array, stage: Stage, num_moves: int, num_steps: int, *, anew: int
    ) -> tuple[Walker, Move]:
        """Walkers after some moves, and sums over these, island by island."""
        tuning, index = stage.tuning, np.arange(len(stage.walkers.q))
        by_island = index, stage.walkers, tuning.metric, tuning.lattice
        numbers = map(np.int32, (num_moves, num_steps, anew))
        return self.parts.run(self.advance, by_island, key, stage.temperature, tuning.step_size, *numbers)

    def values(self, stage: Stage) -> dict[str, np.ndarray]:
        """Where walkers are, by site, constrained."""
        return jax.tree.map(np.asarray, self.parts.run(self.report, stage.walkers.q))

    def climb(self, key: jax.Array, stage: Stage, factor: int) -> tuple[Stage, Temperature]:
        """To the next temperature that the walkers allow.

        Args:
            key: random key.
            stage: where they are.
            factor: how many times as many moves as it takes to forget.
        """
        key_resample, key_at, key_moves = jax.random.split(key, 3)
        before, effective, enough = self.reweigh(key_resample, stage)
        stage = self.at(key_at, before)
        origin, moves, needed = stage.walkers.q, None, self.settings.max_moves
        blind = np.sum(~np.isfinite(np.asarray(stage.walkers.gradient)), axis=0)
        spent, gradients = 0, 0  # of moves, a long one as two
        while spent < needed * factor:
            key_now = jax.random.fold_in(key_moves, spent)
            stage, some = self.move(key_now, stage, origin, _AT_ONCE, adapting=True)
            moves = joined(moves, some)
            length = int(stage.num_steps) // self.settings.num_steps
            spent, gradients = spent + _AT_ONCE * length, gradients + _AT_ONCE * self.gradients(stage)
            if needed == self.settings.max_moves:  # not forgotten yet
                if float(moves.correlation) <= float(enough):
                    needed = spent
                elif spent >= _MANY and float(moves.correlation) > _MUCH and length == 1:
                    stage = stage._replace(num_steps=jnp.asarray(np.int32(2 * self.settings.num_steps)))
        assert moves is not None
        happened = Temperature(
            stage.temperature,
            effective,
            **moves._replace(accept_prob=moves.accept_prob.mean())._asdict(),
            step_size=stage.tuning.step_size,
            num_steps=stage.num_steps,
            num_gradients=jnp.asarray(np.int32(gradients)),
            lag=_lag(before.walkers.log_likelihood, stage.walkers.log_likelihood),
            num_blind=blind,
        )
        return stage, Temperature._make(map(np.asarray, happened))


class Chains:
    """The walkers as chains at temperature 1, with nothing adapting.

    Args:
        programs: at the model's arguments.
        key: random key.
        stage: the population at temperature 1.
        between: moves between two draws.
    """

    def __init__(self, programs: Programs, key: jax.Array, stage: Stage, between: int) -> None:
        self._programs, self._key, self._stage, self.between = programs, key, stage, between
        self._draws: list[dict[str, np.ndarray]] = []
        self._log_likelihoods: list[np.ndarray] = []
        self._moves: Moves | None = None

    def draw(self, number: int, tick: Callable[[], Any]) -> Moves:
        """Draws of every chain; the second time all are thinned, evenly, to as many as there were before.

        Args:
            number: how many; the second time at most as many as before.
            tick: is called after each.

        Returns:
            All moves so far.
        """
        first = len(self._draws)
        for _ in range(number):
            done = 0 if self._moves is None else int(self._moves.num_moves)
            key, q = jax.random.fold_in(self._key, done), self._stage.walkers.q
            self._stage, some = self._programs.move(key, self._stage, q, self.between, adapting=False)
            self._moves = joined(self._moves, some)
            self._draws.append(self._programs.values(self._stage))
            self._log_likelihoods.append(np.asarray(self._stage.walkers.log_likelihood))
            tick()
        if first:
            kept = [-(-(i + 1) * (first + number) // first) - 1 for i in range(first)]
            self._draws = [self._draws[i] for i in kept]
            self._log_likelihoods = [self._log_likelihoods[i] for i in kept]
            self.between *= 2 if number == first else 1
        assert self._moves is not None
        return self._moves

    def values(self, num_islands: int) -> dict[str, np.ndarray]:
        """Draws by site, (islands, N / islands, draws, ...)."""
        stacked = {name: np.stack([draw[name] for draw in self._draws], 1) for name in self._draws[0]}
        return {name: v.reshape(num_islands, -1, *v.shape[1:]) for name, v in stacked.items()}

    def log_likelihoods(self, num_islands: int) -> np.ndarray:
        """Of the draws, (islands, draws of all chains there)."""
        return np.stack(self._log_likelihoods, 1).reshape(num_islands, -1)


@jax.jit
def _lag(before: jax.Array, after: jax.Array) -> jax.Array:
    return lag_of(without_improper(before), without_improper(after))
