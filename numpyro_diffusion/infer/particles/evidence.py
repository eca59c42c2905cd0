r"""The evidence by particles on islands: its estimate, the estimate's error, and draws of all islands together.

Independent runs $k = 1 \dots K$ of a particle method (the islands of one population) each give an unbiased estimate
$\hat Z_k$ of $Z = \int p(x) L(x)\, dx$. So their mean is unbiased too, and their spread is its error:

$$\hat Z = \frac1K \sum_k \hat Z_k, \qquad
\mathrm{se}(\log \hat Z) \approx \frac{1}{\sqrt K}\, \mathrm{sd}_k\!\left(\hat Z_k / \hat Z\right).$$

The logarithm of an unbiased $\hat Z$ is too small on average, by half its relative variance. In the pooled draws island
$k$ has the share $\hat Z_k / \sum_k \hat Z_k$: an island that has missed a mode counts accordingly less.

The spread does not show what all islands miss in the same way. A sampler that detects such a problem widens the error,
warns, and keeps the message in `ParticleSampler.problems`.

For the estimates themselves see `tempered` and `twisted`; that of `population` is by the walkers of neighbouring
temperatures (`population.bridge`), and not unbiased. `ParticleSampler` is their common base.

References:
    Vergé, Dubarry, Del Moral, Moulines, On parallel implementation of sequential Monte Carlo methods: the island
    particle model, 2015, https://arxiv.org/abs/1306.3911.
"""

import abc
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from numpyro import diagnostics
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.choose import effective_size, systematic
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading, Record


class Evidence(NamedTuple):
    """An estimate of the log-evidence, in nats."""

    value: jax.Array  # of all islands together
    standard_error: jax.Array  # over islands, widened by what they share; NaN for a single one
    islands: jax.Array  # the estimate of each, (islands,)


class Draws(NamedTuple):
    """Particles at the end of a run, and the indices of draws among them."""

    values: Mapping[str, jax.Array | np.ndarray]  # constrained, by site, deterministic sites included, (N, ...)
    pooled: jax.Array | np.ndarray  # indices: all islands, each in proportion to its evidence, (N,)
    by_island: jax.Array | np.ndarray  # indices: each island by itself, (islands, N / islands)


class Outcome(NamedTuple):
    """The result of a run."""

    draws: Draws
    evidence: Evidence
    history: Any  # what the sampler recorded on the way
    problems: tuple[str, ...]


def evidence_of(islands: jax.Array) -> Evidence:
    """The estimate of independent islands together, with its standard error.

    Args:
        islands: log-evidence of each, shape (K,); minus infinity where no particle was left.

    Returns:
        The estimate; its error is NaN for one island, or where all are minus infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.infer.particles.evidence import evidence_of
        >>> value, error, _ = evidence_of(jnp.log(jnp.array([1.0, 2.0, 3.0, 2.0])))
        >>> round(float(jnp.exp(value)), 3), round(float(error), 3)  # (sd 0.816) / 2 / sqrt(4)
        (2.0, 0.204)
    """
    count = islands.size
    value = logsumexp(islands) - jnp.log(count)
    relative = jnp.exp(islands - value)
    error = jnp.std(relative, ddof=1) / jnp.sqrt(count) if count > 1 else jnp.full((), jnp.nan)
    return Evidence(value, error, islands)


def pool_islands(key: jax.Array, islands: jax.Array, size: int) -> jax.Array:
    """Chooses particles of all islands, each island in proportion to its evidence.

    Args:
        key: random key.
        islands: log-evidence of each, shape (K,), not all minus infinity.
        size: equally weighted particles on each.

    Returns:
        Flat indices into particles of shape (K, size), shape (K * size,).
    """
    return systematic(key, jnp.repeat(islands, size))


def resample_islands(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Resamples each island by itself; an island whose weights all vanish is filled from the others.

    Args:
        key: random key.
        log_weights: logarithms, shape (K, n), not all minus infinity.

    Returns:
        Flat indices into the particles, shape (K, n).
    """
    key_islands, key_all = jax.random.split(key)
    islands, size = log_weights.shape
    chosen = jax.vmap(systematic)(jax.random.split(key_islands, islands), log_weights)
    chosen += size * jnp.arange(islands)[:, None]
    anywhere = systematic(key_all, log_weights.reshape(-1)).reshape(islands, size)
    return jnp.where(jnp.isfinite(log_weights).any(1, keepdims=True), chosen, anywhere)


class Resampled(NamedTuple):
    """Islands after those with uneven weights have been resampled."""

    ancestors: jax.Array  # flat indices, (islands * n,)
    log_weights: jax.Array  # zero where resampled, (islands, n)
    log_gain: jax.Array  # by which the log-evidence of each island has grown, (islands,)
    sizes: jax.Array  # effective size of each island before, (islands,)
    now: jax.Array  # whether it was resampled, (islands,)


def resample_uneven(key: jax.Array, log_weights: jax.Array, threshold: float) -> Resampled:
    """Resamples the islands whose weights have become uneven.

    Args:
        key: random key.
        log_weights: logarithms, without NaN and plus infinity, shape (K, n).
        threshold: share of an island's particles below which its effective size asks for it, in (0, 1].

    Returns:
        The `Resampled`.
    """
    islands, n = log_weights.shape
    sizes = jax.vmap(effective_size)(log_weights)
    now = sizes < threshold * n
    chosen = jax.vmap(systematic)(jax.random.split(key, islands), log_weights)
    chosen = jnp.where(now[:, None], chosen, jnp.arange(n)) + n * jnp.arange(islands)[:, None]
    mean = logsumexp(log_weights, axis=1) - jnp.log(n)
    rest = jnp.where(now[:, None], 0.0, log_weights)
    return Resampled(chosen.reshape(-1), rest, jnp.where(now, mean, 0.0), sizes, now)


def harmonic_mean(sizes: jax.Array) -> jax.Array:
    """Of effective sizes, since the relative variances of the islands' weights are proportional to their inverses."""
    return 1.0 / jnp.mean(1.0 / jnp.maximum(sizes, 1.0))


Sampler = TypeVar("Sampler", bound="ParticleSampler")


class ParticleSampler(abc.ABC):
    """Base of the samplers whose particles live on islands: the run, and its results."""

    _members: ClassVar[str] = "num_particles"
    """Name of the argument with their number."""

    def __init__(
        self, model: Model, num_particles: int, num_islands: int, ess_threshold: float, progress_bar: bool
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        _checks.at_least(2, **{self._members: num_particles})
        _checks.at_least(1, num_islands=num_islands)
        if num_particles % num_islands or num_particles < 2 * num_islands:
            raise ValueError(
                f"{self._members} must be a multiple of num_islands={num_islands}, at least two each; got "
                f"{num_particles}"
            )
        if not 0.0 < ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold must lie in (0, 1]; got {ess_threshold}")
        self._model = model
        self._shape = num_islands, num_particles // num_islands
        self._ess_threshold = ess_threshold
        self._progress_bar = progress_bar
        self._arguments: tuple[tuple, dict[str, Any]] = (), {}
        self._outcome: Outcome | None = None

    @abc.abstractmethod
    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        """One run."""

    def run(self: Sampler, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Sampler:
        """Runs from the prior to the posterior.

        A second run compiles nothing if the arguments have the same shapes and other variables that the model reads
        have not changed; if they have, it sees the new values.

        Args:
            rng_key: random key.
            *args: the model's arguments: arrays, pytrees of arrays such as a `DiffusionPrior`, and Python values.
            **kwargs: its keyword arguments.

        Returns:
            This object, which then has draws and evidence.
        """
        self._outcome = None
        outcome = self._sample(rng_key, args, kwargs)
        self._arguments, self._outcome = (args, kwargs), outcome
        for problem in outcome.problems:
            warnings.warn(problem, stacklevel=2)
        return self

    def get_samples(self, group_by_chain: bool = False) -> dict[str, jax.Array]:
        """Draws of the posterior by site, constrained, with the model's deterministic sites.

        Args:
            group_by_chain: whether to keep the islands separate, as chains. Each is then an estimate of the posterior
                by itself. In the pooled draws, the default, an island counts in proportion to its evidence.

        Returns:
            Arrays (num_particles, ...), or (num_islands, num_particles / num_islands, ...).
        """
        values, pooled, by_island = self._ran.draws
        chosen = by_island if group_by_chain else pooled
        return {name: value[chosen] for name, value in values.items()}

    def init_params(self, num_chains: int = 1) -> dict[str, jax.Array]:
        """Draws of the posterior as starts of chains, of every kernel: `mcmc.run(key, init_params=smc.init_params(4))`.

        Args:
            num_chains: as `MCMC` has; at most the number of draws, over which the starts are spread evenly.

        Returns:
            Unconstrained values of the continuous latent sites, as NumPyro takes them: arrays (num_chains, ...), and
            (...) for a single chain.

        Raises:
            ValueError: if there are fewer draws than chains.
        """
        samples, reading = self.get_samples(), self._reading()
        structure = reading.structure
        names = [name for name in structure.latent if name not in structure.discrete]
        size = len(samples[names[0]])
        _checks.at_least(1, num_chains=num_chains)
        if num_chains > size:
            raise ValueError(f"num_chains must be at most {size}, the number of draws; got {num_chains}")
        chosen = (jnp.arange(num_chains) * size + size // 2) // num_chains
        z = jax.vmap(reading.unconstrain)({name: jnp.asarray(samples[name])[chosen] for name in names})
        return {name: value[0] for name, value in z.items()} if num_chains == 1 else z

    def _reading(self) -> Reading:
        args, kwargs = self.arguments
        return Record(self._model).at(args, kwargs)

    @property
    def model(self) -> Model:
        """The model as the user wrote it."""
        return self._model

    @property
    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """The model's arguments and keyword arguments in the last run."""
        _ = self._ran
        return self._arguments

    @property
    def log_evidence(self) -> Evidence:
        """The estimate of the log-evidence, with its standard error over islands."""
        return self._ran.evidence

    @property
    def problems(self) -> tuple[str, ...]:
        """The warnings of the last run; empty if nothing went wrong."""
        return self._ran.problems

    def print_summary(self, prob: float = 0.9) -> None:
        """Prints moments and intervals of the draws, the evidence, and what happened on the way.

        Copies of one ancestor lie side by side, so that `n_eff`, which is computed from the correlation of neighbours,
        accounts for the resampling.

        Args:
            prob: mass of the intervals.
        """
        diagnostics.print_summary(self.get_samples(), prob, group_by_chain=False)
        value, error, islands = self.log_evidence
        print(f"log evidence {value:.3f} +- {error:.3f} ({len(islands)} islands)")
        for problem in self.problems:
            print(f"problem: {problem}")

    @property
    def _ran(self) -> Outcome:
        if self._outcome is None:
            raise RuntimeError("run() must come first")
        return self._outcome

    @property
    def sample_field(self) -> NoReturn:
        """What `MCMC` asks a kernel for first."""
        raise TypeError(
            f"{type(self).__name__} is a sampler by itself, not a kernel of MCMC: call its own run(rng_key, ...). "
            "For a chain of the same kind use MCMC(ParticleGibbs(model), ...)"
        )

    def _bar(self, total: float, unit: str) -> tqdm:
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]"
        return tqdm(total=total, disable=not self._progress_bar, desc=unit, bar_format=bar_format)
