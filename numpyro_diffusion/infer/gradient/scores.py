r"""Scores of a model's joint density, or of a prior, at draws: what Stein discrepancies are made of.

In NumPyro's unconstrained coordinates $q$ of all latent sites, where no support has a border at which Stein's identity
could fail,

$$s(q) = \nabla_q \left( \sum_i \log p_i(x_i(q)) + \log L(x(q), \theta(q)) + \log |\det J(q)| \right),$$

with $\log p_i$ of a diffusion prior its own density where that is known, closed or of an energy, and else that of its
probability flow, whose gradient goes through the solve. Both are of a law that is wider by the smallest noise level.

The score of a *network* at that level, which ULA moves by, is another one: its error is that of $\hat\varepsilon$ over
the level. No exact sampler of a learned prior draws from a law of that score, and its draws have a discrepancy from it.
For the score of a denoiser at another level see `diagnostics.score_function`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.gradient.target import Target, check
from numpyro_diffusion.infer.model.density import Density, LogPrior, Score, Source, log_prior_of
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Record


class JointScores(NamedTuple):
    """Draws of a model as vectors, and the score at each."""

    points: jax.Array  # unconstrained, sites in alphabetical order, shape (draws, D)
    scores: jax.Array  # gradient of the log joint density, shape (draws, D)


@dataclass(frozen=True)
class _Own(Density):
    """The density of a prior, or its score if it has none."""

    def _of(self, prior: DiffusionPrior) -> LogPrior:
        return Score() if self.source_of(prior) is None else Density(self.source, self.gradient)

    def value(self, prior: DiffusionPrior, u: jax.Array) -> jax.Array:
        return self._of(prior).value(prior, u)

    def check(self, name: str, prior: DiffusionPrior, depends: bool, kernel: str) -> None:
        self._of(prior).check(name, prior, depends, kernel)


def joint_scores(
    model: Model | DiffusionPrior,
    draws: Mapping[str, jax.Array] | jax.Array,
    *args: Any,
    density: LogPrior | Source | None = None,
    **kwargs: Any,
) -> JointScores:
    """The score of a model's posterior at draws, both in unconstrained coordinates.

    Args:
        model: NumPyro model, or a `DiffusionPrior`.
        draws: values of all latent sites on their supports, each with one leading dimension, as `MCMC.get_samples()`
            has them; what else is there, such as deterministic sites, is left out. Of a `DiffusionPrior`, an array.
        *args: the model's arguments.
        density: what stands for the densities of diffusion priors, as in `MALA`. None takes the denoiser's own, or that
            of the flow by `Density("flow", gradient="solve")`, and without either `Score()`, the denoiser's score. The
            flow's takes a solve with its reverse pass for each draw: in many dimensions give the prior
            `density_probes`, or `Score()` if draws were to follow the network's score. A prior that depends on other
            latent sites needs a density.
        **kwargs: the model's keyword arguments.

    Returns:
        `JointScores`, for `diagnostics.stein_test(found.points, found.scores, key)`.

    Raises:
        ValueError: if the model has no latent site, one is discrete, draws of one are missing, or a diffusion prior
            lacks what is needed.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer import joint_scores
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> joint_scores(model, {"x": jnp.array([1.5, 2.5])}, 3.0).scores.tolist()
        [[0.0], [-2.0]]
    """
    if isinstance(model, DiffusionPrior):
        model, draws = partial(numpyro.sample, "x", model), {"x": draws}  # type: ignore[dict-item]  # an array
    density = _Own(gradient="solve") if density is None else log_prior_of(density)
    reading = Record(model).at(args, kwargs)
    check(reading, density, "joint_scores")
    names = sorted(reading.structure.latent)
    missing = [name for name in names if name not in draws]
    if missing:
        raise ValueError(f"draws must hold all latent sites of the model; {', '.join(missing)} are missing")
    values = {name: jnp.asarray(draws[name]) for name in names}

    @jax.jit
    def over_draws(values: dict[str, jax.Array]) -> JointScores:
        def one(values: dict[str, jax.Array]) -> JointScores:
            z = reading.unconstrain(values)
            q = ravel_pytree(z)[0]
            return JointScores(q, Target(reading, density, z).evaluate(q).gradient)

        return jax.lax.map(one, values, batch_size=256)

    return over_draws(values)
