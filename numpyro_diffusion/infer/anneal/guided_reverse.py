r"""Predictor and corrector as a kernel: every draw is a reverse process given the data, corrected at each level.

Any solver moves the noisy point from one level to the next by the guided denoiser, $\hat x_0 + (\sigma_t^2 / \alpha_t)
\nabla G$ (`posterior`); then a few Langevin steps by the guided score, of the size $h = 2 r^2 \sigma_t^2$, pull it
towards the noisy posterior of the level reached. Draws are independent.

**What is approximate.** Without data, the solver and the Langevin step: the law is the prior's up to their orders. With
data, also the guidance. Unless it is $\log E[L(x) \mid x_t]$, the target of each level is not the noised posterior. The
predictor moves from level to level as if it were, and the corrector removes part of the error. On a Gaussian with a
linear likelihood and a linear predictor, mean and variance follow an affine recursion, and the tests compare the kernel
with it.

With several sites, a solver with more than one evaluation a step takes the other sites as they were when it began.

References:
    Song et al., Score-based generative modeling through stochastic differential equations, 2021, algorithm 1 and
    section 5, https://arxiv.org/abs/2011.13456.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.anneal.base import AnnealedKernel
from numpyro_diffusion.infer.anneal.posterior import Guidance, GuidedSite, NoisyPosterior, Point, langevin_steps
from numpyro_diffusion.infer.kernel.choose import keep_finite
from numpyro_diffusion.infer.kernel.start import Strategy, start
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.solve import Solver
from numpyro_diffusion.solve.base import total_evaluations
from numpyro_diffusion.solve.langevin import snr_step_size


class GuidedReverseState(NamedTuple):
    """State of `GuidedReverse`.

    Args:
        z: current point, by site, in NumPyro's unconstrained coordinates.
        num_score_evals: denoiser evaluations of the last draw, per point.
        diverging: whether the last trajectory did not end at a finite point; then the chain stayed where it was.
        rng_key: random key.
    """

    z: Point
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class GuidedReverse(AnnealedKernel[GuidedReverseState]):
    r"""Draws all diffusion sites of a model by a guided reverse process with Langevin corrections.

    This is a kernel for a model; for a denoiser there is the solver `solve.PredictorCorrector`. Needs the score of the
    priors and the gradient of the likelihood; see the module for what is approximate.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites; `DiffusionGibbs` takes the others.
        predictor: any solver of `solve`; None takes each prior's own `sampler`.
        num_corrections: Langevin steps at each level reached; 0 for a guided solver alone.
        snr: their size, the ratio $r$ of `solve.langevin.snr_step_size`.
        guidance: what stands for the likelihood of noisy points, see `infer.at_clean_point`, or one of
            `guidance.GUIDANCES` such as "mmps", for one site with Gaussian data; None takes the likelihood at the
            predicted clean point.
        init_strategy: where chains start, as in NumPyro; None draws the priors.

    Raises:
        ValueError: for a number out of its range; when run, for a model without a latent `DiffusionPrior` site, with
            other latent sites, or with priors of different samplers.
        TypeError: for a model or a guidance that is not callable, or a predictor that is not a solver.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import GuidedReverse
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(GuidedReverse(model), num_warmup=0, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.6)
        True
    """

    status = Status("score", False, "the prior's law without data, up to the solver; with data biased by the guidance")
    statistics = ("num_score_evals",)

    def __init__(
        self,
        model: Model,
        *,
        predictor: Solver | None = None,
        num_corrections: int = 1,
        snr: float = 0.16,
        guidance: Guidance | str | None = None,
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, guidance, init_strategy)
        if not (predictor is None or isinstance(predictor, Solver)):
            raise TypeError(f"predictor must be a Solver such as solve.Ancestral(); got {predictor!r}")
        _checks.at_least(0, num_corrections=num_corrections)
        _checks.positive(snr=snr)
        self._predictor = predictor
        self._num_corrections = num_corrections
        self._snr = snr

    def _check_model(self, reading: Reading) -> None:
        super()._check_model(reading)
        self._solver_of(reading.sites_in_the_abstract())

    def _solver_of(self, sites: dict[str, PriorSite]) -> Solver:
        if self._predictor is not None:
            return self._predictor
        solvers = {site.prior.sampler for site in sites.values()}
        if len(solvers) > 1:
            raise ValueError(
                "diffusion sites have different samplers; give one for all by GuidedReverse(predictor=...)"
            )
        return solvers.pop()

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> GuidedReverseState:
        key, key_start = jax.random.split(key)
        z = start(key_start, reading, init_params, self._init_strategy)
        return GuidedReverseState(z, jnp.zeros((), jnp.int32), jnp.array(False), key)

    def _step(self, state: GuidedReverseState, reading: Reading) -> GuidedReverseState:
        posterior = self._posterior(reading)
        solver = self._solver_of(posterior.sites)
        key, key_start, key_walk = jax.random.split(state.rng_key, 3)
        times = {name: solver.times(site.denoiser) for name, site in posterior.sites.items()}
        x_t = posterior.from_noise(key_start, _at(times, 0))
        x_t = self._walk(key_walk, solver, posterior, x_t, times)
        clean = posterior.guided(x_t, _at(times, -1))
        z = posterior.to_unconstrained({name: prediction.x0 for name, prediction in clean.items()})
        z, diverging = keep_finite(z, state.z)
        evaluations = total_evaluations([solver.evaluations(), (solver.num_times - 1) * self._num_corrections])
        return GuidedReverseState(z, jnp.asarray(evaluations, jnp.int32), diverging, key)

    def _walk(
        self, key: jax.Array, solver: Solver, posterior: NoisyPosterior, x_t: Point, times: dict[str, jax.Array]
    ) -> Point:
        """From the first time of each site's grid to the last."""

        def step(carry: tuple, k: jax.Array) -> tuple:
            x_t, memory = carry
            t, s = _at(times, k), _at(times, k + 1)
            key_predict, key_correct = jax.random.split(jax.random.fold_in(key, k))
            keys = dict(zip(x_t, jax.random.split(key_predict, len(x_t)), strict=True))
            moved = {}
            for name, x in x_t.items():
                site = GuidedSite(posterior, name, x_t, t)
                noise = keys[name] if solver.stochastic else None
                x_s, remembered = solver.step(site, x, memory[name], t[name], s[name], noise)
                moved[name] = x_s.astype(x.dtype), remembered
            memory = {name: remembered for name, (_, remembered) in moved.items()}
            corrected = self._correct(key_correct, posterior, {name: x for name, (x, _) in moved.items()}, s)
            return (corrected, memory), None

        first = _at(times, 0)
        memory = {name: solver.init(GuidedSite(posterior, name, x_t, first), x) for name, x in x_t.items()}
        return jax.lax.scan(step, (x_t, memory), jnp.arange(solver.num_times - 1))[0][0]

    def _correct(self, key: jax.Array, posterior: NoisyPosterior, x_t: Point, t: dict[str, jax.Array]) -> Point:
        """Langevin steps at one level."""
        schedules = {name: site.denoiser.schedule for name, site in posterior.sites.items()}
        step_size = {name: snr_step_size(schedules[name].sigma(t[name]), self._snr) for name in x_t}

        def correct(x_t: Point, key: jax.Array) -> tuple[Point, None]:
            return langevin_steps(key, x_t, posterior.score(x_t, t), step_size), None

        return jax.lax.scan(correct, x_t, jax.random.split(key, self._num_corrections))[0]

    def get_diagnostics_str(self, state: GuidedReverseState) -> str:
        """For the progress bar."""
        return f"{state.num_score_evals} score evaluations"


def _at(times: dict[str, jax.Array], k: jax.Array | int) -> dict[str, jax.Array]:
    return {name: values[k] for name, values in times.items()}
