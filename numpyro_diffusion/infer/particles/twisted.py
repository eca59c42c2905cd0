r"""Twisted sequential Monte Carlo: particles walk down the reverse process, looking ahead at the data.

The solver's walk is a Markov chain $p(x_T) \prod p(x_s \mid x_t)$ that ends at a clean point, which the model weighs by
$L(x)$. A *twisting function* $\psi_t(x_t) \approx E[L(x) \mid x_t]$, from any guidance, says on the way how well a
point will explain the data. Particles step by the guided transition $q$, a tenth of them by $p$ (`walk` says why, and
what then replaces $q$), and are weighted by

$$w_s = \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)} \frac{\psi_s(x_s)}{\psi_t(x_t)}, \qquad \psi_0 = L,$$

so the twisting cancels in the end: particles target $L(x)$ times the law of the walk for any $\psi > 0$, and

$$\hat Z = \prod \text{mean weights}, \qquad E[\hat Z] = \int L(x)\, p_\text{walk}(x)\, \mathrm{d}x,$$

exactly, for any number of particles. A good guidance makes the weights even; a bad one costs particles, not
correctness. Particles are resampled where their effective sample size falls below a share of their number. With the
guidance "mmps", "tmpd" or "dps" this is the twisted diffusion sampler, with "flat" the look-ahead of MCGDiff (which
takes $y$ as a point of the noising process, where this adds the variances). For likelihoods that are not Gaussian see
`look_ahead`.

Correct means unbiased on the natural scale, which is of no use if the guidance is bad enough: where one particle has
all the weight at a level, nearly every run ends far below $Z$, the islands agree on that, and runs that almost never
happen contribute the rest of the mean. So the run records the effective sample size of each island at every level. If
it is ever only a few particles, the spread over islands says nothing about the error, which is set to infinity.

What remains approximate: the walk has the prior's law up to the solver's order, and weighted draws of finitely many
particles have an error of $O(1 / N)$. Once particles are clean, nothing can correct them by the data: `TemperedSMC`,
which moves them, does better where no guidance is good.

References:
    Wu et al., Practical and asymptotically exact conditional sampling in diffusion models, 2023,
    https://arxiv.org/abs/2306.17775.
    Cardoso et al., Monte Carlo guided diffusion for Bayesian linear inverse problems, 2024,
    https://arxiv.org/abs/2308.07983.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from numpyro_diffusion.guidance import Guided, Likelihood, Observation
from numpyro_diffusion.infer.kernel.choose import effective_size, systematic, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.checks import check_walk
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.observation import GuidedSites, check_guidance, guided_sites
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.particles.evidence import (
    Draws,
    Outcome,
    ParticleSampler,
    evidence_of,
    harmonic_mean,
    resample_islands,
    resample_uneven,
)
from numpyro_diffusion.infer.particles.look_ahead import LookAhead
from numpyro_diffusion.infer.reverse.base import solver_of
from numpyro_diffusion.infer.reverse.walk import Transition, check_solver, log_walk_weight, outlooks
from numpyro_diffusion.solve import GaussianSolver, Solver, terminal_point


class Level(NamedTuple):
    """What happened at a noise level; the last is the clean end, where the model weighs."""

    noise_level: jax.Array
    effective_size: jax.Array  # of all islands together, before resampling
    per_island: jax.Array  # of one island, its harmonic mean over islands, before resampling
    resampled: jax.Array  # share of the islands
    blind: jax.Array  # share of the particles at whose predicted clean point the likelihood is zero or NaN
    unguided: jax.Array  # share of the particles whose guidance was not finite: they went without it


class Cloud(NamedTuple):
    """Weighted particles, island by island."""

    points: jax.Array  # (islands * n, *event_shape)
    memory: Any  # of the solver, by particle
    log_ratio: jax.Array  # (islands * n,), of the walks so far, the prior's density over the guidance's
    log_weights: jax.Array  # (islands, n), since the last resampling
    log_evidence: jax.Array  # (islands,), up to the last resampling


_SPAN = 50.0
"""Lower bound of the twisting function, which must be positive, in nats below the best particle of a level."""
_BLIND = 0.01
"""Share of particles with zero or NaN likelihood ahead, above which a run raises an error."""
_FEW = 10.0
"""Number of effective particles of an island below which its estimate is not reliable."""


class TwistedSMC(ParticleSampler):
    """Samples the diffusion sites of a model, and estimates the evidence, in one guided walk of many particles.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites, possibly in plates.
        num_particles: particles in all, at least 2 an island.
        guidance: how the walk looks ahead, see `guidance.Guided`; None takes "mmps" for a Gaussian observation and
            "dps" for any other likelihood, limited as in `look_ahead`.
        observation: what is observed of a point of the denoiser's own space; None reads the model. It steers; the
            weights are the model's.
        solver: a solver whose steps have a density; None takes the prior's own `sampler`.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of an island's particles below which they are resampled, in (0, 1]; 1 resamples at every
            level.
        progress_bar: whether to show the noise level.

    Raises:
        TypeError: if `model` is not callable, or the solver's steps have no density.
        ValueError: for a number out of its range or an unknown guidance; when run, for a model with other latent sites,
            diffusion sites whose ladders of noise levels differ in span, a guidance that cannot handle the likelihood
            (none can look ahead to a hard constraint), or weights that all vanish.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import TwistedSMC
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> smc = TwistedSMC(model, num_particles=400, progress_bar=False).run(jax.random.key(0), 3.0)
        >>> bool(abs(smc.get_samples()["x"].mean() - 1.5) < 0.2)  # log evidence is log N(3; 0, 2) = -3.52
        True
        >>> bool(abs(smc.log_evidence.value + 3.52) < 0.1)
        True
    """

    def __init__(
        self,
        model: Model,
        num_particles: int = 1000,
        *,
        guidance: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_particles, num_islands, ess_threshold, progress_bar)
        check_guidance(guidance)
        if solver is not None:
            check_solver(solver)
        self._guidance = guidance, observation
        self._solver = solver
        self._compiled = Compiled(model, self._start, self._down, self._weigh)

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        check_walk("TwistedSMC", Record(self._model).at(args, kwargs))
        start, down, weigh = self._compiled.bind(args, kwargs)
        key_start, key_steps, key_draws = jax.random.split(rng_key, 3)
        cloud, noise_levels = start(key_start)
        history = []
        with self._bar(len(noise_levels), "noise level") as bar:
            for k in range(len(noise_levels) - 1):
                cloud, level = down(jax.random.fold_in(key_steps, k), cloud, jnp.asarray(k))
                history.append(level)
                bar.update()
            draws, islands, level = weigh(key_draws, cloud)
            levels = jax.tree.map(lambda *leaves: np.array(leaves), *history, level)
            bar.update()
        self._check(islands, levels)
        evidence, problems = evidence_of(islands), self._problems(levels)
        if problems:
            evidence = evidence._replace(standard_error=jnp.full((), jnp.inf))
        return Outcome(draws, evidence, levels, problems)

    def _check(self, islands: jax.Array, levels: Level) -> None:
        if not bool(jnp.isfinite(islands).any()):
            raise ValueError(
                "the likelihood must be positive at some particle; the weights of all of them vanish or are NaN. Take "
                "more particles, another guidance, or TemperedSMC(model)"
            )
        if levels.blind.max() > _BLIND:
            raise ValueError(
                f"the likelihood is zero or NaN at the clean points that up to {float(levels.blind.max()):.0%} of the "
                "particles predict, so that the guidance cannot tell which of them will meet it, and those that do "
                "would be lost. Give an `observation` to steer by, or use TemperedSMC(model)"
            )

    def _problems(self, levels: Level) -> tuple[str, ...]:
        """A message if few particles had all the weight at some level."""
        few = min(_FEW, 0.25 * self._shape[1])
        poor = levels.per_island < few
        if not poor.any():
            return ()
        worst = int(np.argmin(levels.per_island))
        return (
            f"the weights degenerate at {poor.sum()} of {len(poor)} noise levels: of the {self._shape[1]} particles of "
            f"an island only {levels.per_island[worst]:.1f} are effective at noise level "
            f"{levels.noise_level[worst]:.3g}. Draws are copies of a few, and the log evidence is most likely too "
            "small by more than islands show, so its error is infinite. Take more particles, another guidance, a "
            "solver of more steps, or TemperedSMC(model)",
        )

    @property
    def levels(self) -> Level:
        """What happened at each noise level, as arrays over levels."""
        return self._ran.history

    @property
    def num_score_evals(self) -> int:
        """Denoiser evaluations per particle; a guidance's derivatives of the network are not counted."""
        return len(self.levels.noise_level)

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        levels = self.levels
        worst = int(np.argmin(levels.effective_size))
        print(
            f"smallest effective size {levels.effective_size[worst]:.0f} of {self._shape[0] * self._shape[1]}, at "
            f"noise level {levels.noise_level[worst]:.3g}; resampled at {np.mean(levels.resampled):.0%} of the levels"
        )

    def _parts(self, args: tuple, kwargs: dict) -> tuple[Reading, GuidedSites, Guided, GaussianSolver, jax.Array]:
        reading = Record(self._model).at(args, kwargs)
        found = guided_sites(reading, *self._guidance)
        solver = solver_of(found, self._solver, "TwistedSMC")
        return reading, found, found.guided, solver, solver.times(found.guided)

    def _start(self, key: jax.Array, args: tuple, kwargs: dict) -> tuple[Cloud, jax.Array]:
        """Particles at the highest noise level, and all levels."""
        _, _, guided, solver, times = self._parts(args, kwargs)
        islands, n = self._shape
        noise = jax.random.normal(key, (islands * n, *guided.event_shape))
        points = jax.vmap(partial(terminal_point, guided))(noise)
        memory = jax.vmap(partial(solver.init, guided))(points)
        cloud = Cloud(points, memory, jnp.zeros(islands * n), jnp.zeros(self._shape), jnp.zeros(islands))
        return cloud, jax.vmap(guided.schedule.noise_level)(times)

    def _down(self, key: jax.Array, cloud: Cloud, k: jax.Array, args: tuple, kwargs: dict) -> tuple[Cloud, Level]:
        """One level down: looks ahead, resamples where weights have become uneven, steps and weighs."""
        _, _, guided, solver, times = self._parts(args, kwargs)
        t, s = times[k], times[k + 1]
        key_resample, key_step = jax.random.split(key)
        log_twist, step, memory = outlooks(solver, LookAhead(guided), cloud.points, cloud.memory, t, s)
        log_twist, blind = _positive(log_twist)
        cloud, ancestors, level = self._resample(key_resample, cloud, log_twist)
        moving = log_twist, step, memory, cloud.log_ratio
        log_twist, step, memory, before = jax.tree.map(lambda leaf: leaf[ancestors], moving)
        points = jax.vmap(Transition.draw)(step, jax.random.split(key_step, len(ancestors)), before)
        log_ratio = before + jax.vmap(Transition.log_ratio)(step, points)
        gained = log_walk_weight(log_ratio) - log_walk_weight(before) - log_twist
        log_weights = cloud.log_weights + gained.reshape(self._shape)
        cloud = Cloud(points, memory, log_ratio, log_weights, cloud.log_evidence)
        unguided = jnp.mean(step.is_lost, dtype=points.dtype)
        return cloud, level._replace(
            noise_level=guided.schedule.noise_level(t), blind=jnp.mean(blind), unguided=unguided
        )

    def _resample(self, key: jax.Array, cloud: Cloud, log_twist: jax.Array) -> tuple[Cloud, jax.Array, Level]:
        """Weighs by the twisting function, and resamples where the weights have become uneven."""
        log_weights = without_improper(cloud.log_weights + log_twist.reshape(self._shape))
        ancestors, log_weights, log_gain, sizes, now = resample_uneven(key, log_weights, self._ess_threshold)
        cloud = cloud._replace(log_weights=log_weights, log_evidence=cloud.log_evidence + log_gain)
        zero = jnp.zeros(())
        return cloud, ancestors, Level(zero, sizes.sum(), harmonic_mean(sizes), jnp.mean(now), zero, zero)

    def _weigh(self, key: jax.Array, cloud: Cloud, args: tuple, kwargs: dict) -> tuple[Draws, jax.Array, Level]:
        """Weighs clean points by the model: draws, the evidence of each island, and the effective sizes."""
        reading, found, guided, _, times = self._parts(args, kwargs)
        clean = jax.vmap(lambda x_t: guided.base(x_t, times[-1]).x0)(cloud.points)
        z = jax.vmap(found.from_denoiser)(clean)
        log_likelihoods = jax.vmap(reading.log_rest)(z)
        log_weights = without_improper(cloud.log_weights + log_likelihoods.reshape(self._shape))
        log_evidence = cloud.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(self._shape[1])
        key_pooled, key_islands = jax.random.split(key)
        pooled = systematic(key_pooled, (cloud.log_evidence[:, None] + log_weights).reshape(-1))
        values = jax.vmap(lambda z: reading.constrain(z, deterministic=True))(z)
        sizes, zero = jax.vmap(effective_size)(log_weights), jnp.zeros(())
        noise_level = guided.schedule.noise_level(times[-1])
        level = Level(noise_level, sizes.sum(), harmonic_mean(sizes), zero, zero, zero)
        return Draws(values, pooled, resample_islands(key_islands, log_weights)), log_evidence, level


def _positive(log_twist: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A twisting function relative to the best particle and bounded below, and where it was zero or NaN."""
    log_twist = without_improper(log_twist)
    best, blind = jnp.max(log_twist), jnp.isneginf(log_twist)
    return jnp.where(jnp.isfinite(best), jnp.maximum(log_twist - best, -_SPAN), 0.0), blind
