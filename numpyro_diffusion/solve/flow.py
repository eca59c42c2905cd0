r"""The probability flow: the deterministic path with the same marginals as the reverse process.

Let $m$ and $s$ be the denoiser's location and scale, $\lambda = \sigma_t / \alpha_t$ the noise level,
$\rho = \sqrt{s^2 + \lambda^2}$, and run the clock $\varphi = \operatorname{asinh}(\lambda / s)$ from data to noise:

$$w = \frac{1}{\rho} \left( \frac{x_t}{\alpha_t} - m \right), \qquad
\frac{\mathrm{d}w}{\mathrm{d}\varphi} = \hat\varepsilon - \frac{\lambda}{\rho}\, w.$$

Every schedule is the same flow in these coordinates, the terminal law is $w \sim N(0, I)$, and the velocity is zero if
the data are $N(m, s^2 I)$: steps are spent on what is not Gaussian. The clock is linear in $\lambda$ below the scale of
the data and logarithmic above it. Heun's method averages the velocities at both ends of a step and is of order two;
Euler's method in $\lambda$ is `Ancestral(eta=0)`.

A flow keeps the law but is not a reversible move: it is the map behind `NoiseReparam`, not a proposal.

`FlowMap` is a flow that a network has learned as a whole (`train.distill`). With levels
$\lambda_1 > \dots > \lambda_K$, the first the largest of the schedule, it starts at the terminal point
$u_1 = m + \sqrt{s^2 + \lambda_1^2}\, z$ and takes $K$ evaluations,

$$u_{k+1} = D_k + \frac{\lambda_{k+1}}{\lambda_k} (u_k - D_k), \qquad D_k = D_\theta(u_k, \lambda_k), \qquad
G_\theta(z) = D_K,$$

which is Euler's method for a denoiser, and any smooth map of noise for what training makes of it: $D_\theta$ is no
posterior mean then. In noise space nothing is lost by that: inference is exact for the law of $G_\theta(z)$, a prior
of its own, at $K$ evaluations a gradient.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
    Lu and Song, Simplifying, stabilizing and scaling continuous-time consistency models, 2024 (coordinates at rest,
    with an angle for a clock), https://arxiv.org/abs/2410.11081.
    Luhman and Luhman, Knowledge distillation in iterative generative models for improved sampling speed, 2021
    (a network for the whole flow), https://arxiv.org/abs/2101.02388.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, NetworkDenoiser
from numpyro_diffusion.noise import Karras, TimeGrid
from numpyro_diffusion.solve.base import Law, Memory, Solver, solve, terminal_point


def clock(denoiser: Denoiser, t: ArrayLike) -> jax.Array:
    r"""$\varphi = \operatorname{asinh}(\lambda_t / s)$, from data to noise."""
    return jnp.arcsinh(denoiser.schedule.noise_level(t) / denoiser.scale)


def spread(denoiser: Denoiser, t: ArrayLike) -> jax.Array:
    r"""$\rho = \sqrt{s^2 + \lambda_t^2}$, the scale of the data with their noise."""
    return jnp.hypot(denoiser.scale, denoiser.schedule.noise_level(t))


def to_rest(denoiser: Denoiser, x_t: jax.Array, t: ArrayLike) -> jax.Array:
    """The coordinate `w` of a noisy point."""
    return (x_t / denoiser.schedule.alpha(t) - denoiser.location) / spread(denoiser, t)


def from_rest(denoiser: Denoiser, w: jax.Array, t: ArrayLike) -> jax.Array:
    """The noisy point at a coordinate `w`."""
    return denoiser.schedule.alpha(t) * (denoiser.location + spread(denoiser, t) * w)


def velocity(denoiser: Denoiser, w: jax.Array, t: ArrayLike) -> jax.Array:
    r"""$\mathrm{d}w / \mathrm{d}\varphi$ of the probability flow."""
    prediction = denoiser(from_rest(denoiser, w, t).astype(w.dtype), t)
    slope = denoiser.schedule.noise_level(t) / spread(denoiser, t)
    return (prediction.eps - slope * w).astype(w.dtype)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method for the probability flow, of order two.

    Args:
        num_times: number of times visited, two denoiser evaluations a step.
        grid: where the times lie.

    Raises:
        ValueError: if `num_times` is below 2.
    """

    num_times: int = 18
    grid: TimeGrid = Karras()

    law: ClassVar[Law] = "flow"
    order = 2
    evaluations_per_step = 2

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        w = to_rest(denoiser, x_t, t).astype(x_t.dtype)
        tick = (clock(denoiser, s) - clock(denoiser, t)).astype(x_t.dtype)
        here = velocity(denoiser, w, t)
        there = velocity(denoiser, w + tick * here, s)
        return from_rest(denoiser, w + 0.5 * tick * (here + there), s).astype(x_t.dtype), memory


@jax.tree_util.register_pytree_node_class
class FlowMap:
    r"""A flow from noise to data in one to a few evaluations of a network: $x = G(z)$.

    It takes the place of a flow's solver in a prior, `DiffusionPrior(denoiser, flow_solver=flow_map)`, and of nothing
    else: what is not in noise space (`sample`, `log_prob`, moves of x) still asks the prior's denoiser. In noise space
    the prior is then the law of $G(z)$, $z \sim N(0, I)$; `train.distill` reports how far that is from the teacher's.
    A pytree, whose leaves are the weights.

    Args:
        network: a network in the units of the data, called like a denoiser.
        noise_levels: the levels of the evaluations after the first, in units of the network's scale, decreasing; none
            for a map of one evaluation.

    Raises:
        TypeError: if `network` is not a `NetworkDenoiser`.
        ValueError: if the levels do not decrease, or do not lie between zero and the largest of the network's schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import NetworkDenoiser
        >>> from numpyro_diffusion.nn import MLP
        >>> from numpyro_diffusion.solve import FlowMap
        >>> flow_map = FlowMap(NetworkDenoiser(MLP((2,), rngs=nnx.Rngs(0))), noise_levels=(2.0,))
        >>> flow_map(jnp.zeros(2)).shape, flow_map.evaluations()
        ((2,), 2)
    """

    def __init__(self, network: NetworkDenoiser, noise_levels: Sequence[float] = ()) -> None:
        if not isinstance(network, NetworkDenoiser):
            raise TypeError(f"network must be a NetworkDenoiser; got {type(network).__name__}")
        self.network = network
        self.noise_levels = tuple(float(level) for level in noise_levels)
        _checks.positive(**{f"noise_levels[{i}]": level for i, level in enumerate(self.noise_levels)})
        base = network.schedule.base
        levels = (float(base.noise_level(base.t_max)), *self.noise_levels)
        if any(not upper > lower for upper, lower in zip(levels, levels[1:], strict=False)):
            raise ValueError(
                f"noise_levels must decrease from below the schedule's largest, {levels[0]:.4g}; got {levels[1:]}"
            )

    def with_network(self, network: NetworkDenoiser) -> "FlowMap":
        """The same map of another network, such as one with other weights."""
        return self.tree_unflatten(self.noise_levels, (network,))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one point and of its noise."""
        return tuple(self.network.event_shape)

    def evaluations(self) -> int:
        """Evaluations of the network."""
        return len(self.noise_levels) + 1

    def __call__(self, z: jax.Array) -> jax.Array:
        """The point at noise `z`, both of `event_shape`; for many use `jax.vmap`."""
        network, schedule = self.network, self.network.schedule
        t: ArrayLike = schedule.t_max
        u = terminal_point(network, z) / schedule.alpha(t)
        held = network((schedule.alpha(t) * u).astype(z.dtype), t).x0
        for level in self.noise_levels:
            s = schedule.inverse_noise_level(level * network.scale)
            ratio = schedule.noise_level(s) / schedule.noise_level(t)
            u, t = held + ratio * (u - held), s
            held = network((schedule.alpha(t) * u).astype(z.dtype), t).x0
        return held.astype(z.dtype)

    def learned(self, z: jax.Array) -> jax.Array:
        """All of the map is learned."""
        return self(z)

    def to_saved(self) -> tuple[NetworkDenoiser, dict[str, Any], dict[str, Any]]:
        """Its network, plain JSON values and further arrays, for `checkpoint.save`."""
        return self.network, {"noise_levels": list(self.noise_levels)}, {}

    @classmethod
    def from_saved(cls, network: NetworkDenoiser, described: dict[str, Any], arrays: dict[str, Any]) -> "FlowMap":
        """What `to_saved` was given."""
        return cls(network, described["noise_levels"])

    def tree_flatten(self) -> tuple[tuple[NetworkDenoiser], tuple[float, ...]]:
        return (self.network,), self.noise_levels

    @classmethod
    def tree_unflatten(cls, noise_levels: tuple[float, ...], leaves: tuple[NetworkDenoiser]) -> "FlowMap":
        self = object.__new__(cls)
        (self.network,), self.noise_levels = leaves, noise_levels
        return self


def push_forward(flow_solver: Solver | FlowMap, denoiser: Denoiser, z: jax.Array) -> jax.Array:
    """The point at given noise, by a solver of law "flow" or by a map that has learned one.

    Args:
        flow_solver: the solver, or the map.
        denoiser: of the law; a map does without.
        z: noise, of `event_shape`.

    Returns:
        The point, of `event_shape`.
    """
    if isinstance(flow_solver, FlowMap):
        return flow_solver(z)
    return solve(flow_solver, denoiser, terminal_point(denoiser, z))


def check_flow(
    flow_solver: Any, event_shape: tuple[int, ...] = (), conditional: bool = False, name: str = "flow_solver"
) -> None:
    """Raises unless something maps noise to the points of a prior without drawing any more noise.

    Raises:
        TypeError: if it is neither a deterministic solver nor a `FlowMap`.
        ValueError: for a `FlowMap` of points of another shape, or for a prior with a condition.
    """
    if not isinstance(flow_solver, FlowMap):
        if not (isinstance(flow_solver, Solver) and not flow_solver.stochastic):
            raise TypeError(f"{name} must be a deterministic solver such as solve.Heun(); got {flow_solver!r}")
    elif conditional:
        raise ValueError(f"{name} must be a solver for a prior with a condition: a FlowMap is the flow of one law")
    elif flow_solver.event_shape != event_shape:
        raise ValueError(
            f"{name} must map noise to points of shape {event_shape}; this FlowMap's have {flow_solver.event_shape}"
        )
