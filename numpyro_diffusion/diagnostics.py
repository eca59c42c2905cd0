r"""Draws and their statistics for ArviZ, with a word on what they are exact for.

ArviZ's `from_numpyro` reads sites, extra fields and dimensions from an `MCMC` object as they are. What it cannot know
is what stands behind a kernel: whether it tested its moves, and with what. `to_arviz` writes that, the kernel's
`status`, into the attributes of the posterior group, so that it stays with the draws when they are saved.

Nothing is computed here: no flow is solved and no likelihood evaluated, unless it is asked for. Works on ArviZ 0.23
(`InferenceData`) and 1.x (`DataTree`).
"""

from typing import Any

import numpyro
from numpyro.infer import MCMC, initialization


def to_arviz(mcmc: MCMC, *, log_likelihood: bool = False, **options: Any) -> Any:
    """Converts a finished run.

    Args:
        mcmc: a run of `numpyro.infer.MCMC` with any kernel.
        log_likelihood: whether to evaluate the likelihood at every draw, which `az.loo` needs.
        **options: passed on to `arviz.from_numpyro`, such as `coords` and `dims`.

    Returns:
        An `InferenceData` or `DataTree`. The attributes of its posterior hold the name of the `kernel` and, for one of
        this library, what it `provides`, whether it is `exact` ("yes" or "no") and the `statement` that says for what.

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

    # ArviZ 1.x loads NumPyro lazily: imported first, it leaves a module unbound that it then asks for (arviz-base 1.3)
    numpyro.infer.initialization = initialization
    data = az.from_numpyro(mcmc, log_likelihood=log_likelihood, **options)
    attributes = {"kernel": type(mcmc.sampler).__name__}
    status = getattr(mcmc.sampler, "status", None)
    if status is not None:
        attributes |= status._asdict() | {"exact": "yes" if status.exact else "no"}
    data["posterior"].attrs.update(attributes)
    return data
