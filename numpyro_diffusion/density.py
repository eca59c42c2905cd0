r"""The log-density of a diffusion model, by its probability flow.

Along the flow $\dot w(\varphi)$ of `solve.ode` the density changes by the divergence of the velocity. It ends in
$N(0, I)$ and starts at $w = (x - m) / \rho_0$, so

$$\log p(x) = \log N(w_1; 0, I) + \int_{\varphi_0}^{\varphi_1} \mathrm{tr}\, \frac{\partial \dot w}{\partial w}\,
\mathrm{d}\varphi - d \log \rho_0,$$

one augmented solve by Heun's method with the exact trace ($d$ Jacobian-vector products an evaluation).

Three errors, none hidden: the solver's, of order two in the step; the smoothing of $p$ by the smallest noise level
$\lambda_0$, of order $\lambda_0^2$; and the terminal law, a Gaussian with the data's overall location and scale, where
the truth is the data's law under the largest noise. The last is zero only for an isotropic Gaussian; it is of order
$(s / \lambda_1)^2$ in nats.

The gradient in $x$ is *defined* as the score, in forward and reverse mode, and is never taken through the solve. In the
denoiser's own arrays the derivative is that of the solve.

References:
    Chen et al., Neural ordinary differential equations, 2018, https://arxiv.org/abs/1806.07366.
    Song et al., Score-based generative modeling through stochastic differential equations, 2021, section 4.3,
    https://arxiv.org/abs/2011.13456.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.scipy.stats import norm

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.solve import Heun, ode


def log_prob(denoiser: Denoiser, x: jax.Array, solver: Heun = Heun(64)) -> jax.Array:  # noqa: B008
    r"""The normalised log-density of a clean point under the model's probability flow.

    Args:
        denoiser: the model.
        x: clean point of `event_shape`.
        solver: the time grid of the flow and its number of times.

    Returns:
        A scalar, in nats. Its gradient in `x` is the score at the smallest noise level.

    Raises:
        ValueError: if `x` is not of `event_shape`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.density import log_prob
        >>> round(float(log_prob(Gaussian([0.0]), jnp.zeros(1))), 2)
        -0.92
    """
    x = jnp.asarray(x, jnp.result_type(x, float))
    if x.shape != denoiser.event_shape:
        raise ValueError(f"x must be one point of shape {denoiser.event_shape}; got {x.shape}. Use jax.vmap")
    return _log_prob(solver, denoiser, x)


def _velocity_and_trace(denoiser: Denoiser, w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The velocity of the flow and its divergence."""

    def flat_velocity(w: jax.Array) -> jax.Array:
        return ode.velocity(denoiser, w.reshape(denoiser.event_shape), t).reshape(-1)

    value, jvp = jax.linearize(flat_velocity, w)
    return value, jnp.trace(jax.vmap(jvp)(jnp.eye(w.size, dtype=w.dtype)))


def _solve(solver: Heun, denoiser: Denoiser, x: jax.Array) -> jax.Array:
    times = solver.times(denoiser)[::-1]
    ticks = jnp.diff(ode.clock(denoiser, times))

    def step(carry, k):
        w, integral = carry
        velocity, trace = _velocity_and_trace(denoiser, w, times[k])
        velocity_there, trace_there = _velocity_and_trace(denoiser, w + ticks[k] * velocity, times[k + 1])
        w = w + 0.5 * ticks[k] * (velocity + velocity_there)
        return (w, integral + 0.5 * ticks[k] * (trace + trace_there)), None

    start = ode.to_rest(denoiser, denoiser.schedule.alpha(times[0]) * x, times[0]).reshape(-1)
    carry = start, jnp.zeros((), x.dtype)
    (w, integral), _ = jax.lax.scan(step, carry, jnp.arange(solver.num_steps - 1))
    return norm.logpdf(w).sum() + integral - x.size * jnp.log(ode.spread(denoiser, times[0]))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_prob(solver: Heun, denoiser: Denoiser, x: jax.Array) -> jax.Array:
    return _solve(solver, denoiser, x)


@partial(_log_prob.defjvp, symbolic_zeros=True)
def _log_prob_jvp(solver, primals, tangents):
    denoiser, x = primals
    denoiser_dot, x_dot = tangents
    leaves, structure = jax.tree.flatten(denoiser)
    dots = jax.tree.leaves(denoiser_dot, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

    def in_arrays(*moved: jax.Array) -> jax.Array:
        replaced = list(leaves)
        for i, leaf in zip(moving, moved, strict=True):
            replaced[i] = leaf
        return _solve(solver, jax.tree.unflatten(structure, replaced), x)

    if moving:
        value, dot = jax.jvp(in_arrays, [leaves[i] for i in moving], [dots[i] for i in moving])
    else:
        value, dot = _log_prob(solver, denoiser, x), jnp.zeros((), x.dtype)
    if not isinstance(x_dot, SymbolicZero):
        alpha = denoiser.schedule.alpha(denoiser.schedule.t_min)
        score = alpha * denoiser(alpha * x, denoiser.schedule.t_min).score
        dot = dot + jnp.vdot(score, x_dot)
    return value, dot
