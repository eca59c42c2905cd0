r"""A model with its likelihood raised to a power, and the likelihood by itself.

A model is the product of the priors of its latent sites, which can be drawn, and of its observations and factors,
which it is conditioned on:

$$p(x, \theta)\, L(x, \theta)^\beta, \qquad \beta \in [0, 1].$$

`temper` is a handler that scales the second factor; its $\beta$ is one of the keyword arguments, so that it can change
without a compilation and any kernel can move at any temperature. The Jacobian of NumPyro's unconstrained coordinates
belongs to the prior and keeps its full weight. `log_likelihood` and `draw_prior` are the two factors by themselves. For
the walk from $\beta = 0$ to 1 see `particles.tempered`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import conditioned
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.model.handlers import Model

TEMPERATURE = "_temperature"
"""Keyword argument that holds the inverse temperature."""
_UNDER_WAY = "_under_way"
_LARGEST_THRESHOLD = 0.999


class _scale_observed(Messenger):  # noqa: N801
    """Scales the log-density of everything that is conditioned on.

    A site that appears while a latent one passes through the handlers does not belong to the model: it is the Jacobian
    of NumPyro's unconstrained coordinates, a part of the prior.
    """

    def __init__(self, fn: Model, temperature: jax.Array) -> None:
        self.temperature = temperature
        self._inside_latent = 0
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample":
            return
        if not msg["is_observed"]:
            msg["infer"] = {**msg["infer"], _UNDER_WAY: True}
            self._inside_latent += 1
        elif not self._inside_latent:
            msg["scale"] = self.temperature if msg["scale"] is None else self.temperature * msg["scale"]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        self._inside_latent -= _UNDER_WAY in msg.get("infer", {})


class _only_observed(Messenger):  # noqa: N801
    """Counts the log-density of latent sites as zero, without evaluating it."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = msg["fn"].mask(False)


class _remember_site(Messenger):  # noqa: N801
    """Remembers the last latent site."""

    name: str | None = None

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            self.name = msg["name"]


class temper:  # noqa: N801
    """A model whose keyword arguments may hold an inverse temperature for its likelihood.

    Args:
        model: NumPyro model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        temperature = kwargs.pop(TEMPERATURE, None)
        model = self._model if temperature is None else _scale_observed(self._model, temperature)
        return model(*args, **kwargs)


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


def draw_prior(model: Model, key: jax.Array, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """One draw of all latent sites from their priors, constrained.

    Raises:
        ValueError: if a latent site cannot be drawn.
    """
    remembering = _remember_site(model)
    try:
        sites = trace(seed(remembering, key)).get_trace(*args, **kwargs)
    except NotImplementedError as error:
        raise ValueError(
            f"particles start at draws of the prior, and the prior of site {remembering.name!r} cannot be drawn. Give "
            "the site a proper distribution, and put the rest of its density into numpyro.factor"
        ) from error
    return {name: s["value"] for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}


def log_likelihood(model: Model, args: tuple, kwargs: Mapping[str, Any], values: Mapping[str, jax.Array]) -> jax.Array:
    """Log-density of all observations and factors at constrained values of the latent sites, a scalar."""
    rest = seed(_only_observed(conditioned(model)), jax.random.key(0))
    return jnp.asarray(log_density(substitute(rest, data=dict(values)), args, dict(kwargs), {})[0], float)
