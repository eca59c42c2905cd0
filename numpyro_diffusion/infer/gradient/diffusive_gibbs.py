r"""Diffusive Gibbs sampling: noise the point, then sample what it may have come from. No learned prior is needed.

For the joint law of a point $q$ of the posterior $\pi$ and a noised $x_t = \alpha q + \sigma \epsilon$, alternate

$$x_t \mid q \sim N(\alpha q, \sigma^2 C), \qquad q \mid x_t \propto \pi(q)\, N(x_t; \alpha q, \sigma^2 C),$$

where $C$ is the preconditioner, the identity by default. Noise that is as wide as the gap between two modes takes
$x_t$ to where either may have produced it. The second draw is made by Metropolis moves that leave its law invariant:

1. A *restart* $q' = x_t / \alpha + (\sigma / \alpha)\, C^{1/2} \epsilon'$, wherever $q$ is. As a function of $q'$ its
   density is $N(x_t; \alpha q', \sigma^2 C)$ up to a constant, so this factor cancels in the test, which leaves

$$a = \min\left(1, \frac{\pi(q')}{\pi(q)}\right).$$

2. MALA steps on the conditional, whose gradient is
   $\nabla \log \pi(q) - C^{-1} (q - x_t / \alpha)\, (\alpha / \sigma)^2$.

Both use true values, so $\pi$ is left invariant at any step size. Only the noise level $\rho = \sigma / \alpha$
matters; the paper's $\alpha$, with $\sigma^2 = 1 - \alpha^2$, is $\rho = \sqrt{1 - \alpha^2} / \alpha$. A draw goes
through several levels, from high to low. The step of a level starts at $h = h_1\, \rho^2 / (1 + \rho^2)$, where the
fraction is the variance of the conditional if that of $\pi$ is one.

Modes are reached by accepted restarts. A restart must hit the width of a mode within a region of size $\rho$, so the
accepted share falls exponentially with the dimension. Watch `level_restart_prob`; where it is nearly zero, this is an
expensive MALA.

References:
    Chen, Zhang, Paige, Hernandez-Lobato, Barber, Diffusive Gibbs sampling, 2024, https://arxiv.org/abs/2402.03008.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.gradient.base import GradientKernel, flatten
from numpyro_diffusion.infer.gradient.langevin import log_reversal, propose
from numpyro_diffusion.infer.gradient.target import Evaluation, Target
from numpyro_diffusion.infer.kernel.adapt import Adaptation, Root, running_mean
from numpyro_diffusion.infer.kernel.choose import Choice, metropolis
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.density import LogPrior, Source
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading


class DiffusiveGibbsState(NamedTuple):
    """State of `DiffusiveGibbs`; statistics by level are means over the last draw, from the highest level down.

    Args:
        i: number of draws done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        evaluation: the target there.
        potential_energy: negative log-density of the target there.
        adapt_state: states of the adaptation, one for each level.
        accept_prob: acceptance probability of the steps on the conditionals, all levels together.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        level_accept_prob: the same by level, (num_levels,).
        level_restart_prob: acceptance probability of the restarts, (num_levels,).
        level_step_size: the step h of the next draw, (num_levels,).
        num_score_evals: denoiser evaluations of the last draw, per point.
        diverging: whether a log-density or gradient was not finite where it should be; that move was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    evaluation: Evaluation
    potential_energy: jax.Array
    adapt_state: Any
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    level_accept_prob: jax.Array
    level_restart_prob: jax.Array
    level_step_size: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class DiffusiveGibbs(GradientKernel[DiffusiveGibbsState]):
    r"""Noise and Metropolis-adjusted denoising, for any model with gradients; diffusion sites need a density.

    Args:
        model: NumPyro model, with diffusion sites or without.
        noise_levels: the $\rho = \sigma / \alpha$, positive and decreasing, in units of the preconditioner; the highest
            about as wide as the gaps between modes.
        num_steps: MALA steps after each restart, at least 1.
        num_sweeps: how often to go through the levels within a draw.
        density: where the log-density of diffusion priors comes from: "auto", "denoiser" or "flow" as in `Density`.
        step_size: the $h_1$ of the rule for the steps, in units of the preconditioner; None for $D^{-1/3}$.
        target_accept_prob: acceptance to which the step of each level adapts in warm-up, in (0, 1); None keeps the
            rule.
        adapt_mass_matrix: whether warm-up estimates a preconditioner; the identity if not.
        dense_mass: whether it is dense, or diagonal.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` is not callable or `density` is of another type.
        ValueError: if a number is out of its range, the levels do not decrease, or `density` is none; when
            run, for a model without latent sites, with discrete ones, or that cannot be differentiated, or a prior
            without a density.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.infer import DiffusiveGibbs
        >>> def model():
        ...     modes = dist.Normal(jnp.array([-6.0, 6.0]), 1.0)
        ...     numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), modes))
        >>> mcmc = MCMC(DiffusiveGibbs(model, num_sweeps=4), num_warmup=200, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> bool(abs((mcmc.get_samples()["x"] > 0).mean() - 0.7) < 0.1)
        True
    """

    statistics = (
        "accept_prob",
        "potential_energy",
        "level_accept_prob",
        "level_restart_prob",
        "level_step_size",
        "num_score_evals",
    )

    def __init__(
        self,
        model: Model,
        *,
        noise_levels: Sequence[float] = (10.0, 3.0, 1.0),
        num_steps: int = 5,
        num_sweeps: int = 1,
        density: LogPrior | Source = "auto",
        step_size: float | None = None,
        target_accept_prob: float | None = 0.574,
        adapt_mass_matrix: bool = False,
        dense_mass: bool = False,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, density, init_strategy)
        if not self._density.has_density:
            raise ValueError(f'DiffusiveGibbs restarts far away and needs a density; got {density}. Use density="auto"')
        levels = tuple(float(level) for level in noise_levels)
        if not levels:
            raise ValueError("noise_levels must hold at least one level; got none")
        _checks.positive(**{f"noise_levels[{k}]": level for k, level in enumerate(levels)})
        if any(upper <= lower for upper, lower in zip(levels, levels[1:], strict=False)):
            raise ValueError(f"noise_levels must decrease; got {levels}. Sort them from the highest")
        _checks.at_least(1, num_steps=num_steps, num_sweeps=num_sweeps)
        self._levels, self._num_steps, self._num_sweeps = levels, num_steps, num_sweeps
        self._adaptation = Adaptation(adapt_mass_matrix, dense_mass, step_size, target_accept_prob)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """Those of its statistics by level."""
        return self._levels

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> DiffusiveGibbsState:
        key, key_first, key_adapt = jax.random.split(key, 3)
        z, evaluation = self._first(key_first, init_params, reading)
        q = flatten(z)
        step_size = self._adaptation.step_size or q.size ** (-1.0 / 3.0)
        by_rule = [replace(self._adaptation, step_size=step_size * v**2 / (1.0 + v**2)) for v in self._levels]
        started = [adaptation.start(self._num_warmup, q, key_adapt) for adaptation in by_rule]
        adapt_state = jax.tree.map(lambda *states: jnp.stack(states), *started)
        zero, count = jnp.zeros_like(evaluation.log_density), jnp.zeros((), jnp.int32)
        by_level = jnp.zeros(len(self._levels), zero.dtype)
        return DiffusiveGibbsState(
            i=count,
            z=z,
            evaluation=evaluation,
            potential_energy=-evaluation.log_density,
            adapt_state=adapt_state,
            accept_prob=zero,
            mean_accept_prob=zero,
            level_accept_prob=by_level,
            level_restart_prob=by_level,
            level_step_size=adapt_state.step_size,
            num_score_evals=count,
            diverging=jnp.array(False),
            rng_key=key,
        )

    def _step(self, state: DiffusiveGibbsState, reading: Reading) -> DiffusiveGibbsState:
        key, key_sweeps = jax.random.split(state.rng_key)
        target, count = self._target(state.z, reading), len(self._levels)
        root = self._adaptation.root(jax.tree.map(lambda levels: levels[0], state.adapt_state))
        levels = jnp.tile(jnp.asarray(self._levels, target.flat.dtype), self._num_sweeps)
        steps = jnp.tile(state.level_step_size, self._num_sweeps)

        def visit(point: tuple, level: tuple) -> tuple[tuple, tuple]:
            return self._visit(target, root, point, *level)

        keys = jax.random.split(key_sweeps, len(levels))
        start = target.flat, state.evaluation
        (q, evaluation), (restart, accept, diverging) = jax.lax.scan(visit, start, (keys, levels, steps))
        restart, accept = (values.reshape(-1, count).mean(0) for values in (restart, accept))

        def adapt(adapt_state: Any, accept_prob: jax.Array) -> Any:
            return self._adaptation.update(adapt_state, state.i, self._num_warmup, accept_prob, q)

        adapt_state = jax.vmap(adapt)(state.adapt_state, accept)
        evaluations = self._evaluations(reading, len(levels) * (1 + self._num_steps))
        return DiffusiveGibbsState(
            i=state.i + 1,
            z=target.unflatten(q),
            evaluation=evaluation,
            potential_energy=-evaluation.log_density,
            adapt_state=adapt_state,
            accept_prob=accept.mean(),
            mean_accept_prob=running_mean(state.mean_accept_prob, accept.mean(), state.i, self._num_warmup),
            level_accept_prob=accept,
            level_restart_prob=restart,
            level_step_size=adapt_state.step_size,
            num_score_evals=jnp.asarray(evaluations, jnp.int32),
            diverging=diverging.any(),
            rng_key=key,
        )

    def _visit(
        self, target: Target, root: Root, point: tuple, key: jax.Array, level: jax.Array, step_size: jax.Array
    ) -> tuple[tuple, tuple]:
        """Noises a point to a level and denoises it; returns the new point, acceptances and whether one diverged."""
        q, here = point
        key_noise, key_restart, key_accept, key_steps = jax.random.split(key, 4)
        centre = q + level * root.push(jax.random.normal(key_noise, q.shape, q.dtype))  # x_t / alpha

        q_new = centre + level * root.push(jax.random.normal(key_restart, q.shape, q.dtype))
        there = target.evaluate(q_new)
        restart = _test(key_accept, (q, here), (q_new, there), there.log_density - here.log_density)

        def step(point: tuple, key: jax.Array) -> tuple[tuple, tuple]:
            (q, here), (key_step, key_accept) = point, jax.random.split(key)
            given = _conditional(here, q, centre, root, level)
            q_new = propose(key_step, q, given.gradient, root, step_size)
            there = target.evaluate(q_new)
            given_new = _conditional(there, q_new, centre, root, level)
            log_ratio = given_new.log_density - given.log_density
            log_ratio += log_reversal(q, q_new, given.gradient, given_new.gradient, root, root, step_size)
            choice = _test(key_accept, point, (q_new, there), log_ratio)
            return choice.point, (choice.accept_prob, choice.diverging)

        keys = jax.random.split(key_steps, self._num_steps)
        point, (accept_prob, diverging) = jax.lax.scan(step, restart.point, keys)
        return point, (restart.accept_prob, accept_prob.mean(), restart.diverging | diverging.any())

    def get_diagnostics_str(self, state: DiffusiveGibbsState) -> str:
        """For the progress bar."""
        restarts = ", ".join(f"{p:.2f}" for p in state.level_restart_prob)
        return f"acc. prob={state.mean_accept_prob:.2f}, restarts {restarts}"


def _conditional(at: Evaluation, q: jax.Array, centre: jax.Array, root: Root, level: jax.Array) -> Evaluation:
    """The target at a point times the law of the noise that led from there to `centre`, up to a constant."""
    w = root.unpush(q - centre) / level
    pulled_back = (root.inverse * w if root.inverse.ndim == 1 else root.inverse @ w) / level
    return Evaluation(at.log_density - 0.5 * jnp.sum(w**2), at.gradient - pulled_back)


def _test(key: jax.Array, point: tuple, new: tuple, log_ratio: jax.Array) -> Choice:
    """One of two points with their evaluations, by a Metropolis test."""
    return metropolis(key, log_ratio, new, point, new[1].log_density, new[1].gradient)
