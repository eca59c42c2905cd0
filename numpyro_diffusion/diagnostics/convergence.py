r"""Whether a run has converged, what is worst in it, and the one thing to change.

A chain of a valid kernel says nothing false, but it may not have said anything yet. `verdict` reads a finished run,
of `MCMC` with any kernel or of a particle sampler, and answers yes or no: every R-hat below 1.01, every effective
sample size above 400, no divergence, and nothing that the sampler itself has found. If no, it names the site and entry
that is worst, the kind of failure, and a cure.

R-hat and effective sample size are ArviZ's, of ranks. They can be fooled by what all chains have in common.

References:
    Vehtari, Gelman, Simpson, Carpenter, Bürkner, Rank-normalization, folding, and localization: an improved R-hat,
    2021, https://arxiv.org/abs/1903.08008.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpyro.infer import MCMC

LARGEST_RHAT = 1.01
SMALLEST_ESS = 400.0
_DISAGREEMENT = 0.3
"""Distance of a chain's mean from the middle one, in standard deviations, at which the chain is named."""
_LONGER = "Run longer, or take PopulationHMC(model)"
_SATURATED = 0.05
_NEVER = 0.01
_FEW_TRIPS = 100


@dataclass(frozen=True)
class Verdict:
    """What `verdict` says of a run; printed, it is a few lines of text.

    Args:
        converged: whether nothing speaks against it.
        worst: the site and entry with the largest R-hat, such as "x[3, 4]".
        r_hat: its R-hat.
        ess: the smallest bulk effective sample size of all sites.
        problems: what is wrong, each with its cure; empty if `converged`.
    """

    converged: bool
    worst: str
    r_hat: float
    ess: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        head = "converged" if self.converged else "NOT CONVERGED"
        lines = [f"{head}: largest R-hat {self.r_hat:.3f} ({self.worst}), smallest bulk ESS {self.ess:.0f}"]
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])


def verdict(run: MCMC | Any) -> Verdict:
    """Says whether a run has converged.

    Args:
        run: a run of `numpyro.infer.MCMC` with any kernel, or a particle sampler that has run. Extra fields that `MCMC`
            has collected are read: `diverging` always, `num_steps` for saturated trees (`NoiseSpace` has it always, of
            NUTS ask for it), `noise_level` with `accept_prob` for noise levels at which nothing is accepted,
            `round_trips` of `ParallelTempering`.

    Returns:
        A `Verdict`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_diffusion.diagnostics import verdict
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(model), num_warmup=5, num_samples=20, num_chains=4,
        ...             chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> verdict(mcmc).converged
        False
    """
    draws = {name: np.asarray(value) for name, value in run.get_samples(group_by_chain=True).items()}
    found = statistics(draws, getattr(run, "cure", _LONGER))
    if isinstance(run, MCMC):
        problems = [*found.problems, *_of_fields(run)]
    else:
        problems = list(dict.fromkeys((*run.problems, *found.problems)))
    return Verdict(not problems, found.worst, found.r_hat, found.ess, tuple(problems))


def statistics(draws: dict[str, np.ndarray], cure: str) -> Verdict:
    """The verdict on draws alone: R-hat, effective sample size, and chains that disagree.

    Args:
        draws: values by site, (chains, draws, ...).
        cure: what to do about chains that are too short.
    """
    import arviz as az

    draws = {name: value for name, value in draws.items() if np.issubdtype(value.dtype, np.number) and value.size}
    dataset = az.convert_to_dataset(draws)
    rhats = {name: np.asarray(value) for name, value in az.rhat(dataset).items()}
    sizes = {name: np.asarray(value) for name, value in az.ess(dataset).items()}
    varies = {name: value.std((0, 1)) > 0 for name, value in draws.items()}
    r_hat, ess, worst, problems = 1.0, np.inf, "", []
    for name, moving in varies.items():
        if not np.all(np.isfinite(draws[name])):
            problems.append(f"draws of {name!r} are not finite")
            continue
        if not np.any(moving):
            continue
        ess = min(ess, float(np.min(np.where(moving, sizes[name], np.inf))))
        here = np.where(moving & np.isfinite(rhats[name]), rhats[name], np.where(moving, np.inf, 1.0))
        if not worst or here.max() > r_hat:
            index = np.unravel_index(here.argmax(), here.shape)
            r_hat, worst = float(here.max()), name + (str([int(i) for i in index]) if index else "")
            values = draws[name][(slice(None), slice(None), *index)]
    if r_hat >= LARGEST_RHAT:
        problems.append(f"R-hat of {worst} is {r_hat:.3f}, above {LARGEST_RHAT}{_who(values)}. {cure}")
    if ess <= SMALLEST_ESS:
        problems.append(f"the smallest effective sample size is {ess:.0f}, of at least {SMALLEST_ESS:.0f}. {cure}")
    return Verdict(not problems, worst, r_hat, ess, tuple(problems))


def _who(values: np.ndarray) -> str:
    """Which chains are apart from the others, of values (chains, draws)."""
    if len(values) < 2:
        return ""
    means, scale = values.mean(1), np.median(values.std(1))
    middle = np.median(means)
    order = np.argsort(-np.abs(means - middle))
    apart = [i for i in order if abs(means[i] - middle) > _DISAGREEMENT * scale]
    if not apart:
        return ""
    shown = ", ".join(f"{i} ({means[i]:.3g})" for i in apart[:3])
    return f": of {len(means)} chains, {shown} are apart from the middle, {middle:.3g}"


def _of_fields(mcmc: MCMC) -> list[str]:
    """What extra fields say."""
    fields, kernel, problems = mcmc.get_extra_fields(), mcmc.sampler, []
    count = int(np.sum(np.asarray(fields.get("diverging", 0))))
    if count:
        problems.append(
            f"{count} transitions diverged. Raise target_accept_prob, or look for a funnel or a likelihood that is not "
            "finite"
        )
    trips = mcmc.get_extra_fields(group_by_chain=True).get("round_trips")
    if trips is not None and (total := int(np.sum(np.asarray(trips)[:, -1]))) < _FEW_TRIPS:
        problems.append(
            f"only {total} points have come from the prior to the posterior, of at least {_FEW_TRIPS}: modes may be "
            "missing, and weights of modes are noise. Raise num_temperatures if swap_rates are far below 1/2, run "
            "longer, or write the model with a prior that is nearer to the posterior"
        )
    inner = getattr(kernel, "inner", kernel)
    depth = getattr(inner, "_max_tree_depth", None) if getattr(inner, "_algo", "NUTS") == "NUTS" else None
    steps = next((value for name, value in fields.items() if name.split(".")[-1] == "num_steps"), None)
    if steps is not None and depth is not None:
        limit = 2 ** (depth[1] if isinstance(depth, tuple) else depth) - 1
        share = float(np.mean(np.asarray(steps) >= limit))
        if share > _SATURATED:
            problems.append(
                f"{share:.0%} of the trees are saturated at {limit} steps. Run some 64 chains of NoiseSpace(model) at "
                'once, chain_method="vectorized", which share one mass matrix, take PopulationHMC(model), or raise '
                "max_tree_depth"
            )
    if "noise_level" in fields and "accept_prob" in fields:
        level, accepted = (np.asarray(fields[name]).reshape(-1) for name in ("noise_level", "accept_prob"))
        edges = np.quantile(level, [0.0, 0.25, 0.5, 0.75, 1.0])
        if edges[-1] > edges[0]:
            for low, high in zip(edges[:-1], edges[1:], strict=True):
                inside = (level >= low) & (level <= high)
                if np.mean(accepted[inside]) < _NEVER:
                    problems.append(
                        f"moves at noise levels of {low:.2g} to {high:.2g} are never accepted. Lower the largest level"
                    )
                    break
    return problems
