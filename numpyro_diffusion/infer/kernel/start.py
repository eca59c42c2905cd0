r"""Where a chain starts: at given values, or at a draw that the kernel can continue from.

Diffusion sites start at a draw of their prior, since other points are far from all that a denoiser has seen; other
latent sites start as in NumPyro, uniformly on (-2, 2) in unconstrained coordinates. An `init_strategy` of NumPyro
replaces both where it has a value of its own: `init_to_value` for the sites that it names, others for all but diffusion
sites. Starts are drawn until one is valid for the kernel, at most a hundred times.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import GIBBS_SITES_KWARG
from numpyro.infer.initialization import init_to_feasible, init_to_uniform, init_to_value
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.model.handlers import is_diffusion_site
from numpyro_diffusion.infer.model.record import Reading

MAX_TRIES = 100
_RADIUS = 2.0
Point = dict[str, jax.Array]  # unconstrained values by site
Strategy = Callable[..., Any]


def start(
    key: jax.Array,
    reading: Reading,
    init_params: Mapping[str, Any] | None,
    init_strategy: Strategy | None = None,
    valid: Callable[[Point], jax.Array] | None = None,
    draw: Callable[[jax.Array], Point] | None = None,
) -> Point:
    """Unconstrained values of all latent sites to start a chain at.

    Args:
        key: random key.
        reading: the model.
        init_params: values to start at, unconstrained; or those that a composite kernel gives, constrained, which are
            drawn again if they are not valid. None draws.
        init_strategy: as in NumPyro; None leaves it to `draw`.
        valid: whether a kernel can continue from a point; draws are repeated until it can.
        draw: the kernel's own way to draw a start from a random key; None draws diffusion sites from their priors and
            others uniformly.

    Returns:
        A point, which need not be valid if it was given or the draws ran out.

    Raises:
        ValueError: if `init_params` lacks a site or has one too many.
    """
    if init_strategy is not None:
        draw = partial(by_strategy, reading=reading, strategy=init_strategy)
    draw = draw or partial(_draw, reading=reading)
    if init_params is not None:
        z = _given(reading, init_params)
        if valid is None or not is_block(reading):
            return z
        first = z, valid(z)
    elif valid is None:
        return draw(key)
    else:
        first = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), jax.eval_shape(draw, key)), jnp.array(False)

    def redraw(carry: tuple) -> tuple:
        tries, key, _, _ = carry
        key, key_draw = jax.random.split(key)
        z = draw(key_draw)
        return tries + 1, key, z, valid(z)

    going = lambda carry: (carry[0] < MAX_TRIES) & ~carry[3]  # noqa: E731
    return jax.lax.while_loop(going, redraw, (0, key, *first))[2]


def is_block(reading: Reading) -> bool:
    """Whether a composite kernel conditions the model, and gives constrained values to start at."""
    return GIBBS_SITES_KWARG in reading.kwargs


def strategy_of(kernel: MCMCKernel) -> Strategy | None:
    """The `init_strategy` that a NumPyro kernel was given, if it asks for the laws or the names of a model's sites."""
    strategy = getattr(kernel, "_init_strategy", None)
    function = strategy.func if isinstance(strategy, partial) else strategy
    return None if function in (init_to_uniform, init_to_feasible) else strategy


def _given(reading: Reading, init_params: Mapping[str, Any]) -> Point:
    names = list(reading.structure.latent)
    if set(init_params) != set(names):
        raise ValueError(f"init_params must have the latent sites {sorted(names)}; got {sorted(init_params)}")
    values = {name: jnp.asarray(init_params[name], jnp.result_type(float)) for name in names}
    return reading.unconstrain(values) if is_block(reading) else values


def _draw(key: jax.Array, *, reading: Reading) -> Point:
    key_others, key_diffusion = jax.random.split(key)
    structure = reading.structure
    z = {**reading.origin(), **uniform(key_others, reading, structure.others)}
    for index, name in enumerate(structure.diffusion):
        key_site = jax.random.fold_in(key_diffusion, index)
        z[name] = reading.sites(z)[name].draw(key_site).astype(z[name].dtype)
    return z


def uniform(key: jax.Array, reading: Reading, names: Sequence[str]) -> Point:
    """Unconstrained values of sites that are no diffusion sites, uniform on (-2, 2) as in NumPyro."""
    shapes = {name: reading.structure.latent[name].unconstrained_shape for name in names}
    keys = jax.random.split(key, len(shapes) + 1)[1:]
    draws = zip(keys, shapes.items(), strict=True)
    return {name: jax.random.uniform(k, shape, minval=-_RADIUS, maxval=_RADIUS) for k, (name, shape) in draws}


def values_of(strategy: Strategy) -> Mapping[str, Any]:
    """What `init_to_value` names; nothing for other strategies."""
    if isinstance(strategy, partial) and strategy.func is init_to_value:
        return strategy.keywords.get("values", {})
    return {}


def by_strategy(key: jax.Array, reading: Reading, strategy: Strategy) -> Point:
    """Unconstrained values of all latent sites by a strategy of NumPyro; other diffusion sites are drawn."""
    strategy = strategy if isinstance(strategy, partial) else strategy()
    own = values_of(strategy)

    def value(site: dict[str, Any]) -> jax.Array | None:
        if site["type"] != "sample" or site["is_observed"] or site["name"] in own or not is_diffusion_site(site):
            return strategy(site)
        return None  # drawn from its prior by `seed`

    model = substitute(seed(reading.model, key), substitute_fn=value)
    sites = trace(model).get_trace(*reading.args, **reading.kwargs)
    latent = {name: sites[name] for name in reading.structure.latent}
    z = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latent.items()}
    return {name: jnp.asarray(value, jnp.result_type(value, float)) for name, value in z.items()}
