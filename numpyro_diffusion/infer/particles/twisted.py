r"""Twisted sequential Monte Carlo: particles walk down the reverse process, looking ahead at the data.

The solver's walk is a Markov chain $p(x_T) \prod p(x_s \mid x_t)$ that ends at a clean point, which the model weighs by
$L(x)$. A *twisting function* $\psi_t(x_t) \approx E[L(x) \mid x_t]$, from any guidance, says on the way how well a
point will do. Particles step by the guided transition $q$, a tenth of them by $p$ (`reverse.walk` has the reason, and
what then takes the place of $q$), and are weighted by

$$w_s = \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)} \frac{\psi_s(x_s)}{\psi_t(x_t)}, \qquad \psi_0 = L,$$

so the twisting cancels in the end: particles target $L(x)$ times the law of the walk for any $\psi > 0$, and

$$\hat Z = \prod \text{mean weights}, \qquad E[\hat Z] = \int L(x)\, p_\text{walk}(x)\, \mathrm{d}x,$$

exactly, for any number of particles. A good guidance makes the weights even; a bad one costs particles, not
correctness. They are resampled where their effective sample size falls below a share of them. With the moment "mmps",
"tmpd" or "dps" this is the twisted diffusion sampler, with "flat" the look-ahead of MCGDiff (which takes $y$ for a
point of the noising process where this adds the variances).

What remains approximate: the walk stands for the prior, to the solver's order; and draws are those of finitely many
particles, weighted, so they err by $O(1 / N)$. Particles never see the data again once they are clean: `TemperedSMC`,
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

from numpyro_diffusion.guidance import Likelihood, Observation
from numpyro_diffusion.guidance.guided import LOG_FLOOR
from numpyro_diffusion.infer.kernel.choose import effective_size, proper, systematic
from numpyro_diffusion.infer.model.observation import GuidedSites, check_guidance, check_missing, guided_sites
from numpyro_diffusion.infer.model.sites import (
    Model,
    dependent_priors,
    log_rest,
    other_latent_sites,
    prior_sites,
    with_deterministic,
)
from numpyro_diffusion.infer.particles.evidence import ParticleSampler, evidence_of
from numpyro_diffusion.infer.reverse.base import solver_of
from numpyro_diffusion.infer.reverse.walk import Transition, check_solver, log_worth, outlooks
from numpyro_diffusion.solve import Solver, terminal_point


class Level(NamedTuple):
    """What happened at a noise level."""

    noise_level: jax.Array
    effective_size: jax.Array  # of all islands together, before resampling
    resampled: jax.Array  # share of the islands
    blind: jax.Array  # share of the particles whose predicted clean point the likelihood gives no weight at all
    unguided: jax.Array | float = 0.0  # share of the particles whose guidance was not finite: they went without it


class _Cloud(NamedTuple):
    """Weighted particles, island by island."""

    points: jax.Array  # (islands * n, *event_shape)
    memory: Any  # of the solver, by particle
    log_ratio: jax.Array  # (islands * n,), of the walks so far, the prior's density over the guidance's
    log_weights: jax.Array  # (islands, n), since the last resampling
    log_evidence: jax.Array  # (islands,), up to the last resampling


class TwistedSMC(ParticleSampler):
    """Samples the diffusion sites of a model, and estimates the evidence, in one guided walk of many particles.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites, possibly in plates.
        num_particles: particles in all, at least 2 an island.
        moment: how the guidance looks ahead, see `guidance.Guided`; None takes "mmps" for a Gaussian observation and
            "dps" for any other likelihood.
        observation: what is observed of a point of the denoiser's own space; None reads the model. It steers; the
            weights are the model's.
        solver: a solver whose steps have a density; None takes the prior's own `sampler`.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of an island's particles below which they are resampled, in (0, 1].

    Raises:
        TypeError: if `model` is not callable, or the solver's steps have no density.
        ValueError: for a number out of its range or an unknown moment; when run, for a model with other latent sites,
            diffusion sites whose ladders of noise levels differ, a moment that cannot handle the likelihood (none can
            look ahead to a hard constraint), or weights that all vanish.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import TwistedSMC
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> smc = TwistedSMC(model, num_particles=400).run(jax.random.key(0), 3.0)
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
        moment: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
    ) -> None:
        super().__init__(model, num_particles, num_islands, ess_threshold)
        check_guidance(moment)
        if solver is not None:
            check_solver(solver)
        self._guidance = moment, observation
        self._solver = solver
        self._compiled = jax.jit(self._run)

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> "TwistedSMC":
        """Walks from noise to the posterior; a second run on data of the same shapes compiles nothing.

        Args:
            rng_key: random key.
            *args: the model's arguments, arrays or pytrees of them.
            **kwargs: its keyword arguments.

        Returns:
            This object, which then holds draws and evidence.
        """
        check_missing(self._model, args, kwargs)
        others = other_latent_sites(self._model, args, kwargs)
        if others:
            raise ValueError(
                f"TwistedSMC moves DiffusionPrior sites only; the model also has latent sites {others}. Use "
                "DiffusionGibbs(model, x_kernel=ParticleGibbs), which moves these by NUTS, or TemperedSMC(model)"
            )
        several = len(prior_sites(self._model, args, kwargs)) > 1
        dependent = dependent_priors(self._model, args, kwargs) if several else set()
        if dependent:
            raise ValueError(
                f"the priors of diffusion sites {sorted(dependent)} depend on other diffusion sites that TwistedSMC "
                "walks together with them; use NoiseSpace(model)"
            )
        samples, islands, levels = self._compiled(rng_key, args, kwargs)
        if not bool(jnp.isfinite(islands).any()):
            raise ValueError(
                "the weights of all particles vanish or are not numbers: the likelihood is zero at all of them. Take "
                "more particles, another moment, or TemperedSMC(model)"
            )
        if levels.blind.any():
            raise ValueError(
                "the likelihood is zero, or not a number, at the clean points that up to "
                f"{float(levels.blind.max()):.0%} of the particles predict: it cannot say which of them will meet it, "
                "and some that do would be lost. Give an `observation` to steer by, or use TemperedSMC(model)"
            )
        self._result = samples, evidence_of(islands), jax.tree.map(np.asarray, levels)
        return self

    @property
    def levels(self) -> Level:
        """What happened at each noise level, as arrays over levels."""
        return self._ran[2]

    @property
    def num_score_evals(self) -> int:
        """Denoiser evaluations per particle; a guidance's derivatives of the network are not counted."""
        return len(self.levels.noise_level) + 1

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        levels = self.levels
        worst = int(np.argmin(levels.effective_size))
        print(
            f"smallest effective size {levels.effective_size[worst]:.0f} of {self._shape[0] * self._shape[1]}, at "
            f"noise level {levels.noise_level[worst]:.3g}; resampled at {np.mean(levels.resampled):.0%} of the levels"
        )

    def _run(self, key: jax.Array, args: tuple, kwargs: dict) -> tuple[dict[str, jax.Array], jax.Array, Level]:
        found = guided_sites(self._model, args, kwargs, *self._guidance)
        guided, solver = found.guided, solver_of(found, self._solver, "TwistedSMC")
        times = solver.times(guided)
        key_start, key_steps, key_draws = jax.random.split(key, 3)
        islands, n = self._shape
        noise = jax.random.normal(key_start, (islands * n, *guided.event_shape))
        points = jax.vmap(partial(terminal_point, guided))(noise)
        memory = jax.vmap(partial(solver.remember, guided))(points)
        cloud = _Cloud(points, memory, jnp.zeros(islands * n), jnp.zeros(self._shape), jnp.zeros(islands))

        def down(cloud: _Cloud, k: jax.Array) -> tuple[_Cloud, Level]:
            t, s = times[k], times[k + 1]
            log_twist, step, memory = outlooks(solver, guided, cloud.points, cloud.memory, t, s)
            keys = jax.random.split(jax.random.fold_in(key_steps, k))
            cloud, ancestors, level = self._resample(keys[0], cloud, log_twist)
            moving = log_twist, step, memory, cloud.log_ratio
            log_twist, step, memory, before = jax.tree.map(lambda leaf: leaf[ancestors], moving)
            points = jax.vmap(Transition.draw)(step, jax.random.split(keys[1], islands * n), before)
            log_ratio = before + jax.vmap(Transition.log_ratio)(step, points)
            gained = log_worth(log_ratio) - log_worth(before) - log_twist
            log_weights = cloud.log_weights + gained.reshape(self._shape)
            cloud = _Cloud(points, memory, log_ratio, log_weights, cloud.log_evidence)
            unguided = jnp.mean(step.is_lost, dtype=points.dtype)
            return cloud, level._replace(noise_level=guided.schedule.noise_level(t), unguided=unguided)

        cloud, levels = jax.lax.scan(down, cloud, jnp.arange(len(times) - 1))
        clean = jax.vmap(lambda x_t: guided.base(x_t, times[-1]).x0)(cloud.points)
        return *self._weigh(key_draws, found, clean, cloud, args, kwargs), levels

    def _resample(self, key: jax.Array, cloud: _Cloud, log_twist: jax.Array) -> tuple[_Cloud, jax.Array, Level]:
        """Weighs by what lies ahead, and copies where the weights have become uneven."""
        islands, n = self._shape
        log_weights = proper(cloud.log_weights + log_twist.reshape(self._shape))
        worth = jax.vmap(effective_size)(log_weights)
        now = worth < self._ess_threshold * n
        chosen = jax.vmap(systematic)(jax.random.split(key, islands), log_weights)
        chosen = jnp.where(now[:, None], chosen, jnp.arange(n)) + n * jnp.arange(islands)[:, None]
        mean = logsumexp(log_weights, axis=1) - jnp.log(n)
        cloud = cloud._replace(
            log_weights=jnp.where(now[:, None], 0.0, log_weights),
            log_evidence=cloud.log_evidence + jnp.where(now, mean, 0.0),
        )
        return (
            cloud,
            chosen.reshape(-1),
            Level(jnp.zeros(()), worth.sum(), jnp.mean(now), jnp.mean(log_twist <= LOG_FLOOR)),
        )

    def _weigh(
        self, key: jax.Array, found: GuidedSites, clean: jax.Array, cloud: _Cloud, args: tuple, kwargs: dict
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Weighs clean points by the model: draws by island in proportion to its evidence, and the evidence of each."""
        values = jax.vmap(lambda u: found.constrain(found.from_denoiser(u)))(clean)
        log_likelihoods = jax.vmap(lambda x: log_rest(self._model, args, kwargs, x))(values)
        log_weights = proper(cloud.log_weights + log_likelihoods.reshape(self._shape))
        log_evidence = cloud.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(self._shape[1])
        ancestors = systematic(key, (cloud.log_evidence[:, None] + log_weights).reshape(-1))
        values = jax.tree.map(lambda leaf: leaf[ancestors], values)
        return jax.vmap(lambda x: with_deterministic(self._model, args, kwargs, x))(values), log_evidence
