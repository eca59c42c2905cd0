r"""A sampler that a density alone has taught, and the evidence by weights.

A walk from noise to data (`walk`) is trained on a model's joint density, without draws of it (`training`). Then fresh
walks are made, each with its exact weight $W$. So, whatever was learned and in any number of levels,

$$\hat Z = \frac1N \sum_i W_i \quad\text{is unbiased}, \qquad
\frac1N \sum_i \log W_i \quad\text{is a lower bound on } \log Z \text{ in the mean},$$

and walks chosen by weight are draws of the posterior in the limit of many. Training makes the weights equal, and
nothing else: what was learned badly costs effective walks, and that is seen. Walks may also be taken as proposals of
independent Metropolis chains, one on each island. Moves by MALA separate copies in the end.

What no weight shows is a mode to which no walk has gone, and a walk that is trained on its own ends can forget one.
`training` tempers the target against that, which is no proof. In a few dimensions importance sampling about the prior
shows it (`problems`); in more, nothing does.

It learns anew for each posterior, and what it learns costs far more evaluations of the target than `TemperedSMC` needs
for the same draws; see `docs/concepts/trained.md` for figures. It pays if many more draws of one posterior are wanted,
since `train` and later runs part that cost.

References:
    Vargas, Grathwohl, Doucet, Denoising diffusion samplers, 2023, https://arxiv.org/abs/2302.13834.
    Zhang, Chen, Path integral sampler, 2022, https://arxiv.org/abs/2111.15141.
    Richter, Berner, Improved sampling via learned diffusions, 2024, https://arxiv.org/abs/2307.01198.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.choose import effective_size, metropolis, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.infer.particles.designed.vector import (
    Units,
    both,
    check_model,
    check_units,
    given_units,
    units_of_prior,
    vector_of,
)
from numpyro_diffusion.infer.particles.evidence import (
    Draws,
    Outcome,
    ParticleSampler,
    evidence_of,
    pool_islands,
    resample_islands,
)
from numpyro_diffusion.infer.particles.learned.law import log_normal
from numpyro_diffusion.infer.particles.mutate import separate
from numpyro_diffusion.infer.particles.trained.problems import NUM_DRAWS, Reference, problems_of, reference_of
from numpyro_diffusion.infer.particles.trained.training import (
    OBJECTIVES,
    Trace,
    Trained,
    Trainer,
    Training,
)
from numpyro_diffusion.infer.particles.trained.walk import Learned, LogDensity, Walk
from numpyro_diffusion.nn import MLP

_NAME = "DenoisingDiffusionSampler"
_CALLS = 20
"""Compiled calls of training, between which the bar moves."""
_AT_ONCE = 1000
"""Draws about the prior that are evaluated together."""


class Bound(NamedTuple):
    """A lower bound on the log-evidence, in nats."""

    value: jax.Array  # mean of the log-weights
    standard_error: jax.Array


class DenoisingDiffusionSampler(ParticleSampler):
    r"""Samples an ordinary model by a diffusion that learns from the model's density, and estimates its evidence.

    Args:
        model: NumPyro model, all of whose latent sites are continuous.
        num_particles: walks after training, at least 2 an island.
        num_training_steps: steps of training; 0 for none, which is importance sampling from a normal law.
        batch_size: walks in a step of training, at least 2.
        objective: "log_variance", how unequal the weights are, or "kl", the bound on the evidence, whose gradients go
            through walk and target.
        network: a backbone for vectors of twice as many entries as there are unconstrained numbers, whose output is
            zero before training; None for an `MLP`.
        guided: whether the target's gradient steers the walk, at one evaluation a level. Without it, a walk is one
            evaluation, and modes are easily lost.
        learning_rate: the largest of Adam, positive.
        num_levels: noise levels of a walk, at least 2.
        noise_levels: the highest and the lowest, in units of `scale`.
        correct: "resample" for walks chosen by weight; "independence" for a chain on each island, with its walks as
            proposals.
        num_moves: at most so many moves by MALA in the end, 0 for none.
        location: centre of the law, unconstrained values by site; None takes the mean of draws of the prior.
        scale: standard deviations there, positive, in the same form; None takes those of the prior.
        num_islands: parts of the walks, as chains of their own. The error of the evidence is that of all walks.
        progress_bar: whether to show the training.

    Raises:
        TypeError: if `model` is not callable, or `network` is no `nnx.Module`.
        ValueError: for a number out of its range, an unknown name, or one of `location` and `scale` without the other;
            when run, for a model without latent sites, with discrete ones or that cannot be differentiated, a prior
            that cannot be drawn where location and scale are not given, or a density that is zero or NaN wherever it is
            looked at.

    Warns:
        UserWarning: if few walks have all the weight, modes are lost, or training has failed.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer import DenoisingDiffusionSampler
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("y", dist.Normal(jnp.abs(x), 0.5), obs=y)
        >>> sampler = DenoisingDiffusionSampler(
        ...     model, 1000, num_training_steps=200, batch_size=64, num_levels=12, progress_bar=False
        ... ).run(jax.random.key(0), 3.0)
        >>> bool(abs((sampler.get_samples()["x"] > 0.0).mean() - 0.5) < 0.15)  # the sign is not observed
        True
        >>> bool(sampler.evidence_bound.value < sampler.log_evidence.value)
        True
    """

    status = Status("density", True, "exact in many walks, whatever was learned; few effective ones are reported")
    cure = "raise num_training_steps, batch_size or num_particles, or take TemperedSMC(model)"
    """What `verdict` advises about draws that are too few."""

    def __init__(
        self,
        model: Model,
        num_particles: int = 2000,
        *,
        num_training_steps: int = 1000,
        batch_size: int = 128,
        objective: Literal["log_variance", "kl"] = "log_variance",
        network: nnx.Module | None = None,
        guided: bool = True,
        learning_rate: float = 3e-3,
        num_levels: int = 24,
        noise_levels: tuple[float, float] = (3.0, 0.03),
        correct: Literal["resample", "independence"] = "resample",
        num_moves: int = 20,
        location: Mapping[str, ArrayLike] | None = None,
        scale: Mapping[str, ArrayLike] | None = None,
        num_islands: int = 4,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_particles, num_islands, 1.0, progress_bar)
        _checks.at_least(0, num_training_steps=num_training_steps, num_moves=num_moves)
        _checks.at_least(2, batch_size=batch_size, num_levels=num_levels)
        _checks.one_of("objective", objective, OBJECTIVES)
        _checks.one_of("correct", correct, ("resample", "independence"))
        if not (network is None or isinstance(network, nnx.Module)):
            raise TypeError(f"network must be None or a flax.nnx.Module; got {network!r}")
        highest, lowest = noise_levels
        _checks.positive(**{"noise_levels[1]": lowest, "learning_rate": learning_rate})
        _checks.exceeds("noise_levels[0]", highest, "noise_levels[1]", lowest)
        self._given = both(location, scale)
        self._walk = Walk(np.geomspace(lowest, highest, num_levels), guided, objective == "log_variance")
        self._trainer = Trainer(self._walk, objective, num_training_steps, batch_size, learning_rate)
        self._num_training_steps, self._batch_size = num_training_steps, batch_size
        self._network, self._correct, self._num_moves = network, correct, num_moves
        self._kept: Trained | None = None
        self._compiled = Compiled(model, self._units, self._by_prior, self._steps, self._draw)

    def train(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Self:
        """Trains, and keeps what was learned for all later runs; they are exact at other arguments too, as weights are.

        Args:
            rng_key: random key.
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            This object.
        """
        self._kept = self._train(rng_key, args, kwargs)
        return self

    @property
    def training(self) -> Trace:
        """Training of the last run, step by step."""
        return self._ran.history.trace

    @property
    def log_weights(self) -> jax.Array:
        """Of the walks of the last run, (num_islands, num_particles / num_islands)."""
        _ = self._ran
        return self._log_weights

    @property
    def evidence_bound(self) -> Bound:
        """The mean log-weight of the last run: below the log-evidence, up to its error."""
        values = self.log_weights.reshape(-1)
        return Bound(values.mean(), values.std(ddof=1) / jnp.sqrt(values.size))

    @property
    def effective_size(self) -> float:
        """Of all walks of the last run."""
        return float(effective_size(self.log_weights.reshape(-1)))

    @property
    def num_target_evals(self) -> int:
        """Of the model's density, with its gradient or without: training, also an earlier one, walks and moves."""
        trained, walks = self._ran.history, self._shape[0] * self._shape[1]
        return trained.num_target_evals + NUM_DRAWS + walks * (self._walk.evaluations + self._moves_made + 1)

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        bound, walks = self.evidence_bound, self._shape[0] * self._shape[1]
        print(f"log evidence is above {bound.value:.3f} +- {bound.standard_error:.3f}")
        print(f"effective number of walks: {self.effective_size:.1f} of {walks}")
        print(f"{self.num_target_evals} evaluations of the target, training included")

    def _train(self, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Trained:
        check_model(_NAME, Record(self._model).at(args, kwargs), self._given)
        units_of, by_prior, steps, _ = self._compiled.bind(args, kwargs)
        key_units, key_network, key_start, key_steps = jax.random.split(key, 4)
        units = units_of(key_units)
        check_units(_NAME, units, self._given is not None)
        size, count, lowest = units[0].size, self._num_training_steps, by_prior(key_start, units).lowest
        if not bool(lowest > 0.0):
            raise ValueError(
                f"the model's density must be positive and finite somewhere; it is zero or NaN at all of {NUM_DRAWS} "
                "points about the prior. Look for a factor that is not finite, or give location= and scale= nearer to "
                "the posterior"
            )
        network = self._network
        if network is None:
            network = MLP((2 * size,), 64 if size <= 8 else 128, 2, rngs=nnx.Rngs(key_network))
        if (shape := getattr(network, "event_shape", (2 * size,))) != (2 * size,):
            raise ValueError(f"network must be for vectors of {2 * size} entries; got {shape}")
        training, called = self._trainer.start(self._walk.untrained(network, size)), -(-count // _CALLS)
        with self._bar(count, "training") as bar:
            for first in range(0, count, max(called, 1)):
                end = min(first + called, count)
                training = steps(key_steps, units, training, lowest, jnp.asarray(first), jnp.asarray(end))
                bar.set_postfix_str(f"loss {training.trace.loss[end - 1]:.3g}", refresh=False)
                bar.update(end - first)
        evaluations = NUM_DRAWS + count * self._batch_size * self._walk.evaluations
        return Trained(units, training.learned, jax.tree.map(np.asarray, training.trace), evaluations)

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        key_train, key_draw, key_check = jax.random.split(rng_key, 3)
        trained = self._train(key_train, args, kwargs) if self._kept is None else self._kept
        reading = Record(self._model).at(args, kwargs)
        check_model(_NAME, reading, self._given)
        size = sum(value.size for value in reading.origin().values())
        if size != trained.units[0].size:
            raise ValueError(
                f"the model has {size} unconstrained numbers, and {trained.units[0].size} where train() learned. Train "
                "again at these arguments"
            )
        _, by_prior, _, draw = self._compiled.bind(args, kwargs)
        draws, log_weights, moves = draw(key_draw, trained.units, trained.learned)
        if not bool(jnp.isfinite(log_weights).any()):
            raise ValueError(
                "the model's density must be positive and finite at the end of some walk; it is zero or NaN at all of "
                "them. Look for a factor that is not finite, or raise num_training_steps"
            )
        self._log_weights, self._moves_made = log_weights, int(moves)
        evidence = evidence_of(logsumexp(log_weights, axis=1) - jnp.log(self._shape[1]))
        by_walk = evidence_of(log_weights.reshape(-1)).standard_error  # walks are independent, also on one island
        evidence = evidence._replace(standard_error=by_walk)
        reference = by_prior(key_check, trained.units)
        problems = problems_of(np.asarray(log_weights), trained.trace, reference)
        if problems:
            evidence = evidence._replace(standard_error=jnp.full((), jnp.inf))
        return Outcome(draws, evidence, trained, problems)

    def _units(self, key: jax.Array, args: tuple, kwargs: dict) -> Units:
        """Location and scale of all latent sites, (D,)."""
        if self._given is None:
            return units_of_prior(_NAME, self._model, key, args, kwargs)
        return given_units(Record(self._model).at(args, kwargs), *self._given)

    def _log_tilt(self, units: Units, args: tuple, kwargs: dict) -> LogDensity:
        """The model's log-density over that of N(0, I)."""
        vector = vector_of(self._model, units, args, kwargs)
        return lambda w: vector.log_density(w) - log_normal(w, jnp.ones(()))

    def _by_prior(self, key: jax.Array, units: Units, args: tuple, kwargs: dict) -> Reference:
        """What draws of N(0, I) say of the target."""
        points = jax.random.normal(key, (NUM_DRAWS, units[0].size))
        return reference_of(jax.lax.map(self._log_tilt(units, args, kwargs), points, batch_size=_AT_ONCE))

    def _steps(self, key: jax.Array, units: Units, training: Training, *rest: Any) -> Training:
        """Steps of training."""
        lowest, first, end, args, kwargs = rest
        return self._trainer.steps(key, training, self._log_tilt(units, args, kwargs), lowest, first, end)

    def _draw(
        self, key: jax.Array, units: Units, learned: Learned, args: tuple, kwargs: dict
    ) -> tuple[Draws, jax.Array, jax.Array]:
        """Walks, island by island, corrected and moved: draws, log-weights, and the number of moves."""
        key_walks, key_correct, key_moves, key_pooled = jax.random.split(key, 4)
        log_tilt, one = self._log_tilt(units, args, kwargs), jnp.ones(())
        islands, n = self._shape
        keys = jax.random.split(key_walks, self._shape)
        walked = jax.lax.map(jax.vmap(lambda key: self._walk(learned, key, log_tilt, one)), keys)
        log_weights = without_improper(walked.log_tilt + walked.log_rest)
        everyone = jnp.arange(islands * n)
        if self._correct == "independence":
            chosen = jax.vmap(_chain)(jax.random.split(key_correct, islands), log_weights)
            chosen, pooled = (chosen + n * jnp.arange(islands)[:, None]).reshape(-1), everyone
        else:
            chosen = resample_islands(key_correct, log_weights).reshape(-1)
            pooled = pool_islands(key_pooled, logsumexp(log_weights, axis=1), n)
        vector = vector_of(self._model, units, args, kwargs)
        z = jax.vmap(vector.point)(walked.point.reshape(islands * n, -1)[chosen])
        z, moves = separate(self._model, key_moves, z, args, kwargs, self._num_moves)
        values = jax.vmap(partial(vector.reading.constrain, deterministic=True))(z)
        return Draws(values, pooled, everyone.reshape(self._shape)), log_weights, moves


def _chain(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Indices of a Metropolis chain whose proposals are walks in turn, from one chosen by weight; (n,)."""
    key_start, key_steps = jax.random.split(key)

    def step(current: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        new, key = at
        new = metropolis(key, log_weights[new] - log_weights[current], new, current, log_weights[new]).point
        return new, new

    each = jnp.arange(len(log_weights)), jax.random.split(key_steps, len(log_weights))
    return jax.lax.scan(step, jax.random.categorical(key_start, log_weights), each)[1]
