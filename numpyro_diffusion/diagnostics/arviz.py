r"""Draws and their statistics for ArviZ, with a statement of what they are exact for.

ArviZ's `from_numpyro` reads sites, extra fields and dimensions from an `MCMC` object as they are. It cannot know
whether a kernel tested its moves, and with what. `to_arviz` writes that, the kernel's `status`, into the attributes of
the posterior group, so that it stays with the draws when they are saved.

Particle samplers (`TemperedSMC`, `TwistedSMC`) are not `MCMC` objects. Their islands take the place of chains, each
with its own draws, so that R-hat between them says whether they agree; the evidence goes into the attributes.

Nothing is computed here: no flow is solved, and a likelihood is evaluated only on request. Works on ArviZ 0.23
(`InferenceData`) and 1.x (`DataTree`).
"""

import inspect
from typing import Any

import numpy as np
import numpyro
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, initialization


def to_arviz(mcmc: MCMC | Any, *, log_likelihood: bool = False, **options: Any) -> Any:
    """Converts a finished run.

    Args:
        mcmc: a run of `numpyro.infer.MCMC` with any kernel, or a particle sampler that has run.
        log_likelihood: whether to evaluate the likelihood at every draw, which `az.loo` needs.
        **options: passed on to `arviz.from_numpyro`, or `arviz.from_dict` for a particle sampler, such as `coords` and
            `dims`.

    Returns:
        An `InferenceData` or `DataTree`. The attributes of its posterior hold the name of the `kernel` and, for one of
        this library, what it `needs` from a prior, whether it is `exact` ("yes" or "no") and the `statement` of what
        for.
        Those of a particle sampler hold its name as the kernel, `log_evidence`, `log_evidence_error` and the
        `problems` of the run.

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
    """
    import arviz as az

    if hasattr(mcmc, "log_evidence"):
        return _from_particles(az, mcmc, log_likelihood, options)
    # ArviZ 1.x loads NumPyro lazily: imported first, it leaves a module unbound that it then asks for (arviz-base 1.3)
    numpyro.infer.initialization = initialization
    data = az.from_numpyro(mcmc, log_likelihood=log_likelihood, **options)
    data["posterior"].attrs.update(_statement(mcmc.sampler))
    return data


def _statement(sampler: Any) -> dict[str, str]:
    """The name of a kernel or sampler and, where it says so, what it is exact for."""
    status = getattr(sampler, "status", None)
    said = {} if status is None else status._asdict() | {"exact": "yes" if status.exact else "no"}
    return {"kernel": type(sampler).__name__, **said}


def _from_particles(az: Any, sampler: Any, log_likelihood: bool, options: dict[str, Any]) -> Any:
    """Islands as chains, with the data and, if asked, their log-likelihoods."""
    posterior = sampler.get_samples(group_by_chain=True)
    args, kwargs = sampler.arguments
    one = {name: value[0, 0] for name, value in posterior.items()}
    sites = trace(substitute(seed(sampler.model, 0), data=one)).get_trace(*args, **kwargs)
    observed = {
        name: np.asarray(site["value"])
        for name, site in sites.items()
        if site["type"] == "sample" and site["is_observed"] and name not in posterior and np.size(site["value"])
    }
    groups = {"posterior": posterior}
    if observed:
        groups["observed_data"] = observed
    if log_likelihood:
        shape = next(iter(posterior.values())).shape[:2]
        draws = {name: value.reshape(-1, *value.shape[2:]) for name, value in posterior.items()}
        values = numpyro.infer.log_likelihood(sampler.model, draws, *args, **kwargs)
        groups["log_likelihood"] = {name: np.asarray(v).reshape(*shape, *v.shape[1:]) for name, v in values.items()}
    groups = {group: {name: np.asarray(v) for name, v in values.items()} for group, values in groups.items()}
    takes_groups = "posterior" in inspect.signature(az.from_dict).parameters  # ArviZ 0.23; 1.x takes one dictionary
    data = az.from_dict(**groups, **options) if takes_groups else az.from_dict(groups, **options)
    evidence = sampler.log_evidence
    data["posterior"].attrs.update(
        **_statement(sampler),
        log_evidence=float(evidence.value),
        log_evidence_error=float(evidence.standard_error),
        problems="; ".join(sampler.problems),
    )
    return data
