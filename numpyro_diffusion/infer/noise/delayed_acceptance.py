r"""Delayed acceptance: moves by a cheap surrogate of the model, confirmed by the model itself.

Let $\pi$ be the posterior, dear to evaluate, and $\tilde\pi$ that of a surrogate on the same sites. A step makes $k$
moves of a kernel $\tilde K$ that is reversible with respect to $\tilde\pi$, from $q$ to $q'$, and accepts $q'$ with

$$a = \min\left(1, \frac{\pi(q')\, \tilde\pi(q)}{\pi(q)\, \tilde\pi(q')}\right).$$

Because $\tilde\pi(q)\, \tilde K^k(q, q') = \tilde\pi(q')\, \tilde K^k(q', q)$, this is the Metropolis-Hastings ratio of
the proposal $\tilde K^k$: the step is reversible with respect to $\pi$, exactly, at one evaluation of $\pi$ and no
gradient of it (Liu's surrogate transition; with $k = 1$ and a Metropolis kernel, the delayed acceptance of Christen and
Fox, which evaluates nothing where the screen rejects). The conditions:

* $\tilde K$ is reversible, the same kernel in all $k$ moves. Metropolis kernels are, and so are HMC and NUTS, which
  draw their momentum anew in each move: of two points of a tree, each is reached from the other by its own weight times
  the same number. Mixtures of such kernels are; a cycle is not.
* $\tilde\pi > 0$ wherever $\pi > 0$: where the surrogate vanishes, no chain goes.
* nothing adapts; so exactness begins after warm-up, where the inner kernel adapts to $\tilde\pi$.

The coordinates are those of `NoiseSpace`: the noise behind diffusion sites, and the other sites unconstrained. So the
surrogate of a model with a dear flow is the same model with a cheap one, a `FlowMap` that was distilled from it, or a
solver of fewer steps, and the law is that of the dear one. In general it is any model of the same sites: a coarser
grid, a linearised forward operator, fewer terms.

What it gains is decided by the spread of $\log \pi / \tilde\pi$ over the posterior. If that is Gaussian with standard
deviation $\tau$ and the ends are far apart, the acceptance is $\operatorname{erfc}(\tau / 2)$: .48 at 1, .16 at 2, .03
at 3. Fewer moves per test raise it, because the ends are then alike. Precise data make $\tau$ large.

References:
    Christen and Fox, Markov chain Monte Carlo using an approximation, 2005, https://doi.org/10.1198/106186005X76983.
    Liu, Monte Carlo strategies in scientific computing, 2001, section 9.4.3 (the surrogate transition method).
    Hoffman and Gelman, The No-U-Turn sampler, 2014, https://arxiv.org/abs/1111.4246.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer import NUTS

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.adapt import pool_chains
from numpyro_diffusion.infer.kernel.choose import all_finite, metropolis
from numpyro_diffusion.infer.kernel.contract import hand_on, pooled
from numpyro_diffusion.infer.kernel.inner import KernelLike, is_reversible, takes_point
from numpyro_diffusion.infer.kernel.stand_in import Point, Transformed, inside
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed, check_names, check_walkable
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model, with_flow
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.noise.coordinates import InNoise
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace, flow_evaluations
from numpyro_diffusion.reparam import noise_name
from numpyro_diffusion.solve import FlowMap, Solver
from numpyro_diffusion.solve.flow import check_flow


class DelayedAcceptanceState(NamedTuple):
    """State of `DelayedAcceptance`; statistics that the inner kernel does not have are NaN.

    Args:
        z: constrained values of the original latent and deterministic sites.
        inner_state: state of the inner kernel, on the surrogate.
        log_correction: of the model's density over the surrogate's, at the point.
        potential_energy: negative joint log-density of the model there.
        accept_prob: acceptance probability of the last test by the model.
        screen_accept_prob: mean acceptance statistic of the inner kernel in the last step.
        step_size: the inner kernel's step size.
        num_steps: steps of the inner kernel's trajectories in the last step.
        num_likelihood_evals: evaluations of the model's likelihood in the last step: 0 if the inner moves led nowhere.
        num_surrogate_evals: evaluations of the surrogate's likelihood, most of them with a gradient.
        num_score_evals: evaluations of denoisers and flow maps in the last step, per point, a gradient as one solve.
        diverging: whether a trajectory diverged, or the model's density was not a number at the proposal.
        rng_key: random key.
    """

    z: Point
    inner_state: Any
    log_correction: jax.Array
    potential_energy: jax.Array
    accept_prob: jax.Array
    screen_accept_prob: jax.Array
    step_size: jax.Array
    num_steps: jax.Array
    num_likelihood_evals: jax.Array
    num_surrogate_evals: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class DelayedAcceptance(NoiseSpace):
    r"""Moves by a surrogate of a model, in noise space, and confirms them by the model: exact for the model.

    Args:
        model: NumPyro model.
        surrogate: a model of the same sites and arguments; or a deterministic solver or `FlowMap`, for the same model
            with this flow (`with_flow`).
        inner: the kernel on the surrogate: a reversible one that can be handed a point, such as `numpyro.infer.NUTS` or
            HMC, `CrankNicolson` or `EllipticalSlice`; a class, a `functools.partial` of one, or a kernel.
        num_moves: number $k$ of moves between tests.
        init_strategy: where chains start, as in NumPyro; None leaves the start to the inner kernel.
        **inner_options: passed on to a class; `dense_mass` as in `NoiseSpace`.

    Raises:
        TypeError: if `surrogate` is neither a model nor a flow, or `inner` does not make an `MCMCKernel`.
        ValueError: if `num_moves` is below one, or `inner` is not reversible; when run, if the surrogate has other
            sites than the model, or one of them draws random numbers elsewhere or has discrete sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import DelayedAcceptance
        >>> from numpyro_diffusion.solve import DPMSolverPP
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> kernel = DelayedAcceptance(model, DPMSolverPP(3), num_moves=2)
        >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = (
        "accept_prob",
        "screen_accept_prob",
        "step_size",
        "num_steps",
        "num_likelihood_evals",
        "num_surrogate_evals",
        "num_score_evals",
    )
    status = Status("flow", True, "exact for the prior that the model's own flow pushes forward; moves by a surrogate")

    def __init__(
        self,
        model: Model,
        surrogate: Model | Solver | FlowMap,
        inner: KernelLike = NUTS,
        *,
        num_moves: int = 1,
        init_strategy: Strategy | None = None,
        **inner_options: Any,
    ) -> None:
        _checks.at_least(1, num_moves=num_moves)
        if isinstance(surrogate, Solver):
            check_flow(surrogate, name="surrogate")
        elif not callable(surrogate):
            raise TypeError(
                "surrogate must be a NumPyro model, a deterministic solver or a FlowMap; got "
                f"{type(surrogate).__name__}"
            )
        self._surrogate, self._num_moves = surrogate, num_moves
        self._surrogate_record: Record | None = None
        super().__init__(model, inner, init_strategy=init_strategy, **inner_options)
        if not (takes_point(self._inner) and is_reversible(self._inner)):
            raise ValueError(
                f"inner must be a reversible kernel that can be handed a point; {type(self._inner).__name__} is not "
                "known to be. Take NUTS, HMC, CrankNicolson, EllipticalSlice, MALA or a Mixture of them"
            )

    def _build_inner(self, wrapper: Callable[[Model], Model] = lambda model: model) -> None:
        if not isinstance(self._surrogate, Solver | FlowMap):
            self._surrogate = wrapper(self._surrogate)
        super()._build_inner()

    def _inner_law(self) -> InNoise:
        given: Any = self._surrogate
        self._surrogate_in_noise = InNoise(
            with_flow(self._model, given) if isinstance(given, Solver | FlowMap) else given
        )
        return self._surrogate_in_noise

    @property
    def _inner_warmup(self) -> int:
        return self._num_moves * self._num_warmup

    def _hand_on(self, reading: Reading) -> None:
        super()._hand_on(reading)
        self._surrogate_record = Record(self._surrogate_in_noise.model)
        hand_on(self.held, self._of_surrogate(reading))

    def _of_surrogate(self, reading: Reading) -> Reading:
        """The surrogate at the model's arguments."""
        if self._surrogate_record is None:
            self._surrogate_record = Record(self._surrogate_in_noise.model)
        return self._surrogate_record.at(reading.args, reading.kwargs)

    def _check_model(self, reading: Reading) -> None:
        name, cheap = type(self).__name__, self._of_surrogate(reading)
        for each in (reading, cheap):
            check_fixed(name, each.structure)
            check_continuous(name, each.structure)
            check_walkable(name, each.sites_in_the_abstract())
        check_names(name, reading.structure, map(noise_name, reading.structure.diffusion))
        ours, theirs = self._in_noise.shapes(reading), self._surrogate_in_noise.shapes(cheap)
        if ours != theirs:
            raise ValueError(
                f"surrogate must have the sites of the model, {ours} in noise space and unconstrained; got {theirs}"
            )
        if not ours:
            raise ValueError(f"{name} needs a latent site; the model has none")

    def _is_valid_noise(self, reading: Reading, point: Point) -> jax.Array:
        cheap = self._of_surrogate(reading)
        moves = jax.value_and_grad(lambda w: self._surrogate_in_noise.evaluate(cheap, w).log_density)(point)
        return all_finite(moves) & jnp.isfinite(self._in_noise.evaluate(reading, point).log_density)

    def _compare(self, reading: Reading, point: Point) -> tuple[Transformed, jax.Array]:
        """The model at a point, and the logarithm of its density over the surrogate's."""
        dear = self._in_noise.evaluate(reading, point)
        cheap = self._surrogate_in_noise.evaluate(self._of_surrogate(reading), point)
        return dear, dear.log_density - cheap.log_density

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> DelayedAcceptanceState:  # type: ignore[override]
        inner_state = self._start_inner(key, init_params, reading)
        dear, log_correction = self._compare(reading, self._point(inner_state))
        zero = jnp.zeros((), jnp.int32)
        return DelayedAcceptanceState(
            z={**dear.values, **dear.deterministic},
            inner_state=inner_state,
            log_correction=log_correction,
            potential_energy=-dear.log_density,
            accept_prob=jnp.ones_like(log_correction),
            screen_accept_prob=jnp.full_like(log_correction, jnp.nan),
            step_size=_statistic(getattr(inner_state, "adapt_state", inner_state), "step_size"),
            num_steps=zero,
            num_likelihood_evals=zero,
            num_surrogate_evals=zero,
            num_score_evals=zero,
            diverging=jnp.array(False),
            rng_key=inner_state.rng_key,
        )

    def _point(self, inner_state: Any) -> Point:
        return getattr(inner_state, self._inner.sample_field)

    def _screen(self, inner_state: Any, reading: Reading) -> tuple[Any, tuple]:
        """The inner kernel's moves; their steps, mean acceptance, and whether one diverged."""
        kwargs = inside(reading.kwargs)

        def move(_: int, carry: tuple) -> tuple:
            state, (steps, accepted, diverging) = carry
            moved = pool_chains(state, self._inner.sample(state, reading.args, kwargs), self._inner_warmup)
            made = jnp.asarray(getattr(moved, "num_steps", 1), jnp.int32)
            accept_prob = _statistic(moved, "accept_prob").astype(accepted.dtype)
            diverging |= jnp.any(jnp.asarray(getattr(moved, "diverging", False)))
            return moved, (steps + made, accepted + accept_prob / self._num_moves, diverging)

        nothing = jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.array(False)
        return jax.lax.fori_loop(0, self._num_moves, move, (inner_state, nothing))

    def _step(self, state: DelayedAcceptanceState, reading: Reading) -> DelayedAcceptanceState:  # type: ignore[override]
        key, key_moves, key_accept = jax.random.split(state.rng_key, 3)
        here = self._point(state.inner_state)
        screened, (steps, screen_accept_prob, diverging) = self._screen(
            state.inner_state._replace(rng_key=key_moves), reading
        )
        there = self._point(screened)
        has_moved = jnp.any(jnp.stack([jnp.any(there[name] != here[name]) for name in here]))
        old = state.z, state.log_correction, state.potential_energy

        def evaluate() -> tuple:
            dear, log_correction = self._compare(reading, there)
            new = {**dear.values, **dear.deterministic}, log_correction, -dear.log_density
            return jax.tree.map(lambda a, b: a.astype(jnp.result_type(b)), new, old)

        new = jax.lax.cond(pooled(has_moved.astype(float)) > 0.0, evaluate, lambda: old)
        log_ratio = new[1] - state.log_correction
        choice = metropolis(key_accept, log_ratio, (new, there), (old, here), -new[2])
        (z, log_correction, potential_energy), point = choice.point
        inner_state = self._inner.refresh(
            screened._replace(**{self._inner.sample_field: point}), reading.args, inside(reading.kwargs)
        )
        made, dear, cheap = has_moved.astype(jnp.int32), *self._evaluations(reading)
        num_surrogate_evals = steps + 1 + made
        return DelayedAcceptanceState(
            z=z,
            inner_state=inner_state,
            log_correction=log_correction,
            potential_energy=potential_energy,
            accept_prob=choice.accept_prob.astype(state.accept_prob.dtype),
            screen_accept_prob=screen_accept_prob.astype(state.screen_accept_prob.dtype),
            step_size=_statistic(getattr(inner_state, "adapt_state", inner_state), "step_size"),
            num_steps=steps,
            num_likelihood_evals=made,
            num_surrogate_evals=num_surrogate_evals,
            num_score_evals=made * dear + num_surrogate_evals * cheap,
            diverging=diverging | choice.diverging,
            rng_key=key,
        )

    def _evaluations(self, reading: Reading) -> tuple[int | jax.Array, int | jax.Array]:
        """Denoiser evaluations in one flow of all sites, of the model and of the surrogate; 0 if not known."""
        return flow_evaluations(reading), flow_evaluations(self._of_surrogate(reading))

    def refresh(self, state: DelayedAcceptanceState, model_args: tuple, model_kwargs: dict | None) -> Any:  # type: ignore[override]
        """Evaluates model and surrogate anew after a composite kernel has moved what they are conditioned on."""
        reading = self.read(model_args, model_kwargs)
        inner_state = self._inner.refresh(state.inner_state, model_args, inside(model_kwargs or {}))
        dear, log_correction = self._compare(reading, self._point(inner_state))
        return state._replace(
            inner_state=inner_state, log_correction=log_correction, potential_energy=-dear.log_density
        )

    def wrap_model(self, wrapper: Callable[[Model], Model]) -> "DelayedAcceptance":
        """A copy of this kernel on a wrapped model and a wrapped surrogate, for composite kernels."""
        kernel = super(NoiseSpace, self).wrap_model(wrapper)
        kernel._surrogate_record = None
        kernel._build_inner(wrapper)
        return kernel

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_surrogate_record": None}


def _statistic(state: Any, name: str) -> jax.Array:
    return jnp.asarray(getattr(state, name, jnp.nan))
