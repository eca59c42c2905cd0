r"""pCN in the noise of a guided walk: the move of `DiffusionPCN` for informative likelihoods.

`DiffusionPCN` proposes from the prior's reverse process, so that only small moves are accepted where the data are much
more precise than the prior. Here the walk down is guided, and the whole walk is the state. Its steps are Gaussian under
the prior, $p$, and under the guidance, $q$, with means $\mu_q$ and the same deviation $\tilde\sigma$. In the noise of
the guided walk,

$$z_T = \frac{x_T - m_T}{s_T}, \qquad z_s = \frac{x_s - \mu_q(x_t)}{\tilde\sigma_s},$$

a change of variables with a constant Jacobian, the target $p(x_T) \prod p(x_s \mid x_t)\, L(x_0)$ is

$$N(z; 0, I)\; W, \qquad \log W = \log L(x_0) + \sum \log \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)}.$$

A move that leaves $N(0, I)$ invariant therefore needs a test by $W$ alone. As `DiffusionPCN` noises the point to a
level $\lambda$, this one noises each $z_s$ like a component of $x$ of the size of its own level $\lambda_s$,

$$w_s = a_s z_s + \sqrt{1 - a_s^2}\, \xi, \qquad z'_s = a_s w_s + \sqrt{1 - a_s^2}\, \xi', \qquad
a_s^2 = \frac{\lambda_s^2}{\lambda_s^2 + \lambda^2},$$

once for $w$ and $M$ times for candidates $z'$: steps well below level $\lambda$ are drawn anew, and those well above it
stay. Given $w$, the current walk and the candidates are draws of one law, so the test is that of `DiffusionPCN` with
$W$ in place of the likelihood. **Neither the errors of the guidance nor the number of steps cause a bias**: they only
lower the acceptance. With an exact guidance $W$ would be constant.

A walk that the guidance would hardly ever take may have any $W$, and a chain would not leave it. One step in ten
therefore draws the whole walk anew from a mixture that contains such walks, with bounded weights (`walk`).

A step costs a walk for each candidate and one for the current walk, whose noise is computed under the current guidance:
in a Gibbs sweep the data's noise level may have changed.

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, 2013, https://arxiv.org/abs/1202.0709.
    Corenflos et al., Conditioning diffusion models by explicit forward-backward bridging, 2024,
    https://arxiv.org/abs/2405.13794.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.guidance import Guided, Likelihood, Observation
from numpyro_diffusion.infer.kernel.adapt import Tally, running_mean
from numpyro_diffusion.infer.kernel.choose import metropolised_gibbs, without_improper
from numpyro_diffusion.infer.kernel.contract import pooled
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.reverse.base import WalkKernel
from numpyro_diffusion.infer.reverse.walk import Transition, log_walk_weight, transition
from numpyro_diffusion.solve import GaussianSolver, Solver
from numpyro_diffusion.solve.base import terminal_moments, total_evaluations

_FRESH = 0.1
"""Share of the steps that draw the whole walk anew."""
_LEVEL_WIDTH = 0.7
"""Spread of the adapted levels about their centre, in natural logarithms: a factor of two either way."""


class GuidedPCNState(NamedTuple):
    """State of `GuidedPCN`.

    Args:
        i: number of steps done.
        z: the clean end of the walk, by site, in NumPyro's unconstrained coordinates.
        walk: the walk in the denoiser's space, at all times of the solver's grid, noisiest first.
        accept_prob: acceptance probability of the last step.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        noise_level: level of the last step, in the units of the (first site's) data; the highest if the whole walk was
            drawn anew.
        log_level: centre of the adapted levels, as a natural logarithm.
        tally: acceptance of the other moves in the second half of warm-up, by their level.
        num_unguided: steps of the last walks at which the guidance was not finite; they went without it.
        num_score_evals: denoiser evaluations of the last step.
        diverging: whether the log-density of a candidate was NaN or plus infinity; it was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    walk: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    noise_level: jax.Array
    log_level: jax.Array
    tally: Tally
    num_unguided: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class GuidedPCN(WalkKernel[GuidedPCNState]):
    """Moves all diffusion sites of a model by pCN in the noise of a guided walk.

    It leaves the posterior under the solver's walk invariant, for any guidance and any number of steps. Levels are
    drawn and adapted as in `DiffusionPCN`. For precise data in many dimensions it is slow: see `ParticleGibbs`.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites, possibly in plates; `DiffusionGibbs` takes the
            others.
        guidance: how to look ahead, see `guidance.Guided`; None takes "mmps" for a Gaussian observation and "dps" for
            any other likelihood.
        observation: what is observed of a point of the denoiser's own space (of several sites: of a dict of them);
            None reads the model. It steers; the test takes the model's likelihood.
        solver: a solver whose steps have a density; None takes the priors' own `sampler`.
        num_proposals: candidates per step, walked in one batch.
        global_fraction: share of steps with a log-uniform level, in [0, 1].
        target_accept_prob: acceptance to which the centre of the levels adapts, in (0, 1).
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for a number out of its range or an unknown guidance; when run, for a model with other latent sites,
            diffusion sites whose ladders of noise levels differ in span, or a guidance that cannot handle the
            likelihood.
        TypeError: for a model that is not callable or a solver whose steps have no density.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import GuidedPCN
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(GuidedPCN(model), num_warmup=100, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "noise_level", "num_unguided", "num_score_evals")

    def __init__(
        self,
        model: Model,
        *,
        guidance: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        num_proposals: int = 1,
        global_fraction: float = 0.5,
        target_accept_prob: float = 0.4,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, guidance=guidance, observation=observation, solver=solver, init_strategy=init_strategy)
        _checks.at_least(1, num_proposals=num_proposals)
        _checks.fraction(global_fraction=global_fraction, target_accept_prob=target_accept_prob)
        self._num_proposals = num_proposals
        self._global_fraction = global_fraction
        self._target_accept_prob = target_accept_prob

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> GuidedPCNState:
        key, key_start = jax.random.split(key)
        found, solver = self._parts(reading)
        z, walk = self._start_walk(key_start, init_params, reading)
        low, high = _log_ends(found.guided, solver)
        zero, count = jnp.zeros((), walk.dtype), jnp.zeros((), jnp.int32)
        centre = (0.5 * (low + high)).astype(walk.dtype)
        tally = Tally.empty(walk.dtype)
        return GuidedPCNState(count, z, walk, zero, zero, zero, centre, tally, count, count, jnp.array(False), key)

    def _step(self, state: GuidedPCNState, reading: Reading) -> GuidedPCNState:
        found, solver = self._parts(reading)
        key, key_kind, key_near, key_far, key_walk, key_choice = jax.random.split(state.rng_key, 6)
        low, high = _log_ends(found.guided, solver)
        kind = jax.random.uniform(key_kind)
        is_fresh = kind < _FRESH
        is_global = kind < _FRESH + (1.0 - _FRESH) * self._global_fraction
        around = state.log_level + _LEVEL_WIDTH * jax.random.normal(key_near)
        height = state.tally.draw(key_far)
        log_level = jnp.where(is_global, low + (high - low) * height, around)
        level = jnp.where(is_fresh, jnp.inf, jnp.exp(log_level))

        walks, worth, num_unguided = _walks(key_walk, solver, found.guided, state.walk, level, self._num_proposals)
        z, raw = self._weigh(found, walks[:, -1], solver.times(found.guided)[-1], reading)
        weights, new = worth + raw, jax.tree.map(lambda leaf: leaf[:-1], (z, walks))
        choice = metropolised_gibbs(key_choice, weights[:-1], without_improper(weights[-1]), new, (state.z, state.walk))
        z, walk = choice.point

        i, dtype = state.i + 1, state.accept_prob.dtype
        accept_prob = choice.accept_prob.astype(dtype)
        warming, counts = i <= self._num_warmup, (2 * i > self._num_warmup) & (i <= self._num_warmup)
        gain = jnp.where(warming & ~is_global, 2.0 / (1.0 + i) ** 0.6, 0.0)
        centre = state.log_level + gain * (pooled(accept_prob) - self._target_accept_prob)
        return GuidedPCNState(
            i=i,
            z=z,
            walk=walk,
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, accept_prob, state.i, self._num_warmup),
            noise_level=jnp.minimum(level, jnp.exp(high)).astype(dtype),
            log_level=jnp.clip(centre, low, high).astype(dtype),
            tally=state.tally.add(height, accept_prob, counts & is_global & ~is_fresh),
            num_unguided=num_unguided,
            num_score_evals=jnp.asarray(
                (self._num_proposals + 1) * total_evaluations([solver.evaluations()]), jnp.int32
            ),
            diverging=choice.diverging,
            rng_key=key,
        )

    def get_diagnostics_str(self, state: GuidedPCNState) -> str:
        """For the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}, level {jnp.exp(state.log_level):.2g}"


def _log_ends(guided: Guided, solver: Solver) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the lowest and the highest noise level."""
    levels = guided.schedule.noise_level(solver.times(guided))
    return jnp.log(levels[-1]), jnp.log(levels[0])


def _walks(
    key: jax.Array, solver: GaussianSolver, guided: Guided, kept: jax.Array, level: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Candidates for a walk, all in one batch with the walk that is kept.

    Args:
        key: random key.
        solver: how to step.
        guided: the guided denoiser.
        kept: the current walk, (levels, *event_shape).
        level: noise level of the move; infinite for walks of the mixture that are independent of the kept one.
        count: number of candidates.

    Returns:
        Walks (count + 1, levels, ...), the kept one last; the logarithms of their weights without the likelihood,
        (count + 1,); and the number of steps whose guidance was not finite.
    """
    denoiser, times, dtype = guided.base, solver.times(guided), kept.dtype
    is_fresh = jnp.isinf(level)
    key_first, key_steps = jax.random.split(key)

    def near(key: jax.Array, z: jax.Array, own_level: jax.Array) -> jax.Array:
        """Noises the noise of a step like a component of the size of its level, and draws candidates from that."""
        ratio = level / own_level
        keep = jnp.where(is_fresh, 0.0, 1.0 / jnp.sqrt(1.0 + ratio**2)).astype(dtype)
        loss = jnp.where(is_fresh, 1.0, ratio / jnp.sqrt(1.0 + ratio**2)).astype(dtype)
        noise = jax.random.normal(key, (count + 1, *z.shape), dtype)
        return keep * (keep * z + loss * noise[-1]) + loss * noise[:-1]

    mean, deviation = (v.astype(dtype) for v in terminal_moments(denoiser))
    level_of = guided.schedule.noise_level
    noise = near(key_first, (kept[0] - mean) / deviation, level_of(times[0]))
    points = jnp.concatenate([mean + deviation * noise, kept[:1]])

    def down(carry: tuple, k: jax.Array) -> tuple[tuple, jax.Array]:
        points, memory, log_ratio, lost = carry
        t, s = times[k], times[k + 1]
        key_kind, key_noise = jax.random.split(jax.random.fold_in(key_steps, k))

        def law(x_t: jax.Array, memory: Any) -> tuple[Transition, Any]:
            return transition(solver, denoiser, *guided.means(x_t, t), x_t, memory, t, s)

        step, memory = jax.vmap(law)(points, memory)
        deviation = step.deviation[-1].astype(dtype)
        noise = near(key_noise, (kept[k + 1] - step.mean[-1] - step.shift[-1]) / deviation, level_of(s))
        is_guided = jax.vmap(Transition.draw_kind)(step, jax.random.split(key_kind, count + 1), log_ratio) | ~is_fresh
        noise = jnp.concatenate([noise, jnp.zeros_like(noise[:1])])
        points = jax.vmap(Transition.reach)(step, is_guided, noise).at[-1].set(kept[k + 1])
        log_ratio = log_ratio + jax.vmap(Transition.log_ratio)(step, points)
        return (points, memory, log_ratio, lost + jnp.sum(step.is_lost, dtype=jnp.int32)), points

    memory = jax.vmap(lambda x_t: solver.init(denoiser, x_t))(points)
    first = points, memory, jnp.zeros(count + 1, dtype), jnp.zeros((), jnp.int32)
    (_, _, log_ratio, lost), later = jax.lax.scan(down, first, jnp.arange(len(times) - 1))
    walks = jnp.moveaxis(jnp.concatenate([points[None], later]), 0, 1)
    return walks, jnp.where(is_fresh, log_walk_weight(log_ratio), log_ratio), lost
