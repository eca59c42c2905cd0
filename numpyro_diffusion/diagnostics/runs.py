r"""A run, of whatever kind, as draws and statistics by ArviZ's names: what `to_arviz` writes and `verdict` judges.

Runs of `MCMC` with any kernel, particle samplers, data of ArviZ (`InferenceData` of 0.23, `DataTree` of 1.x, also of
other libraries) and plain arrays all become a `Run`. Nothing is computed: no model runs here, see `arviz` for that.

Statistics have the names that ArviZ knows: `accept_prob` is `acceptance_rate`, `num_steps` is `n_steps`, and
`potential_energy` is `lp` with the other sign. A field of a state inside the state, such as `adapt_state.step_size`,
has its last name, unless two fields have the same. What a kernel says of all of its noise levels, or temperatures,
begins with `level_` and has the levels as its last axis.

By noise level (`by_level`) two numbers matter: the share of the moves that is accepted, and how far they go,

$$\frac{1}{2 D} \sum_i \frac{(x_{n, i} - x_{n - 1, i})^2}{\mathrm{var}\, x_i},$$

which is 1 for independent draws and 0 for rejected moves. A level with many accepted moves that go nowhere is too low,
one with none too high.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
from numpyro.infer import MCMC

from numpyro_diffusion._version import __version__

Arrays = dict[str, np.ndarray]
_LEVELS = 4
"""Groups into which the noise levels of a run are put, with as many draws each."""
_NAMES = {"accept_prob": "acceptance_rate", "num_steps": "n_steps", "potential_energy": "lp"}
_SATURATED = "reached_max_tree_depth"
_OTHER_NAMES = {"reached_max_treedepth": _SATURATED, "accept_stat": "acceptance_rate"}
"""As other libraries call what we look at."""


class Run(NamedTuple):
    """What a run has to say."""

    draws: Arrays  # by site, (chains, draws, ...)
    statistics: Arrays  # by ArviZ's name, (chains, draws) or, if it begins with "level_", (chains, draws, levels)
    annealing: Arrays  # of a particle sampler, by name, (temperatures or noise levels, ...)
    attributes: dict[str, Any]  # strings and numbers
    noise_levels: tuple[float, ...] | None = None  # those of statistics by level, where the kernel says them
    model: Any = None  # the model as the user wrote it, None if there is none
    arguments: tuple[tuple, dict] = ((), {})

    @property
    def problems(self) -> tuple[str, ...]:
        """What the sampler has found itself."""
        return tuple(filter(None, self.attributes.get("problems", "").split("\n")))


def read_run(run: Any) -> Run:
    """Reads a run.

    Args:
        run: of `MCMC`, a particle sampler that has run, data of ArviZ with a posterior, or arrays (chains, draws, ...)
            by site.

    Returns:
        A `Run`.

    Raises:
        TypeError: for anything else.
        RuntimeError: for an `MCMC` that has not run.
    """
    if isinstance(run, MCMC):
        return _of_mcmc(run)
    if hasattr(run, "get_samples"):
        return _of_particles(run)
    if hasattr(run, "to_netcdf") and "posterior" in run:
        return _of_arviz(run)
    if isinstance(run, dict) and run:
        return Run({name: np.asarray(value) for name, value in run.items()}, {}, {}, versions())
    raise TypeError(
        "run must be an MCMC, a particle sampler, data of ArviZ with a posterior group, or a dictionary of arrays "
        f"(chains, draws, ...); got {type(run).__name__}"
    )


def versions() -> dict[str, str]:
    """Of the libraries behind a result, by the names that ArviZ has for them."""
    return {
        "inference_library": "numpyro",
        "inference_library_version": numpyro.__version__,
        "jax_version": jax.__version__,
        "numpyro_diffusion_version": __version__,
    }


def _of_mcmc(mcmc: MCMC) -> Run:
    if mcmc.last_state is None:
        raise RuntimeError("this MCMC has no draws; its run() must come first")
    kernel, samples = mcmc.sampler, jax.device_get(mcmc.get_samples(group_by_chain=True))
    if hasattr(samples, "_asdict"):
        samples = samples._asdict()
    if not isinstance(samples, dict):  # of a potential function
        samples = {f"Param:{i}": leaf for i, leaf in enumerate(jax.tree.leaves(samples))}
    statistics = _statistics(mcmc)
    attributes = {**_statement(kernel), "thinning": int(mcmc.thinning), "num_warmup": int(mcmc.num_warmup)}
    if mcmc.thinning == 1 and "num_score_evals" in statistics:
        attributes["num_score_evals"] = int(statistics["num_score_evals"].sum(dtype=np.int64))
    levels = getattr(kernel, "noise_levels", None)
    return Run(
        {name: np.asarray(value) for name, value in samples.items()},
        statistics,
        {},
        {**attributes, **versions()},
        None if levels is None else tuple(levels),
        getattr(kernel, "model", None),
        (mcmc._args, mcmc._kwargs),
    )


def _statement(sampler: Any) -> dict[str, Any]:
    """The name of a kernel or sampler and, where it says so, what it is exact for and what its density is."""
    said: dict[str, Any] = {"kernel": type(sampler).__name__}
    status, density = getattr(sampler, "status", None), getattr(sampler, "density", None)
    if status is not None:
        said |= status._asdict() | {"exact": "yes" if status.exact else "no"}
    if density is not None:
        said["density"] = str(density)
    target = getattr(getattr(sampler, "inner", sampler), "_target_accept_prob", None)
    if isinstance(target, float):
        said["target_accept_prob"] = target
    return said


def _statistics(mcmc: MCMC) -> Arrays:
    """The extra fields that were collected, by ArviZ's names."""
    fields = mcmc.get_extra_fields(group_by_chain=True)
    fields = {name: np.asarray(value) for name, value in fields.items() if hasattr(value, "shape")}
    last = [name.split(".")[-1] for name in fields]
    found: Arrays = {}
    for field, value in fields.items():
        prefix, _, short = field.rpartition(".")
        name = _NAMES.get(short, short)
        if prefix and last.count(short) > 1:
            name = f"{prefix}.{name}"
        if short == "accept_prob" and value.ndim == 3:  # a ladder of temperatures, of which the last is the posterior
            found[f"level_{name}"], value = value, value[..., -1]
        found[name.replace("accept_prob", "acceptance_rate")] = -value if short == "potential_energy" else value
    depth = _max_tree_depth(mcmc.sampler)
    if "n_steps" in found and depth is not None:
        found["tree_depth"] = np.log2(np.maximum(found["n_steps"], 1)).astype(int) + 1
        found[_SATURATED] = found["n_steps"] >= 2**depth - 1
    return found


def _max_tree_depth(kernel: Any) -> int | None:
    """Of NUTS, or of a kernel that holds it."""
    inner = getattr(kernel, "inner", kernel)
    depth = getattr(inner, "_max_tree_depth", None) if getattr(inner, "_algo", "NUTS") == "NUTS" else None
    return depth[1] if isinstance(depth, tuple) else depth


def _of_particles(sampler: Any) -> Run:
    """Islands as chains, or the chains of a sampler that is no kernel."""
    draws = {name: np.asarray(value) for name, value in sampler.get_samples(group_by_chain=True).items()}
    attributes = _statement(sampler)
    evidence = getattr(sampler, "log_evidence", None)
    if evidence is not None:
        attributes |= {"log_evidence": float(evidence.value), "log_evidence_error": float(evidence.standard_error)}
        attributes["log_evidence_islands"] = np.asarray(evidence.islands, float)
    for name in ("num_score_evals", "num_gradients", "num_target_evals"):
        if hasattr(sampler, name):
            attributes[name] = int(getattr(sampler, name))
    rounds = getattr(sampler, "rounds", None)
    if rounds:
        attributes |= {"num_rounds": len(rounds), "sampling_time": float(sum(round.seconds for round in rounds))}
        attributes["nested_r_hat"] = float(rounds[-1].nested_r_hat)
    if hasattr(sampler, "cure"):
        attributes["cure"] = sampler.cure
    attributes["problems"] = "\n".join(problem.replace("\n", " ") for problem in sampler.problems)
    model = getattr(sampler, "model", None)
    arguments: tuple[tuple, dict] = getattr(sampler, "arguments", ((), {}))
    fields = sampler.get_extra_fields(group_by_chain=True) if hasattr(sampler, "get_extra_fields") else {}
    statistics = {_NAMES.get(name, name).replace("accept_prob", "acceptance_rate"): v for name, v in fields.items()}
    return Run(draws, statistics, _annealing(sampler), {**attributes, **versions()}, None, model, arguments)


def _annealing(sampler: Any) -> Arrays:
    """What happened at each temperature or noise level of a particle sampler."""
    levels = getattr(sampler, "levels", None)
    if levels is None:
        steps = getattr(sampler, "temperatures", [])
        if not steps:
            return {}
        levels = type(steps[0])(*(np.stack([np.asarray(v) for v in values]) for values in zip(*steps, strict=True)))
    return {_NAMES.get(name, name): np.asarray(value) for name, value in levels._asdict().items()}


def _of_arviz(data: Any) -> Run:
    def group(name: str) -> Arrays:
        if name not in data:
            return {}
        found = {}
        for variable, values in data[name].data_vars.items():
            leading = [dim for dim in ("chain", "draw") if dim in values.dims]
            found[str(variable)] = np.asarray(values.transpose(*leading, ...))
        return found

    draws = group("posterior")
    missing = [name for name, v in data["posterior"].data_vars.items() if not {"chain", "draw"} <= set(v.dims)]
    if missing:
        raise ValueError(f'the posterior must have the dimensions "chain" and "draw"; {missing} have not')
    statistics = {_OTHER_NAMES.get(name, name): value for name, value in group("sample_stats").items()}
    levels = data["sample_stats"].coords.get("level") if "sample_stats" in data else None
    known = levels is not None and np.issubdtype(levels.dtype, np.floating)
    return Run(
        draws,
        statistics,
        group("annealing"),
        dict(data["posterior"].attrs),
        tuple(np.asarray(levels).tolist()) if known else None,
    )


def has_acceptance(run: Run) -> bool:
    """Whether the acceptance of moves was collected."""
    rate = run.statistics.get("acceptance_rate")
    return rate is not None and bool(np.isfinite(rate).any())


def by_level(run: Run | MCMC | Any) -> Arrays:
    """Statistics by noise level or temperature.

    Args:
        run: whatever `read_run` takes.

    Returns:
        Arrays of one length, empty without levels. For a kernel that draws the noise level of each move: `noise_level`
        (geometric mean), `lowest`, `highest`, `share` of the draws, `acceptance_rate` and `jump` (see the module; NaN
        if draws were thinned) in groups of levels with as many draws each. For one that has all levels in a draw, means
        of what it says of each. For a particle sampler, what happened at each.
    """
    run = run if isinstance(run, Run) else read_run(run)
    if run.annealing:
        length = len(next(iter(run.annealing.values())))
        return {name: value for name, value in run.annealing.items() if value.shape == (length,)}
    whole = {n.removeprefix("level_"): v for n, v in run.statistics.items() if n.startswith("level_") and v.ndim == 3}
    if whole:
        counts = [(~np.isnan(v)).sum((0, 1)) for v in whole.values()]
        sums = [np.nansum(v, (0, 1)) for v in whole.values()]
        means = [np.where(n > 0, s / np.maximum(n, 1), np.nan) for n, s in zip(counts, sums, strict=True)]
        found = {n.replace("accept_prob", "acceptance_rate"): m for n, m in zip(whole, means, strict=True)}
        known = run.noise_levels is not None and len(run.noise_levels) == len(means[0])
        return ({"noise_level": np.asarray(run.noise_levels)} if known else {}) | found
    level = run.statistics.get("noise_level")
    if level is None or level.ndim != 2 or not has_acceptance(run) or not (level > 0).any():
        return {}
    return _in_groups(level, run)


def _in_groups(level: np.ndarray, run: Run) -> Arrays:
    """Statistics in groups of noise levels."""
    edges = np.unique(np.quantile(level, np.linspace(0.0, 1.0, _LEVELS + 1)))
    if len(edges) < 2:
        return {}
    group = np.clip(np.searchsorted(edges, level, side="right") - 1, 0, len(edges) - 2)
    jump, rate = _jumps(run, level.shape), run.statistics["acceptance_rate"]
    inside = [group == k for k in range(len(edges) - 1)]
    inside = [mask for mask in inside if mask.any()]
    return {
        "noise_level": np.array([np.exp(np.mean(np.log(np.maximum(level[mask], 1e-30)))) for mask in inside]),
        "lowest": np.array([level[mask].min() for mask in inside]),
        "highest": np.array([level[mask].max() for mask in inside]),
        "share": np.array([mask.mean() for mask in inside]),
        "acceptance_rate": np.array([mean_of(rate[mask]) for mask in inside]),
        "jump": np.array([mean_of(jump[mask]) for mask in inside]),
    }


def mean_of(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def _jumps(run: Run, shape: tuple[int, int]) -> np.ndarray:
    """How far each draw is from the one before, (chains, draws); NaN for the first, and where draws were thinned."""
    jump, count = np.zeros(shape), 0
    if run.attributes.get("thinning") != 1:
        return np.full(shape, np.nan)
    for value in run.draws.values():
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            continue
        flat = value.reshape(*shape, -1).astype(float)
        variance = flat.var((0, 1))
        moving = variance > 0
        jump[:, 1:] += np.sum(np.diff(flat, axis=1)[..., moving] ** 2 / (2.0 * variance[moving]), axis=-1)
        count += int(moving.sum())
    jump[:, 0] = np.nan
    return jump / max(count, 1)
