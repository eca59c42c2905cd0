r"""Handlers that take a model apart: its diffusion priors on one side, everything else on the other.

The joint density of a model with diffusion sites $x$ and other latent sites $\theta$ is

$$p(x, \theta, y) = \underbrace{\prod_i p(x_i)}_{\text{priors}} \;
\underbrace{p(\theta)\, p(y \mid x, \theta)}_{\text{rest}}.$$

A kernel that moves $x$ by prior-reversible proposals needs only the second factor. `drop_prior` takes the first out of
a model: the sites keep their values, supports and plates, and their `log_prob` is never called.

With a constrained support, the Jacobian of the support belongs to the prior as well: `record` keeps it separate.

Any model, with diffusion sites or without, is the product of the priors of its latent sites and of its observations and
factors, the likelihood. `temper` raises the second to a power,

$$p(x, \theta)\, L(x, \theta)^\beta, \qquad \beta \in [0, 1],$$

where $\beta$ is one of the keyword arguments, so that it can change without a compilation and any kernel can move at
any temperature. `draw_prior` draws the first.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpyro.distributions as dist
from numpyro.handlers import seed, trace
from numpyro.primitives import Messenger

from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.solve import FlowMap, Solver

Model = Callable[..., Any]
_DROPPED = "_diffusion_prior_dropped"
TEMPERATURE = "_temperature"
"""Keyword argument that holds the inverse temperature."""
_UNDER_WAY = "_under_way"


class drop_prior(Messenger):  # noqa: N801
    """Handler: the log-density of latent diffusion sites counts as zero and is never evaluated.

    Args:
        fn: the model.

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer.util import log_density
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import drop_prior
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> round(float(log_density(drop_prior(model), (1.0,), {}, {"x": jnp.ones(1)})[0]), 3)
        -0.919
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        if is_diffusion_site(msg) and _DROPPED not in msg["infer"]:
            msg["infer"] = {**msg["infer"], _DROPPED: True}
            msg["fn"] = msg["fn"].mask(False)


class with_flow(Messenger):  # noqa: N801
    """Handler: the same model, with another flow from noise to the points of its latent diffusion sites.

    Args:
        fn: the model.
        flow_solver: a deterministic solver, or a `solve.FlowMap` that has learned one; for all sites.

    Example:
        >>> import numpyro
        >>> from numpyro.handlers import seed, trace
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import with_flow
        >>> from numpyro_diffusion.solve import DPMSolverPP
        >>> def model():
        ...     numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        >>> trace(seed(with_flow(model, DPMSolverPP(5)), 0)).get_trace()["x"]["fn"].flow_solver.num_times
        5
    """

    def __init__(self, fn: Model, flow_solver: Solver | FlowMap) -> None:
        self.flow_solver = flow_solver
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if is_diffusion_site(msg):
            msg["fn"] = _with_flow(msg["fn"], self.flow_solver)


def _with_flow(fn: Any, flow_solver: Solver | FlowMap) -> Any:
    """A distribution with another flow of the `DiffusionPrior` inside."""
    if isinstance(fn, DiffusionPrior):
        return fn.with_flow(flow_solver)
    fn = copy.copy(fn)
    fn.base_dist = _with_flow(fn.base_dist, flow_solver)
    return fn


def prior_inside(fn: Any, through_masks: bool = False) -> DiffusionPrior | None:
    """The `DiffusionPrior` inside plates, `expand`, `to_event` and, if asked, masks; None if there is none."""
    wrappers = (dist.Independent, dist.ExpandedDistribution, *([dist.MaskedDistribution] if through_masks else []))
    while isinstance(fn, wrappers):
        fn = fn.base_dist
    return fn if isinstance(fn, DiffusionPrior) else None


def is_diffusion_site(site: Mapping[str, Any]) -> bool:
    """Whether a message or trace entry is a latent site with a `DiffusionPrior`."""
    return site["type"] == "sample" and not site["is_observed"] and prior_inside(site["fn"], True) is not None


def as_written(site: Mapping[str, Any]) -> dist.Distribution:
    """The distribution of a site as the user wrote it, without the mask of `drop_prior`."""
    return site["fn"].base_dist if _DROPPED in site["infer"] else site["fn"]


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
            f"tempering starts at draws of the prior, and the prior of site {remembering.name!r} cannot be drawn. Give "
            "the site a proper distribution, and put the rest of its density into numpyro.factor"
        ) from error
    return {name: s["value"] for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
