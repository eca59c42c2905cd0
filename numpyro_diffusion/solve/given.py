r"""Draws of the clean point given a noisy one: by the flow of that law, or by the reverse process.

`denoise.Given` is the denoiser of $p(x \mid x_t)$, so its probability flow maps noise to a draw: a smooth function of
$(x_t, z)$, $z \sim N(0, I)$, with the error of a deterministic solver, which is much below that of a stochastic one.

With $u = x_t / \alpha_t$ at level $L$, the second look $y = x + \ell \varepsilon$ starts at $\ell = 5 L$, since $x$
given $x_t$ has a spread of about $L$ or less. Write $\bar x$ and $C$ for its mean and covariance. For a Gaussian the
flow from infinite noise comes down to

$$y = \bar x + (\ell^2 + C)^{1/2} z \approx \ell z + E[x \mid x_t, y' = \bar x + 2 \ell z \text{ at level } 2 \ell],$$

and the two agree up to a term in $(C / \ell^2)^3$: two evaluations for a start that knows the covariance. At the lowest
level $\lambda$ the rest of the way, to no noise at all, is half a step, for the noise falls to zero linearly there:
$x = y - \lambda \hat\varepsilon / 2$ for a law that is wide on that scale, in general the same in the coordinates at
rest (`flow`). The posterior mean, a whole step, would be too narrow by $(\lambda / L)^2$ of the variance.

`benchmarks/reverse_law.py` compares this with the reverse process.

`GivenMap` is that flow, $x = F(x_t, z)$, as a network has learned it (`train.distill_given`). With $m_L$ and $s_L$ the
mean and the deviation that $x$ given $x_t$ would have if $p$ were $N(m, s^2)$ ($s_L$ is $L$ for small $L$ and $s$ for
large),

$$G_\theta(x_t, z) = E[x \mid x_t] + s_L \left( z + \frac{L}{\sqrt{s^2 + L^2}}\, N_\theta\!\left(z,\;
\frac{u - m}{\sqrt{s^2 + L^2}},\; \frac{E[x \mid x_t] - m_L}{s_L};\; \frac{L}{s}\right) \right).$$

The mean is the denoiser's: one evaluation of it and one of $N_\theta$. Where $L$ is small beside all scales of $p$,
$x$ given $x_t$ is nearly Gaussian with deviation $L$ and $N_\theta$ hardly counts: a move of a small step has the
right drift, which an error of a learned mean, small beside $L$ but not beside $L^2$, would spoil. Elsewhere the law of
$G_\theta(x_t, z)$ is that which training has made of it: between modes, where the flow is steep, regression errs to
the middle. A *second look* corrects that at the price of two more evaluations: $y = x + \ell \varepsilon$ about the
draw, and a draw given $x_t$ and $y$, which are one point at a lower level (`denoise.Given`). It leaves $p(x \mid x_t)$
as it is, and takes what lies between modes to one of them if $\ell$ is a level at which they are apart.

References:
    Potaptchik et al., Meta flow maps enable scalable reward alignment, 2026 (a map of a noisy point and fresh noise),
    https://arxiv.org/abs/2601.14430.
    Holderrieth et al., GLASS flows: transition sampling for alignment of flow and diffusion models, 2025,
    https://arxiv.org/abs/2509.25170.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, Given, NetworkDenoiser
from numpyro_diffusion.noise import grid_from
from numpyro_diffusion.solve import flow
from numpyro_diffusion.solve.adams import Adams
from numpyro_diffusion.solve.base import Solver, solve, walk

_START = 5.0
"""Level at which the second look starts, in units of that of the first."""
_ITERATIONS = 3
"""Each brings the noise behind a point nearer by a factor of twenty or more."""


@jax.tree_util.register_pytree_node_class
class GivenMap:
    r"""A draw of the clean point given a noisy one by one evaluation of the denoiser and one of a network.

    It stands where a solver draws $x$ given $x_t$: `draw_given`, `infer.DiffusionPCN` and `infer.SplitGibbs`. **Its law
    is its own**, near $p(x \mid x_t)$ by as much as `train.distill_given` reports, and no number of steps makes it
    exact. It belongs to one law: that of the denoiser that it was trained with. A pytree, whose leaves are the weights.

    Args:
        network: a `NetworkDenoiser` of target "x0", location 0 and scale 1 for points of `joined_shape(event_shape)`.
        event_shape: shape of one point and of its noise.
        second_look: level of a second look at the draw, in units of the denoiser's scale; None for no second look.

    Raises:
        TypeError: if `network` is not a `NetworkDenoiser`.
        ValueError: if it is for points of another shape, or of another target, or the level is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> from numpyro_diffusion.solve import GivenMap
        >>> network = NetworkDenoiser(MLP((6,), rngs=nnx.Rngs(0)), target="x0")
        >>> GivenMap(network, (2,))(Gaussian([0.0, 0.0]), jnp.ones(2), 0.5, jnp.zeros(2)).shape
        (2,)
    """

    stochastic = False

    def __init__(
        self, network: NetworkDenoiser, event_shape: tuple[int, ...], second_look: float | None = None
    ) -> None:
        if not isinstance(network, NetworkDenoiser):
            raise TypeError(f"network must be a NetworkDenoiser; got {type(network).__name__}")
        self.network, self.event_shape, self.second_look = network, tuple(event_shape), second_look
        if (network.event_shape, network.target) != (joined_shape(self.event_shape), "x0"):
            raise ValueError(
                f'network must be of target "x0" for points of shape {joined_shape(self.event_shape)}: noise, noisy '
                f"point and mean, of shape {self.event_shape} each; got {network.target!r}, {network.event_shape}"
            )

        if second_look is not None:
            _checks.positive(second_look=second_look)

    def with_network(self, network: NetworkDenoiser) -> "GivenMap":
        """The same map of another network, such as one with other weights."""
        return GivenMap.tree_unflatten(self.tree_flatten()[1], (network,))

    def with_second_look(self, level: float | None) -> "GivenMap":
        """The same map with a second look at another level, or without one."""
        return GivenMap(self.network, self.event_shape, level)

    def evaluations(self) -> int:
        """Evaluations of the denoiser and of the network for a draw."""
        return 2 if self.second_look is None else 4

    def draw(self, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, key: jax.Array) -> jax.Array:
        """A clean point; after a second look at the first, if there is one; see `draw_given`."""
        x = self(denoiser, x_t, t, jax.random.normal(key, x_t.shape, x_t.dtype))
        if self.second_look is None:
            return x
        eps, fresh = jax.random.normal(jax.random.fold_in(key, 1), (2, *x_t.shape), x_t.dtype)
        schedule, level = denoiser.schedule, self.second_look * denoiser.scale
        s = jnp.clip(schedule.inverse_noise_level(level), schedule.t_min, schedule.t_max)
        x_s = (schedule.alpha(s) * x + schedule.sigma(s) * eps).astype(x_t.dtype)
        return self(denoiser, *Given(denoiser, x_t, t).together(x_s, s), fresh)

    def __call__(self, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, z: jax.Array) -> jax.Array:
        """The clean point at noise `z`, by the denoiser of the law that it was trained with; see `flow_given`."""
        if tuple(denoiser.event_shape) != self.event_shape:
            raise ValueError(f"this GivenMap is for points of shape {self.event_shape}; got {denoiser.event_shape}")
        seen, pull, level, mean, scale = self.about(denoiser, x_t, t)
        return (mean + scale * (z + self.learned(seen, pull, level, z))).astype(x_t.dtype)

    @staticmethod
    def about(denoiser: Denoiser, x_t: jax.Array, t: ArrayLike) -> tuple[jax.Array, ...]:
        """What is known of a draw before its noise: point, mean and level as the network sees them; mean and scale."""
        given, schedule = Given(denoiser, x_t, t), denoiser.schedule
        level, mean = schedule.noise_level(t), denoiser(x_t, t).x0
        seen = (x_t / schedule.alpha(t) - denoiser.location) / jnp.hypot(denoiser.scale, level)
        pull = (mean - given.location) / given.scale
        return tuple(v.astype(x_t.dtype) for v in (seen, pull, level / denoiser.scale, mean, given.scale))

    def learned(self, seen: jax.Array, pull: jax.Array, level: jax.Array, z: jax.Array) -> jax.Array:
        """The draw less its mean, in units of its scale, less the noise."""
        schedule, rows = self.network.schedule, max(1, math.prod(self.event_shape[-1:]))
        t = jnp.clip(schedule.inverse_noise_level(level), schedule.t_min, schedule.t_max)
        joined = jnp.stack([z, seen, pull], -2 if self.event_shape else -1).reshape(self.network.event_shape)
        spread = jnp.hypot(schedule.alpha(t), schedule.sigma(t)).astype(z.dtype)  # the network divides by it
        out = self.network(spread * joined, t).x0[..., :rows].reshape(z.shape)
        return (level / jnp.hypot(1.0, level) * out).astype(z.dtype)

    def to_saved(self) -> tuple[NetworkDenoiser, dict[str, Any], dict[str, Any]]:
        """Its network, plain JSON values and further arrays, for `checkpoint.save`."""
        return self.network, {"event_shape": list(self.event_shape), "second_look": self.second_look}, {}

    @classmethod
    def from_saved(cls, network: NetworkDenoiser, described: dict[str, Any], arrays: dict[str, Any]) -> "GivenMap":
        """What `to_saved` was given."""
        return cls(network, tuple(described["event_shape"]), described["second_look"])

    def tree_flatten(self) -> tuple[tuple[NetworkDenoiser], tuple[tuple[int, ...], float | None]]:
        return (self.network,), (self.event_shape, self.second_look)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple[int, ...], float | None], leaves: tuple[NetworkDenoiser]) -> "GivenMap":
        self = object.__new__(cls)
        (self.network,), (self.event_shape, self.second_look) = leaves, static
        return self


def joined_shape(event_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of noise, noisy point and mean side by side, along the last axis."""
    return (*event_shape[:-1], 3 * math.prod(event_shape[-1:]))


def draw_given(
    solver: Solver | GivenMap, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, key: jax.Array
) -> jax.Array:
    r"""Draws from $p(x \mid x_t)$, up to the solver's error.

    Args:
        solver: of law "flow", to follow the flow of $x$ given $x_t$, or of law "reverse", to walk down from $x_t$; in
            its `num_times` times. Or a map that has learned that flow.
        denoiser: the model of $p(x)$.
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        key: random key.

    Returns:
        A clean point, in the precision of `x_t`.

    Raises:
        ValueError: for a solver of another law.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.solve import Adams, draw_given
        >>> draw_given(Adams(16), Gaussian([0.0, 0.0]), jnp.ones(2), 0.5, jax.random.key(0)).shape
        (2,)
    """
    if isinstance(solver, GivenMap):
        return solver.draw(denoiser, x_t, t, key)
    if solver.law == "reverse":
        return solve(solver, denoiser, x_t, key, times=grid_from(solver.grid, denoiser.schedule, t, solver.num_times))
    if solver.law != "flow":
        raise ValueError(f"solver must be of law 'flow' or 'reverse'; {solver} has law={solver.law!r}")
    z = jax.random.normal(key, x_t.shape, x_t.dtype)
    return flow_given(solver, denoiser, x_t, t, z)


def flow_given(solver: Solver | GivenMap, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, z: jax.Array) -> jax.Array:
    """Maps standard normal noise to a draw of `draw_given`, smoothly.

    Args:
        solver: of law "flow", or a map that has learned this one.
        denoiser: the model of p(x).
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        z: standard normal noise, of `event_shape`.

    Returns:
        A clean point, in the precision of `x_t`.
    """
    if isinstance(solver, GivenMap):
        return solver(denoiser, x_t, t, z)
    start = _Start(denoiser, x_t, t)
    given, times = start.given, grid_from(solver.grid, denoiser.schedule, start.time, solver.num_times)
    x_s, last = walk(solver, given, start.point(z), None, 0, times), times[-1]
    w = flow.to_rest(given, x_s, last).astype(x_t.dtype)
    w = w - 0.5 * flow.clock(given, last) * flow.velocity(given, w, last)
    return (given.location + given.scale * w).astype(x_t.dtype)


def noise_given(solver: Solver, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike, x: jax.Array) -> jax.Array:
    """The noise that `flow_given` takes to a clean point: its inverse, up to the solver's error.

    Args:
        solver: the one of `flow_given`. `Adams` walks up in as many times, whatever it is.
        denoiser: the model of p(x).
        x_t: the noisy point, of `event_shape`.
        t: its time, a scalar.
        x: the clean point, of `event_shape`.

    Returns:
        Noise, in the precision of `x_t`.
    """
    start = _Start(denoiser, x_t, t)
    given, times = start.given, grid_from(solver.grid, denoiser.schedule, start.time, solver.num_times)
    last = times[-1]
    w = ((x - given.location) / given.scale).astype(x_t.dtype)
    w = w + 0.5 * flow.clock(given, last) * flow.velocity(given, w, last)
    x_s = flow.from_rest(given, w, last).astype(x_t.dtype)
    return start.noise(walk(Adams(solver.num_times, solver.grid), given, x_s, None, 0, times[::-1]))


class _Start:
    """Where the flow of x given x_t starts: a time, and a point there for each noise."""

    def __init__(self, denoiser: Denoiser, x_t: jax.Array, t: ArrayLike) -> None:
        self.given, schedule = Given(denoiser, x_t, t), denoiser.schedule
        self._level = jnp.minimum(_START * schedule.noise_level(t), 0.5 * schedule.noise_level(schedule.t_max))
        self.time, self._above = (
            jnp.clip(schedule.inverse_noise_level(v), schedule.t_min, schedule.t_max)
            for v in (self._level, 2 * self._level)
        )
        self._mean = denoiser(x_t, t).x0

    def point(self, z: jax.Array) -> jax.Array:
        """The point that noise stands for."""
        return (self.given.schedule.alpha(self.time) * (self._pulled(z) + self._level * z)).astype(z.dtype)

    def noise(self, x_s: jax.Array) -> jax.Array:
        """The noise that stands for a point: `pulled` changes little with it, so that a few iterations do."""
        u = x_s / self.given.schedule.alpha(self.time)
        z = ((u - self._mean) / self._level).astype(x_s.dtype)
        for _ in range(_ITERATIONS):
            z = ((u - self._pulled(z)) / self._level).astype(x_s.dtype)
        return z

    def _pulled(self, z: jax.Array) -> jax.Array:
        x_s = self.given.schedule.alpha(self._above) * (self._mean + 2.0 * self._level * z)
        return self.given(x_s.astype(z.dtype), self._above).x0


def evaluations_given(solver: Solver | GivenMap) -> int | jax.Array | None:
    """Denoiser evaluations of `draw_given`, that of the mean among them.

    Args:
        solver: the solver or the map that draws.

    Returns:
        Their number; None if it is not known before the run.
    """
    evaluations = solver.evaluations()
    if evaluations is None or isinstance(solver, GivenMap) or solver.law == "reverse":
        return evaluations
    return evaluations + 2


def evaluations_back(solver: Solver) -> int:
    """Denoiser evaluations of `noise_given`."""
    return solver.num_times + _ITERATIONS + 1
