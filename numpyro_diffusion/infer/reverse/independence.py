r"""Proposals that do not depend on where the chain is: drawn from a law $q$, chosen by importance weight.

With the weight $w = \pi / q$ of the current point $x_0$ and of $M$ independent draws $x_1 \dots x_M$ of $q$, draw $j$
among the $M$ with probability $w_j / \sum_{i \ge 1} w_i$ and accept it with

$$a = \min\left(1, \frac{\sum_{i \ge 1} w_i}{\sum_{i \ge 0, i \ne j} w_i}\right).$$

Exact for any $M$: given the set of $M + 1$ points, any one of them is as likely the current one as its weight says, and
this is a Metropolised Gibbs move on the index, which leaves its place more often than the plain draw by weight that is
known as iterated sampling importance resampling (i-SIR), and for $M = 1$ is Metropolis, $\min(1, w_1 / w_0)$. The $M$
weights are evaluated in one batch.

By default every site is drawn from its own prior in the model, given the sites before it: the prior cancels, no
density of it is asked for, and $w$ is the rest of the model, $p(y \mid x)$ and factors. With a `proposal`, a NumPyro
distribution on some sites, the weight is $\pi / q$ with the model's own log-density. If $w$ is bounded, the chain
converges from anywhere at a geometric rate; where $q$ has lighter tails than $\pi$ it sticks, and in many dimensions it
nearly always does: then this is a move to mix with local ones (`Mixture`).

**What is approximate.** Nothing, where the law that a distribution's `sample` draws from and its `log_prob` are one and
the same. For a `DiffusionPrior` drawn from its own site, the posterior is that of the law of its stochastic solver; one
given as a `proposal` on another site has both, which agree up to the solvers' errors.

References:
    Tjelmeland, Using all Metropolis-Hastings proposals to estimate mean values, 2004 (several independent proposals).
    Andrieu, Lee, Vihola, Uniform ergodicity of the iterated conditional SMC and geometric ergodicity of particle Gibbs
    samplers, 2018 (i-SIR), https://arxiv.org/abs/1312.6432.
    Liu, Peskun's theorem and a modified discrete-state Gibbs sampler, 1996, https://doi.org/10.1093/biomet/83.3.681.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.util import is_identically_one
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, conditioned, subsample_plate_sizes
from numpyro.infer.util import constrain_fn, log_density, unconstrain_fn
from numpyro.primitives import Messenger

from numpyro_diffusion import _checks
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.kernel.adapt import running_mean
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.sites import Model, prior_sites, traced, undropped
from numpyro_diffusion.infer.reverse.pcn import metropolised_gibbs

_MAX_STARTS = 100


class IndependenceState(NamedTuple):
    """State of `Independence`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        log_weight: its log-weight, plus infinity where the proposal never goes.
        accept_prob: acceptance probability of the last step.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        num_score_evals: denoiser evaluations of the last step for diffusion sites drawn from their priors, per point.
        diverging: whether the log-density of a candidate was NaN or plus infinity; it was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    log_weight: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class Independence(DiffusionKernel):
    r"""Metropolis with independent proposals, from the priors of the sites or from any NumPyro distribution.

    Args:
        model: NumPyro model; all latent sites continuous.
        proposal: None for the priors; or a distribution for each site named, with the shape of the site, all others
            being drawn from their priors; or one distribution for the model's only latent site.
        num_proposals: candidates per step, in one batch.

    Raises:
        TypeError: if `model` is not callable or a proposal no distribution.
        ValueError: if `num_proposals` is below 1, or a proposal has no density; when run, for a model without latent
            sites, with discrete ones or subsampling, a site drawn from its prior that is masked, scaled or cannot be
            drawn, a proposal for no site or of another shape, or 100 draws without a finite weight.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import Independence
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(Independence(model, num_proposals=16), num_warmup=10, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.2)
        True
    """

    status = Status(
        "density or reverse process", True, "leaves the model's law in place, with priors as their `sample` draws them"
    )
    takes_point = True

    def __init__(
        self,
        model: Model,
        proposal: dist.Distribution | Mapping[str, dist.Distribution] | None = None,
        *,
        num_proposals: int = 1,
    ) -> None:
        super().__init__(model)
        _checks.at_least(1, num_proposals=num_proposals)
        self._num_proposals = num_proposals
        self._only = isinstance(proposal, dist.Distribution)
        if not (proposal is None or self._only or isinstance(proposal, Mapping)):
            raise TypeError(f"proposal must be a NumPyro distribution or one for each site; got {proposal!r}")
        self._proposal = {"": proposal} if self._only else dict(proposal or {})
        for name, fn in self._proposal.items():
            if not isinstance(fn, dist.Distribution):
                raise TypeError(f"the proposal of site {name!r} must be a NumPyro distribution; got {fn!r}")
            if isinstance(fn, DiffusionPrior) and fn.density == "none":
                raise ValueError(
                    'Independence divides by the density of a proposal, and this DiffusionPrior has density="none". '
                    'Give it density="auto"; or leave it out where it is the prior of its site, which then cancels'
                )

    def _latent(self, args: tuple, kwargs: dict) -> dict[str, dict]:
        sites = traced(self._model, args, kwargs, {})
        return {name: site for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]}

    def _proposals(self, args: tuple, kwargs: dict) -> dict[str, dist.Distribution]:
        """The given proposals by site."""
        return {next(iter(self._latent(args, kwargs))): self._proposal[""]} if self._only else self._proposal

    def _check_model(self, args: tuple, kwargs: dict) -> None:
        try:
            latent, sites = self._latent(args, kwargs), traced(self._model, args, kwargs, {})
        except NotImplementedError as error:
            raise ValueError(f"Independence draws sites from their priors, and one cannot be drawn: {error}") from error
        if not latent or self._only and len(latent) > 1:
            need = "exactly one latent site for one proposal: give a dict of them" if latent else "a latent site"
            raise ValueError(f"Independence needs {need}; got {sorted(latent) or 'none'}")
        if subsample_plate_sizes(sites):
            raise ValueError("Independence cannot move a model that subsamples a plate: two points see different data")
        discrete = [name for name, site in latent.items() if site["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"Independence moves continuous sites; {discrete} are discrete. Use DiscreteGibbs for them"
            )
        proposals = self._proposals(args, kwargs)
        unknown = sorted(set(proposals) - set(latent))
        if unknown:
            raise ValueError(f"there is no latent site for the proposals of {unknown}; the sites are {sorted(latent)}")
        for name, site in latent.items():
            if name in proposals:
                _check_shape(name, proposals[name], site)
            elif not _unaltered(site):
                raise ValueError(
                    f"site {name!r} is masked or scaled, so that its prior does not cancel; give it a proposal"
                )

    def _check_start(self, state: IndependenceState) -> None:
        bad = int(jnp.sum(jnp.isneginf(state.log_weight)))
        if bad:
            raise ValueError(
                f"no weight is finite among {_MAX_STARTS} draws of the proposal, in {bad} of {state.log_weight.size} "
                "chains: the data contradict it, or the model returns NaN. Pass init_params where it is finite"
            )

    def _draw(self, key: jax.Array, args: tuple, kwargs: dict) -> dict[str, jax.Array]:
        """One candidate: constrained values of all latent sites."""
        key, *keys = jax.random.split(key, len(self._proposal) + 1)
        proposals = self._proposals(args, kwargs)
        values = {name: fn.sample(key) for key, (name, fn) in zip(keys, proposals.items(), strict=True)}
        sites = trace(seed(substitute(conditioned(self._model), values), key)).get_trace(*args, **kwargs)
        return {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}

    def _log_weight(self, values: dict[str, jax.Array], args: tuple, kwargs: dict) -> tuple[jax.Array, jax.Array]:
        """The log-weight of a point given by constrained values, and whether the model has a log-density there."""
        proposals = self._proposals(args, kwargs)
        priors_cancel = _Uncancelled(conditioned(self._model), proposals)
        log_target, _ = log_density(seed(priors_cancel, jax.random.key(0)), args, kwargs, values)
        log_target = jnp.asarray(log_target, jnp.result_type(float))
        log_proposal = jnp.zeros_like(log_target)
        for name, fn in proposals.items():
            log_proposal += jnp.sum(fn.log_prob(values[name]))  # like the model's, minus infinity outside the support
        fine = ~(jnp.isnan(log_target) | jnp.isposinf(log_target))
        log_weight = jnp.where(fine, log_target, -jnp.inf) - log_proposal
        return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight), fine

    def _start(self, key: jax.Array, init_params: dict | None, args: tuple, kwargs: dict) -> IndependenceState:
        model, (key, key_start) = conditioned(self._model), jax.random.split(key)
        is_block = GIBBS_SITES_KWARG in kwargs  # then a composite kernel gives constrained values

        def weighed(values: dict) -> tuple:
            return values, self._log_weight(values, args, kwargs)[0]

        def redraw(carry: tuple) -> tuple:
            tries, key, _, _ = carry
            key, key_draw = jax.random.split(key)
            return tries + 1, key, *weighed(self._draw(key_draw, args, kwargs))

        if init_params is None:
            tried = redraw((0, key_start, None, None))
        else:
            values = init_params if is_block else constrain_fn(model, args, kwargs, init_params)
            tried = _MAX_STARTS, key_start, *weighed({name: jnp.asarray(v) for name, v in values.items()})
        going = lambda carry: (carry[0] < _MAX_STARTS) & jnp.isneginf(carry[3])  # noqa: E731
        _, _, values, log_weight = jax.lax.while_loop(going, redraw, tried)
        z = init_params if init_params is not None and not is_block else unconstrain_fn(model, args, kwargs, values)
        z = {name: jnp.asarray(z[name]) for name in values}
        zero, count = jnp.zeros_like(log_weight), jnp.zeros((), jnp.int32)
        return IndependenceState(count, z, log_weight, zero, zero, count, jnp.array(False), key)

    def _step(self, state: IndependenceState, args: tuple, kwargs: dict) -> IndependenceState:
        key, key_draw, key_choice, key_accept = jax.random.split(state.rng_key, 4)
        candidates = jax.vmap(lambda key: self._draw(key, args, kwargs))(
            jax.random.split(key_draw, self._num_proposals)
        )
        log_weights, fine = jax.vmap(lambda values: self._log_weight(values, args, kwargs))(candidates)
        chosen, accept_prob = metropolised_gibbs(key_choice, log_weights, state.log_weight)
        accepted = jax.random.uniform(key_accept, dtype=accept_prob.dtype) < accept_prob
        values = {name: value[chosen] for name, value in candidates.items()}
        there = unconstrain_fn(conditioned(self._model), args, kwargs, values)
        sites = prior_sites(self._model, args, kwargs, required=False)
        drawn = set(sites) - set(self._proposals(args, kwargs))
        evaluations = sum(sites[name].prior.sampler.evaluations() for name in drawn)
        return IndependenceState(
            i=state.i + 1,
            z={name: jnp.where(accepted, there[name], here).astype(here.dtype) for name, here in state.z.items()},
            log_weight=jnp.where(accepted, log_weights[chosen], state.log_weight),
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, accept_prob, state.i, self._num_warmup),
            num_score_evals=jnp.asarray(self._num_proposals * evaluations, jnp.int32),
            diverging=~fine.all(),
            rng_key=key,
        )

    def refresh(self, state: IndependenceState, model_args: tuple, model_kwargs: dict | None) -> IndependenceState:
        """Weighs the point anew after a composite kernel has moved it or what it is conditioned on."""
        kwargs = {} if model_kwargs is None else model_kwargs
        values = constrain_fn(conditioned(self._model), model_args, kwargs, state.z)
        return state._replace(log_weight=self._log_weight(values, model_args, kwargs)[0])

    def get_constrain_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports."""
        return self._constrain(model_args, model_kwargs, return_deterministic=False)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict | None) -> Callable[[dict], dict]:
        """Maps the state's `z` to values on the supports and the model's deterministic sites."""
        return self._constrain(model_args, model_kwargs, return_deterministic=True)

    def _constrain(self, args: tuple, kwargs: dict | None, **options: Any) -> Callable[[dict], dict]:
        model = seed(conditioned(self._model), jax.random.key(0))  # Gibbs asks before it knows the other blocks' values
        return lambda z: constrain_fn(model, args, kwargs or {}, z, **options)

    def get_diagnostics_str(self, state: IndependenceState) -> str:
        """For the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}"


class _Uncancelled(Messenger):
    """Handler: log-densities of latent sites count as zero without a proposal, and in full with one, dropped or not."""

    def __init__(self, fn: Model, proposals: Mapping[str, dist.Distribution]) -> None:
        super().__init__(fn)
        self._names = frozenset(proposals)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = undropped(msg) if msg["name"] in self._names else msg["fn"].mask(False)


def _unaltered(site: Mapping[str, Any]) -> bool:
    """Whether the term of a site in the model is the density that it is drawn from."""
    fn = undropped(site)
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    scaled = not (site["scale"] is None or is_identically_one(site["scale"]))
    return not (isinstance(fn, dist.MaskedDistribution) or scaled)


def _check_shape(name: str, proposal: dist.Distribution, site: Mapping[str, Any]) -> None:
    if tuple(proposal.shape()) != jnp.shape(site["value"]):
        raise ValueError(
            f"the proposal of site {name!r} must have its shape {jnp.shape(site['value'])}; got "
            f"{tuple(proposal.shape())}. Use .expand(...) and .to_event(...)"
        )
