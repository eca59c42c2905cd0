r"""A population of Hamiltonian chains in noise space, from the prior to the posterior, until it has converged.

Walkers start as draws of the prior and are carried through $\pi_\beta \propto p\, L^\beta$ to $\beta = 1$, as in
`tempered`: reweighted, resampled on their island, and moved until they have forgotten where they were. Here the moves
are Hamiltonian trajectories in noise space (`walkers`). Their step size, and for each island a metric from the walkers
of the others, go on from temperature to temperature, and trajectories become twice as long where it takes many of them
to forget. At $\beta = 1$ adaptation ends, and every walker is a chain.

One run cannot show what all of its islands have in common. So a run is followed by another with twice the moves, and
the result counts as converged if, for every site,

* islands agree: nested R-hat below 1.01, and the walkers are stationary: R-hat between early and late draws too;
* the effective sample size exceeds 400, and hardly any walker is stuck where its steps are too long;
* both runs agree in means, in spreads and in the log evidence (`bridge`), within their errors;
* where the posterior reaches further than the prior, chains are long by themselves.

Draws of rounds that agree are pooled. If only their number is wanting, chains go on, at twice the distance between
draws, up to three times. If that brings hardly more effective draws, each walker is kept in its mode. If walkers drift
or runs disagree, the moves are doubled; if stationary islands disagree, or walkers keep to their modes, the walkers
are. When the budget does not suffice for that, what is left goes into more draws of the same chains, where they are
wanting, and the run says that it has not converged, and why.

In the last phase, with nothing adapting, the chains leave the model's posterior in noise space invariant: exact for the
prior that the flow's solver pushes forward. A model without diffusion sites serves as well: any sites whose
priors can be drawn and whose densities can be differentiated.

References:
    Margossian et al., Nested R-hat, 2022, https://arxiv.org/abs/2110.13017.
    Buchholz, Chopin, Jacob, Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo, 2021,
    https://arxiv.org/abs/1808.07730.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed, check_names, check_walkable
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.noise.lattice import can_be_summed, site_to_sum
from numpyro_diffusion.infer.noise.vector import NoiseVector
from numpyro_diffusion.infer.particles.evidence import Draws, Outcome, ParticleSampler
from numpyro_diffusion.infer.particles.population.bridge import bridged
from numpyro_diffusion.infer.particles.population.climb import Chains, Climb, Programs, Settings
from numpyro_diffusion.infer.particles.population.rounds import CURE, Look, Round, Temperature, agreement, look, pooled
from numpyro_diffusion.infer.particles.tempered import look_at_start
from numpyro_diffusion.infer.particles.tempering import check_climb
from numpyro_diffusion.reparam import noise_name

_LENGTHS = 4
"""Times that the draws of a round are made, each but the first doubling their distance."""


class PopulationHMC(ParticleSampler):
    r"""Samples a posterior by a tempered population of Hamiltonian chains, run again until its results agree.

    Args:
        model: NumPyro model whose latent sites can all be drawn from their priors.
        num_walkers: chains in all, at least 2 an island.
        num_draws: draws of each chain, at least 2.
        num_islands: independent parts of the population, at least 2.
        num_steps: leapfrog steps of a move; twice as many from where 8 moves leave a correlation above 1/4.
        ess_threshold: share of the walkers that a step of the temperature leaves effective, in (0, 0.999].
        correlation: largest correlation with their ancestors that walkers may have, in any coordinate, when the moves
            at a temperature end, in (0, 1). Smaller ones than the noise of the estimate count as that.
        max_moves: largest number of moves at a temperature, in the first round; a long one counts as two.
        max_gradients: budget: no round begins that is expected to exceed this number of gradients of the model, all
            walkers together; the first always runs. Draws lie closer together in a round that takes more than expected,
            and one that has not reached the posterior when the budget ends is given up.
        max_seconds: budget in seconds of wall time, compilation included, in the same way; None for no limit.
        collapsed: name of a scalar site, such as a noise level, that moves are summed over on a lattice of its values
            (`noise.lattice`): the funnel between a scale and what it scales is no obstacle then. "auto" takes the scale
            of Gaussian data, or else another scalar, if the sum costs little beside the flow; None takes none.
        progress_bar: whether to show the progress.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: for a number out of its range; when run, for a model without latent sites, with discrete ones or
            with one that cannot be drawn, a `collapsed` that is none of its scalars, or a likelihood that is zero at
            all walkers.

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
        num_steps: int = 16,
        ess_threshold: float = 0.5,
        correlation: float = 0.25,
        max_moves: int = 64,
        max_gradients: int = 5_000_000,
        max_seconds: float | None = None,
        collapsed: str | None = "auto",
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_walkers, num_islands, ess_threshold, progress_bar)
        _checks.at_least(2, num_islands=num_islands, num_draws=num_draws)
        _checks.at_least(1, num_steps=num_steps, max_gradients=max_gradients)
        check_climb(ess_threshold, correlation, max_moves)
        if max_seconds is not None:
            _checks.positive(max_seconds=max_seconds)
        self._num_draws, self._num_steps = num_draws, num_steps
        self._limits = correlation, max_moves
        self._max_gradients, self._max_seconds = max_gradients, max_seconds
        self._collapsed = collapsed
        self._settings: Settings | None = None
        self._climbs: dict[int, Climb] = {}
        self._looks: list[Look] = []
        self._given_up = 0  # gradients of a round that was

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
        """Gradients of the model in all rounds, of all walkers together, with one that was given up."""
        _ = self._ran
        return sum(round.num_gradients for round in self._looks) + self._given_up

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        reading = Record(self._model).at(args, kwargs)
        _check(reading)
        settings = Settings(self._shape[0], self._num_steps, self._ess_threshold, *self._limits, self._site(reading))
        if settings != self._settings:
            self._settings, self._climbs = settings, {}
        names, self._started = NoiseVector(reading).names, time.monotonic()
        runs: list[tuple[Round, Look]] = []  # the last two
        number, factor, self._looks, self._given_up = self._shape[1], 1, [], 0
        while True:
            key = jax.random.fold_in(rng_key, len(self._looks))
            if number not in self._climbs:
                self._climbs[number] = Climb(self._model, settings, number)
            programs = self._climbs[number].bind(args, kwargs)
            found = self._round(key, programs, factor, runs[-1][0] if runs else None, names)
            if found is None:
                break
            runs = [*runs[-1:], found]
            following = None if found[1].converged else self._following(*found)
            self._looks.append(found[1])
            if following is None:
                break
            number, factor = following
        (before, _), (last, seen) = runs[0], runs[-1]
        values = pooled(last, before) if seen.is_pooled else last.values
        values = {name: value.reshape(-1, *value.shape[3:]) for name, value in values.items()}
        indices = np.arange(len(next(iter(values.values()))))
        draws = Draws(values, indices, indices.reshape(self._shape[0], -1))
        return Outcome(draws, last.evidence, last.history, seen.problems)

    def _site(self, reading: Reading) -> str | None:
        """The site that moves are summed over."""
        if self._collapsed in ("auto", None):
            return None if self._collapsed is None else site_to_sum(reading)
        if self._collapsed not in reading.structure.latent or not can_be_summed(reading.structure, self._collapsed):
            raise ValueError(
                "collapsed must name a continuous scalar site, in a model with diffusion sites none of whose priors "
                f"depends on another site, or be 'auto' or None; got {self._collapsed!r}"
            )
        return self._collapsed

    def _following(self, this: Round, seen: Look) -> tuple[int, int] | None:
        """Walkers on each island and `factor` of the round after this one; None if the budget does not suffice."""
        number, factor = this.num_walkers, this.factor
        if seen.needs_walkers or (seen.is_apart and self._looks):  # stationary, and kept apart by modes
            number *= 2
        else:
            factor *= 2
        gradients = this.num_gradients * number * factor // (this.num_walkers * this.factor)
        # a first one compiles, which is the greater part where seconds count
        compiling = 0.0 if number in self._climbs else (self._looks or [seen])[0].seconds
        affords = self._affords(this.num_gradients, gradients, gradients * this.seconds_each + compiling)
        return (number, factor) if affords else None

    def _affords(self, since: int, gradients: int, seconds: float) -> bool:
        """Whether the budget suffices for so much more, after the rounds so far and `since` gradients."""
        gradients += since + sum(look.num_gradients for look in self._looks)
        in_time = self._max_seconds is None or time.monotonic() - self._started + seconds <= self._max_seconds
        return gradients <= self._max_gradients and in_time

    def _round(
        self, key: jax.Array, programs: Programs, factor: int, last: Round | None, names: list[str]
    ) -> tuple[Round, Look] | None:
        """From the prior to draws of the posterior, with `factor` times the moves that it takes to forget.

        None if the budget ends on the way; the first one comes to its end.
        """
        started, islands = time.monotonic(), self._shape[0]
        key_start, key_at, key_climb, key_draw = jax.random.split(key, 4)
        stage, label = programs.at(key_at, programs.start(key_start)), f"round {len(self._looks) + 1}"
        history: list[Temperature] = []
        walkers, before = len(stage.walkers.q), 0
        log_likelihoods = [np.asarray(stage.walkers.log_likelihood)]
        starts = {n: v.reshape(islands, -1, 1, *v.shape[1:]) for n, v in programs.values(stage).items()}
        if last is None:
            look_at_start(log_likelihoods[0])
        with self._bar(1.0, f"{label}, temperature") as bar:
            while float(stage.temperature) < 1.0:
                if last is not None and not self._affords(before, 0, 0.0):
                    self._given_up = before
                    return None
                stage, happened = programs.climb(jax.random.fold_in(key_climb, len(history)), stage, factor)
                history.append(happened)
                before += int(happened.num_gradients) * walkers
                log_likelihoods.append(np.asarray(stage.walkers.log_likelihood))
                bar.set_postfix_str(f"ESS {happened.effective_size:.0f}, moves {happened.num_moves}", refresh=False)
                bar.update(float(happened.temperature) - bar.n)
        log_likelihoods = [v.reshape(islands, -1) for v in log_likelihoods]
        each = programs.gradients(stage) * walkers
        to_forget = -(-int(history[-1].num_gradients) * walkers // each)
        between = self._moves_between(to_forget, before, each, last)
        chains, drawing = Chains(programs, key_draw, stage, between), time.monotonic()
        lengths, number, seen = 0, self._num_draws, None
        while True:
            with self._bar(number, f"{label}, draws") as bar:
                between_draws = chains.draw(number, partial(_tell, bar, chains, islands))
            lengths, now, moves = lengths + 1, time.monotonic(), int(between_draws.num_moves)
            spent = before + moves * each + (1 + len(history)) * walkers
            seconds_each = (now - drawing) / (moves * each)
            evidence = bridged(history, [*log_likelihoods[:-1], chains.log_likelihoods(islands)])
            cost, size = (spent, now - started, seconds_each), (walkers // islands, factor)
            this = Round(chains.values(islands), starts, evidence, history, between_draws, *cost, *size)
            seen = look(this, last, names, seen)
            goes_on = seen.needs_draws or (seen.is_short and self._following(this, seen) is None)
            if not goes_on or lengths == _LENGTHS or number < self._num_draws:
                return this, seen
            number = self._most(self._num_draws, spent, chains.between * each, seconds_each)
            if number == 0:
                return this, seen

    def _moves_between(self, num_moves: int, since: int, each: int, last: Round | None) -> int:
        """Moves between draws, which span as many as it took to forget, or, after a first round, as the budget allows.

        Args:
            num_moves: that it took.
            since: gradients of the round so far.
            each: gradients of a move of all walkers.
            last: the round before.
        """
        between = -(-num_moves // self._num_draws)
        if last is None:
            return between
        return max(self._most(between, since, self._num_draws * each, last.seconds_each), 1)

    def _most(self, number: int, since: int, gradients: int, seconds_each: float) -> int:
        """How many times so many gradients the budget suffices for, at most `number`."""
        while number and not self._affords(since, number * gradients, number * gradients * seconds_each):
            number -= 1
        return number

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        for round in self.rounds:
            print(round)


def _tell(bar: tqdm, chains: Chains, islands: int) -> None:
    """Goes on by a draw, and says how far islands agree by now."""
    if not bar.disable:
        bar.set_postfix_str("nested R-hat {:.3f} ({})".format(*agreement(chains.values(islands))), refresh=False)
    bar.update(1)


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
