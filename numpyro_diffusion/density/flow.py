r"""The log-density of a diffusion model, by its probability flow.

Along the flow $\dot w(\varphi)$ of `solve.flow` the density changes by the divergence of the velocity. It ends in
$N(0, I)$ and starts at $w = (x - m) / \rho_0$, so

$$\log p(x) = \log N(w_1; 0, I) + \int_{\varphi_0}^{\varphi_1} \mathrm{tr}\, \frac{\partial \dot w}{\partial w}\,
\mathrm{d}\varphi - d \log \rho_0,$$

one augmented solve by Heun's method or an adaptive one. The trace takes $d$ Jacobian-vector products an evaluation, or
it is estimated: $\mathrm{tr}\, A = E[z^\top A z]$ for probes with $E[z z^\top] = I$ (Hutchinson), drawn once and held
along the path, so that the integral is unbiased and its spread over the probes is its standard error.

There are three errors: that of the solver, of order two in the step; the smoothing of $p$ by the smallest noise level
$\lambda_0$, of order $\lambda_0^2$; and the terminal law, a Gaussian with the data's overall location and scale instead
of the data's law under the largest noise. The last is zero only for an isotropic Gaussian; it is of order
$(s / \lambda_1)^2$ in nats.

The gradient in $x$ is *defined* as the score at $\lambda_0$, in forward and reverse mode, and takes no solve. It is the
gradient of this density if the score is exact. That of a network is off by its error in $\hat\varepsilon$ over
$\lambda_0$, which the flow hardly feels, as its velocity is $\hat\varepsilon$ itself: `gradient="solve"` differentiates
the value, for moves that should follow it and discrepancies that should not blame draws for the network. In the
denoiser's own arrays, a condition among them (`denoise.Conditioned`), the derivative is always that of the solve.

References:
    Chen et al., Neural ordinary differential equations, 2018, https://arxiv.org/abs/1806.07366.
    Grathwohl et al., FFJORD: free-form continuous dynamics for scalable reversible generative models, 2019 (probes held
    along the path), https://arxiv.org/abs/1810.01367.
    Song et al., Score-based generative modeling through stochastic differential equations, 2021, section 4.3,
    https://arxiv.org/abs/2011.13456.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.denoise import Denoiser, Product, density_kind
from numpyro_diffusion.denoise.wrapped import inside
from numpyro_diffusion.solve import AdaptiveFlow, Heun, flow

Gradient = Literal["score", "solve"]


class LogProb(NamedTuple):
    """A log-density with its error, as far as it is known, and its cost."""

    value: jax.Array  # nats, a scalar; its gradient in x is the score, or that of the solve
    standard_error: jax.Array  # of the probes: 0 for the exact trace, NaN for a single probe
    num_evals: jax.Array  # denoiser evaluations, each with its Jacobian-vector products


def log_prob(
    denoiser: Denoiser,
    x: jax.Array,
    solver: Heun | AdaptiveFlow = Heun(64),  # noqa: B008
    *,
    num_probes: int | None = None,
    key: jax.Array | None = None,
    probes: Literal["rademacher", "normal"] = "rademacher",
    gradient: Gradient = "score",
) -> LogProb:
    r"""The normalised log-density of a clean point under the model's probability flow.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.
        solver: `Heun`, for its grid and number of times, or `AdaptiveFlow`, for its tolerances.
        num_probes: number of Hutchinson probes; None for the exact trace.
        key: random key of the probes.
        probes: their law; Rademacher probes have the smaller variance.
        gradient: what the gradient in `x` is: "score" for the denoiser's at the smallest noise level, one evaluation,
            or "solve" for that of the value, through the solve.

    Returns:
        A `LogProb`. The gradient of its value in `x` is as `gradient` says, that in the arrays of the denoiser is the
        solve's.

    Raises:
        ValueError: if `x` is not of `event_shape`, `num_probes` is below one, `probes` or `gradient` unknown, or a key
            is missing or not needed.
        TypeError: if `solver` is of another kind, or adaptive with `gradient="solve"`, since its loop has no gradient;
            or the denoiser is a `Product`, whose flow has another law.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.density import log_prob
        >>> round(float(log_prob(Gaussian([0.0]), jnp.zeros(1)).value), 2)
        -0.92
    """
    x = jnp.asarray(x, jnp.result_type(x, float))
    if x.shape != denoiser.event_shape:
        raise ValueError(f"x must be one point of shape {denoiser.event_shape}; got {x.shape}. Use jax.vmap")
    if not isinstance(solver, AdaptiveFlow) and type(solver) is not Heun:
        raise TypeError(f"solver must be Heun or AdaptiveFlow; got {solver!r}")
    if not has_flow(denoiser):
        raise TypeError(
            "a Product has no probability flow: that of its summed scores is not the flow of its law. Its log_density "
            "is known up to a constant; kernels take it with Density(), NUTS with infer.with_density(model)"
        )
    _checks.one_of("gradient", gradient, get_args(Gradient))
    drawn = _draw_probes(x, num_probes, key, probes)
    if gradient == "solve":
        if isinstance(solver, AdaptiveFlow):
            raise TypeError(f'gradient="solve" needs a solver with a fixed grid, Heun; got {solver!r}')
        with _precision.highest():
            return LogProb(*_solve(solver, denoiser, x, drawn))
    value, standard_error, num_evals = _log_prob(solver, denoiser, x, drawn)
    return LogProb(value, standard_error, num_evals)


def has_flow(denoiser: Denoiser) -> bool:
    """Whether the probability flow of a denoiser ends at its own law, as that of a `Product` does not."""
    return not isinstance(inside(denoiser), Product)


def _draw_probes(x: jax.Array, num_probes: int | None, key: jax.Array | None, law: str) -> jax.Array | None:
    _checks.one_of("probes", law, ("rademacher", "normal"))
    if num_probes is None:
        if key is not None:
            raise ValueError("key is for probes; the exact trace draws none. Give num_probes=, or no key")
        return None
    _checks.at_least(1, num_probes=num_probes)
    if key is None:
        raise ValueError(f"num_probes={num_probes} needs a key=")
    draw = jax.random.rademacher if law == "rademacher" else jax.random.normal
    return draw(key, (num_probes, x.size), x.dtype)


def _velocity_and_traces(
    denoiser: Denoiser, w: jax.Array, t: ArrayLike, probes: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The velocity of the flow and its divergence: one number if exact, one per probe if not."""

    def flat_velocity(w: jax.Array) -> jax.Array:
        return flow.velocity(denoiser, w.reshape(denoiser.event_shape), t).reshape(-1)

    value, jvp = jax.linearize(flat_velocity, w)
    if probes is None:
        return value, jnp.trace(jax.vmap(jvp)(jnp.eye(w.size, dtype=w.dtype)))[None]
    return value, jnp.sum(probes * jax.vmap(jvp)(probes), axis=-1)


def _solve(
    solver: Heun | AdaptiveFlow, denoiser: Denoiser, x: jax.Array, probes: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    times = solver.times(denoiser)[::-1]
    start = flow.to_rest(denoiser, denoiser.schedule.alpha(times[0]) * x, times[0]).reshape(-1).astype(x.dtype)
    state = start, jnp.zeros(1 if probes is None else len(probes), x.dtype)

    def slopes(t: ArrayLike, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _velocity_and_traces(denoiser, w, t, probes)

    if isinstance(solver, AdaptiveFlow):
        velocity = lambda t, state: slopes(t, state[0])  # noqa: E731
        (w, integrals), num_evals = solver.follow(denoiser, velocity, state, times[0], times[-1])
    else:
        ticks = jnp.diff(flow.clock(denoiser, times)).astype(x.dtype)

        def step(state: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            w, integrals = state
            velocity, traces = slopes(times[k], w)
            velocity_there, traces_there = slopes(times[k + 1], w + ticks[k] * velocity)
            w = w + 0.5 * ticks[k] * (velocity + velocity_there)
            return (w, integrals + 0.5 * ticks[k] * (traces + traces_there)), None

        body = jax.checkpoint(step, prevent_cse=False)  # a reverse pass would hold all steps' tangents in memory
        (w, integrals), _ = jax.lax.scan(body, state, jnp.arange(solver.num_times - 1))
        num_evals = jnp.asarray(2 * (solver.num_times - 1))
    log_start = norm.logpdf(w).sum() - x.size * jnp.log(flow.spread(denoiser, times[0])).astype(x.dtype)
    if probes is None:
        standard_error = jnp.zeros((), x.dtype)
    else:
        spread = jnp.std(integrals, ddof=1) if len(integrals) > 1 else jnp.full((), jnp.nan, x.dtype)
        standard_error = spread / jnp.sqrt(jnp.asarray(len(integrals), x.dtype))
    return log_start + jnp.mean(integrals), jax.lax.stop_gradient(standard_error), num_evals


def clean_score(denoiser: Denoiser, x: jax.Array) -> jax.Array:
    """The gradient of log p at a clean point, taken at the smallest noise level.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.

    Returns:
        The gradient, of `event_shape`.
    """
    t = denoiser.schedule.t_min
    alpha = denoiser.schedule.alpha(t).astype(x.dtype)
    return (alpha * denoiser((alpha * x).astype(x.dtype), t).score).astype(x.dtype)


def clean_log_density(denoiser: Denoiser, x: jax.Array) -> jax.Array:
    r"""A denoiser's own log-density at a clean point, $\log p_t(\alpha_t x) + d \log \alpha_t$.

    Like the flow's it is that of the law under the smallest noise; it is normalised if the denoiser's is.

    Args:
        denoiser: a model with a `log_density`.
        x: clean point of `event_shape`.

    Returns:
        The log-density in nats, a scalar.

    Raises:
        ValueError: if it is known up to a constant, and is differentiated in what the constant depends on.
    """
    if density_kind(denoiser) == "unnormalized":
        return _up_to_a_constant(denoiser, x)
    return _own_log_density(denoiser, x)


def _own_log_density(denoiser: Denoiser, x: jax.Array) -> jax.Array:
    t = denoiser.schedule.t_min
    alpha = denoiser.schedule.alpha(t)
    return (denoiser.log_density((alpha * x).astype(x.dtype), t) + x.size * jnp.log(alpha)).astype(x.dtype)  # type: ignore[attr-defined]


@jax.custom_jvp
def _up_to_a_constant(denoiser: Denoiser, x: jax.Array) -> jax.Array:
    return _own_log_density(denoiser, x)


@partial(_up_to_a_constant.defjvp, symbolic_zeros=True)
def _up_to_a_constant_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (denoiser, x), (denoiser_dot, x_dot) = primals, tangents
    dots = jax.tree.leaves(denoiser_dot, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    if not all(isinstance(dot, SymbolicZero) for dot in dots):
        raise ValueError(
            "this log-density is known but for a constant that depends on the condition (or another array of the "
            "denoiser), so it has a gradient in the point only. For a likelihood, or a prior that depends on another "
            'latent site, use density="flow"'
        )
    return jax.jvp(partial(_own_log_density, denoiser), (x,), (_instantiated(x_dot, x),))


def _instantiated(dot: jax.Array | SymbolicZero, x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x) if isinstance(dot, SymbolicZero) else dot


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_prob(
    solver: Heun | AdaptiveFlow, denoiser: Denoiser, x: jax.Array, probes: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    with _precision.highest():
        return _solve(solver, denoiser, x, probes)


@partial(_log_prob.defjvp, symbolic_zeros=True)
def _log_prob_jvp(solver: Heun | AdaptiveFlow, primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    denoiser, x, probes = primals
    denoiser_dot, x_dot, _ = tangents
    leaves, structure = jax.tree.flatten(denoiser)
    dots = jax.tree.leaves(denoiser_dot, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

    def in_arrays(*moved: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        replaced = list(leaves)
        for i, leaf in zip(moving, moved, strict=True):
            replaced[i] = leaf
        with _precision.highest():  # this rule is traced where the derivative is taken
            value, standard_error, num_evals = _solve(solver, jax.tree.unflatten(structure, replaced), x, probes)
        return value, (standard_error, num_evals)

    if moving:
        value, dot, rest = jax.jvp(in_arrays, [leaves[i] for i in moving], [dots[i] for i in moving], has_aux=True)
    else:
        value, *rest = _log_prob(solver, denoiser, x, probes)
        dot = jnp.zeros((), x.dtype)
    if not isinstance(x_dot, SymbolicZero):
        with _precision.highest():
            dot = dot + jnp.vdot(clean_score(denoiser, x), x_dot)
    standard_error, num_evals = rest
    still = jnp.zeros_like(standard_error), np.zeros(jnp.shape(num_evals), jax.dtypes.float0)
    return (value, standard_error, num_evals), (dot.astype(value.dtype), *still)
