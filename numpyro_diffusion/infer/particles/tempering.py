"""A climb from the prior to the posterior: the likelihood by itself, and what makes a climb end.

A tempered model and draws of its prior are in `model.handlers`. For the walk see `particles.tempered`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute
from numpyro.infer.gibbs import conditioned
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.model.handlers import Model

_LARGEST_THRESHOLD = 0.999


class _only_observed(Messenger):  # noqa: N801
    """Counts the log-density of latent sites as zero, without evaluating it."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = msg["fn"].mask(False)


def check_climb(ess_threshold: float, correlation: float, max_moves: int) -> None:
    """Raises `ValueError` unless a climb from the prior by these numbers comes to an end."""
    if ess_threshold > _LARGEST_THRESHOLD:
        raise ValueError(
            f"ess_threshold must be at most {_LARGEST_THRESHOLD}, since the steps of the temperature shrink to "
            f"nothing as it nears 1; got {ess_threshold}. For steps of your own give TemperedSMC `temperatures`"
        )
    _checks.at_least(1, max_moves=max_moves)
    if not 0.0 < correlation < 1.0:
        raise ValueError(f"correlation must lie in (0, 1); got {correlation}")


def log_likelihood(model: Model, args: tuple, kwargs: Mapping[str, Any], values: Mapping[str, jax.Array]) -> jax.Array:
    """Log-density of all observations and factors at constrained values of the latent sites, a scalar."""
    rest = seed(_only_observed(conditioned(model)), jax.random.key(0))
    return jnp.asarray(log_density(substitute(rest, data=dict(values)), args, dict(kwargs), {})[0], float)
