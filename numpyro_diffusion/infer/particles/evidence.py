r"""The evidence of particles on islands: its estimate, the error of that, and draws of all islands together.

Independent runs $k = 1 \dots K$ of a particle method (the islands of one population) each give an unbiased estimate
$\hat Z_k$ of $Z = \int p(x) L(x)\, dx$. So their mean is unbiased too, and their spread is its error:

$$\hat Z = \frac1K \sum_k \hat Z_k, \qquad
\mathrm{se}(\log \hat Z) \approx \frac{1}{\sqrt K}\, \mathrm{sd}_k\!\left(\hat Z_k / \hat Z\right).$$

An unbiased $\hat Z$ has a logarithm that is too small on average, by half its relative variance. Draws of island $k$
stand for $\hat Z_k$ of $\sum_k \hat Z_k$: an island that has missed a mode counts by the little it has found.

How the estimates come about is the matter of the samplers, `smc` and `twisted_smc`; what they hold afterwards is that
of `ParticleSampler`.

References:
    Vergé, Dubarry, Del Moral, Moulines, On parallel implementation of sequential Monte Carlo methods: the island
    particle model, 2015, https://arxiv.org/abs/1306.3911.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from numpyro import diagnostics

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.choose import systematic
from numpyro_diffusion.infer.model.sites import Model


class Evidence(NamedTuple):
    """An estimate of the log-evidence, in nats."""

    value: jax.Array  # log of the mean over islands
    standard_error: jax.Array  # over islands; NaN for a single one
    islands: jax.Array  # the estimate of each, (islands,)


def evidence_of(islands: jax.Array) -> Evidence:
    """The estimate of independent islands together, with its standard error.

    Args:
        islands: log-evidence of each, shape (K,); minus infinity where no particle was left.

    Returns:
        The estimate; its error is NaN for one island, or where all are minus infinity.

    Example:
        >>> import jax.numpy as jnp
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
    """Which particles stand for all islands, each island in proportion to its evidence.

    Args:
        key: random key.
        islands: log-evidence of each, shape (K,), not all minus infinity.
        size: equally weighted particles on each.

    Returns:
        Flat indices into particles of shape (K, size), shape (K * size,).
    """
    return systematic(key, jnp.repeat(islands, size))


class ParticleSampler:
    """A sampler whose particles live on islands: what it is made of, and what it holds once it has run."""

    def __init__(self, model: Model, num_particles: int, num_islands: int, ess_threshold: float) -> None:
        if not callable(model):
            raise TypeError(f"model must be a NumPyro model, a callable; got {type(model).__name__}")
        _checks.at_least(2, num_particles=num_particles)
        _checks.at_least(1, num_islands=num_islands)
        if num_particles % num_islands or num_particles < 2 * num_islands:
            raise ValueError(
                f"num_particles must be a multiple of num_islands={num_islands}, at least two each; got {num_particles}"
            )
        if not 0.0 < ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold must lie in (0, 1]; got {ess_threshold}")
        self._model = model
        self._shape = num_islands, num_particles // num_islands
        self._ess_threshold = ess_threshold
        self._result: tuple[dict[str, jax.Array], Evidence, Any] | None = None

    def get_samples(self) -> dict[str, jax.Array]:
        """Draws of the posterior by site, constrained, with the model's deterministic sites: (num_particles, ...)."""
        return self._ran[0]

    @property
    def log_evidence(self) -> Evidence:
        """The estimate of the log-evidence, with its standard error over islands."""
        return self._ran[1]

    def print_summary(self, prob: float = 0.9) -> None:
        """Prints moments and intervals of the draws, the evidence, and what happened on the way.

        Copies of one ancestor lie side by side, so that `n_eff`, by the correlation of neighbours, sees what is left of
        the resampling.

        Args:
            prob: mass of the intervals.
        """
        diagnostics.print_summary(self.get_samples(), prob, group_by_chain=False)
        value, error, islands = self.log_evidence
        print(f"log evidence {value:.3f} +- {error:.3f} ({len(islands)} islands)")

    @property
    def _ran(self) -> tuple[dict[str, jax.Array], Evidence, Any]:
        """Samples, evidence, and what a sampler notes on the way."""
        if self._result is None:
            raise RuntimeError("run() must come first")
        return self._result
