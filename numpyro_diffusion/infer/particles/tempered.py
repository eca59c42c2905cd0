r"""Likelihood tempering: from draws of the prior to draws of the posterior, and the evidence on the way.

Particles start as draws of the prior and walk through

$$\pi_\beta(x, \theta) \propto p(x, \theta)\, L(x, \theta)^\beta, \qquad 0 = \beta_0 < \dots < \beta_T = 1.$$

At each temperature they are reweighted by $L^{\beta' - \beta}$, as far as an effective sample size allows, resampled,
and moved by a kernel that leaves $\pi_{\beta'}$ in place, again and again until they have forgotten where they came
from. `DiffusionPCN` is the kernel for diffusion priors: it asks nothing but values of the likelihood, and one batch of
all particles is one call of the network. It adapts its noise levels anew at each temperature.

The mean weights multiply to an estimate of the evidence,

$$\hat Z = \prod_t \frac1N \sum_i L(x_i)^{\beta_{t + 1} - \beta_t},$$

whose expectation is $Z = \int p L$ if temperatures and kernels are given; that they are chosen from the particles
biases it by less than its own error. Particles live on islands that share temperatures and the tuning of the moves, and
nothing else: the spread of their estimates is its error, and each island counts by its own in the end.

A likelihood of zero has no temperature: $0^\beta = 0$. What a hard constraint costs is paid in the first step, by draws
of the prior that meet it.

What is exact: the law of the particles as their number grows, for any kernel that leaves $\pi_\beta$ in place. What
these kernels owe, `DiffusionPCN` its discretised reverse process, remains.

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
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.combine.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.gradient.langevin import MALA
from numpyro_diffusion.infer.kernel.choose import effective_size, next_temperature, systematic, without_improper
from numpyro_diffusion.infer.model.sites import Model, other_latent_sites, prior_sites
from numpyro_diffusion.infer.model.tempering import TEMPERATURE, draw_prior, log_likelihood, temper
from numpyro_diffusion.infer.particles.evidence import ParticleSampler, evidence_of, pool_islands
from numpyro_diffusion.infer.particles.mutate import move
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN


class Temperature(NamedTuple):
    """What happened at one temperature."""

    temperature: jax.Array  # inverse, after the step
    effective_size: jax.Array  # what the particles were worth after reweighting, over all islands
    num_moves: jax.Array
    correlation: jax.Array  # left between particles and their ancestors after the moves
    accept_prob: jax.Array  # mean over moves and particles, NaN if the kernel has none
    noise_level: jax.Array  # at which the kernel's adapted levels are centred at the end, NaN if it has none
    num_score_evals: jax.Array  # denoiser evaluations of the moves, per particle
    num_diverging: jax.Array  # of all particles and moves: what the kernel rejected as not finite


class Population(NamedTuple):
    """The particles at a temperature."""

    z: dict[str, jax.Array]  # unconstrained values by site, (islands * particles, ...)
    log_likelihood: jax.Array  # as the model gives it, (islands, particles)
    log_evidence: jax.Array  # of each island so far, (islands,)
    temperature: jax.Array  # inverse
    noise_level: jax.Array  # at which the moves have left the kernel's levels, NaN at the start


class TemperedSMC(ParticleSampler):
    r"""Samples a posterior, and estimates its evidence, by tempering the likelihood.

    Args:
        model: NumPyro model whose latent sites can all be drawn from their priors.
        num_particles: particles in all, at least 2 an island.
        kernel: makes the kernel that moves the particles from a model; by default `DiffusionPCN` if all latent sites
            are diffusion sites, `DiffusionGibbs` of it and `MALA` if there are others. For moves in noise space give a
            model under `NoiseReparam` and `lambda m: Vectorize(NUTS(m))`.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of the particles that a step of the temperature leaves effective, in (0, 1]; near 1 the
            steps become very many.
        correlation: what may be left between particles and their ancestors when the moves at a temperature end, as a
            mean correlation over dimensions, in (0, 1).
        max_moves: moves at a temperature after which they end all the same.
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
        super().__init__(model, num_particles, num_islands, ess_threshold)
        if not (kernel is None or callable(kernel)):
            raise TypeError(f"kernel must make a kernel from a model, a callable; got {type(kernel).__name__}")
        _checks.at_least(1, max_moves=max_moves)
        if not 0.0 < correlation < 1.0:
            raise ValueError(f"correlation must lie in (0, 1); got {correlation}")
        self._ladder = None if temperatures is None else _ladder(temperatures)
        self._make_kernel = kernel
        self._correlation, self._max_moves = correlation, max_moves
        self._progress_bar = progress_bar
        self._start_compiled = jax.jit(self._start)
        self._step_compiled = jax.jit(self._step)
        self._finish_compiled = jax.jit(self._finish)

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> "TemperedSMC":
        """Walks from the prior to the posterior; a second run on data of the same shapes compiles nothing.

        Args:
            rng_key: random key.
            *args: the model's arguments, arrays or pytrees of them.
            **kwargs: its keyword arguments.

        Returns:
            This object, which then holds draws and evidence.
        """
        key_start, key_steps, key_finish = jax.random.split(rng_key, 3)
        population = self._start_compiled(key_start, args, kwargs)
        _look_at_start(np.asarray(population.log_likelihood))
        history = []
        with tqdm(total=1.0, disable=not self._progress_bar, desc="temperature", bar_format=_BAR) as bar:
            while float(population.temperature) < 1.0:
                key_steps, key = jax.random.split(key_steps)
                given = None if self._ladder is None else jnp.asarray(self._ladder[len(history)], float)
                population, step = self._step_compiled(key, population, given, args, kwargs)
                history.append(jax.tree.map(np.asarray, step))
                if not bool(jnp.isfinite(population.log_likelihood).any()):
                    raise ValueError(
                        f"all particles have lost their likelihood at temperature {step.temperature:.4g}: the kernel "
                        "does not leave the posterior in place. Use one with a Metropolis test"
                    )
                bar.set_postfix_str(f"ESS {step.effective_size:.0f}, moves {step.num_moves}", refresh=False)
                bar.update(float(step.temperature) - bar.n)
        samples = self._finish_compiled(key_finish, population, args, kwargs)
        self._result = samples, evidence_of(population.log_evidence), history
        return self

    @property
    def temperatures(self) -> list[Temperature]:
        """What happened at each temperature."""
        return self._ran[2]

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
            if other_latent_sites(self._model, args, kwargs):
                has_prior = prior_sites(self._model, args, kwargs, required=False)
                make = partial(DiffusionGibbs, rest_kernel=MALA) if has_prior else MALA
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
        return Population(z, log_likelihoods, jnp.zeros(self._shape[0]), zero, nan)

    def _step(
        self, key: jax.Array, population: Population, given: jax.Array | None, args: tuple, kwargs: dict
    ) -> tuple[Population, Temperature]:
        """Reweights to a given temperature or to the next one that the particles allow, resamples and moves."""
        key_resample, key_move = jax.random.split(key)
        values, old = without_improper(population.log_likelihood), population.temperature
        new = next_temperature(values.reshape(-1), old, self._ess_threshold) if given is None else given
        log_weights = jnp.where(jnp.isfinite(values), (new - old) * values, -jnp.inf)
        ancestors = self._ancestors(key_resample, log_weights)
        z = jax.tree.map(lambda leaf: leaf[ancestors], population.z)
        kernel, keys = self._kernel(args, kwargs), jax.random.split(key_move, len(ancestors))
        limits = {"correlation": self._correlation, "max_moves": self._max_moves}
        z, moves = move(kernel, keys, z, args, {**kwargs, TEMPERATURE: new}, population.noise_level, **limits)
        step = Temperature(new, effective_size(log_weights.reshape(-1)), **moves._asdict())
        log_evidence = population.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(self._shape[1])
        return Population(z, self._log_likelihoods(z, args, kwargs), log_evidence, new, moves.noise_level), step

    def _ancestors(self, key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Flat indices; an island without a particle of any weight is filled from the others and counts no more."""
        key_islands, key_all = jax.random.split(key)
        islands, size = self._shape
        chosen = jax.vmap(systematic)(jax.random.split(key_islands, islands), log_weights)
        chosen += size * jnp.arange(islands)[:, None]
        anywhere = systematic(key_all, log_weights.reshape(-1)).reshape(self._shape)
        return jnp.where(jnp.isfinite(log_weights).any(1, keepdims=True), chosen, anywhere).reshape(-1)

    def _finish(self, key: jax.Array, population: Population, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
        """Draws by island in proportion to its evidence, constrained."""
        ancestors = pool_islands(key, population.log_evidence, self._shape[1])
        z = jax.tree.map(lambda leaf: leaf[ancestors], population.z)
        constrain = partial(constrain_fn, self._model, args, kwargs, return_deterministic=True)
        return jax.vmap(constrain)(z)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
_FEW = 10
"""Particles with a likelihood at the start, below which a run warns."""


def _ladder(temperatures: Sequence[float]) -> np.ndarray:
    """Inverse temperatures as an array, or an error."""
    ladder = np.asarray(temperatures, np.float32)
    if ladder.ndim != 1 or not len(ladder) or (np.diff(ladder, prepend=0.0) <= 0).any() or ladder[-1] != 1.0:
        raise ValueError(f"temperatures must rise from above 0 to 1; got {temperatures}")
    return ladder


def _look_at_start(log_likelihood: np.ndarray) -> None:
    """Raises if no draw of the prior has a likelihood to go on, warns if few have or some have none that is one."""
    num, alive = log_likelihood.size, int(np.isfinite(log_likelihood).sum())
    not_a_number, infinite = int(np.isnan(log_likelihood).sum()), int(np.isposinf(log_likelihood).sum())
    kinds = f"zero at {num - alive - not_a_number - infinite}, not a number at {not_a_number}, infinite at {infinite}"
    if alive == 0:
        raise ValueError(
            f"none of {num} draws of the prior has a likelihood to go on: it is {kinds}. A likelihood of zero has no "
            "temperature: take more particles, or a likelihood that says how far off a draw is"
        )
    if not_a_number or infinite:
        warnings.warn(
            f"of {num} draws of the prior, the likelihood is {kinds}; what is no number counts as zero", stacklevel=3
        )
    if alive < min(_FEW, num):
        warnings.warn(
            f"only {alive} of {num} draws of the prior have a likelihood above zero: all particles descend from them, "
            "and the evidence rests on their number. Take more particles",
            stacklevel=3,
        )
