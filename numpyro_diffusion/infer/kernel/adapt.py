r"""Step size and preconditioner, adapted in warm-up by NumPyro's own scheme, for one chain or for a population.

A preconditioner is a positive definite matrix $C = A^\top A$, and a kernel works in coordinates $w$ with
$q = A^\top w$, in which $C$ is the identity: the gradient is $A \nabla_q$ and a step of any isotropic kernel in $w$ is
one with $C$ in $q$. `numpyro.infer.hmc_util.warmup_adapter` estimates $C$, diagonal or dense, from the draws of warm-up
in Stan's windows, and the step size by dual averaging of the acceptance. After warm-up both are fixed.

A particle of a population must not adapt by its own history: its kernel would depend on where it is, and would no
longer leave its target invariant (particles in a narrow region would learn to stay there). `pool_adaptation` gives all
particles one step size and one preconditioner, those of the population, on which a single particle has an influence of
order $1/N$.

References:
    Hoffman and Gelman, The No-U-Turn sampler, 2014 (dual averaging), https://arxiv.org/abs/1111.4246.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc_util import warmup_adapter, welford_covariance

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.contract import shared


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
        adapt_mass_matrix: whether to estimate a preconditioner; the identity if not.
        dense_mass: whether it is dense, or diagonal.
        step_size: where the step size starts, or stays if there is no `target_accept_prob`; None for D^(-1/3).
        target_accept_prob: acceptance to which the step size adapts, in (0, 1), or None.

    Raises:
        ValueError: if a number is out of its range, or a dense preconditioner is asked for without adaptation.
    """

    adapt_mass_matrix: bool
    dense_mass: bool
    step_size: float | None
    target_accept_prob: float | None

    def __post_init__(self) -> None:
        if self.dense_mass and not self.adapt_mass_matrix:
            raise ValueError("dense_mass=True needs adapt_mass_matrix=True: there is nothing to make dense without it")
        if self.step_size is not None:
            _checks.positive(step_size=self.step_size)
        if self.target_accept_prob is not None and not 0.0 < self.target_accept_prob < 1.0:
            raise ValueError(f"target_accept_prob must lie in (0, 1); got {self.target_accept_prob}")

    def _adapter(self, num_warmup: int) -> tuple:
        return warmup_adapter(
            num_warmup,
            adapt_step_size=self.target_accept_prob is not None,
            adapt_mass_matrix=self.adapt_mass_matrix,
            dense_mass=self.dense_mass,
            target_accept_prob=self.target_accept_prob or 0.5,
        )

    def start(self, num_warmup: int, q: jax.Array, key: jax.Array) -> Any:
        """The state before the first step, at a point of shape (D,)."""
        step_size = q.size ** (-1.0 / 3.0) if self.step_size is None else self.step_size
        state = self._adapter(num_warmup)[0]((q,), key, step_size=jnp.asarray(step_size, q.dtype))
        return state if self.adapt_mass_matrix else state._replace(mm_state=None)  # nothing to estimate

    def update(self, state: Any, i: jax.Array, num_warmup: int, accept_prob: jax.Array, q: jax.Array) -> Any:
        """The state after step number `i`, counted from zero; unchanged once warm-up is over."""
        adapt = lambda: self._adapter(num_warmup)[1](i, accept_prob, (q,), state)  # noqa: E731
        return jax.lax.cond(shared(i) < num_warmup, adapt, lambda: state)

    def root(self, state: Any) -> Root:
        """The root of the current preconditioner."""
        return Root(state.mass_matrix_sqrt_inv, state.mass_matrix_sqrt, jnp.zeros((), state.mass_matrix_sqrt.dtype))


def running_mean(mean: jax.Array, value: jax.Array, i: jax.Array, num_warmup: int) -> jax.Array:
    """The mean over the phase (warm-up or sampling) after step number `i`, counted from zero."""
    count = jnp.where(i < num_warmup, i, i - num_warmup) + 1
    return mean + (value - mean) / count


def pool_adaptation(states: Any) -> Any:
    """Gives all particles the step size and the preconditioner of the population.

    Args:
        states: the state of a kernel that was started with particles as chains, a leading axis on every leaf. Wherever
            it has an `adapt_state` of NumPyro's scheme beside the point `z`, dual averaging is replaced by its mean
            over particles, which is that of the mean acceptance, and the preconditioner by the particles' covariance.

    Returns:
        The pooled state, of the same shapes.
    """

    def pool(node: Any) -> Any:
        if not hasattr(node, "adapt_state"):
            return node
        adapt_state = _pooled(node.adapt_state, node.z)
        own = {"step_size": adapt_state.step_size} if "step_size" in node._fields else {}
        return node._replace(adapt_state=adapt_state, **own)

    return jax.tree.map(pool, states, is_leaf=lambda node: hasattr(node, "adapt_state"))


def _pooled(adapt_state: Any, z: dict[str, jax.Array]) -> Any:
    """The adaptation of the population, for particles at unconstrained values `z` by site."""

    def mean(leaf: jax.Array) -> jax.Array:
        is_count = jnp.issubdtype(leaf.dtype, jnp.integer)
        return leaf if is_count else jnp.broadcast_to(leaf.mean(0), leaf.shape).astype(leaf.dtype)

    first = adapt_state.step_size[0]
    step_size = first * jnp.exp(mean(jnp.log(adapt_state.step_size / first)))  # exactly `first` where all are equal
    pooled = adapt_state._replace(step_size=step_size, ss_state=jax.tree.map(mean, adapt_state.ss_state))
    if adapt_state.mm_state is None:
        return pooled
    num_batch = adapt_state.step_size.ndim  # particles, and what else a kernel adapts separately

    def moments(like: jax.Array, values: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `welford_covariance` keeps them, diagonal or dense."""
        q = jax.vmap(lambda value: ravel_pytree(value)[0])(values)
        centred = q - q.mean(0)
        spread = (centred**2).sum(0) if like.ndim == num_batch + 1 else centred.T @ centred
        return q.mean(0), spread, jnp.asarray(len(q), q.dtype)

    matrix = adapt_state.inverse_mass_matrix
    if isinstance(matrix, dict):  # by blocks of sites
        population = {names: moments(like, tuple(z[name] for name in names)) for names, like in matrix.items()}
    else:
        population = moments(matrix, z)
    estimate = welford_covariance()[2](population, regularize=True)
    names = ("inverse_mass_matrix", "mass_matrix_sqrt", "mass_matrix_sqrt_inv")
    spread_out = lambda new, old: jnp.broadcast_to(new, old.shape).astype(old.dtype)  # noqa: E731
    old = tuple(getattr(adapt_state, name) for name in names)
    return pooled._replace(**dict(zip(names, jax.tree.map(spread_out, tuple(estimate), old), strict=True)))
