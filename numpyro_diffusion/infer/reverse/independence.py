r"""Proposals that do not depend on where the chain is: drawn from a law $q$, chosen by importance weight.

With the weight $w = \pi / q$ of the current point $x_0$ and of $M$ independent draws $x_1 \dots x_M$ of $q$, draw $j$
among the $M$ with probability $w_j / \sum_{i \ge 1} w_i$ and accept it with

$$a = \min\left(1, \frac{\sum_{i \ge 1} w_i}{\sum_{i \ge 0, i \ne j} w_i}\right).$$

This is exact for any $M$: given the set of $M + 1$ points, the probability that a point is the current one is
proportional to its weight, and this is a Metropolised Gibbs move on the index. It changes the index more often than the
plain draw by weight known as iterated sampling importance resampling (i-SIR); for $M = 1$ it is Metropolis,
$\min(1, w_1 / w_0)$. The $M$ weights are evaluated in one batch.

By default every site is drawn from its own prior in the model, given the sites before it: the prior cancels, its
density is not needed, and $w$ is the rest of the model, $p(y \mid x)$ and factors. With a `proposal`, a NumPyro
distribution on some sites, the weight is $\pi / q$ with the model's own log-density. If $w$ is bounded, the chain
converges from anywhere at a geometric rate. Where $q$ has lighter tails than $\pi$ it sticks, and in many dimensions it
nearly always does: then mix this move with local ones (`Mixture`).

**What is approximate.** Nothing, if a distribution's `sample` and its `log_prob` belong to the same law. For a
`DiffusionPrior` drawn at its own site, the posterior is that under the law of its stochastic solver. One given as a
`proposal` on another site uses both, which agree up to the solvers' errors.

References:
    Tjelmeland, Using all Metropolis-Hastings proposals to estimate mean values, 2004 (several independent proposals).
    Andrieu, Lee, Vihola, Uniform ergodicity of the iterated conditional SMC and geometric ergodicity of particle Gibbs
    samplers, 2018 (i-SIR), https://arxiv.org/abs/1312.6432.
    Liu, Peskun's theorem and a modified discrete-state Gibbs sampler, 1996, https://doi.org/10.1093/biomet/83.3.681.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.kernel.adapt import running_mean
from numpyro_diffusion.infer.kernel.choose import metropolised_gibbs
from numpyro_diffusion.infer.kernel.contract import DiffusionKernel
from numpyro_diffusion.infer.kernel.start import MAX_TRIES, Strategy, start
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model, as_written
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.solve.base import total_evaluations


class IndependenceState(NamedTuple):
    """State of `Independence`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        log_weight: its log-weight, plus infinity where the proposal has no density.
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


class Independence(DiffusionKernel[IndependenceState]):
    r"""Metropolis with independent proposals, from the priors of the sites or from any NumPyro distribution.

    Args:
        model: NumPyro model; all latent sites continuous.
        proposal: None for the priors; or a dict of distributions by site, each with the shape of the site, where other
            sites are drawn from their priors; or one distribution for the model's only latent site.
        num_proposals: candidates per step, in one batch.
        init_strategy: where chains start, as in NumPyro; None draws the proposal.

    Raises:
        TypeError: if `model` is not callable or a proposal is not a distribution.
        ValueError: if `num_proposals` is below 1, or a proposal has no density; when run, for a model without latent
            sites, with discrete ones or subsampling, a site drawn from its prior that is masked, scaled or cannot be
            drawn, a proposal for an unknown site or of another shape, or 100 draws without a finite weight.

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
        "density or reverse process", True, "leaves the model's law invariant, with priors as their `sample` draws them"
    )
    takes_point = True

    def __init__(
        self,
        model: Model,
        proposal: dist.Distribution | Mapping[str, dist.Distribution] | None = None,
        *,
        num_proposals: int = 1,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, init_strategy)
        _checks.at_least(1, num_proposals=num_proposals)
        self._num_proposals = num_proposals
        self._only = isinstance(proposal, dist.Distribution)
        if not (proposal is None or self._only or isinstance(proposal, Mapping)):
            raise TypeError(f"proposal must be a NumPyro distribution or one for each site; got {proposal!r}")
        self._proposal = {"": proposal} if self._only else dict(proposal or {})
        self._candidate, self._weight = partial(_candidate, self._proposal), partial(_weight, self._proposal)
        for name, fn in self._proposal.items():
            if not isinstance(fn, dist.Distribution):
                raise TypeError(f"the proposal of site {name!r} must be a NumPyro distribution; got {fn!r}")
            if isinstance(fn, DiffusionPrior) and fn.density == "none":
                raise ValueError(
                    'Independence divides by the density of a proposal, and this DiffusionPrior has density="none". '
                    'Give it density="auto"; or leave it out where it is the prior of its site, which then cancels'
                )

    def _proposals(self, reading: Reading) -> dict[str, dist.Distribution]:
        """The given proposals by site."""
        return {next(iter(reading.structure.latent)): self._proposal[""]} if self._only else self._proposal

    def _check_model(self, reading: Reading) -> None:
        structure = reading.structure
        if not structure.latent or self._only and len(structure.latent) > 1:
            need = (
                "exactly one latent site for one proposal: give a dict of them" if structure.latent else "a latent site"
            )
            raise ValueError(f"Independence needs {need}; got {sorted(structure.latent) or 'none'}")
        check_fixed("Independence", structure, but_altered=tuple(self._proposals(reading)))
        check_continuous("Independence", structure)
        proposals = self._proposals(reading)
        unknown = sorted(set(proposals) - set(structure.latent))
        if unknown:
            raise ValueError(
                f"there is no latent site for the proposals of {unknown}; the sites are {sorted(structure.latent)}"
            )
        for name, site in structure.latent.items():
            if name in proposals:
                _check_shape(name, proposals[name], site.shape)
            elif site.is_altered:
                raise ValueError(
                    f"site {name!r} is masked or scaled, so that its prior does not cancel; give it a proposal"
                )
        try:
            jax.eval_shape(lambda key: self._draw(key, reading), jax.random.key(0))
        except NotImplementedError as error:
            raise ValueError(f"Independence draws sites from their priors, and one cannot be drawn: {error}") from error

    def _check_start(self, state: IndependenceState) -> None:
        bad = int(jnp.sum(jnp.isneginf(state.log_weight)))
        if bad:
            raise ValueError(
                f"no weight is finite among {MAX_TRIES} draws of the proposal, in {bad} of {state.log_weight.size} "
                "chains: the data contradict it, or the model returns NaN. Pass init_params where it is finite"
            )

    def _draw(self, key: jax.Array, reading: Reading) -> tuple[dict, jax.Array]:
        """One candidate: unconstrained values of all latent sites, and its log-weight."""
        return reading.run(self._candidate, key)

    def _log_weight(self, z: dict[str, jax.Array], reading: Reading) -> jax.Array:
        """The log-weight of a point, as the model gives it."""
        if not self._proposal:
            return jnp.asarray(reading.evaluate(z).log_likelihood, jnp.result_type(float))
        return reading.run(self._weight, reading.constrain(z))

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> IndependenceState:
        key, key_start = jax.random.split(key)

        def weigh(z: dict[str, jax.Array]) -> jax.Array:
            log_weight = self._log_weight(z, reading)
            return jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight)

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            return self._draw(key, reading)[0]

        z = start(key_start, reading, init_params, self._init_strategy, lambda z: jnp.isfinite(weigh(z)), draw)
        zero, count = jnp.zeros((), jnp.result_type(float)), jnp.zeros((), jnp.int32)
        return IndependenceState(count, z, weigh(z), zero, zero, count, jnp.array(False), key)

    def _step(self, state: IndependenceState, reading: Reading) -> IndependenceState:
        key, key_draw, key_choice = jax.random.split(state.rng_key, 3)
        keys = jax.random.split(key_draw, self._num_proposals)
        candidates, log_weights = jax.vmap(lambda key: self._draw(key, reading))(keys)
        new, old = (candidates, log_weights), (state.z, state.log_weight)
        choice = metropolised_gibbs(key_choice, log_weights, state.log_weight, new, old)
        z, log_weight = choice.point
        drawn = {n: site for n, site in reading.sites_in_the_abstract().items() if n not in self._proposals(reading)}
        evaluations = total_evaluations(site.prior.sampler.evaluations() for site in drawn.values())
        return IndependenceState(
            i=state.i + 1,
            z=z,
            log_weight=log_weight,
            accept_prob=choice.accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, choice.accept_prob, state.i, self._num_warmup),
            num_score_evals=jnp.asarray(self._num_proposals * evaluations, jnp.int32),
            diverging=choice.diverging,
            rng_key=key,
        )

    def refresh(self, state: IndependenceState, model_args: tuple, model_kwargs: dict | None) -> IndependenceState:
        """Weighs the point anew after a composite kernel has moved it or what it is conditioned on."""
        reading = self.read(model_args, model_kwargs)
        log_weight = self._log_weight(state.z, reading)
        return state._replace(log_weight=jnp.where(jnp.isnan(log_weight), -jnp.inf, log_weight))

    def get_diagnostics_str(self, state: IndependenceState) -> str:
        """For the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}"


class _Uncancelled(Messenger):
    """Handler: latent sites without a proposal count as zero, those with one in full, whether dropped or not."""

    def __init__(self, fn: Model, proposals: Mapping[str, dist.Distribution]) -> None:
        super().__init__(fn)
        self._proposals = proposals

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["fn"] = msg["fn"].mask(False) if _proposal(self._proposals, msg["name"]) is None else as_written(msg)


def _proposal(proposals: Mapping[str, dist.Distribution], name: str) -> dist.Distribution | None:
    """The proposal of a site, None if that is its prior; one without a name is that of the only site."""
    return proposals.get(name, proposals.get(""))


def _weighed(
    proposals: Mapping[str, dist.Distribution], model: Model, args: tuple, kwargs: dict, key: jax.Array, value: Callable
) -> tuple[dict, jax.Array]:
    """The latent sites of one execution of the model, and the log-weight of their values.

    `value` says what a site with a proposal is; others are drawn unless it knows them.
    """

    def given(site: dict[str, Any]) -> jax.Array | None:
        is_latent = site["type"] == "sample" and not site["is_observed"]
        return value(site["name"], _proposal(proposals, site["name"])) if is_latent else None

    with _precision.highest():
        at_values = seed(substitute(_Uncancelled(model, proposals), substitute_fn=given), key)
        log_probs, sites = compute_log_probs(at_values, args, kwargs, {})
        latent = {name: s for name, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        log_weight = sum(log_probs.values(), start=jnp.zeros(()))
        for name, site in latent.items():
            if (fn := _proposal(proposals, name)) is not None:
                log_weight -= jnp.sum(fn.log_prob(site["value"]))  # minus infinity outside of the support
    return latent, jnp.asarray(log_weight, jnp.result_type(float))


def _candidate(
    proposals: Mapping[str, dist.Distribution], model: Model, args: tuple, kwargs: dict, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Unconstrained values of a candidate and its log-weight, which is minus infinity outside the supports."""
    key, *keys = jax.random.split(key, len(proposals) + 1)
    drawn = {name: fn.sample(key) for key, (name, fn) in zip(keys, proposals.items(), strict=True)}
    latent, log_weight = _weighed(
        proposals, model, args, kwargs, key, lambda name, fn: None if fn is None else drawn.get(name, drawn.get(""))
    )
    z = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latent.items()}
    own = [site for name, site in latent.items() if _proposal(proposals, name) is not None]
    inside = [jnp.all(site["fn"].support(site["value"])) for site in own]
    return z, jnp.where(jnp.all(jnp.array([True, *inside])), log_weight, -jnp.inf)


def _weight(
    proposals: Mapping[str, dist.Distribution], model: Model, args: tuple, kwargs: dict, values: dict[str, jax.Array]
) -> jax.Array:
    """The log-weight of constrained values."""
    return _weighed(proposals, model, args, kwargs, jax.random.key(0), lambda name, _: values.get(name))[1]


def _check_shape(name: str, proposal: dist.Distribution, shape: tuple[int, ...]) -> None:
    if tuple(proposal.shape()) != shape:
        raise ValueError(
            f"the proposal of site {name!r} must have its shape {shape}; got "
            f"{tuple(proposal.shape())}. Use .expand(...) and .to_event(...)"
        )
