r"""Particle Gibbs: a chain of whole walks down the reverse process, renewed by conditional sequential Monte Carlo.

The state is a walk $x_T \to \dots \to x_0$ of the solver. Its law under the model,

$$\pi(x_{T:0}) \propto p(x_T) \prod p(x_s \mid x_t)\; L(x_0),$$

is what `TwistedSMC` approximates with many particles. Conditional SMC makes a Markov kernel of it: the current walk is
kept as one of $N$ particles, the others walk beside it, guided and weighted, and a new walk is drawn from the others by
its final weight and tested against the kept one. **This leaves $\pi$ invariant for any $N \ge 2$**: no bias of order
$1 / N$. Particles are resampled where their weights have become uneven, and there the kept walk draws its own past anew
among all particles (ancestor sampling) with weights

$$\tilde w^i \propto w^i \frac{p(x'_s \mid x_t^i)}{\psi_t(x_t^i)},$$

with $x'$ the kept walk and $\psi$ the twisting function. One walk in ten is unguided (`walk`), so that a kept walk that
the guidance would hardly ever take does not stay for good. For a solver that remembers one step there is a second
factor $p(x'_r \mid x'_s, x_t^i)$, that of the next step.

The clean point has the law of the walk times the likelihood: exact up to the solver's steps, as is a draw of the prior.
Other latent sites get a block of their own (`DiffusionGibbs(model, x_kernel=ParticleGibbs)`).

References:
    Chopin and Singh, On particle Gibbs sampling, 2015 (the last choice as a forced move),
    https://arxiv.org/abs/1304.1887.
    Andrieu, Doucet, Holenstein, Particle Markov chain Monte Carlo methods, 2010,
    https://doi.org/10.1111/j.1467-9868.2009.00736.x.
    Lindsten, Jordan, Schön, Particle Gibbs with ancestor sampling, 2014, https://arxiv.org/abs/1401.0604.
    Corenflos et al., Conditioning diffusion models by explicit forward-backward bridging, 2024,
    https://arxiv.org/abs/2405.13794.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.guidance import Guided, Likelihood, Observation
from numpyro_diffusion.infer.kernel.choose import (
    conditional_systematic,
    effective_size,
    metropolised_gibbs,
    without_improper,
)
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.reverse.base import WalkKernel
from numpyro_diffusion.infer.reverse.walk import Transition, log_walk_weight, outlooks, transition
from numpyro_diffusion.solve import GaussianSolver, Solver, terminal_point

_ESS_THRESHOLD = 0.5
"""Particles are resampled when their effective number falls below this share."""


class ParticleGibbsState(NamedTuple):
    """State of `ParticleGibbs`.

    Args:
        i: number of steps done.
        z: the clean end of the walk, by site, in NumPyro's unconstrained coordinates.
        walk: the walk in the denoiser's space, at all times of the solver's grid, noisiest first.
        renewed: share of the walk's points that the last step has changed.
        num_unguided: steps of the last walks at which the guidance was not finite; they went without it.
        num_score_evals: denoiser evaluations of the last step.
        diverging: whether the log-density of a particle was NaN or plus infinity; its weight was zero.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    walk: jax.Array
    renewed: jax.Array
    num_unguided: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class _Cloud(NamedTuple):
    """Particles on their way down; the first is the kept walk."""

    points: jax.Array  # (N, *event_shape)
    memory: Any  # of the solver, by particle
    log_weights: jax.Array  # (N,), without the twisting function
    log_ratio: jax.Array  # (N,), of the walks so far, the prior's density over the guidance's


class ParticleGibbs(WalkKernel[ParticleGibbsState]):
    """Draws all diffusion sites of a model by conditional SMC with ancestor sampling over the reverse process.

    It leaves the posterior under the solver's walk invariant for any number of particles.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites, possibly in plates; `DiffusionGibbs` takes the
            others.
        num_particles: number of particles including the kept one, at least 2.
        guidance: how to look ahead, see `guidance.Guided`; None takes "mmps" for a Gaussian observation and "dps" for
            any other likelihood.
        observation: what is observed of a point of the denoiser's own space (of several sites: of a dict of them);
            None reads the model. It steers; the weights are the model's.
        solver: a solver whose steps have a density; None takes the priors' own `sampler`.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for `num_particles` below 2 or an unknown guidance; when run, for a model with other latent sites,
            diffusion sites whose ladders of noise levels differ in span, or a guidance that cannot handle the
            likelihood.
        TypeError: for a model that is not callable or a solver whose steps have no density.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import ParticleGibbs
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(ParticleGibbs(model), num_warmup=10, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("renewed", "num_unguided", "num_score_evals")

    def __init__(
        self,
        model: Model,
        *,
        num_particles: int = 10,
        guidance: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, guidance=guidance, observation=observation, solver=solver, init_strategy=init_strategy)
        _checks.at_least(2, num_particles=num_particles)
        self._num_particles = num_particles

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> ParticleGibbsState:
        """The walk at the start: the noising process of the point where the chain begins."""
        key, key_start = jax.random.split(key)
        z, walk = self._start_walk(key_start, init_params, reading)
        zero, count = jnp.zeros((), walk.dtype), jnp.zeros((), jnp.int32)
        return ParticleGibbsState(count, z, walk, zero, count, count, jnp.array(False), key)

    def _step(self, state: ParticleGibbsState, reading: Reading) -> ParticleGibbsState:
        found, solver = self._parts(reading)
        guided, times = found.guided, solver.times(found.guided)
        key, key_walk, key_choice = jax.random.split(state.rng_key, 3)
        points, ancestors, log_weights, num_unguided = _conditional_walks(
            key_walk, solver, guided, state.walk, self._num_particles
        )
        z, raw = self._weigh(found, points[-1], times[-1], reading)
        weights, others = log_weights + raw, jnp.arange(1, self._num_particles)
        choice = metropolised_gibbs(
            key_choice, weights[1:], without_improper(weights[0]), others, jnp.zeros_like(others[0])
        )
        chosen, indices = choice.point, _lineage(ancestors, choice.point)
        walk = jax.vmap(lambda points, index: points[index])(points, indices)
        return ParticleGibbsState(
            i=state.i + 1,
            z=jax.tree.map(lambda leaf: leaf[chosen], z),
            walk=walk,
            renewed=jnp.mean(indices != 0, dtype=walk.dtype),
            num_unguided=num_unguided,
            num_score_evals=jnp.asarray((self._num_particles + 1) * len(times), jnp.int32),
            diverging=choice.diverging,
            rng_key=key,
        )


def _conditional_walks(
    key: jax.Array, solver: GaussianSolver, guided: Guided, kept: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All particles given the kept walk, (levels, N, ...), and their ancestors (levels - 1, N).

    Also returns their last weights, and the number of steps whose guidance was not finite.
    """
    times = solver.times(guided)
    kept_means = jax.vmap(lambda x_t, t: guided.base(x_t, t).x0)(kept, times)
    key_start, key_steps = jax.random.split(key)
    noise = jax.random.normal(key_start, (count, *guided.event_shape), kept.dtype)
    points = jax.vmap(partial(terminal_point, guided))(noise).astype(kept.dtype).at[0].set(kept[0])
    memory = jax.vmap(partial(solver.init, guided))(points)

    def down(cloud: _Cloud, k: jax.Array) -> tuple[_Cloud, tuple[jax.Array, jax.Array, jax.Array]]:
        log_twist, step, memory = outlooks(solver, guided, cloud.points, cloud.memory, times[k], times[k + 1])
        log_weights = without_improper(cloud.log_weights + log_twist)
        key_copies, key_draw = jax.random.split(jax.random.fold_in(key_steps, k))
        log_future = _log_future(solver, guided, kept, kept_means, times, k, step, memory)
        uneven = effective_size(log_weights) < _ESS_THRESHOLD * count
        copies = _ancestors(key_copies, log_weights, without_improper(log_weights + log_future - log_twist))
        ancestors = jnp.where(uneven, copies, jnp.arange(count))
        log_weights = jnp.where(uneven, 0.0, log_weights)
        moving = log_twist, step, memory, cloud.log_ratio
        log_twist, step, memory, before = jax.tree.map(lambda leaf: leaf[ancestors], moving)
        points = jax.vmap(Transition.draw)(step, jax.random.split(key_draw, count), before).at[0].set(kept[k + 1])
        log_ratio = before + jax.vmap(Transition.log_ratio)(step, points)
        log_weights += log_walk_weight(log_ratio) - log_walk_weight(before) - log_twist
        return _Cloud(points, memory, log_weights, log_ratio), (cloud.points, ancestors, step.is_lost)

    none = jnp.zeros(count, kept.dtype)
    cloud = _Cloud(points, memory, none, none)
    cloud, (points, ancestors, is_lost) = jax.lax.scan(down, cloud, jnp.arange(len(times) - 1))
    return (
        jnp.concatenate([points, cloud.points[None]]),
        ancestors,
        cloud.log_weights,
        jnp.sum(is_lost, dtype=jnp.int32),
    )


def _log_future(
    solver: GaussianSolver,
    guided: Guided,
    kept: jax.Array,
    kept_means: jax.Array,
    times: jax.Array,
    k: jax.Array,
    step: Transition,
    memory: Any,
) -> jax.Array:
    """Log-density of the rest of the kept walk after each particle, as far as it depends on the particle, (N,)."""
    following = jax.vmap(Transition.log_density, (0, None))(step, kept[k + 1])
    after = jnp.minimum(k + 2, len(times) - 1)

    def remembered(memory: Any) -> jax.Array:
        x0, x_t = kept_means[k + 1], kept[k + 1]
        law, _ = transition(solver, guided.base, x0, x0, x_t, memory, times[k + 1], times[after])
        return law.log_density(kept[after])

    two_steps = following + jax.vmap(remembered, axis_size=len(following))(memory)
    return jnp.where(after > k + 1, two_steps, following)


def _ancestors(key: jax.Array, log_weights: jax.Array, log_past: jax.Array) -> jax.Array:
    """The kept walk's ancestor by its own weights; those of the others by systematic resampling given that one."""
    key_kept, key_others = jax.random.split(key)
    of_kept = jax.random.categorical(key_kept, log_past)
    order = jnp.arange(log_weights.size).at[of_kept].set(0).at[0].set(of_kept)
    return order[conditional_systematic(key_others, log_weights[order])]


def _lineage(ancestors: jax.Array, last: jax.Array) -> jax.Array:
    """Indices of a particle and its ancestors, noisiest level first."""

    def back(index: jax.Array, ancestors: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ancestors[index], index

    first, later = jax.lax.scan(back, last, ancestors, reverse=True)
    return jnp.concatenate([first[None], later])
