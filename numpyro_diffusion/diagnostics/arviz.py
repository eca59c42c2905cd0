r"""Draws and their statistics for ArviZ, with a statement of what they are exact for.

ArviZ's `from_numpyro` reads an `MCMC` object and nothing else, runs the model from the prior to see the data, and
cannot know whether a kernel tested its moves, and with what. `to_arviz` takes every run of this library, and plain
draws, and writes into the attributes of the posterior group what they are exact for, the kernel's `status`, so that it
stays with them when they are saved.

| group | what is in it |
|---|---|
| posterior, or another for plain draws | draws, (chain, draw, ...); islands of a particle sampler are chains |
| sample_stats | statistics of every draw by ArviZ's names, those by level with a dimension `level` |
| annealing | what happened at each temperature or noise level of a particle sampler, with a dimension `level` |
| observed_data, log_likelihood | of all observed sites that have data; factors have none |
| prior, prior_predictive, posterior_predictive | as they are given |

The model is read at the first draw, without its flow: sites have their values from the draws, also under
`NoiseReparam`. So names of dimensions, `infer={"event_dims": ["row", "col"]}` and plates, come from the model as it was
written. The pointwise log-likelihoods of all draws are evaluated a block at a time, so that memory is bounded by the
result and one block. Works on ArviZ 0.23 (`InferenceData`) and 1.x (`DataTree`).
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, init_to_feasible

from numpyro_diffusion import _precision
from numpyro_diffusion.diagnostics.runs import Arrays, Run, read_run, versions

_BLOCK = 2**21
"""Log-likelihoods that are evaluated at once."""


class _at_draw(substitute):  # noqa: N801
    """Handler: sites have the values of a draw, and `NoiseReparam` leaves those alone that have one."""

    @property
    def values_as_written(self) -> Mapping[str, Any]:
        return self.data


class _Model(NamedTuple):
    """What a model says at a draw."""

    observed: Arrays  # of observed sites with data
    dims: dict[str, list[str]]  # named dimensions of sites, plates first
    not_drawn: list[str]  # latent sites without draws
    subsampled: list[str]  # plates that show a part of the data
    schedules: dict[str, str]  # of diffusion sites


def to_arviz(
    run: MCMC | Any,
    *,
    log_likelihood: bool = False,
    prior: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attributes: Mapping[str, Any] | None = None,
    sample_dims: Sequence[str] | None = None,
    name: str = "x",
    group: str = "posterior",
) -> Any:
    """Converts a finished run, or plain draws.

    Args:
        run: a run of `numpyro.infer.MCMC` with any kernel, a particle sampler that has run, or draws of a prior or a
            solver: an array, or a dictionary of arrays by site.
        log_likelihood: whether to evaluate the likelihood at every draw, which `az.loo` needs.
        prior: draws of the prior and its predictions, (draws, ...), as of `numpyro.infer.Predictive`. Sites that the
            posterior has too are the group `prior`, others `prior_predictive`.
        posterior_predictive: predictions, (chains, draws, ...) or, for a run of `MCMC`, (chains * draws, ...).
        coords: coordinates of dimensions.
        dims: names of dimensions by site, besides chain and draw; they go before those of the model.
        attributes: more of them for the first group, such as `{"sampling_time": seconds}`.
        sample_dims: of plain draws only, what their leading axes are: `("draw",)`, `("chain", "draw")` or
            `("draw", "chain")`.
        name: of the site, for draws in a single array.
        group: of plain draws only, such as "prior".

    Returns:
        An `InferenceData` or `DataTree`, with groups as in the module. The attributes of its posterior hold the name of
        the `kernel` and, for one of this library, what it `needs` from a prior, whether it is `exact` ("yes" or "no")
        and the `statement` of what for, its `density`, and the `schedule` of the priors; `num_score_evals` (of all
        draws after warm-up) and `sampling_time` (seconds) where they are known; versions of the libraries. Those of a
        particle sampler hold `log_evidence`, `log_evidence_error` and the `problems` of the run, a line each.

    Raises:
        TypeError: for something that is not a run, or plain draws without `sample_dims`.
        ValueError: for draws or predictions of another shape; with `log_likelihood`, for a model without observed data,
            a latent site without draws, or a subsampling plate.

    Example:
        >>> import jax, numpyro
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.diagnostics import to_arviz
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import ULA
        >>> def model():
        ...     numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        >>> mcmc = MCMC(ULA(model), num_warmup=5, num_samples=5, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> to_arviz(mcmc)["posterior"].attrs["exact"]
        'no'
        >>> draws = DiffusionPrior(Gaussian([0.0])).sample(jax.random.key(0), (100,))
        >>> to_arviz(draws, sample_dims=("draw",), group="prior")["prior"]["x"].shape
        (1, 100, 1)
    """
    is_plain = isinstance(run, Mapping | np.ndarray | jax.Array) and not hasattr(run, "to_netcdf")
    if is_plain:
        this = Run(_plain({**run} if isinstance(run, Mapping) else {name: run}, sample_dims), {}, {}, versions())
    elif sample_dims is not None or group != "posterior":
        raise TypeError("sample_dims and group are for plain draws; a run says itself what its axes are")
    else:
        this = read_run(run)
    groups, named = {group if is_plain else "posterior": this.draws}, dict(dims or {})
    attached = {**this.attributes, **(attributes or {})}
    coords = dict(coords or {})
    if this.statistics:
        groups["sample_stats"] = this.statistics
        by_level = {f: v.shape[-1] for f, v in this.statistics.items() if f.startswith("level_") and v.ndim == 3}
        length = next(iter(by_level.values()), 0)
        named |= {field: ["level"] for field, size in by_level.items() if size == length}
        if this.noise_levels is not None and len(this.noise_levels) == length:
            coords.setdefault("level", list(this.noise_levels))
    if this.model is not None:
        read = _read_model(this)
        named = {**read.dims, **named}
        if read.observed:
            groups["observed_data"] = read.observed
        if read.schedules:
            attached["schedule"] = "; ".join(f"{site}: {schedule}" for site, schedule in read.schedules.items())
        if log_likelihood:
            _check_likelihood(read)
            groups["log_likelihood"] = _log_likelihoods(this, list(read.observed))
    elif log_likelihood:
        raise ValueError("log_likelihood=True needs a model with data; this run has none")
    if posterior_predictive is not None:
        groups["posterior_predictive"] = _predictions(posterior_predictive, this, isinstance(run, MCMC))
    if prior is not None:
        drawn = {site: np.asarray(value)[None] for site, value in prior.items()}
        for where, inside in (("prior", True), ("prior_predictive", False)):
            part = {site: value for site, value in drawn.items() if (site in this.draws) is inside}
            groups |= {where: part} if part else {}
    data = _from_groups(groups, coords, _fitting(named, groups))
    data[next(iter(groups))].attrs.update(attached)
    return _with_annealing(data, this.annealing)


def _from_groups(groups: dict[str, Arrays], coords: dict[str, Any], dims: dict[str, list[str]]) -> Any:
    """By ArviZ's converter, old or new."""
    import arviz as az

    takes_groups = "posterior" in inspect.signature(az.from_dict).parameters  # ArviZ 0.23; 1.x takes one dictionary
    return (
        az.from_dict(**groups, coords=coords, dims=dims)  # type: ignore[arg-type]
        if takes_groups
        else az.from_dict(groups, coords=coords, dims=dims)
    )


def _with_annealing(data: Any, annealing: Arrays) -> Any:
    """Adds the group of what happened on the way, which has neither chains nor draws."""
    if not annealing:
        return data
    import xarray as xr

    def dims(name: str, value: np.ndarray) -> tuple[str, ...]:
        return ("level", *(f"{name}_dim_{i}" for i in range(value.ndim - 1)))

    group = xr.Dataset({name: (dims(name, value), value) for name, value in annealing.items()})
    if hasattr(data, "add_groups"):
        data.add_groups({"annealing": group})
    else:
        data["annealing"] = xr.DataTree(group)
    return data


def _plain(draws: dict[str, Any], sample_dims: Sequence[str] | None) -> Arrays:
    """Plain draws with chains first, then draws."""
    allowed = [("draw",), ("chain", "draw"), ("draw", "chain")]
    if sample_dims is None or tuple(sample_dims) not in allowed:
        raise TypeError(
            f"sample_dims must say what the leading axes of plain draws are, one of {allowed}; got {sample_dims}"
        )
    found = {}
    for site, value in draws.items():
        value = np.asarray(value)
        if value.ndim < len(sample_dims):
            raise ValueError(f"draws of {site!r} must have the leading axes {tuple(sample_dims)}; got {value.shape}")
        found[site] = (
            value[None] if len(sample_dims) == 1 else value if sample_dims[0] == "chain" else value.swapaxes(0, 1)
        )
    shapes = {value.shape[:2] for value in found.values()}
    if len(shapes) != 1:
        raise ValueError(f"draws must have the same number of chains and draws at every site; got {sorted(shapes)}")
    return found


def _predictions(given: Mapping[str, Any], run: Run, is_mcmc: bool) -> Arrays:
    """Predictions in the order of the posterior's draws."""
    shape = next(iter(run.draws.values())).shape[:2]
    found = {}
    for site, value in given.items():
        value = np.asarray(value)
        if is_mcmc and value.shape[:1] == (shape[0] * shape[1],):
            value = value.reshape(*shape, *value.shape[1:])
        if value.shape[:2] != shape:
            advice = (
                f"or ({shape[0] * shape[1]}, ...)"
                if is_mcmc
                else "and in the order of get_samples(group_by_chain=True): take Predictive(..., batch_ndims=2)"
            )
            raise ValueError(f"posterior_predictive of {site!r} must be {shape} {advice}; got {value.shape}")
        found[site] = value
    return found


def _fitting(dims: Mapping[str, Sequence[str]], groups: Mapping[str, Arrays]) -> dict[str, list[str]]:
    """Names of dimensions that no array is too small for, as of a site that a plate does not enlarge."""
    smallest: dict[str, int] = {}
    for group, arrays in groups.items():
        if group == "log_likelihood":  # events have one log-likelihood: ArviZ leaves their names out
            continue
        for site, value in arrays.items():
            smallest[site] = min(smallest.get(site, 99), value.ndim - (0 if group == "observed_data" else 2))
    return {site: list(names) for site, names in dims.items() if len(names) <= smallest.get(site, 99)}


def _sites_at(run: Run, draw: Mapping[str, Any]) -> dict[str, Any]:
    """The sites of the model at a draw."""
    args, kwargs = run.arguments
    anywhere = substitute(seed(run.model, jax.random.key(0)), substitute_fn=init_to_feasible())
    return trace(_at_draw(anywhere, data=dict(draw))).get_trace(*args, **kwargs)


def _read_model(run: Run) -> _Model:
    """The model at the first draw, traced once; only what it computes of its data is compiled."""
    found: dict[str, Any] = {}
    first = {site: value[0, 0] for site, value in run.draws.items()}

    def read(draw: Arrays) -> dict[str, jax.Array]:
        sites = _sites_at(run, draw)
        samples = {site: s for site, s in sites.items() if s["type"] == "sample"}
        data = {
            site: s["value"]
            for site, s in samples.items()
            if s["is_observed"] and site not in draw and np.size(s["value"])
        }
        schedules = {site: _schedule(s["fn"]) for site, s in samples.items() if not s["is_observed"]}
        found.update(
            constant={site: np.asarray(v) for site, v in data.items() if not isinstance(v, jax.core.Tracer)},
            order=list(data),
            dims={site: _dims(s) for site, s in sites.items() if s["type"] in ("sample", "deterministic")},
            not_drawn=[site for site, s in samples.items() if not s["is_observed"] and site not in draw],
            subsampled=[
                site
                for site, s in sites.items()
                if s["type"] == "plate" and (s["args"][1] or s["args"][0]) < s["args"][0]
            ],
            schedules={site: schedule for site, schedule in schedules.items() if schedule is not None},
        )
        return {site: value for site, value in data.items() if isinstance(value, jax.core.Tracer)}

    shapes = jax.eval_shape(read, first)
    computed = {**found["constant"], **(jax.device_get(jax.jit(read)(first)) if shapes else {})}
    dims = {site: names for site, names in found["dims"].items() if names}
    for site in run.draws:  # noise, of which the model as written knows nothing
        behind = site.removesuffix("_noise")
        if site not in found["dims"] and behind in dims and run.draws[site].shape == run.draws[behind].shape:
            dims[site] = dims[behind]
    return _Model(
        {site: np.asarray(computed[site]) for site in found["order"]},
        dims,
        found["not_drawn"],
        found["subsampled"],
        found["schedules"],
    )


def _dims(site: Mapping[str, Any]) -> list[str]:
    """The names of its plates and of its event."""
    plates = [frame.name for frame in sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)]
    return [*plates, *site.get("infer", {}).get("event_dims", [])]


def _schedule(fn: Any) -> str | None:
    """Of a diffusion prior, inside of plates, masks and the like."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    schedule = getattr(getattr(fn, "denoisers", None), "schedule", None)
    return None if schedule is None else " ".join(repr(schedule).split())[:200]


def _check_likelihood(read: _Model) -> None:
    if not read.observed:
        raise ValueError("log_likelihood=True needs an observed site; the model has none, and factors are no data")
    if read.not_drawn:
        raise ValueError(f"log_likelihood=True needs draws of every latent site; {read.not_drawn} have none")
    if read.subsampled:
        raise ValueError(f"log_likelihood=True needs all of the data; plates {read.subsampled} show a part of it")


def _log_likelihoods(run: Run, names: list[str]) -> Arrays:
    """Of all draws at all points of the data, a block of draws at a time."""

    def one(draw: Arrays) -> dict[str, jax.Array]:
        sites = _sites_at(run, draw)
        return {site: sites[site]["fn"].log_prob(sites[site]["value"]) for site in names}

    flat = {site: value.reshape(-1, *value.shape[2:]) for site, value in run.draws.items()}
    chains, draws = next(iter(run.draws.values())).shape[:2]
    shapes = jax.eval_shape(one, {site: value[0] for site, value in flat.items()})
    found = {site: np.empty((chains * draws, *s.shape), s.dtype) for site, s in shapes.items()}
    each = max(sum(s.size for s in shapes.values()), 1)
    block = min(max(_BLOCK // each, 1), chains * draws)
    with _precision.highest():
        evaluate = jax.jit(jax.vmap(one))
        for start in range(0, chains * draws, block):
            start = min(
                start, chains * draws - block
            )  # the last block has draws of the one before: one program for all
            values = evaluate({site: value[start : start + block] for site, value in flat.items()})
            for site, value in values.items():
                found[site][start : start + block] = value
    return {site: value.reshape(chains, draws, *value.shape[1:]) for site, value in found.items()}
