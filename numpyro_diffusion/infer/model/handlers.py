r"""Handlers that take a model apart: its diffusion priors on one side, everything else on the other.

The joint density of a model with diffusion sites $x$ and other latent sites $\theta$ is

$$p(x, \theta, y) = \underbrace{\prod_i p(x_i)}_{\text{priors}} \;
\underbrace{p(\theta)\, p(y \mid x, \theta)}_{\text{rest}}.$$

A kernel that moves $x$ by prior-reversible proposals needs only the second factor. `drop_prior` takes the first out of
a model: the sites keep their values, supports and plates, and their `log_prob` is never called.

With a constrained support, the Jacobian of the support belongs to the prior as well: `record` keeps it separate.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_diffusion.distributions import DiffusionPrior

Model = Callable[..., Any]
_DROPPED = "_diffusion_prior_dropped"


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
