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
biases it by less than its own error. Particles live on islands that share temperatures and nothing else: the spread of
their estimates is its error, and each island counts by its own in the end.

What is exact: the law of the particles as their number grows, for any kernel that leaves $\pi_\beta$ in place. What
these kernels owe, `DiffusionPCN` its discretised reverse process, remains.

References:
    Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers, 2006, https://doi.org/10.1111/j.1467-9868.2006.00553.x.
    Jasra et al., Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo, 2011
    (temperatures by effective sample size), https://doi.org/10.1111/j.1467-9469.2010.00723.x.
    Kantas, Beskos, Jasra, Sequential Monte Carlo methods for high-dimensional inverse problems, 2014 (moves until
    decorrelated, with pCN), https://arxiv.org/abs/1307.6127.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from numpyro import diagnostics
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import constrain_fn, unconstrain_fn
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.evidence import Evidence, evidence_of, pool_islands
from numpyro_diffusion.infer.gibbs import DiffusionGibbs
from numpyro_diffusion.infer.langevin import MALA
from numpyro_diffusion.infer.pcn import DiffusionPCN
from numpyro_diffusion.infer.resampling import effective_size, next_temperature, systematic
from numpyro_diffusion.infer.split import Model, other_latent_sites, prior_sites
from numpyro_diffusion.infer.tempered import TEMPERATURE, draw_prior, log_likelihood, temper


class Temperature(NamedTuple):
    """What happened at one temperature."""

    temperature: jax.Array  # inverse, after the step
    effective_size: jax.Array  # what the particles were worth after reweighting, over all islands
    accept_prob: jax.Array  # mean over particles of the last move, NaN if the kernel has none
    correlation: jax.Array  # left between particles and their ancestors after the moves
    num_moves: jax.Array
    num_score_evals: jax.Array  # denoiser evaluations of the moves, per particle


class Population(NamedTuple):
    """The particles at a temperature."""

    z: dict[str, jax.Array]  # unconstrained values by site, (islands * particles, ...)
    log_likelihood: jax.Array  # (islands, particles)
    log_evidence: jax.Array  # of each island so far, (islands,)
    temperature: jax.Array  # inverse


class TemperedSMC:
    r"""Samples a posterior, and estimates its evidence, by tempering the likelihood.

    Args:
        model: NumPyro model whose latent sites can all be drawn from their priors.
        num_particles: particles in all, at least 2 an island.
        kernel: makes the kernel that moves the particles from a model; by default `DiffusionPCN` if all latent sites
            are diffusion sites, `DiffusionGibbs` of it and `MALA` if there are others. For moves in noise space give a
            model under `NoiseReparam` and `lambda m: Vectorize(NUTS(m))`.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of the particles that a step of the temperature leaves effective, in (0, 1].
        correlation: what may be left between particles and their ancestors when the moves at a temperature end, as a
            mean correlation over dimensions, in (0, 1).
        max_moves: moves at a temperature after which they end all the same.
        progress_bar: whether to show the temperature.

    Raises:
        TypeError: if `model` or `kernel` is not callable.
        ValueError: for a number out of its range; when run, for a model without latent sites or with one that cannot be
            drawn, or a likelihood that is zero at all draws of the prior.

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
        num_particles: int = 1000,
        *,
        kernel: Callable[[Model], MCMCKernel] | None = None,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
        correlation: float = 0.1,
        max_moves: int = 100,
        progress_bar: bool = True,
    ) -> None:
        for name, value in {"model": model, "kernel": DiffusionPCN if kernel is None else kernel}.items():
            if not callable(value):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}")
        _checks.at_least(2, num_particles=num_particles)
        _checks.at_least(1, num_islands=num_islands, max_moves=max_moves)
        if num_particles % num_islands or num_particles < 2 * num_islands:
            raise ValueError(
                f"num_particles must be a multiple of num_islands={num_islands}, at least two each; got {num_particles}"
            )
        if not 0.0 < ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold must lie in (0, 1]; got {ess_threshold}")
        if not 0.0 < correlation < 1.0:
            raise ValueError(f"correlation must lie in (0, 1); got {correlation}")
        self._model = model
        self._make_kernel = kernel
        self._shape = num_islands, num_particles // num_islands
        self._ess_threshold, self._correlation, self._max_moves = ess_threshold, correlation, max_moves
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
        if not bool(jnp.isfinite(population.log_likelihood).any()):
            raise ValueError(
                f"the likelihood is zero, or not a number, at all {population.log_likelihood.size} draws of the prior. "
                "Take more particles, or a likelihood that says how far off a draw is"
            )
        history = []
        with tqdm(total=1.0, disable=not self._progress_bar, desc="temperature", bar_format=_BAR) as bar:
            while float(population.temperature) < 1.0:
                key_steps, key = jax.random.split(key_steps)
                population, step = self._step_compiled(key, population, args, kwargs)
                history.append(jax.tree.map(np.asarray, step))
                bar.set_postfix_str(f"ESS {step.effective_size:.0f}, moves {step.num_moves}", refresh=False)
                bar.update(float(step.temperature) - bar.n)
        self._samples = self._finish_compiled(key_finish, population, args, kwargs)
        self._evidence = evidence_of(population.log_evidence)
        self._history = history
        return self

    def get_samples(self) -> dict[str, jax.Array]:
        """Draws of the posterior by site, constrained, with the model's deterministic sites: (num_particles, ...)."""
        return self._ran("_samples")

    @property
    def log_evidence(self) -> Evidence:
        """The estimate of the log-evidence, with its standard error over islands."""
        return self._ran("_evidence")

    @property
    def temperatures(self) -> list[Temperature]:
        """What happened at each temperature."""
        return self._ran("_history")

    @property
    def num_score_evals(self) -> int:
        """Denoiser evaluations of all moves, per particle."""
        return int(sum(step.num_score_evals for step in self.temperatures))

    def print_summary(self) -> None:
        """Prints posterior moments, the evidence and the temperatures."""
        diagnostics.print_summary(self.get_samples(), group_by_chain=False)
        evidence = self.log_evidence
        print(f"log evidence {evidence.value:.3f} +- {evidence.standard_error:.3f} ({len(evidence.islands)} islands)")
        for step in self.temperatures:
            print(
                f"temperature {step.temperature:.4g}: ESS {step.effective_size:.0f}, {step.num_moves} moves, "
                f"acc. prob {step.accept_prob:.2f}, correlation left {step.correlation:.2f}"
            )

    def _ran(self, name: str) -> Any:
        if not hasattr(self, name):
            raise RuntimeError("run() must come first")
        return getattr(self, name)

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
            return unconstrain_fn(self._model, args, kwargs, values)

        z = jax.vmap(one)(jax.random.split(key, self._shape[0] * self._shape[1]))
        log_likelihoods = self._log_likelihoods(z, args, kwargs)
        return Population(z, log_likelihoods, jnp.zeros(self._shape[0]), jnp.zeros(()))

    def _step(
        self, key: jax.Array, population: Population, args: tuple, kwargs: dict
    ) -> tuple[Population, Temperature]:
        """Reweights, resamples and moves."""
        key_resample, key_move = jax.random.split(key)
        old = population.temperature
        new = next_temperature(population.log_likelihood.reshape(-1), old, self._ess_threshold)
        alive = jnp.isfinite(population.log_likelihood)
        log_weights = jnp.where(alive, (new - old) * population.log_likelihood, -jnp.inf)
        ancestors = self._ancestors(key_resample, log_weights)
        z = jax.tree.map(lambda leaf: leaf[ancestors], population.z)
        z, moved = self._move(key_move, z, new, args, kwargs)
        step = moved._replace(temperature=new, effective_size=effective_size(log_weights.reshape(-1)))
        log_evidence = population.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(self._shape[1])
        return Population(z, self._log_likelihoods(z, args, kwargs), log_evidence, new), step

    def _ancestors(self, key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Flat indices; an island without a particle of any weight is filled from the others and counts no more."""
        key_islands, key_all = jax.random.split(key)
        islands, size = self._shape
        chosen = jax.vmap(systematic)(jax.random.split(key_islands, islands), log_weights)
        chosen += size * jnp.arange(islands)[:, None]
        anywhere = systematic(key_all, log_weights.reshape(-1)).reshape(self._shape)
        return jnp.where(jnp.isfinite(log_weights).any(1, keepdims=True), chosen, anywhere).reshape(-1)

    def _move(
        self, key: jax.Array, z: dict[str, jax.Array], temperature: jax.Array, args: tuple, kwargs: dict
    ) -> tuple[dict[str, jax.Array], Temperature]:
        """Moves all particles as one batch until they have forgotten their ancestors."""
        kernel, kwargs = self._kernel(args, kwargs), {**kwargs, TEMPERATURE: temperature}
        flat = jax.vmap(lambda z: ravel_pytree(z)[0])
        keys = jax.random.split(key, self._shape[0] * self._shape[1])
        state = kernel.init(keys, self._max_moves, z, model_args=args, model_kwargs=kwargs)
        start = flat(z)

        def point(state: Any) -> dict[str, jax.Array]:
            values = getattr(state, kernel.sample_field)
            return {name: values[name] for name in z}

        def going(carry: tuple) -> jax.Array:
            _, moves, _, correlation = carry
            return (moves < self._max_moves) & (correlation > self._correlation)

        def move(carry: tuple) -> tuple:
            state, moves, evaluations, _ = carry
            state = kernel.sample(state, args, kwargs)
            evaluations += jnp.max(jnp.asarray(getattr(state, "num_score_evals", 0)))
            return state, moves + 1, evaluations, _mean_correlation(start, flat(point(state)))

        count = jnp.zeros((), jnp.int32)
        state, moves, evaluations, left = jax.lax.while_loop(going, move, (state, count, count, jnp.ones(())))
        accept_prob = jnp.mean(getattr(state, "accept_prob", jnp.full((), jnp.nan)))
        nan = jnp.full((), jnp.nan)
        return point(state), Temperature(nan, nan, accept_prob, left, moves, evaluations)

    def _finish(self, key: jax.Array, population: Population, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
        """Draws by island in proportion to its evidence, constrained."""
        ancestors = pool_islands(key, population.log_evidence, self._shape[1])
        z = jax.tree.map(lambda leaf: leaf[ancestors], population.z)
        constrain = partial(constrain_fn, self._model, args, kwargs, return_deterministic=True)
        return jax.vmap(constrain)(z)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"


def _mean_correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean over dimensions of the correlation between two sets of points, both (N, D); one where a set is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    scale = jnp.sqrt((a**2).mean(0) * (b**2).mean(0))
    return jnp.mean(jnp.where(scale > 0, (a * b).mean(0) / jnp.where(scale > 0, scale, 1.0), 1.0))
