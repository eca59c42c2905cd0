r"""Adam on the noise ladder: can an optimiser walk the reverse process?

At each noise level $\lambda_s$ the point descends $-\log p_s$ by Adam, its moments carried from level to level. In
$u = x / \alpha$ the gradient, in units of the level, is $\hat\varepsilon$, so a step is

$$u \leftarrow u - \gamma \lambda_s\, \mathrm{Adam}(\hat\varepsilon(u, \lambda_s)).$$

It is deterministic and no sampler: what it is after is a mode of each $p_s$, and it stops where $\hat\varepsilon$
vanishes, while a draw of $p_s$ has $\|\hat\varepsilon\|^2$ of order $d$. So it collapses within a mode; and onto few
modes, since a law smoothed by much noise has one, to which the better optimiser brings more of the points.
`docs/concepts/solvers.md` has the figures; for draws, take any other solver.

References:
    Kingma and Ba, Adam: a method for stochastic optimization, 2015, https://arxiv.org/abs/1412.6980.
"""

from dataclasses import dataclass

import jax
import optax
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import Karras, TimeGrid
from numpyro_diffusion.solve.base import Memory, Solver


@jax.tree_util.register_static
@dataclass(frozen=True)
class AdamFlow(Solver):
    r"""Descent on $-\log p_t$ along a falling noise ladder with Adam's moments: finds modes, does not sample.

    Args:
        num_steps: number of times visited.
        num_descents: Adam steps at each level, one denoiser evaluation each.
        learning_rate: step $\gamma$ in units of the noise level.
        b1: decay of the mean of the gradient, in [0, 1).
        b2: decay of the mean of its square, in [0, 1).
        grid: where the times lie.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_steps: int = 64
    num_descents: int = 1
    learning_rate: float = 0.3
    b1: float = 0.5
    b2: float = 0.9
    grid: TimeGrid = Karras()

    stochastic = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.at_least(1, num_descents=self.num_descents)
        _checks.positive(learning_rate=self.learning_rate)
        for name, value in {"b1": self.b1, "b2": self.b2}.items():
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1); got {value}")

    @property
    def evaluations_per_step(self) -> int:
        return self.num_descents

    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2)

    def remember(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
        return self._adam().init(x_t)

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        t: ArrayLike,
        s: ArrayLike,
        key: None = None,
        cond: jax.Array | None = None,
    ) -> jax.Array:
        return self.advance(denoiser, x_t, self.remember(denoiser, x_t), t, s, key, cond)[0]

    def advance(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: None = None,
        cond: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        schedule = denoiser.schedule
        alpha, reach = schedule.alpha(s), self.learning_rate * schedule.noise_level(s)

        def descend(carry: tuple[jax.Array, Memory], _: None) -> tuple[tuple[jax.Array, Memory], None]:
            u, moments = carry
            direction, moments = self._adam().update(denoiser(alpha * u, s).eps.astype(u.dtype), moments)
            return ((u - reach * direction).astype(u.dtype), moments), None

        start = (x_t / schedule.alpha(t)).astype(x_t.dtype), memory
        (u, memory), _ = jax.lax.scan(descend, start, None, self.num_descents)
        return alpha * u, memory
