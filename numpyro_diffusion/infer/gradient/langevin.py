r"""Langevin dynamics on the joint posterior: unadjusted, which is biased, and with a Metropolis test, which is not.

Both propose

$$q' = q + h\, C\, \nabla \log \pi(q) + \sqrt{2 h}\, C^{1/2} \xi, \qquad \xi \sim N(0, I),$$

with a preconditioner $C$. `ULA` takes every proposal: it needs no density, and its law has an error of order $h$. On
a Gaussian of covariance $C$ its variance is exactly $1 / (1 - h / 2)$ times the true one. `MALA` accepts with

$$a = \min\left(1, \frac{\pi(q')\, k(q \mid q')}{\pi(q)\, k(q' \mid q)}\right), \qquad
k(q' \mid q) = N\!\left(q';\; q + h\, C(q) \nabla \log \pi(q),\; 2 h\, C(q)\right),$$

where the density of the reverse move has the new point's gradient and, where $C$ depends on the point, the new point's
$C$. Each chain has its own test. In many dimensions the best acceptance is 0.574, to which dual averaging steers $h$.

With `Tweedie(level)` the preconditioner is the prior's own posterior covariance $\mathrm{Cov}[x \mid x_t]$ at a noise
level, which tells what directions are wide near this point at this scale.

References:
    Roberts and Tweedie, Exponential convergence of Langevin distributions and their discrete approximations, 1996,
    https://doi.org/10.2307/3318418.
    Roberts and Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions, 1998 (0.574),
    https://doi.org/10.1111/1467-9868.00123.
    Girolami and Calderhead, Riemann manifold Langevin and Hamiltonian Monte Carlo methods, 2011 (position-dependent C,
    their simplified proposal), https://doi.org/10.1111/j.1467-9868.2010.00765.x.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion.infer.gradient.base import GradientKernel, MetropolisKernel, flatten
from numpyro_diffusion.infer.gradient.target import Evaluation
from numpyro_diffusion.infer.gradient.tweedie import Tweedie
from numpyro_diffusion.infer.kernel.adapt import Adaptation, Root, running_mean
from numpyro_diffusion.infer.kernel.choose import all_finite, metropolis, select
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.density import LogPrior, Score, Source
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.solve.langevin import langevin_step

_WARMUP_STEP = 0.1
"""Largest step of `ULA` while it estimates its preconditioner."""


class ULAState(NamedTuple):
    """State of `ULA`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        evaluation: the target there.
        adapt_state: state of the preconditioner's adaptation.
        step_size: the step h.
        num_score_evals: denoiser evaluations of the last step, per point.
        diverging: whether the last proposal was not finite; the chain stayed where it was.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    evaluation: Evaluation
    adapt_state: Any
    step_size: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class MALAState(NamedTuple):
    """State of `MALA`.

    Args:
        i: number of steps done.
        z: current point, by site, in NumPyro's unconstrained coordinates.
        evaluation: the target there.
        root: root of the preconditioner there, where it depends on the point; None where it does not.
        potential_energy: negative log-density of the target, or NaN without a density.
        adapt_state: state of the adaptation.
        accept_prob: acceptance probability of the last step.
        mean_accept_prob: its mean over the phase (warm-up or sampling) so far.
        step_size: the step h of the next proposal.
        circulation: work of the score around the triangle of point, proposal and the proposal's mean, in nats, if the
            `density` is a `LineIntegral`; otherwise NaN.
        num_score_evals: denoiser evaluations of the last step, per point.
        diverging: whether the proposal's log-density or gradient was not finite; it was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: dict[str, jax.Array]
    evaluation: Evaluation
    root: Root | None
    potential_energy: jax.Array
    adapt_state: Any
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    step_size: jax.Array
    circulation: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


def propose(key: jax.Array, q: jax.Array, gradient: jax.Array, root: Root, step_size: jax.Array) -> jax.Array:
    """One preconditioned Langevin step from a point of shape (D,)."""
    return q + root.push(langevin_step(key, jnp.zeros_like(q), root.pull(gradient), step_size))


def log_transition(q: jax.Array, q_new: jax.Array, gradient: jax.Array, root: Root, step_size: jax.Array) -> jax.Array:
    """Log-density of proposing `q_new` from `q`, with the gradient and the root at `q`; up to a constant."""
    residual = root.unpush(q_new - q) - step_size * root.pull(gradient)
    return -0.25 * jnp.sum(residual**2) / step_size - root.log_det


def log_reversal(
    q: jax.Array,
    q_new: jax.Array,
    gradient: jax.Array,
    gradient_new: jax.Array,
    root: Root,
    root_new: Root,
    step_size: jax.Array,
) -> jax.Array:
    """Log-density of proposing the way back minus that of the way there."""
    there = log_transition(q, q_new, gradient, root, step_size)
    return log_transition(q_new, q, gradient_new, root_new, step_size) - there


class ULA(GradientKernel[ULAState]):
    r"""Unadjusted Langevin: every proposal is taken, and the law has an error of the order of the step.

    With the preconditioner at the posterior's covariance, variances are too large by $1 / (1 - h / 2)$ where the
    posterior is Gaussian. It needs only the score of the diffusion priors.

    A preconditioner estimated from draws that are too wide makes the next draws wider still, and from $h = 1/2$ they
    grow without bound. So the step in warm-up is at most 0.1, which leaves the estimate at most 6 % too large, and
    `step_size` is for the draws that are kept. Before the first estimate the step is in squared units of the sites: if
    the posterior is narrower than about a quarter, rescale the model.

    Args:
        model: NumPyro model.
        step_size: the step $h$, in units of the preconditioner; positive. From 2 on it explodes.
        adapt_mass_matrix: whether warm-up estimates a preconditioner; the identity if not.
        dense_mass: whether it is dense, or diagonal.
        init_strategy: where chains start, as in NumPyro; None draws diffusion sites from their priors.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: if a number is out of its range; when run, for a model without latent sites, with discrete ones, or
            that cannot be differentiated, or a prior that depends on other latent sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import ULA
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(ULA(model, step_size=0.05), num_warmup=200, num_samples=2000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.5)
        True
    """

    statistics = ("step_size", "num_score_evals")

    def __init__(
        self,
        model: Model,
        *,
        step_size: float = 0.1,
        adapt_mass_matrix: bool = True,
        dense_mass: bool = False,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, Score(), init_strategy)
        self._adaptation = Adaptation(adapt_mass_matrix, dense_mass, step_size, None)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> ULAState:
        key, key_first, key_adapt = jax.random.split(key, 3)
        z, evaluation = self._first(key_first, init_params, reading)
        adapt_state = self._adaptation.start(self._num_warmup, flatten(z), key_adapt)
        count = jnp.zeros((), jnp.int32)
        return ULAState(count, z, evaluation, adapt_state, adapt_state.step_size, count, jnp.array(False), key)

    def _step(self, state: ULAState, reading: Reading) -> ULAState:
        key, key_step = jax.random.split(state.rng_key)
        target = self._target(state.z, reading)
        root = self._adaptation.root(state.adapt_state)
        step_size = jnp.asarray(self._adaptation.step_size, target.flat.dtype)
        if self._adaptation.adapt_mass_matrix:
            step_size = jnp.where(state.i < self._num_warmup, jnp.minimum(step_size, _WARMUP_STEP), step_size)
        q_new = propose(key_step, target.flat, state.evaluation.gradient, root, step_size)
        there = target.evaluate(q_new)
        fine = all_finite((q_new, there.gradient))
        q, evaluation = select(fine, (q_new, there), (target.flat, state.evaluation))
        adapt_state = self._adaptation.update(state.adapt_state, state.i, self._num_warmup, jnp.ones((), q.dtype), q)
        return state._replace(
            i=state.i + 1,
            z=target.unflatten(q),
            evaluation=evaluation,
            adapt_state=adapt_state,
            step_size=step_size,
            num_score_evals=jnp.asarray(self._evaluations(reading), jnp.int32),
            diverging=~fine,
            rng_key=key,
        )

    def get_diagnostics_str(self, state: ULAState) -> str:
        """For the progress bar."""
        return f"step {state.step_size:.2g}, unadjusted"


class MALA(MetropolisKernel[MALAState]):
    r"""Langevin proposals with a Metropolis test on the density, one for each chain.

    Args:
        model: NumPyro model.
        density: what stands for the log-density of diffusion priors: "auto", "denoiser" or "flow" as in `Density`, or
            `LineIntegral()`, which is approximate, for a prior with only a score.
        step_size: where the step $h$ starts, in units of the preconditioner; None for $D^{-1/3}$.
        target_accept_prob: acceptance to which $h$ adapts in warm-up, in (0, 1); None keeps `step_size`.
        adapt_mass_matrix: whether warm-up estimates a preconditioner; the identity if not.
        dense_mass: whether it is dense, or diagonal.
        preconditioner: `Tweedie(level)` instead of one estimate for all points.
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
        >>> from numpyro_diffusion.infer import MALA
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(MALA(model), num_warmup=300, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "potential_energy", "step_size", "circulation", "num_score_evals")
    reversible = True

    def __init__(
        self,
        model: Model,
        *,
        density: LogPrior | Source = "auto",
        step_size: float | None = None,
        target_accept_prob: float | None = 0.574,
        adapt_mass_matrix: bool = True,
        dense_mass: bool = False,
        preconditioner: Tweedie | None = None,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, density, init_strategy)
        if not (preconditioner is None or isinstance(preconditioner, Tweedie)):
            raise TypeError(f"preconditioner must be Tweedie(level) or None; got {preconditioner!r}. See dense_mass")
        self._tweedie = preconditioner
        adapts = adapt_mass_matrix and preconditioner is None
        self._adaptation = Adaptation(adapts, dense_mass, step_size, target_accept_prob)

    def _root(self, z: dict[str, jax.Array], reading: Reading) -> Root | None:
        """The root of the preconditioner at a point, None if it is the same everywhere."""
        return None if self._tweedie is None else self._tweedie.root(reading, z)

    def _check_model(self, reading: Reading) -> None:
        super()._check_model(reading)
        if self._tweedie is not None:
            self._tweedie.check(reading)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> MALAState:
        key, key_first, key_adapt = jax.random.split(key, 3)
        z, evaluation = self._first(key_first, init_params, reading)
        adapt_state = self._adaptation.start(self._num_warmup, flatten(z), key_adapt)
        zero, count = jnp.zeros_like(evaluation.log_density), jnp.zeros((), jnp.int32)
        return MALAState(
            i=count,
            z=z,
            evaluation=evaluation,
            root=self._root(z, reading),
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

    def _step(self, state: MALAState, reading: Reading) -> MALAState:
        key, key_step, key_accept = jax.random.split(state.rng_key, 3)
        target, h = self._target(state.z, reading), state.step_size
        q, here = target.flat, state.evaluation
        root = self._adaptation.root(state.adapt_state) if state.root is None else state.root
        q_new = propose(key_step, q, here.gradient, root, h)
        there = target.evaluate(q_new)
        root_new = root if self._tweedie is None else self._tweedie.root(reading, target.unflatten(q_new))
        log_ratio = target.log_ratio(here, there, q, q_new)
        log_ratio += log_reversal(q, q_new, here.gradient, there.gradient, root, root_new, h)
        mean = q + h * root.push(root.pull(here.gradient))
        new, old = (q_new, there, root_new), (q, here, root)
        choice = metropolis(key_accept, log_ratio, new, old, there.log_density, there.gradient)
        (q, evaluation, root), accept_prob = choice.point, choice.accept_prob
        adapt_state = self._adaptation.update(state.adapt_state, state.i, self._num_warmup, accept_prob, q)
        return MALAState(
            i=state.i + 1,
            z=target.unflatten(q),
            evaluation=evaluation,
            root=None if self._tweedie is None else root,
            potential_energy=-evaluation.log_density,
            adapt_state=adapt_state,
            accept_prob=accept_prob,
            mean_accept_prob=running_mean(state.mean_accept_prob, accept_prob, state.i, self._num_warmup),
            step_size=adapt_state.step_size,
            circulation=target.circulation(target.flat, q_new, mean),
            num_score_evals=jnp.asarray(self._evaluations(reading, tests=1), jnp.int32),
            diverging=choice.diverging,
            rng_key=key,
        )

    def refresh(self, state: MALAState, model_args: tuple, model_kwargs: dict | None) -> MALAState:
        """Evaluates the target anew after a composite kernel has moved the point or what it is conditioned on."""
        state = super().refresh(state, model_args, model_kwargs)
        return state._replace(root=self._root(state.z, self.read(model_args, model_kwargs)))

    def get_diagnostics_str(self, state: MALAState) -> str:
        """For the progress bar."""
        return f"step {state.step_size:.2g}, acc. prob={state.mean_accept_prob:.2f}"
