r"""The denoiser of a law that is known by its log-density, by Monte Carlo and without training.

Given $x_t$, the clean point has the law

$$p(x \mid x_t) \propto \pi(x)\, N(x; u, \lambda^2 I), \qquad u = x_t / \alpha_t, \quad \lambda = \sigma_t / \alpha_t,$$

for any unnormalised $\pi$. Its mean is the denoiser, and its normalising constant the noisy density $p_t(x_t)$. Both
are estimated from particles of three kinds,

* $n / 2$ from $N(u, \lambda^2 I)$, the noise alone: good at low noise;
* $n / 2$ from $N(\hat u, v I)$, $1 / v = 1 / \lambda^2 + 1 / s^2$, $\hat u / v = u / \lambda^2 + m / s^2$: the answer
  if $\pi$ were $N(m, s^2 I)$, with its location $m$ and scale $s$;
* $M$ from $N(m, s^2 I)$, the same for all points, where $\pi$ is evaluated once for a whole batch: good at high noise,

by self-normalised importance sampling: each has the weight $\pi(x)\, N(x; u, \lambda^2 I) / \sum_k n_k q_k(x)$ against
all three together, so that no kind has to be chosen, and no weight exceeds $2 \pi(x) / n$.

With $K$ steps there are the first two kinds, and each particle walks by Metropolis-adjusted Langevin steps through
$q^{1 - k / K} (\pi N)^{k / K}$ and is weighted by annealed importance sampling. This is the inner Langevin of reverse
diffusion Monte Carlo with a weight for what the walk has missed: the estimate of $p_t(x_t)$ is unbiased, and that of
the mean consistent in $n$, for any number and size of steps.

Both fail as all importance sampling does: the number of particles that is needed grows exponentially with the
dimension at high noise, where $p(x \mid x_t)$ is $\pi$ itself. Steps delay that. `Estimate.effective_size` tells.

The random numbers are those of one key, whatever the point: a fixed function of $(x_t, t)$, smooth if there are no
steps, so that every solver and kernel takes it. Its error is then common to all points and does not average out over
draws.

References:
    Huang, Dong, Hao, Ma, Zhang, Reverse diffusion Monte Carlo, 2024, https://arxiv.org/abs/2307.02037.
    Neal, Annealed importance sampling, 2001, https://arxiv.org/abs/physics/9803008.
    Veach, Guibas, Optimally combining sampling techniques for Monte Carlo rendering, 1995 (the weights against all
    kinds together), https://doi.org/10.1145/218380.218498.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.designed.weighted import Estimate, mean
from numpyro_diffusion.denoise.from_function import Written
from numpyro_diffusion.denoise.prediction import DensityKind, Prediction
from numpyro_diffusion.noise import Schedule

_STEPS = (1.0, 0.3, 0.1, 0.03)
"""Sizes of the Langevin steps, in turn, in units of the variance of the widest law on the way."""


class Particles(NamedTuple):
    """What particles say of the clean point behind a noisy one."""

    shift: jax.Array  # the posterior mean minus u, of `event_shape`
    standard_error: jax.Array  # of it
    variance: jax.Array  # of the clean point given the noisy one, by coordinate
    log_density: jax.Array  # of the noisy law at u, a scalar
    effective_size: jax.Array
    draw: jax.Array  # one of the particles, by weight


class Shared(NamedTuple):
    """Particles that serve all noisy points, drawn from N(location, scale^2)."""

    points: jax.Array  # (M, *event_shape)
    log_density: jax.Array  # (M,)
    gradient: jax.Array  # of it, as the points


Density = Callable[[jax.Array], jax.Array]


def shared(
    log_density: Density,
    key: jax.Array,
    shape: tuple[int, ...],
    count: int,
    location: jax.Array | float,
    scale: jax.Array | float,
) -> Shared:
    """Particles for all noisy points, `count` of them and of `shape`; the rest as in `posterior`."""
    points = location + scale * jax.random.normal(key, (count, *shape))
    return Shared(points, *_evaluated(log_density, points, True))


def _evaluated(log_density: Density, x: jax.Array, gradient: bool) -> tuple[jax.Array, jax.Array]:
    """The log-density of points, minus infinity where it is none, and its gradient if it is asked for."""
    if gradient:
        value, slope = jax.vmap(jax.value_and_grad(log_density))(x)
    else:
        value, slope = jax.vmap(log_density)(x), jnp.zeros_like(x)
    return jnp.where(jnp.isnan(value) | jnp.isposinf(value), -jnp.inf, value).astype(x.dtype), slope


def posterior(
    log_density: Density,
    key: jax.Array,
    u: jax.Array,
    level: ArrayLike,
    location: ArrayLike,
    scale: ArrayLike,
    *,
    num_particles: int,
    num_steps: int = 0,
    gradient: bool = True,
    others: Shared | None = None,
) -> Particles:
    r"""Estimates the law of a clean point given a noisy one.

    Args:
        log_density: $\log \pi$ of one point, up to a constant.
        key: random key.
        u: noisy point over its signal, of `event_shape`.
        level: noise level $\lambda$, a scalar.
        location: of the law, of `event_shape` or a scalar.
        scale: of the law, a scalar.
        num_particles: even.
        num_steps: Langevin steps of each, 0 for none.
        gradient: whether the mean uses the gradient of `log_density`, see `weighted`.
        others: particles that serve other points too; not with steps.

    Returns:
        The `Particles`; if all weights vanish, the mean of $N(\hat u, v)$ with an infinite error.
    """
    key_start, key_walk, key_draw = jax.random.split(key, 3)
    axes, dimension = tuple(range(1, u.ndim + 1)), u.size
    variance = 1.0 / (level**-2.0 + scale**-2.0)
    pulled = (variance / scale**2 * (location - u)).astype(u.dtype)

    def log_start(d: jax.Array) -> jax.Array:
        """The density of the start over that of the noise, of displacements from u."""
        local = jnp.sum(d**2, axes) / level**2
        kinds = [jnp.zeros_like(local), 0.5 * (local - jnp.sum((d - pulled) ** 2, axes) / variance)]
        kinds[1] -= 0.5 * dimension * jnp.log(variance / level**2)
        if others is not None:
            far = 0.5 * (local - jnp.sum((d + (u - location)) ** 2, axes) / scale**2)
            kinds.append(far - dimension * jnp.log(scale / level) + math.log(2.0 * len(others.points) / num_particles))
        return jax.nn.logsumexp(jnp.stack(kinds), 0) - math.log(2.0)

    def target(d: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _evaluated(log_density, u + d, gradient or num_steps > 0)

    noise = jax.random.normal(key_start, (num_particles, *u.shape), u.dtype)
    is_local = (jnp.arange(num_particles) % 2 == 0).reshape(-1, *[1] * u.ndim)
    d = jnp.where(is_local, level * noise, pulled + jnp.sqrt(variance) * noise)
    at = target(d)
    if num_steps:
        d, at, log_weights = _walk(key_walk, d, at, target, log_start, level, variance, num_steps)
    else:
        if others is not None:
            d = jnp.concatenate([d, (others.points - u).astype(d.dtype)])
            at = jax.tree.map(lambda own, other: jnp.concatenate([own, other.astype(own.dtype)]), at, tuple(others[1:]))
        log_weights = at[0] - log_start(d)
    possible = jnp.isfinite(log_weights).any()
    safe = jnp.where(possible, log_weights, 0.0)
    found = mean(safe, d, d - level**2 * at[1] if gradient else None)
    chosen = jax.random.categorical(key_draw, safe)
    return Particles(
        jnp.where(possible, found.value, pulled),
        jnp.where(possible, found.standard_error, jnp.inf),
        jnp.where(possible, found.variance, variance),
        jax.nn.logsumexp(log_weights) - math.log(num_particles),
        jnp.where(possible, found.effective_size, 0.0),
        u + d[chosen],
    )


def _walk(
    key: jax.Array,
    d: jax.Array,
    at: tuple,
    target: Callable,
    log_start: Callable,
    level: ArrayLike,
    variance: ArrayLike,
    num_steps: int,
) -> tuple[jax.Array, tuple, jax.Array]:
    """Annealed importance sampling by Langevin steps: where the particles end, the target there and their weights."""
    axes = tuple(range(1, d.ndim))
    sizes = jnp.asarray(_STEPS, d.dtype) * d[0].size ** (-1.0 / 3.0) * variance

    def bridge(d: jax.Array, at: tuple, beta: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Log-density at a temperature, and its gradient."""

        def known(d: jax.Array) -> jax.Array:
            return -0.5 * jnp.sum(d**2, axes) / level**2 + (1.0 - beta) * log_start(d)

        slope = jax.grad(lambda d: known(d).sum())(d)
        return known(d) + beta * at[0], slope + beta * at[1]

    def step(carry: tuple, k: jax.Array) -> tuple[tuple, None]:
        d, at, log_weights = carry
        log_weights = log_weights + (at[0] - log_start(d)) / num_steps
        beta, size = (k + 1.0) / num_steps, sizes[k % len(_STEPS)]
        key_noise, key_accept = jax.random.split(jax.random.fold_in(key, k))
        value, slope = bridge(d, at, beta)
        noise = jax.random.normal(key_noise, d.shape, d.dtype)
        new = d + 0.5 * size * slope + jnp.sqrt(size) * noise
        at_new = target(new)
        value_new, slope_new = bridge(new, at_new, beta)
        back = (d - new - 0.5 * size * slope_new) / jnp.sqrt(size)
        log_ratio = value_new - value - 0.5 * jnp.sum(back**2 - noise**2, axes)
        accepted = jnp.log(jax.random.uniform(key_accept, log_ratio.shape)) < log_ratio  # never if that is NaN
        chosen = accepted.reshape(-1, *[1] * len(axes))
        at = jnp.where(accepted, at_new[0], at[0]), jnp.where(chosen, at_new[1], at[1])
        return (jnp.where(chosen, new, d), at, log_weights), None

    first = d, at, jnp.zeros(len(d), d.dtype)
    return jax.lax.scan(step, first, jnp.arange(num_steps))[0]


@jax.tree_util.register_pytree_node_class
class FromTarget(Written):
    r"""The denoiser of an unnormalised log-density, estimated with common random numbers.

    Args:
        log_density: $\log \pi(x)$ as a function `(x, parameters)` of one point and arrays, to a scalar, up to a
            constant. It is static: another function is another program.
        event_shape: shape of one point.
        key: random key of all estimates; another one shows how far they can be trusted.
        location: a centre of the law, of `event_shape` or a scalar.
        scale: a typical standard deviation of the law, a positive scalar. Too wide costs particles, too narrow loses
            tails and modes. Where coordinates differ, standardise them first.
        num_particles: behind each estimate alone, even.
        num_shared: particles behind all estimates, which a batch of points costs once; 0 for none.
        num_steps: Langevin steps of each particle; 0 is importance sampling, which is smooth in `x_t`. With steps no
            particles are shared, and derivatives leave out that a step may be accepted or not.
        gradient: whether to use the gradient of `log_density` for the mean. Leave it out for a density with a jump.
        schedule: the noising process, in the units of the data; by default the levels of `VE()` in units of `scale`.
        parameters: arrays that the function needs, a pytree.

    Raises:
        TypeError: if `log_density` is not callable, `event_shape` not a tuple or `schedule` not a schedule.
        ValueError: if a number is out of its range, `location` has the wrong shape, or the log-density is not finite at
            any of 100 draws of $N(m, s^2)$.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import FromTarget
        >>> def log_density(x, parameters):  # of two modes
        ...     return jax.nn.logsumexp(-0.5 * (x[0] - jnp.array([-3.0, 3.0])) ** 2)
        >>> denoiser = FromTarget(log_density, (1,), jax.random.key(0), 0.0, 3.2, num_particles=1000)
        >>> found = denoiser.estimate(jnp.array([0.5]), denoiser.schedule.inverse_noise_level(1.0))
        >>> x0 = 0.25 + 1.5 * jnp.tanh(0.75)
        >>> bool(abs(found.prediction.x0[0] - x0) < 4 * found.standard_error[0])
        True
    """

    _choice: tuple[int, int, int, bool]  # numbers of particles, of shared ones and of steps; whether by gradient

    def __init__(
        self,
        log_density: Callable[[jax.Array, Any], jax.Array],
        event_shape: tuple[int, ...],
        key: jax.Array,
        location: ArrayLike,
        scale: ArrayLike,
        *,
        num_particles: int = 256,
        num_shared: int = 1000,
        num_steps: int = 0,
        gradient: bool = True,
        schedule: Schedule | None = None,
        parameters: Any = None,
    ) -> None:
        super().__init__("log_density", log_density, event_shape, schedule, location, scale, parameters)
        check_numbers(num_particles, num_shared, num_steps)
        self.key, self._choice = key, (num_particles, 0 if num_steps else num_shared, num_steps, bool(gradient))
        self._check_values()

    def _check_values(self) -> None:
        """Raises if the log-density is nowhere finite."""

        def values(key: jax.Array, location: jax.Array, scale: jax.Array, parameters: Any) -> jax.Array:
            x = location + scale * jax.random.normal(key, (100, *self.event_shape))
            return jax.vmap(lambda x: self._function(x, parameters))(x)

        given = self.key, self.location, self.scale, self.parameters
        found = jax.eval_shape(values, *given)
        if found.shape != (100,):
            raise ValueError(f"log_density must return a scalar; got shape {found.shape[1:]}. Sum over the dimensions")
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
            count = int(jnp.isfinite(jax.jit(values)(*given)).sum())
            if not count:
                raise ValueError(
                    "log_density must be finite where the law lies; of 100 draws of N(location, scale^2) it is at "
                    "none. Give a location and a scale that reach it"
                )

    @property
    def density_kind(self) -> DensityKind:
        return "unnormalized"

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        return self.estimate(x_t, t).prediction

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""The estimate of $\log p_t(x_t)$, up to the constant of $\pi$, in nats: a scalar."""
        return self.estimate(x_t, t).log_density

    def estimate(self, x_t: jax.Array, t: ArrayLike, key: jax.Array | None = None) -> Estimate:
        """The prediction with its error.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.
            key: random key of this estimate; None takes that of all.

        Returns:
            The `Estimate`.
        """
        x_t = self._check_point(x_t)
        n, num_shared, num_steps, gradient = self._choice
        alpha, level = self.schedule.alpha(t), self.schedule.noise_level(t)
        key_shared, key_own = jax.random.split(self.key if key is None else key)
        law, units = lambda x: self._function(x, self.parameters), (self.location, self.scale)
        others = shared(law, key_shared, self.event_shape, num_shared, *units) if num_shared else None
        u = (x_t / alpha).astype(x_t.dtype)
        found = posterior(
            law, key_own, u, level, *units, num_particles=n, num_steps=num_steps, gradient=gradient, others=others
        )
        x0, eps = x_t / alpha + found.shift, -found.shift / level
        prediction = Prediction(x0.astype(x_t.dtype), eps.astype(x_t.dtype), x_t, t, self.schedule)
        log_density = found.log_density - x_t.size * jnp.log(alpha)
        return Estimate(prediction, found.standard_error, found.effective_size, log_density.astype(x_t.dtype))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        leaves, static = super().tree_flatten()
        return (*leaves, self.key), static

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> Self:
        self = super().tree_unflatten(static, leaves[:-1])
        self.key = leaves[-1]
        return self


def check_numbers(num_particles: int, num_shared: int, num_steps: int, name: str = "num_particles") -> None:
    """Raises `ValueError` unless there is an even number of particles, and the others are not negative."""
    _checks.at_least(2, **{name: num_particles})
    _checks.at_least(0, num_shared=num_shared, num_steps=num_steps)
    if num_particles % 2:
        raise ValueError(f"{name} must be even, half of each kind; got {num_particles}")
