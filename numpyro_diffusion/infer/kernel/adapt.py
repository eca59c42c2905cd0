r"""Step size and preconditioner, adapted in warm-up by NumPyro's own scheme, for one chain or for a population.

A preconditioner is a positive definite matrix $C = A^\top A$, and a kernel works in coordinates $w$ with
$q = A^\top w$, in which $C$ is the identity: the gradient is $A \nabla_q$ and a step of any isotropic kernel in $w$ is
one with $C$ in $q$. `numpyro.infer.hmc_util.warmup_adapter` estimates $C$, diagonal or dense, from the draws of warm-up
in Stan's windows, and the step size by dual averaging of the acceptance. After warm-up both are fixed.

A particle of a population must not adapt by its own history: its kernel would depend on where it is, and would no
longer leave its target invariant (particles in a narrow region would learn to stay there). `pool_adaptation` gives all
particles one step size, that of the population, on which a single particle has an influence of order $1/N$. Its
influence on a dense preconditioner is of order $D/N$: moved by the covariance of all 400 of them, itself included,
particles in 64 dimensions end with variances up to 15 % off, either way. So each half of them has the preconditioner
of the other, which leaves the law of each half as it is, whatever $D/N$ is.

Chains of `MCMC` that run together may adapt together too, `pool_chains`: dual averaging follows their mean acceptance,
and at the end of a window the preconditioner is estimated from the draws of all of them, since Welford's moments of $C$
chains of $n$ draws with means $m_c$ and squares $S_c$ are those of $C n$ draws,

$$m = \frac1C \sum_c m_c, \qquad S = \sum_c S_c + n \sum_c (m_c - m)(m_c - m)^\top.$$

The mean acceptance hides a chain that accepts nothing where the target is narrower than elsewhere.

Kernels whose moves have noise levels try them all, and with precise data the highest are never accepted. `Tally`
counts acceptance by part of the ladder, so that fewer of the moves go where hardly any has been accepted.

References:
    Hoffman and Gelman, The No-U-Turn sampler, 2014 (dual averaging), https://arxiv.org/abs/1111.4246.
    Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983 (moments of joined samples),
    https://doi.org/10.1080/00031305.1983.10483115.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc_util import HMCAdaptState, warmup_adapter, welford_covariance

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.kernel.contract import number_together, pooled, shared


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


class Tally(NamedTuple):
    """Acceptance by part of a ladder of noise levels, the lowest first; all parts equally long in logarithms.

    Moves of the first half of warm-up do not count: a chain on its way to the posterior accepts what it later does not.
    """

    accepted: jax.Array  # sum of acceptance probabilities, (parts,)
    tried: jax.Array  # number of moves, of all chains that run together, (parts,)

    @classmethod
    def empty(cls, dtype: Any) -> "Tally":
        """Before the first move."""
        return cls(jnp.zeros(_PARTS, dtype), jnp.zeros(_PARTS, dtype))

    def part_of(self, height: jax.Array) -> jax.Array:
        """The part of a level at a height in [0, 1] of the ladder, in logarithms."""
        return jnp.clip((height * _PARTS).astype(int), 0, _PARTS - 1)

    def weights(self) -> jax.Array:
        """Relative frequencies of moves in each part, (parts,): lower where neither they nor higher ones succeed."""
        succeeds = self.accepted + _DOUBT >= _HARDLY_EVER * (self.tried + _DOUBT)
        from_here_on = jax.lax.cummax(succeeds.astype(int), reverse=True) == 1
        return jnp.where(from_here_on, 1.0, _STILL).astype(self.tried.dtype)

    def draw(self, key: jax.Array) -> jax.Array:
        """A height at which to move."""
        key_part, key_within = jax.random.split(key)
        part = jax.random.categorical(key_part, jnp.log(self.weights()))
        return (part + jax.random.uniform(key_within, (), self.tried.dtype)) / _PARTS

    def add(self, height: jax.Array, accept_prob: jax.Array, counts: jax.Array) -> "Tally":
        """With a move at a height added, if it counts; chains that run together add theirs."""
        here = (counts & (jnp.arange(_PARTS) == self.part_of(height))).astype(self.tried.dtype)
        chains = number_together()
        return Tally(self.accepted + chains * pooled(here * accept_prob), self.tried + chains * pooled(here))


_PARTS = 4
_HARDLY_EVER, _DOUBT = 0.002, 0.25
"""Acceptance below which moves of a part become rarer, and what counts as accepted before the first: 125 tries."""
_STILL = 0.2
"""How frequent they stay, relative to the others: modes may be joined by moves that rarely succeed."""


def running_mean(mean: jax.Array, value: jax.Array, i: jax.Array, num_warmup: int) -> jax.Array:
    """The mean over the phase (warm-up or sampling) after step number `i`, counted from zero."""
    count = jnp.where(i < num_warmup, i, i - num_warmup) + 1
    return mean + (value - mean) / count


def pool_adaptation(states: Any) -> Any:
    """Gives all particles the step size of the population, and each half the preconditioner of the other.

    Args:
        states: the state of a kernel that was started with particles as chains, a leading axis on every leaf. Wherever
            it has an `adapt_state` of NumPyro's scheme beside the point `z`, dual averaging is replaced by its mean
            over particles, which is that of the mean acceptance, and the preconditioner by the covariance of the
            particles with odd numbers for those with even ones, and the other way round; of all, if they are few.

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
    number = len(adapt_state.step_size)
    parts = (slice(1, None, 2), slice(0, None, 2)) if number >= _HALVED else (slice(None), slice(None))

    def moments(like: jax.Array, values: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `welford_covariance` keeps them, diagonal or dense."""
        q = jax.vmap(lambda value: ravel_pytree(value)[0])(values)
        centred = q - q.mean(0)
        spread = (centred**2).sum(0) if like.ndim == num_batch + 1 else centred.T @ centred
        return q.mean(0), spread, jnp.asarray(len(q), q.dtype)

    def estimate(part: slice) -> tuple:
        """The preconditioner of some of the particles."""
        matrix, some = adapt_state.inverse_mass_matrix, jax.tree.map(lambda leaf: leaf[part], z)
        if isinstance(matrix, dict):  # by blocks of sites
            population: Any = {
                names: moments(like, tuple(some[name] for name in names)) for names, like in matrix.items()
            }
        else:
            population = moments(matrix, some)
        return tuple(welford_covariance()[2](population, regularize=True))

    def handed_out(of_odd: jax.Array, of_even: jax.Array, old: jax.Array) -> jax.Array:
        is_even = (jnp.arange(number) % 2 == 0).reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.broadcast_to(jnp.where(is_even, of_odd, of_even), old.shape).astype(old.dtype)

    old = tuple(getattr(adapt_state, name) for name in _MATRICES)
    new = jax.tree.map(handed_out, *map(estimate, parts), old)
    return pooled._replace(**dict(zip(_MATRICES, new, strict=True)))


def pool_chains(before: Any, after: Any, num_warmup: int) -> Any:
    """Gives chains that run together one step size and one preconditioner, while they adapt.

    Args:
        before: the state of one chain's kernel before a step. Wherever it has an `adapt_state` of NumPyro's scheme,
            beside the count `i` of its steps and the point `z`, that is pooled.
        after: the state after the step.
        num_warmup: number of steps that adapt.

    Returns:
        The second state, pooled; as it is after warm-up, and for a chain by itself.
    """
    if number_together() == 1:
        return after

    def pool(old: Any, new: Any) -> Any:
        if not _adapts(old):
            return new
        together = lambda: _of_chains(old.adapt_state, new.adapt_state, new.z)  # noqa: E731
        adapt_state = jax.lax.cond(shared(old.i) < num_warmup, together, lambda: new.adapt_state)
        own = {"step_size": adapt_state.step_size} if "step_size" in new._fields else {}
        return new._replace(adapt_state=adapt_state, **own)

    return jax.tree.map(pool, before, after, is_leaf=_adapts)


def _adapts(node: Any) -> bool:
    return isinstance(getattr(node, "adapt_state", None), HMCAdaptState)


def _of_chains(old: HMCAdaptState, new: HMCAdaptState, z: dict[str, jax.Array]) -> HMCAdaptState:
    """The adaptation of all chains after a step of each, which led this one to unconstrained values `z`."""
    first = shared(new.step_size)
    step_size = first * jnp.exp(pooled(jnp.log(new.step_size / first)))  # exactly `first` where all are equal
    mean = lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else pooled(leaf)  # noqa: E731
    new = new._replace(step_size=step_size, ss_state=jax.tree.map(mean, new.ss_state))
    if old.mm_state is None:
        return new
    is_moments = lambda node: isinstance(node, tuple)  # noqa: E731
    _, update, estimate = welford_covariance()
    counts = [moments[2] for moments in jax.tree.leaves([old.mm_state, new.mm_state], is_leaf=is_moments)]
    # a window ends where NumPyro has made an estimate of its draws and begun to count anew
    window_ends = (shared(counts[0]) > 0) & (shared(counts[-1]) == 0)

    def joined(moments: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, squares, count = moments
        off, chains = mean - pooled(mean), number_together()
        between = off**2 if squares.ndim == 1 else jnp.outer(off, off)
        return pooled(mean), chains * pooled(squares + count * between), chains * shared(count)

    def of_all() -> tuple:
        moments = jax.tree.map(joined, update(z, old.mm_state), is_leaf=is_moments)
        return estimate(moments, regularize=True)

    own = new.inverse_mass_matrix, new.mass_matrix_sqrt, new.mass_matrix_sqrt_inv
    matrices = jax.lax.cond(window_ends, of_all, lambda: own)
    return new._replace(**dict(zip(_MATRICES, matrices, strict=True)))


_MATRICES = "inverse_mass_matrix", "mass_matrix_sqrt", "mass_matrix_sqrt_inv"
_HALVED = 16
"""Particles from which on each half of them has the preconditioner of the other."""
