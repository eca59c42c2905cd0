r"""Likelihood tempering: from draws of the prior to draws of the posterior, and the evidence on the way.

Particles start as draws of the prior and walk through

$$\pi_\beta(x, \theta) \propto p(x, \theta)\, L(x, \theta)^\beta, \qquad 0 = \beta_0 < \dots < \beta_T = 1.$$

At each temperature they are reweighted by $L^{\beta' - \beta}$, as far as an effective sample size allows, resampled,
and moved by a kernel that leaves $\pi_{\beta'}$ invariant until they have forgotten where they came from.
`DiffusionPCN` is the kernel for diffusion priors: it needs only values of the likelihood, and one batch of all
particles is one call of the network. At each temperature a kernel goes on from the noise levels and step sizes of the
one before.

The mean weights multiply to an estimate of the evidence,

$$\hat Z = \prod_t \frac1N \sum_i L(x_i)^{\beta_{t + 1} - \beta_t},$$

whose expectation is $Z = \int p L$ if temperatures and kernels are given; choosing them from the particles biases it by
less than its own error. Particles live on islands that share nothing but temperatures and the tuning of the moves: the
spread of their estimates gives the error, and in the end each island counts in proportion to its own estimate.

Tempering does not soften a likelihood of zero: $0^\beta = 0$. A hard constraint takes effect in the first step, and
all particles then descend from the draws of the prior that meet it.

If moves end at `max_moves`, before the particles have forgotten their ancestors, the population has not reached
$\pi_\beta$ yet. How far it lags behind is measured on $\log L$, by the change $D$ of its mean in the moves and by the
correlation $\rho$ that they leave in it. If the approach is geometric, $D \rho / (1 - \rho)$ is still missing, and
since $\partial_\beta \log Z = E_\beta[\log L]$ the next step misses that times $\Delta \beta$. The sum over
temperatures is added to the error, and a warning says where there were too few moves.

What is exact: the law of the particles as their number grows, for any kernel that leaves $\pi_\beta$ invariant. The
approximation of the kernel itself remains, for `DiffusionPCN` its discretised reverse process.

References:
    Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers, 2006, https://doi.org/10.1111/j.1467-9868.2006.00553.x.
    Jasra et al., Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo, 2011
    (temperatures by effective sample size), https://doi.org/10.1111/j.1467-9469.2010.00723.x.
    Kantas, Beskos, Jasra, Sequential Monte Carlo methods for high-dimensional inverse problems, 2014 (moves until
    decorrelated, with pCN), https://arxiv.org/abs/1307.6127.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn, unconstrain_fn

from numpyro_diffusion.infer.combine.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.gradient.langevin import MALA
from numpyro_diffusion.infer.kernel.choose import effective_size, next_temperature, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.checks import check_fixed
from numpyro_diffusion.infer.model.handlers import TEMPERATURE, Model, draw_prior, temper
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.infer.particles.evidence import (
    Draws,
    Evidence,
    Outcome,
    ParticleSampler,
    evidence_of,
    pool_islands,
    resample_islands,
)
from numpyro_diffusion.infer.particles.mutate import NUM_STEP_SIZES, correlations, move
from numpyro_diffusion.infer.particles.tempering import check_climb, log_likelihood
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN


class Temperature(NamedTuple):
    """What happened at one temperature."""

    temperature: jax.Array  # inverse, after the step
    effective_size: jax.Array  # effective sample size after reweighting, over all islands
    num_moves: jax.Array
    correlation: jax.Array  # left between particles and their ancestors after the moves, in the worst coordinate
    accept_prob: jax.Array  # mean over moves and particles, NaN if the kernel has none
    noise_level: jax.Array  # at which the kernel's adapted levels are centred at the end, NaN if it has none
    log_growth: jax.Array  # of each step size that the kernel adapts, since it was new; NaN without one, (8,)
    num_score_evals: jax.Array  # denoiser evaluations of the moves, per particle
    num_diverging: jax.Array  # of all particles and moves: what the kernel rejected as not finite
    lag: jax.Array  # by how much the mean log-likelihood may fall short of its equilibrium after the moves, in nats


class Population(NamedTuple):
    """The particles at a temperature."""

    z: dict[str, jax.Array]  # unconstrained values by site, (islands * particles, ...)
    log_likelihood: jax.Array  # as the model gives it, (islands, particles)
    log_evidence: jax.Array  # of each island so far, (islands,)
    temperature: jax.Array  # inverse
    noise_level: jax.Array  # at which the moves have left the kernel's levels, NaN at the start
    log_growth: jax.Array  # by which they have changed each of its step sizes, NaN at the start, (8,)


class TemperedSMC(ParticleSampler):
    r"""Samples a posterior, and estimates its evidence, by tempering the likelihood.

    Args:
        model: NumPyro model whose latent sites can all be drawn from their priors.
        num_particles: particles in all, at least 2 an island.
        kernel: makes the kernel that moves the particles from a model. The default is `DiffusionPCN` for diffusion
            sites, `MALA` for others, and `DiffusionGibbs` with these two if there are both. For moves in noise space
            give a model under `NoiseReparam` and `lambda m: Vectorize(NUTS(m))`.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of the particles that a step of the temperature leaves effective, in (0, 0.999]; near 1
            there are very many steps.
        correlation: largest correlation with their ancestors that particles may have, in any coordinate, when the moves
            at a temperature end, in (0, 1). Smaller ones than the noise of the estimate count as that.
        max_moves: largest number of moves at a temperature; a run warns if much correlation is left then.
        temperatures: inverse temperatures to visit, rising to 1, instead of those that the effective sample size asks
            for: with a kernel that does not adapt, the evidence is then exactly unbiased.
        progress_bar: whether to show the temperature.

    Raises:
        TypeError: if `model` or `kernel` is not callable.
        ValueError: for a number out of its range; when run, for a model without latent sites, with discrete ones or
            with one that cannot be drawn, or a likelihood that is zero at all particles.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import TemperedSMC
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> smc = TemperedSMC(model, num_particles=400, progress_bar=False).run(jax.random.key(0), 3.0)
        >>> bool(abs(smc.get_samples()["x"].mean() - 1.5) < 0.3)  # log evidence is log N(3; 0, 2) = -3.52
        True
        >>> bool(abs(smc.log_evidence.value + 3.52) < 0.5)
        True
    """

    def __init__(
        self,
        model: Model,
        num_particles: int = 2000,
        *,
        kernel: Callable[[Model], MCMCKernel] | None = None,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
        correlation: float = 0.1,
        max_moves: int = 100,
        temperatures: Sequence[float] | None = None,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_particles, num_islands, ess_threshold, progress_bar)
        check_climb(ess_threshold, correlation, max_moves)
        if not (kernel is None or callable(kernel)):
            raise TypeError(f"kernel must make a kernel from a model, a callable; got {type(kernel).__name__}")
        self._ladder = None if temperatures is None else _ladder(temperatures)
        self._make_kernel = kernel
        self._correlation, self._max_moves = correlation, max_moves
        self._compiled = Compiled(model, self._start, self._step, self._finish)

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        check_fixed("TemperedSMC", Record(self._model).at(args, kwargs).structure)
        start, step, finish = self._compiled.bind(args, kwargs)
        key_start, key_steps, key_finish = jax.random.split(rng_key, 3)
        population = start(key_start)
        look_at_start(np.asarray(population.log_likelihood))
        history: list[Temperature] = []
        with self._bar(1.0, "temperature") as bar:
            while float(population.temperature) < 1.0:
                key_steps, key = jax.random.split(key_steps)
                given = None if self._ladder is None else jnp.asarray(self._ladder[len(history)], float)
                population, happened = step(key, population, given)
                history.append(jax.tree.map(np.asarray, happened))
                if not bool(jnp.isfinite(population.log_likelihood).any()):
                    raise ValueError(
                        f"at temperature {happened.temperature:.4g} the moves have taken all particles to points of "
                        "zero likelihood: the kernel does not leave the posterior invariant. Use one with a Metropolis "
                        "test"
                    )
                bar.set_postfix_str(f"ESS {happened.effective_size:.0f}, moves {happened.num_moves}", refresh=False)
                bar.update(float(happened.temperature) - bar.n)
        evidence = evidence_of(population.log_evidence)
        return Outcome(finish(key_finish, population), widened(evidence, history), history, self._problems(history))

    def _problems(self, history: list[Temperature]) -> tuple[str, ...]:
        """A message if moves ended too early."""
        ended = [step for step in history if step.num_moves >= self._max_moves]
        short = [step for step in ended if step.correlation > max(_MUCH, self._correlation)]
        if not short:
            return ()
        worst = max(short, key=lambda step: step.correlation)
        return (
            f"at {len(short)} of {len(history)} temperatures the moves ended at max_moves={self._max_moves} before the "
            f"particles had forgotten their ancestors: a correlation of {worst.correlation:.2f} is left at temperature "
            f"{worst.temperature:.3g}, for at most {self._correlation}. The draws are fewer than they look, and the "
            "log evidence tends to be too small, by more than islands show. Raise max_moves, or take another kernel, "
            "such as NUTS in noise space; if modes are kept apart, raise num_particles",
        )

    @property
    def temperatures(self) -> list[Temperature]:
        """What happened at each temperature."""
        return self._ran.history

    @property
    def num_score_evals(self) -> int:
        """Denoiser evaluations of all moves, per particle."""
        return int(sum(step.num_score_evals for step in self.temperatures))

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        for step in self.temperatures:
            print(
                f"temperature {step.temperature:.4g}: ESS {step.effective_size:.0f}, {step.num_moves} moves, "
                f"acc. prob {step.accept_prob:.2f}, correlation left {step.correlation:.2f}"
                + (f", noise level {step.noise_level:.2g}" if np.isfinite(step.noise_level) else "")
                + (f", {step.num_diverging} diverging" if step.num_diverging else "")
            )

    def _kernel(self, args: tuple, kwargs: dict) -> MCMCKernel:
        make = self._make_kernel
        if make is None:
            make = DiffusionPCN
            structure = Record(self._model).at(args, kwargs).structure
            if structure.others:
                make = partial(DiffusionGibbs, rest_kernel=MALA) if structure.diffusion else MALA
        return make(temper(self._model))

    def _log_likelihoods(self, z: dict[str, jax.Array], args: tuple, kwargs: dict) -> jax.Array:
        """Of all particles, (islands, particles)."""

        def one(z: dict[str, jax.Array]) -> jax.Array:
            return log_likelihood(self._model, args, kwargs, constrain_fn(self._model, args, kwargs, z))

        return jax.vmap(one)(z).reshape(self._shape)

    def _start(self, key: jax.Array, args: tuple, kwargs: dict) -> Population:
        """Draws of the prior."""

        def one(key: jax.Array) -> dict[str, jax.Array]:
            values = draw_prior(self._model, key, args, kwargs)
            if not values:
                raise ValueError("the model needs a latent site; it has none")
            discrete = [name for name, value in values.items() if not jnp.issubdtype(value.dtype, jnp.floating)]
            if discrete:
                raise ValueError(f"TemperedSMC moves continuous sites; sites {discrete} are discrete. Marginalise them")
            return unconstrain_fn(self._model, args, kwargs, values)

        z = jax.vmap(one)(jax.random.split(key, self._shape[0] * self._shape[1]))
        log_likelihoods = self._log_likelihoods(z, args, kwargs)
        zero, nan = jnp.zeros(()), jnp.full((), jnp.nan, float)  # of the types that they keep
        return Population(z, log_likelihoods, jnp.zeros(self._shape[0]), zero, nan, jnp.full(NUM_STEP_SIZES, nan))

    def _step(
        self, key: jax.Array, population: Population, given: jax.Array | None, args: tuple, kwargs: dict
    ) -> tuple[Population, Temperature]:
        """Reweights to a given temperature or to the next one that the particles allow, resamples and moves."""
        key_resample, key_move = jax.random.split(key)
        values, old = without_improper(population.log_likelihood), population.temperature
        new = next_temperature(values.reshape(-1), old, self._ess_threshold) if given is None else given
        log_weights = jnp.where(jnp.isfinite(values), (new - old) * values, -jnp.inf)
        ancestors = resample_islands(key_resample, log_weights).reshape(-1)
        z = jax.tree.map(lambda leaf: leaf[ancestors], population.z)
        kernel, keys = self._kernel(args, kwargs), jax.random.split(key_move, len(ancestors))
        limits: dict[str, Any] = {"correlation": self._correlation, "max_moves": self._max_moves}
        carried = population.noise_level, population.log_growth
        z, moves = move(kernel, keys, z, args, {**kwargs, TEMPERATURE: new}, *carried, **limits)
        log_likelihoods = self._log_likelihoods(z, args, kwargs)
        lag = lag_of(values.reshape(-1)[ancestors], without_improper(log_likelihoods).reshape(-1))
        lag = jnp.where(moves.correlation > self._correlation, lag, 0.0)
        step = Temperature(new, effective_size(log_weights.reshape(-1)), **moves._asdict(), lag=lag)
        log_evidence = population.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(self._shape[1])
        return Population(z, log_likelihoods, log_evidence, new, moves.noise_level, moves.log_growth), step

    def _finish(self, key: jax.Array, population: Population, args: tuple, kwargs: dict) -> Draws:
        """All particles, constrained; drawn by island in proportion to its evidence."""
        islands, size = self._shape
        constrain = partial(constrain_fn, self._model, args, kwargs, return_deterministic=True)
        pooled = pool_islands(key, population.log_evidence, size)
        return Draws(jax.vmap(constrain)(population.z), pooled, jnp.arange(islands * size).reshape(islands, size))


_MUCH = 0.2
"""Correlation left by the moves above which a run warns."""
_FEW = 10
"""Particles with a likelihood at the start, below which a run warns."""


def widened(evidence: Evidence, history: Sequence[Any]) -> Evidence:
    """An evidence with what its temperatures may owe their equilibria, each to the step after it, in its error."""
    steps = np.diff([happened.temperature for happened in history])
    behind = float(steps @ np.array([happened.lag for happened in history[:-1]]))
    return evidence._replace(standard_error=jnp.hypot(evidence.standard_error, behind))


def lag_of(before: jax.Array, after: jax.Array) -> jax.Array:
    """How much more the mean log-likelihood would change if the moves went on, from its values at both ends, (N,)."""
    both = jnp.isfinite(before) & jnp.isfinite(after)
    count = jnp.maximum(both.sum(), 1)
    before, after = (jnp.where(both, v, jnp.sum(jnp.where(both, v, 0.0)) / count) for v in (before, after))
    left = jnp.clip(correlations(before, after), 0.0, 0.99)
    return jnp.abs(jnp.mean(after - before)) * left / (1.0 - left)


def _ladder(temperatures: Sequence[float]) -> np.ndarray:
    """Inverse temperatures as an array, or an error."""
    ladder = np.asarray(temperatures, np.float32)
    if ladder.ndim != 1 or not len(ladder) or (np.diff(ladder, prepend=0.0) <= 0).any() or ladder[-1] != 1.0:
        raise ValueError(f"temperatures must rise from above 0 to 1; got {temperatures}")
    return ladder


def look_at_start(log_likelihood: np.ndarray) -> None:
    """Raises if the likelihood is zero at all draws of the prior; warns if it is at most, or if some are not finite."""
    num, alive = log_likelihood.size, int(np.isfinite(log_likelihood).sum())
    not_a_number, infinite = int(np.isnan(log_likelihood).sum()), int(np.isposinf(log_likelihood).sum())
    kinds = f"zero at {num - alive - not_a_number - infinite}, NaN at {not_a_number}, infinite at {infinite}"
    if alive == 0:
        raise ValueError(
            f"the likelihood must be positive and finite at some draw of the prior; of {num} it is {kinds}. Tempering "
            "cannot soften a likelihood of zero: take more particles, or give the constraint a distance, by a "
            "likelihood that falls off with how far a draw is from meeting it"
        )
    if not_a_number or infinite:
        warnings.warn(
            f"of {num} draws of the prior, the likelihood is {kinds}; NaN and infinity count as zero", stacklevel=4
        )
    if alive < min(_FEW, num):
        warnings.warn(
            f"only {alive} of {num} draws of the prior have a likelihood above zero: all particles descend from them, "
            "and the evidence rests on their number. Take more particles",
            stacklevel=4,
        )
