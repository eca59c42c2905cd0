r"""Any NumPyro kernel in noise space, reporting the model as the user wrote it.

Every diffusion site $x$ is replaced by its noise, $x = F(z)$ with $z \sim N(0, I)$ (`reparam.NoiseReparam`), and the
inner kernel, NUTS by default, samples $z$ jointly with all other latent sites from

$$\pi(z, \theta) \propto N(z; 0, I)\; p(\theta)\, p(y \mid F(z), \theta).$$

Exact for the prior that the deterministic solver pushes forward, whatever its number of steps. The best choice where
the likelihood is differentiable in $x$; modes that are far apart in $z$ are as hard as they are for the inner kernel.

The state holds the original sites: the flow is solved once per draw, in the step, and not again by post-processing,
`Predictive`, `log_likelihood` or ArviZ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.handlers import reparam
from numpyro.infer import NUTS
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.sites import Model, check_walkable, is_diffusion_site, prior_sites, undropped
from numpyro_diffusion.reparam import NoiseReparam


class NoiseSpaceState(NamedTuple):
    """State of `NoiseSpace`; statistics that the inner kernel does not have are NaN.

    Args:
        z: constrained values of the original latent and deterministic sites.
        inner_state: state of the inner kernel.
        potential_energy: negative joint log-density of noise and other sites, unconstrained.
        accept_prob: acceptance statistic of the last step.
        step_size: the inner kernel's step size.
        num_score_evals: denoiser evaluations of the last step, per point; a gradient counts as one solve.
        diverging: whether the inner kernel's trajectory diverged.
        rng_key: random key.
    """

    z: dict[str, jax.Array]
    inner_state: Any
    potential_energy: jax.Array
    accept_prob: jax.Array
    step_size: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


def _to_noise(site: dict[str, Any]) -> Callable | None:
    """Configuration of `numpyro.handlers.reparam`: every latent diffusion site, its prior dropped or not."""
    if not is_diffusion_site(site):
        return None
    return lambda name, fn, obs: NoiseReparam()(name, undropped(site), obs)


class NoiseSpace(DiffusionKernel):
    """Runs a NumPyro kernel on the noise of all diffusion sites and on all other latent sites.

    Args:
        model: NumPyro model with at least one latent `DiffusionPrior` site.
        inner: makes the inner kernel from a model: a kernel class such as `numpyro.infer.NUTS` or a
            `functools.partial` of one.
        **inner_options: passed on to `inner`.

    Raises:
        TypeError: if `inner` does not make an `MCMCKernel`.
        ValueError: when run, for a model without a latent `DiffusionPrior` site.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import NoiseSpace
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(NoiseSpace(model), num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> sorted(mcmc.get_samples())
        ['x']
    """

    statistics = ("accept_prob", "step_size", "num_score_evals")
    status = Status("flow", True, "exact for the prior that the deterministic solver pushes forward, in its steps")
    binds_on_start = True

    def __init__(self, model: Model, inner: Callable[..., MCMCKernel] = NUTS, **inner_options: Any) -> None:
        super().__init__(model)
        self._make_inner = inner
        self._inner_options = inner_options
        self._inner = self._build_inner()

    def _build_inner(self) -> MCMCKernel:
        inner = self._make_inner(reparam(conditioned(self._model), config=_to_noise), **self._inner_options)
        if not isinstance(inner, MCMCKernel):
            raise TypeError(f"inner must make an MCMCKernel from a model; got {type(inner).__name__}")
        return inner

    @property
    def inner(self) -> MCMCKernel:
        """The inner kernel, on the model in noise space."""
        return self._inner

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        check_walkable("NoiseSpace", prior_sites(self._model, args, kwargs))

    def _start(self, key: jax.Array, init_params: dict | None, args: tuple, kwargs: dict) -> NoiseSpaceState:
        if GIBBS_SITES_KWARG in kwargs:
            init_params = None  # a composite kernel gives points; the noise behind them is not known
        inner_state = self._inner.init(key, self._num_warmup, init_params, model_args=args, model_kwargs=kwargs)
        return self._report(inner_state, args, kwargs)

    def _step(self, state: NoiseSpaceState, args: tuple, kwargs: dict) -> NoiseSpaceState:
        inner_state = state.inner_state._replace(rng_key=state.rng_key)
        return self._report(self._inner.sample(inner_state, args, kwargs), args, kwargs)

    def _report(self, inner_state: Any, args: tuple, kwargs: dict) -> NoiseSpaceState:
        """Solves the flow for the current noise and gathers the statistics."""
        sites = prior_sites(self._model, args, kwargs)
        values = self._inner.postprocess_fn(args, kwargs)(getattr(inner_state, self._inner.sample_field))
        solves = getattr(inner_state, "num_steps", 1) + 1
        evaluations = sum(site.prior.flow_solver.evaluations() for site in sites.values())
        return NoiseSpaceState(
            z={
                name: value
                for name, value in values.items()
                if name.removesuffix("_noise") not in sites or name in sites
            },
            inner_state=inner_state,
            potential_energy=jnp.asarray(getattr(inner_state, "potential_energy", jnp.nan)),
            accept_prob=jnp.asarray(getattr(inner_state, "accept_prob", jnp.nan)),
            step_size=jnp.asarray(getattr(getattr(inner_state, "adapt_state", None), "step_size", jnp.nan)),
            num_score_evals=jnp.asarray(solves * evaluations, jnp.int32),
            diverging=jnp.asarray(getattr(inner_state, "diverging", False)),
            rng_key=inner_state.rng_key,
        )

    def refresh(self, state: NoiseSpaceState, model_args: tuple, model_kwargs: dict | None) -> NoiseSpaceState:
        """Refreshes the inner kernel after a composite kernel has moved what it is conditioned on."""
        kwargs = {} if model_kwargs is None else model_kwargs
        inner_state = self._inner.refresh(state.inner_state, model_args, kwargs)
        return state._replace(inner_state=inner_state)

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "NoiseSpace":
        """A copy of this kernel on a wrapped model, for composite kernels."""
        kernel = super().wrap_model(wrapper)
        kernel._inner = kernel._build_inner()
        return kernel

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """The identity: the state holds constrained values."""
        return _identity

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """The identity: the state holds constrained values."""
        return _identity

    def get_diagnostics_str(self, state: NoiseSpaceState) -> str:
        """The inner kernel's."""
        return self._inner.get_diagnostics_str(state.inner_state)


def _identity(z: dict) -> dict:
    return z
