r"""Several kernels on the same sites: one after the other, or one drawn at random.

If $K_1 \dots K_m$ all leave the posterior $\pi$ invariant, so do

$$K_1 K_2 \cdots K_m \quad (\texttt{Cycle}), \qquad \sum_j p_j K_j \quad (\texttt{Mixture}),$$

and a mixture is ergodic as soon as one of its kernels is. So a kernel that jumps between modes and one that is fast
within a mode together do both, where each alone would fail or be slow.

Each kernel adapts by its own rule in warm-up. There a mixture draws no index: it deals out the moves in the proportions
$p_j$, so that each kernel knows how many it will get, and none adapts after warm-up.

**What a mixture costs.** Under `chain_method="vectorized"`, "sequential" and "parallel", only the kernel that moves:
chains that run together share the index (`kernel.contract.shared`), so the choice stays a branch of the program. Under
`jax.vmap` each chain draws its own index, a branch on it becomes a selection, and **every kernel runs in every draw**.
Take "vectorized" for mixtures of expensive kernels, and `Vectorize` to have it for any kernel.

For kernels on different sites use `numpyro.infer.Gibbs`, in which these two can be blocks.

References:
    Tierney, Markov chains for exploring posterior distributions, 1994, https://doi.org/10.1214/aos/1176325750.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.mcmc import MCMCKernel

from numpyro_diffusion.infer.combine.composed import Composed, ComposedState, Factory
from numpyro_diffusion.infer.kernel.contract import shared
from numpyro_diffusion.infer.kernel.inner import is_reversible
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading


class Cycle(Composed):
    r"""Every kernel in turn, all of them in every draw: $K_1 K_2 \cdots K_m$.

    Args:
        kernels: kernels on the same model object and the same sites; or classes or factories, if `model` is given.
        model: NumPyro model for classes and factories.

    Raises:
        ValueError: if there is no kernel, if models differ, or a kernel cannot be handed a point; when run, if they
            move different sites, or as the kernels do.
        TypeError: if something is neither a kernel nor makes one.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import MALA, Cycle, DiffusionPCN
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(Cycle([DiffusionPCN(model), MALA(model)]), num_warmup=100, num_samples=300, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "num_score_evals")

    def _warmups(self) -> list[int]:
        return [self._num_warmup] * len(self._given)

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> ComposedState:
        state = super()._start(key, init_params, reading)
        return state._replace(accept_prob=jnp.zeros(len(self._given), state.accept_prob.dtype))

    def _step(self, state: ComposedState, reading: Reading) -> ComposedState:
        key, *keys = jax.random.split(state.rng_key, len(self._kernels) + 1)
        moved, moves = state, []
        for index, key_move in enumerate(keys):
            moved = self._move(index, moved, key_move, reading)
            moves.append(moved)
            moved = moved._replace(fresh=index)  # type: ignore[arg-type]  # known while it is traced
        return moves[-1]._replace(
            i=state.i + 1,
            accept_prob=jnp.stack([move.accept_prob for move in moves]),
            num_score_evals=sum((move.num_score_evals for move in moves), start=jnp.zeros((), jnp.int32)),
            diverging=jnp.stack([move.diverging for move in moves]).any(),
            rng_key=key,
        )


class Mixture(Composed):
    r"""One kernel for each draw, at random: $\sum_j p_j K_j$.

    Args:
        kernels: kernels on the same model object and the same sites; or classes or factories, if `model` is given.
        probabilities: the $p_j$, one for each kernel, positive, of sum 1; None for equal ones.
        model: NumPyro model for classes and factories.

    Raises:
        ValueError: if there is no kernel, if models differ, a kernel cannot be handed a point, or the probabilities
            are not positive or do not sum to 1; when run, if the kernels move different sites, or as the kernels do.
        TypeError: if something is neither a kernel nor makes one.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import DiffusionPCN, Mixture, with_density
        >>> @with_density
        ... def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> kernel = Mixture([NUTS, DiffusionPCN], [0.8, 0.2], model=model)
        >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=300, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "num_score_evals", "kernel_index")

    def __init__(
        self,
        kernels: Sequence[MCMCKernel | Factory],
        probabilities: Sequence[float] | None = None,
        model: Model | None = None,
    ) -> None:
        super().__init__(kernels, model)
        count = len(self._given)
        p = np.full(count, 1.0 / count) if probabilities is None else np.asarray(probabilities, float)
        if p.shape != (count,):
            raise ValueError(f"probabilities must be one for each of the {count} kernels; got shape {p.shape}")
        if not (np.isfinite(p).all() and (p > 0.0).all()):
            raise ValueError(f"probabilities must be positive; got {p.tolist()}. Leave out a kernel that never moves")
        if abs(p.sum() - 1.0) > 1e-6:
            raise ValueError(f"probabilities must sum to 1; got {p.tolist()}, of sum {p.sum():.6g}. Divide by the sum")
        self._probabilities = p

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether all kernels are: the one that moves is drawn whatever the point is."""
        return all(map(is_reversible, self._given))

    def _deal(self) -> np.ndarray:
        """The index of every move of warm-up: at all times as near to the proportions as whole numbers can be."""
        credit, indices = np.zeros(len(self._given)), []
        for _ in range(self._num_warmup):
            credit += self._probabilities
            indices.append(int(np.argmax(credit)))
            credit[indices[-1]] -= 1.0
        return np.asarray(indices, np.int32)

    def _warmups(self) -> list[int]:
        return np.bincount(self._deal(), minlength=len(self._given)).tolist()

    def _step(self, state: ComposedState, reading: Reading) -> ComposedState:
        key, key_choice, key_move = jax.random.split(state.rng_key, 3)
        index = jax.random.categorical(key_choice, jnp.log(self._probabilities)).astype(jnp.int32)
        if self._num_warmup:
            dealt = jnp.asarray(self._deal())[jnp.minimum(state.i, self._num_warmup - 1)]
            index = jnp.where(state.i < self._num_warmup, dealt, index)
        moves = [partial(self._move, j, reading=reading) for j in range(len(self._kernels))]
        moved = jax.lax.switch(shared(index), moves, state, key_move)
        return moved._replace(i=state.i + 1, rng_key=key)
