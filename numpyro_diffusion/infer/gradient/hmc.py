r"""Hamiltonian Monte Carlo by the score, with the test that the prior's density allows.

In the coordinates $w$ of the preconditioner ($q = A^\top w$) a trajectory of leapfrog steps

$$p \leftarrow p + \tfrac{\epsilon}{2} A \nabla \log \pi(q), \qquad q \leftarrow q + \epsilon A^\top p, \qquad
p \leftarrow p + \tfrac{\epsilon}{2} A \nabla \log \pi(q)$$

preserves volume and is reversible, whatever vector field takes the place of the gradient. So with momentum
$p \sim N(0, I)$ the test

$$a = \min\left(1, \frac{\pi(q')}{\pi(q)}\, e^{\frac12 \|p\|^2 - \frac12 \|p'\|^2}\right)$$

leaves $\pi(q) N(p; 0, I)$ invariant if its ratio is that of a density, even if the score is not its gradient. With a
`LineIntegral` the ratio is the work of the score along the straight segment.

Before each trajectory the momentum is refreshed, in part or whole, $p \leftarrow \sqrt{1 - r}\, p + \sqrt{r}\, \xi$.
Where a trajectory is rejected, the old momentum is reversed: without that, a chain with partial refreshment would not
leave the law invariant.

The step is drawn anew for every trajectory, within a fifth of `step_size`: trajectories of a fixed length return to
near their start for some scale of the posterior, and a chain of them hardly moves there.

Where there is a density, NumPyro's own `HMC` and `NUTS` can be used (`with_density`). This kernel is for scores that
are not gradients, and for persistent momentum.

References:
    Horowitz, A generalized guided Monte Carlo algorithm, 1991, https://doi.org/10.1016/0370-2693(91)90812-5.
    Neal, MCMC using Hamiltonian dynamics, 2011, https://arxiv.org/abs/1206.1901.
    Du et al., Reduce, reuse, recycle, 2023, https://arxiv.org/abs/2302.11552.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.gradient.base import MetropolisKernel, flatten
from numpyro_diffusion.infer.gradient.target import Evaluation, Target
from numpyro_diffusion.infer.kernel.adapt import Adaptation, Root, running_mean
from numpyro_diffusion.infer.kernel.choose import metropolis
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.density import LogPrior, Source
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading

_JITTER = 0.2
"""Relative range of the step of a trajectory, either way."""


class ScoreHMCState(NamedTuple):
    """State of `ScoreHMC`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        momentum: current momentum, in the preconditioner's coordinates, (D,).
        evaluation: the target at the point.
        potential_energy: negative log-density of the target, or NaN without a density.
        adapt_state: state of the adaptation.
        accept_prob: acceptance probability of the last trajectory.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        step_size: centre of the next trajectory's step.
        circulation: work of the score around the triangle of the trajectory's ends and its start moved by the momentum,
            in nats, if `density` is a `LineIntegral`; otherwise NaN.
        num_score_evals: denoiser evaluations of the last step, per point.
        diverging: whether the end's log-density or gradient was not finite; it was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    momentum: jax.Array
    evaluation: Evaluation
    potential_energy: jax.Array
    adapt_state: Any
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    step_size: jax.Array
    circulation: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


def leapfrog(
    target: Target,
    q: jax.Array,
    momentum: jax.Array,
    evaluation: Evaluation,
    root: Root,
    step_size: jax.Array,
    num_steps: int,
) -> tuple[jax.Array, jax.Array, Evaluation]:
    """A trajectory: point (D,), momentum (D,) in the preconditioner's coordinates, and the target at the end."""

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        q, momentum, at = carry
        momentum = momentum + 0.5 * step_size * root.pull(at.gradient)
        q = q + step_size * root.push(momentum)
        at = target.evaluate(q)
        return (q, momentum + 0.5 * step_size * root.pull(at.gradient), at), None

    return jax.lax.scan(step, (q, momentum, evaluation), None, num_steps)[0]


class ScoreHMC(MetropolisKernel[ScoreHMCState]):
    """Leapfrog by the score, tested by a density or by the score's line integral, with or without persistent momentum.

    Args:
        model: NumPyro model.
        num_steps: leapfrog steps of a trajectory.
        momentum_refresh: share of the momentum that is drawn anew before a trajectory, in (0, 1]; 1 draws all of it.
        density: what stands for the log-density of diffusion priors: "auto", "denoiser" or "flow" as in `Density`, or
            `LineIntegral()`, which is approximate, for a prior with only a score.
        step_size: where the step starts, in units of the preconditioner's root; None for D^(-1/3).
        target_accept_prob: acceptance to which the step adapts in warm-up, in (0, 1); None keeps `step_size`.
        adapt_mass_matrix: whether warm-up estimates a preconditioner; the identity if not.
        dense_mass: whether it is dense, or diagonal.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` is not callable or `density` is of another type.
        ValueError: if a number is out of its range, or `density` unknown or `Score`; when run, for a model without
            latent sites, with discrete ones, or that cannot be differentiated, or a prior without the density that is
            needed.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import LineIntegral, ScoreHMC
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> kernel = ScoreHMC(model, density=LineIntegral())
        >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "potential_energy", "step_size", "circulation", "num_score_evals")

    def __init__(
        self,
        model: Model,
        *,
        num_steps: int = 8,
        momentum_refresh: float = 1.0,
        density: LogPrior | Source = "auto",
        step_size: float | None = None,
        target_accept_prob: float | None = 0.8,
        adapt_mass_matrix: bool = True,
        dense_mass: bool = False,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, density, init_strategy)
        _checks.at_least(1, num_steps=num_steps)
        if not 0.0 < momentum_refresh <= 1.0:
            raise ValueError(f"momentum_refresh must lie in (0, 1]; got {momentum_refresh}")
        self._num_steps, self._momentum_refresh = num_steps, momentum_refresh
        self._adaptation = Adaptation(adapt_mass_matrix, dense_mass, step_size, target_accept_prob)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> ScoreHMCState:
        key, key_first, key_momentum, key_adapt = jax.random.split(key, 4)
        z, evaluation = self._first(key_first, init_params, reading)
        q = flatten(z)
        adapt_state = self._adaptation.start(self._num_warmup, q, key_adapt)
        zero, count = jnp.zeros_like(evaluation.log_density), jnp.zeros((), jnp.int32)
        return ScoreHMCState(
            i=count,
            z=z,
            momentum=jax.random.normal(key_momentum, q.shape, q.dtype),
            evaluation=evaluation,
            potential_energy=-evaluation.log_density,
            adapt_state=adapt_state,
            accept_prob=zero,
            mean_accept_prob=zero,
            step_size=adapt_state.step_size,
            circulation=zero,
            num_score_evals=count,
            diverging=jnp.array(False),
            rng_key=key,
        )

    def _step(self, state: ScoreHMCState, reading: Reading) -> ScoreHMCState:
        key, key_momentum, key_accept, key_length = jax.random.split(state.rng_key, 4)
        target, here = self._target(state.z, reading), state.evaluation
        q, root = target.flat, self._adaptation.root(state.adapt_state)
        fresh = jax.random.normal(key_momentum, q.shape, q.dtype)
        momentum = jnp.sqrt(1.0 - self._momentum_refresh) * state.momentum + jnp.sqrt(self._momentum_refresh) * fresh
        jitter = jax.random.uniform(key_length, (), q.dtype, 1.0 - _JITTER, 1.0 + _JITTER)
        step_size = jitter * state.step_size
        q_new, momentum_new, there = leapfrog(target, q, momentum, here, root, step_size, self._num_steps)
        log_ratio = target.log_ratio(here, there, q, q_new)
        log_ratio += 0.5 * (jnp.sum(momentum**2) - jnp.sum(momentum_new**2))
        circulation = target.circulation(q, q_new, q + root.push(momentum))
        new, old = (q_new, momentum_new, there), (q, -momentum, here)
        choice = metropolis(key_accept, log_ratio, new, old, there.log_density, there.gradient)
        (q, momentum, evaluation), accept_prob = choice.point, choice.accept_prob
        evaluations = self._evaluations(reading, self._num_steps, tests=1)
        adapt_state = self._adaptation.update(state.adapt_state, state.i, self._num_warmup, accept_prob, q)
        return ScoreHMCState(
            i=state.i + 1,
            z=target.unflatten(q),
            momentum=momentum,
            evaluation=evaluation,
            potential_energy=-evaluation.log_density,
            adapt_state=adapt_state,
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, accept_prob, state.i, self._num_warmup),
            step_size=adapt_state.step_size,
            circulation=circulation,
            num_score_evals=jnp.asarray(evaluations, jnp.int32),
            diverging=choice.diverging,
            rng_key=key,
        )

    def get_diagnostics_str(self, state: ScoreHMCState) -> str:
        """For the progress bar."""
        return f"step {state.step_size:.2g}, acc. prob={state.mean_accept_prob:.2f}"
