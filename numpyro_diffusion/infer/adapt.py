r"""Step size and preconditioner, adapted in warm-up by NumPyro's own scheme.

A preconditioner is a positive definite matrix $C = A^\top A$, and a kernel works in coordinates $w$ with
$q = A^\top w$, in which $C$ is the identity: the gradient is $A \nabla_q$ and a step of any isotropic kernel in $w$ is
one with $C$ in $q$. Stan's windows (`numpyro.infer.hmc_util.warmup_adapter`) estimate $C$ from the draws of warm-up,
diagonal or dense, and the step size by dual averaging of the acceptance. Afterwards both stand still.

References:
    Hoffman and Gelman, The No-U-Turn sampler, 2014 (dual averaging), https://arxiv.org/abs/1111.4246.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.infer.hmc_util import warmup_adapter

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.base import shared

Shape = Literal["identity", "diagonal", "dense"]


class Root(NamedTuple):
    """A root $A$ of a preconditioner $C = A'A$ in D dimensions: a diagonal (D,) or a matrix (D, D)."""

    root: jax.Array
    inverse: jax.Array  # of the root
    log_det: jax.Array  # of the root; constant factors of a kernel's density may be left out

    def pull(self, gradient: jax.Array) -> jax.Array:
        """A gradient in the coordinates `w`: $A g$."""
        return self.root * gradient if self.root.ndim == 1 else self.root @ gradient

    def push(self, w: jax.Array) -> jax.Array:
        """A displacement in the coordinates `q`: $A' w$."""
        return self.root * w if self.root.ndim == 1 else w @ self.root

    def unpush(self, displacement: jax.Array) -> jax.Array:
        """The displacement in the coordinates `w`."""
        return self.inverse * displacement if self.inverse.ndim == 1 else displacement @ self.inverse


@dataclass(frozen=True)
class Adaptation:
    """What warm-up adapts.

    Args:
        preconditioner: "identity" for none, "diagonal" or "dense".
        step_size: where the step size starts, or stays if there is no `target_accept_prob`; None for D^(-1/3).
        target_accept_prob: acceptance to which the step size adapts, in (0, 1), or None.

    Raises:
        ValueError: if a number is out of its range or the preconditioner unknown.
    """

    preconditioner: Shape
    step_size: float | None
    target_accept_prob: float | None

    def __post_init__(self) -> None:
        _checks.one_of("preconditioner", self.preconditioner, ("identity", "diagonal", "dense"))
        if self.step_size is not None:
            _checks.positive(step_size=self.step_size)
        if self.target_accept_prob is not None and not 0.0 < self.target_accept_prob < 1.0:
            raise ValueError(f"target_accept_prob must lie in (0, 1); got {self.target_accept_prob}")

    def _adapter(self, num_warmup: int) -> tuple:
        return warmup_adapter(
            num_warmup,
            adapt_step_size=self.target_accept_prob is not None,
            adapt_mass_matrix=self.preconditioner != "identity",
            dense_mass=self.preconditioner == "dense",
            target_accept_prob=self.target_accept_prob or 0.5,
        )

    def start(self, num_warmup: int, q: jax.Array, key: jax.Array) -> Any:
        """The state before the first step, at a point of shape (D,)."""
        step_size = q.size ** (-1.0 / 3.0) if self.step_size is None else self.step_size
        return self._adapter(num_warmup)[0]((q,), key, step_size=jnp.asarray(step_size, q.dtype))

    def update(self, state: Any, i: jax.Array, num_warmup: int, accept_prob: jax.Array, q: jax.Array) -> Any:
        """The state after step number `i`, counted from zero; the same one when warm-up is over."""
        adapt = lambda: self._adapter(num_warmup)[1](i, accept_prob, (q,), state)  # noqa: E731
        return jax.lax.cond(shared(i) < num_warmup, adapt, lambda: state)

    def root(self, state: Any) -> Root:
        """The root of the current preconditioner."""
        return Root(state.mass_matrix_sqrt_inv, state.mass_matrix_sqrt, jnp.zeros((), state.mass_matrix_sqrt.dtype))


def running_mean(mean: jax.Array, value: jax.Array, i: jax.Array, num_warmup: int) -> jax.Array:
    """The mean over the phase (warm-up or sampling) after step number `i`, counted from zero."""
    count = jnp.where(i < num_warmup, i, i - num_warmup) + 1
    return mean + (value - mean) / count
