r"""Learning a joint law from draws: of a posterior, or of simulations of a prior, possibly weighted.

Draws of all sites are brought to unconstrained coordinates, whitened (`units`), and learned by `train.fit`. Of every
five draws one is held out: the weights kept are those with the smallest held-out loss, and the `report` compares the
law with them. Where the network predicts held-out draws no better than the normal law at which it starts, beyond
chance, that law is kept.

Weights $w_i$ are honoured by systematic resampling to four times as many rows: row $i$ appears $4 n\, w_i / \sum w$
times, up or down to a whole number. What counts is $1 / \sum_i w_i^2$, the effective number of draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.diagnostics import denoising_losses
from numpyro_diffusion.diagnostics.distances import generator
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.learned.faithfulness import Faithfulness, faithfulness, warn_if_poor
from numpyro_diffusion.learned.layout import Layout, Site, support_of
from numpyro_diffusion.learned.prior import FLOW_SOLVER, LearnedPrior
from numpyro_diffusion.learned.units import Units, measure
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.train import fit

FEWEST = 100
"""Effective draws below which nothing is learned."""
SCHEDULE = VE(0.005, 40.0)
"""Noise levels for whitened draws: modes of a twentieth of the whole spread are resolved."""
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Noise levels at which the network must be better than a normal law, at one of them at least."""
_COPIES = 4
_ERRORS = 3.0
_OUTSIDE = 1e-3


def prior_from_samples(
    samples: Mapping[str, ArrayLike],
    supports: Mapping[str, Any] | None = None,
    weights: ArrayLike | None = None,
    *,
    key: jax.Array | None = None,
    batch_ndims: int = 1,
    backbone: nnx.Module | None = None,
    num_steps: int = 3000,
    held_out_fraction: float = 0.2,
    report: bool = True,
    progress_bar: bool = False,
    **options: Any,
) -> LearnedPrior:
    """Learns the joint law of draws, to be the prior of another model.

    Args:
        samples: draws by site, (n, *shape), as `MCMC.get_samples` gives them; all sites are learned.
        supports: of sites that are not real, by name: constraints of NumPyro, or distributions that have them.
        weights: of the draws, shape (n,), not negative; of any sum.
        key: random key; `jax.random.key(0)` by default.
        batch_ndims: leading dimensions of draws: 2 for those by chain, (chains, n, *shape).
        backbone: network for vectors of as many entries as there are unconstrained numbers; an `MLP` by default.
        num_steps: steps of training.
        held_out_fraction: share of the draws, in (0, 1), that the law is not trained on.
        report: whether to compare the law with the draws held out, which takes seconds.
        progress_bar: of the training.
        **options: more of `fit`, such as `optimizer=` or `batch_size=`.

    Returns:
        A `LearnedPrior`.

    Raises:
        TypeError: if draws are not real numbers, or a support is not known or discrete.
        ValueError: if there are no sites, too few draws, also effectively, draws that are not finite, do not vary, or
            lie outside of their support, or weights that do not match, are negative or vanish.
        FloatingPointError: if training diverges.

    Warns:
        UserWarning: if the law is not that of the draws; its `report` says where.

    Example:
        >>> import jax
        >>> from numpyro.distributions import constraints
        >>> from numpyro_diffusion import prior_from_samples
        >>> draws = {"share": jax.random.beta(jax.random.key(0), 2.0, 5.0, (400,))}
        >>> prior = prior_from_samples(draws, {"share": constraints.unit_interval}, num_steps=50, report=False)
        >>> prior
        LearnedPrior(share)
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction must lie in (0, 1); got {held_out_fraction}")
    if taken := sorted({"held_out", "validation_fraction", "cond", "target"} & options.keys()):
        raise TypeError(f"options of fit must not be {', '.join(taken)}: the draws held out are a share of samples")
    draws = _check_draws(samples, batch_ndims)
    weights = _check_weights(weights, draws, jnp.shape(next(iter(samples.values())))[:batch_ndims])
    layout = _layout(draws, supports or {})
    u = layout.rows(draws)
    location, factor = measure(u, weights, layout.entries)
    w = np.linalg.solve(factor, (u - location).T).T
    keys = jax.random.split(jax.random.key(0) if key is None else key, 5)
    rows, held_out = _split(generator(keys[0]), w, weights, held_out_fraction)
    own = backbone is None
    if backbone is None:
        backbone = MLP((layout.size,), 64 if layout.size <= 16 else 128, rngs=nnx.Rngs(keys[1]))
    given: dict[str, Any] = {"schedule": SCHEDULE, "held_out": held_out, "num_evaluations": 10, "patience": 10}
    given |= {"num_steps": num_steps, "progress_bar": progress_bar, **options}
    denoiser = fit(keys[2], backbone, rows, **given).denoiser
    if own and not _better_than_normal(keys[3], denoiser, held_out):
        denoiser = NetworkDenoiser(backbone, schedule=denoiser.schedule.base)  # its output starts at zero
    units = Units(jnp.asarray(location, denoiser.dtype), jnp.asarray(factor, denoiser.dtype))
    prior = DiffusionPrior(denoiser, flow_solver=FLOW_SOLVER)
    learned = LearnedPrior(prior, layout, units)
    if report:
        learned.report = warn_if_poor(_compare(keys[4], learned, u, weights, rows, held_out))
    return learned


def prior_from_idata(
    idata: Any,
    var_names: Sequence[str] | None = None,
    supports: Mapping[str, Any] | None = None,
    weights: ArrayLike | None = None,
    *,
    group: str = "posterior",
    **options: Any,
) -> LearnedPrior:
    """Learns the joint law of draws in ArviZ data.

    Args:
        idata: of ArviZ, old (`InferenceData`) or new (`DataTree`), with draws (chain, draw, *shape).
        var_names: variables to learn; None for all of the group. Leave out what is computed from the others.
        supports: as those of `prior_from_samples`: ArviZ data do not know them.
        weights: of the draws, shape (chain, draw).
        group: such as "posterior" or "prior".
        **options: those of `prior_from_samples`.

    Returns:
        A `LearnedPrior`.

    Raises:
        ValueError: if there is no such group or variable, and as `prior_from_samples`.
    """
    groups = [str(name).strip("/") for name in (idata.groups() if callable(idata.groups) else idata.groups)]
    if group not in groups:
        raise ValueError(f"idata must have the group {group!r}; got {[name for name in groups if name]}")
    found = idata[group]
    known = [str(name) for name in found.data_vars]
    if isinstance(var_names, str):
        var_names = [var_names]
    if unknown := [name for name in var_names or () if name not in known]:
        raise ValueError(f"var_names must be variables of the {group}, {known}; got {unknown}")
    names = known if var_names is None else list(var_names)
    dims = {name: found[name].transpose("chain", "draw", ...).values for name in names}
    return prior_from_samples(dims, supports, weights, batch_ndims=2, **options)


def _check_draws(samples: Mapping[str, ArrayLike], batch_ndims: int) -> dict[str, np.ndarray]:
    """Draws by site, (n, *shape)."""
    _checks.at_least(1, batch_ndims=batch_ndims)
    if not isinstance(samples, Mapping) or not samples:
        raise ValueError(f"samples must have draws by site, such as MCMC.get_samples(); got {type(samples).__name__}")
    draws, batches = {}, {}
    for name, values in samples.items():
        values = np.asarray(values)
        if not np.issubdtype(values.dtype, np.floating):
            raise TypeError(
                f"draws of site {name!r} must be real numbers; got {values.dtype}. A diffusion learns continuous "
                "sites: leave discrete ones out"
            )
        batches[name] = values.shape[:batch_ndims]
        if len(batches[name]) < batch_ndims:
            raise ValueError(f"draws of site {name!r} must have {batch_ndims} leading dimensions; got {values.shape}")
        _checks.finite(f"samples[{name!r}]", values, "Drop these draws, and find out where they come from")
        draws[name] = values.reshape(-1, *values.shape[batch_ndims:])
    if len(set(batches.values())) > 1:
        raise ValueError(f"all sites must have as many draws; got {batches}. Draws by chain are for batch_ndims=2")
    if (count := len(next(iter(draws.values())))) < FEWEST:
        raise ValueError(f"samples must have at least {FEWEST} draws; got {count}")
    return draws


def _check_weights(
    weights: ArrayLike | None, draws: Mapping[str, np.ndarray], batch_shape: tuple[int, ...]
) -> np.ndarray | None:
    """Weights (n,) that sum to one."""
    if weights is None:
        return None
    shares, count = np.asarray(weights, np.float64), len(next(iter(draws.values())))
    if shares.shape != batch_shape:
        raise ValueError(f"weights must have one number for each draw, shape {batch_shape}; got {shares.shape}")
    _checks.finite("weights", shares, "Of log-weights, take the largest away before the exponential")
    if (shares < 0).any():
        raise ValueError(f"weights must not be negative; got {np.min(shares)}")
    if not shares.sum() > 0:
        raise ValueError("weights must not all vanish. Of log-weights, take the largest away before the exponential")
    shares = shares.reshape(-1) / shares.sum()
    if (effective := _effective(shares, count)) < FEWEST:
        raise ValueError(
            f"weights must leave an effective number of at least {FEWEST} draws; got {effective:.1f} of {count}. Take "
            "more draws, or a proposal that is nearer"
        )
    return shares


def _effective(weights: np.ndarray | None, count: int) -> float:
    return float(count) if weights is None else float(np.sum(weights) ** 2 / np.sum(weights**2))


def _layout(draws: Mapping[str, np.ndarray], supports: Mapping[str, Any]) -> Layout:
    if unknown := [name for name in supports if name not in draws]:
        raise ValueError(f"supports must be of sites among the draws, {list(draws)}; got {unknown}")
    sites = []
    for name, values in draws.items():
        shape = values.shape[1:]
        if not values.size:
            raise ValueError(f"draws of site {name!r} must not be empty; got {values.shape}")
        sites.append(Site(name, shape, support_of(name, supports.get(name, constraints.real), shape)))
    return Layout(tuple(sites))


def _split(
    rng: np.random.Generator, w: np.ndarray, weights: np.ndarray | None, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and others, both of equal weight."""
    order = rng.permutation(len(w))
    count = max(2, round(fraction * len(w)))
    held_out, train = order[:count], order[count:]
    if weights is None:
        return w[train], w[held_out]
    parts = weights[train], weights[held_out]
    if min(part.sum() for part in parts) <= 0:
        raise ValueError("weights must not vanish on the draws held out: too few have any. Take more draws")
    few = max(2, round(_effective(parts[1], count)))  # copies would make the comparison too sure
    return w[train][_resample(rng, parts[0], _COPIES * len(train))], w[held_out][_resample(rng, parts[1], few)]


def _resample(rng: np.random.Generator, weights: np.ndarray, num: int) -> np.ndarray:
    """Indices of systematic resampling."""
    edges = np.cumsum(weights / weights.sum())
    found = np.searchsorted(edges, (rng.random() + np.arange(num)) / num)
    return np.minimum(found, len(weights) - 1)


def _better_than_normal(key: jax.Array, denoiser: NetworkDenoiser, held_out: np.ndarray) -> bool:
    """Whether the network predicts held-out draws better than the normal law of their moments, at some noise level."""
    losses = denoising_losses(denoiser, key, held_out, held_out, LEVELS)
    return bool((losses.gaussian - losses.denoiser > _ERRORS * losses.difference_error).any())


def _compare(
    key: jax.Array,
    learned: LearnedPrior,
    u: np.ndarray,
    weights: np.ndarray | None,
    rows: np.ndarray,
    held_out: np.ndarray,
) -> Faithfulness:
    """The law in noise space beside draws, in standardised entries."""
    layout, factor = learned.layout, np.asarray(learned.units.factor, np.float64)
    scale = np.sqrt(np.square(factor).sum(1))
    drawn_key, compare_key = jax.random.split(key)

    def draw(key: jax.Array, num: int) -> np.ndarray:
        z = jax.random.normal(key, (num, layout.size))
        return np.asarray(learned.prior.flow(z), np.float64) @ factor.T / scale

    mean = np.asarray(learned.units.location) / scale
    problems = _unbounded(layout, u, mean + draw(drawn_key, 4000))
    trained, others = (w @ factor.T / scale for w in (rows, held_out))
    num_draws = round(_effective(weights, len(u)))
    return faithfulness(draw, trained, others, layout.entries, compare_key, num_draws, problems)


def _unbounded(layout: Layout, u: np.ndarray, drawn: np.ndarray) -> tuple[str, ...]:
    """Entries that look as if their support had been forgotten."""
    found, at = [], np.cumsum([0, *(site.size for site in layout.sites)])
    for site, first, last in zip(layout.sites, at[:-1], at[1:], strict=True):
        outside = float((drawn[:, first:last] <= 0).any(1).mean())
        if site.is_real and (u[:, first:last] > 0).all() and outside > _OUTSIDE:
            found.append(
                f"all draws of {site.name} are positive, and {outside:.1%} of the law's are not: give "
                f"supports={{{site.name!r}: constraints.positive}}, if it is so"
            )
    return tuple(found)
