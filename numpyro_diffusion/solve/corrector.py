r"""Predictor and corrector: any solver moves the point down, then Langevin steps correct it at its new level.

The predictor makes an error in the law of the point. The corrector leaves $p_s$ invariant, up to the order of its own
step, and removes part of that error. Where it forgets fast, its own error does not vanish with the number of levels
$n$: for data of variance $V$ the variance at level $\lambda$ is too large by the factor
$1 + r^2 \lambda^2 / (V + \lambda^2)$. But it forgets more and more slowly, and once $r^2 \lambda^2$ is below about
$V / n$ it no longer matters: the error that remains is of order one in the step, and of the opposite sign to that of
`Ancestral`, so that at some $n$ the two cancel. Whether this is worth its evaluations depends on the law:
`benchmarks/solvers.py` has figures.

References:
    Song et al., Score-based generative modeling through stochastic differential equations, 2021, algorithm 1,
    https://arxiv.org/abs/2011.13456.
"""

from dataclasses import dataclass, field

import jax
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import TimeGrid
from numpyro_diffusion.solve.base import Memory, Solver
from numpyro_diffusion.solve.gaussian import Ancestral
from numpyro_diffusion.solve.langevin import langevin_step, snr_step_size


@jax.tree_util.register_static
@dataclass(frozen=True)
class PredictorCorrector(Solver):
    r"""A solver whose every step is followed by Langevin steps at the level reached.

    Args:
        predictor: any solver; it has the grid and the number of times.
        num_corrections: Langevin steps at each level, one denoiser evaluation each.
        snr: their size, the ratio of `langevin.snr_step_size`.

    Raises:
        TypeError: if `predictor` is not a solver.
        ValueError: if `num_corrections` is below one or `snr` not positive.
    """

    predictor: Solver = field(default_factory=Ancestral)
    num_corrections: int = 1
    snr: float = 0.16

    law = "marginals"
    order = 1  # that of the corrector, also with a predictor of order two

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise TypeError(f"predictor must be a Solver; got {self.predictor!r}")
        _checks.at_least(1, num_corrections=self.num_corrections)
        _checks.positive(snr=self.snr)

    @property
    def num_times(self) -> int:  # type: ignore[override]
        return self.predictor.num_times

    @property
    def grid(self) -> TimeGrid:  # type: ignore[override]
        return self.predictor.grid

    @property
    def evaluations_per_step(self) -> int | None:  # type: ignore[override]
        predicting = self.predictor.evaluations_per_step
        return None if predicting is None else predicting + self.num_corrections

    def init(self, denoiser: Denoiser, x_t: jax.Array) -> Memory:
        return self.predictor.init(denoiser, x_t)

    def step(
        self,
        denoiser: Denoiser,
        x_t: jax.Array,
        memory: Memory,
        t: ArrayLike,
        s: ArrayLike,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        keys = jax.random.split(key, self.num_corrections + 1)  # type: ignore[arg-type]
        x_s, memory = self.predictor.step(denoiser, x_t, memory, t, s, keys[0] if self.predictor.stochastic else None)
        step_size = snr_step_size(denoiser.schedule.sigma(s), self.snr)

        def correct(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            return langevin_step(key, x, denoiser(x, s).score, step_size).astype(x.dtype), None

        return jax.lax.scan(correct, x_s, keys[1:])[0], memory
