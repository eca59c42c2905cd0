r"""Annealed Langevin dynamics: every draw is a walk from noise to data, a few Langevin steps at each level.

At each level of a decreasing ladder, $K$ steps

$$x_t \leftarrow x_t + h_t\, s_t(x_t) + \sqrt{2 h_t}\, \xi, \qquad h_t = c\, \sigma_t^2,$$

by the guided score $s_t$ (`posterior`); the next level starts where this one ended, and at the bottom the draw is the
posterior mean. Song and Ermon's rule is $c = \epsilon / \sigma_L^2$ with their $\epsilon$ (the `"sigma"` rule,
$h_t = \epsilon\, \sigma_t^2 / \sigma_L^2$ at levels $\sigma_1 > \dots > \sigma_L$), that of the signal-to-noise ratio
$r$ is $c = 2 r^2$ (`"snr"`).

**What is approximate.** There are three errors, and the Metropolis test below removes the first:

1. The step. On a Gaussian of precision $\kappa$ a level's law has the variance $1 / (\kappa (1 - h \kappa / 2))$
   instead of $1 / \kappa$, and beyond $h \kappa = 2$ the walk explodes.
2. The walk is short. Per step a level forgets a share $h \kappa$ of where it started; with $h \propto \sigma_t^2$ the
   last levels hardly move directions that are wider than they are, and a draw has the law of some level above the last.
3. The guidance is a formula, see `posterior`. With `at_clean_point`, $\kappa$ is up to $1 / \sigma_t^2$ plus that of
   the likelihood through the denoiser: precise data need a small $c$.

On a Gaussian prior with a linear likelihood all three have a closed form: mean and variance follow an affine recursion,
and the tests compare the kernel with it. `metropolis` accepts or rejects each step (MALA, with the density of the
reverse move), which leaves the target of each level, $p_t(x_t)\, e^{G}$, invariant and removes the first error.

Draws are independent, unless `restart_level` lets a draw begin at the last one, noised to that level.

References:
    Song and Ermon, Generative modeling by estimating gradients of the data distribution, 2019,
    https://arxiv.org/abs/1907.05600.
    Song et al., Score-based generative modeling through stochastic differential equations, 2021 (signal-to-noise rule),
    https://arxiv.org/abs/2011.13456.
    Jalal et al., Robust compressed sensing MRI with deep generative priors, 2021 (posterior by annealed Langevin),
    https://arxiv.org/abs/2108.01368.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.anneal import langevin as level_walk
from numpyro_diffusion.infer.anneal.base import AnnealedKernel
from numpyro_diffusion.infer.anneal.langevin import LevelStatistics
from numpyro_diffusion.infer.anneal.posterior import Guidance, NoisyPosterior, Point
from numpyro_diffusion.infer.kernel.choose import keep_finite
from numpyro_diffusion.infer.kernel.start import Strategy, start
from numpyro_diffusion.infer.model.density import Density, Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.levels import check_within, decreasing, time_of
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.noise import UniformLogSNR
from numpyro_diffusion.solve.langevin import snr_step_size


class AnnealedLangevinState(NamedTuple):
    """State of `AnnealedLangevin`; the arrays by level have shape (num_levels,), NaN at levels that were not visited.

    Args:
        z: current point, by site, in NumPyro's unconstrained coordinates.
        accept_prob: mean acceptance probability of the last draw; NaN without a test.
        level_accept_prob: mean acceptance probability at each level; NaN without a test.
        level_step_size: the step h at each level, of the first site.
        level_score_norm: mean norm of the guided score at each level.
        num_score_evals: denoiser evaluations of the last draw, per point.
        diverging: whether a step or the draw was not finite, and was not taken, or the score moved a step by far more
            than its noise.
        rng_key: random key.
    """

    z: Point
    accept_prob: jax.Array
    level_accept_prob: jax.Array
    level_step_size: jax.Array
    level_score_norm: jax.Array
    num_score_evals: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class AnnealedLangevin(AnnealedKernel[AnnealedLangevinState]):
    r"""Draws all diffusion sites of a model by Langevin steps down a ladder of noise levels: fast, simple and biased.

    Needs the score of the priors and the gradient of the likelihood; see the module for what is approximate. All sites,
    and all points in plates, walk together.

    Args:
        model: NumPyro model whose latent sites are all diffusion sites; `DiffusionGibbs` takes the others.
        num_levels: number of levels, in geometric progression over the whole of each prior's schedule.
        levels: noise levels $\sigma_t / \alpha_t$, strictly decreasing, in the units of the data, in place of these.
        steps_per_level: Langevin steps at each level.
        step_rule: "snr" or "sigma", see the module.
        step_size: $r$ of the signal-to-noise rule (Song et al. take 0.16 for images, with which a walk of a few steps
            is too short here), or $\epsilon$ in squared units of the noisy point.
        restart_level: noise level to which the last draw is noised to begin the next; None begins from noise.
        guidance: what stands for the likelihood of noisy points, see `infer.at_clean_point`, or one of
            `guidance.GUIDANCES` such as "mmps", for one site with Gaussian data; None takes the likelihood at the
            predicted clean point.
        init_strategy: where chains start, as in NumPyro; None draws the priors.
        metropolis: whether to test each step. Needs priors with a density at every level.

    Raises:
        ValueError: for a number out of its range, an unknown rule, a ladder that does not decrease; when run, for a
            ladder or a restart level outside of the schedule, a model without a latent `DiffusionPrior` site or with
            other latent sites, or a test without a density.
        TypeError: for a model or a guidance that is not callable.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import AnnealedLangevin
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(AnnealedLangevin(model), num_warmup=0, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.5)
        True
    """

    status = Status(
        "score",
        False,
        "biased by the step, by walks too short for their level, and by the guidance; a test removes the first",
    )

    def __init__(
        self,
        model: Model,
        *,
        num_levels: int = 64,
        levels: Sequence[float] | None = None,
        steps_per_level: int = 4,
        step_rule: Literal["snr", "sigma"] = "snr",
        step_size: float = 0.3,
        restart_level: float | None = None,
        guidance: Guidance | str | None = None,
        init_strategy: Strategy | None = None,
        metropolis: bool = False,
    ) -> None:
        super().__init__(model, guidance, init_strategy)
        _checks.at_least(1, steps_per_level=steps_per_level)
        _checks.at_least(2, num_levels=num_levels)
        _checks.one_of("step_rule", step_rule, ("snr", "sigma"))
        _checks.positive(step_size=step_size)
        self._levels = None if levels is None else decreasing("levels", levels)
        if restart_level is not None:
            _checks.positive(restart_level=restart_level)
            if self._levels is not None and not self._levels[-1] <= restart_level <= self._levels[0]:
                raise ValueError(
                    f"restart_level must lie on the ladder, between {self._levels[-1]:.6g} and {self._levels[0]:.6g}; "
                    f"got {restart_level}. None begins from noise"
                )
        if metropolis and isinstance(guidance, str):
            raise ValueError(
                f"metropolis=True needs a guidance with a value at every level; {guidance!r} has a score "
                "only. Give a function such as infer.at_clean_point, or metropolis=False"
            )
        self._num_levels = num_levels if self._levels is None else len(self._levels)
        self._steps_per_level = steps_per_level
        self._step_rule = step_rule
        self._step_size = step_size
        self._restart_level = restart_level
        self._metropolis = metropolis
        tested = ("accept_prob", "level_accept_prob") if metropolis else ()
        self.statistics = (*tested, "level_step_size", "level_score_norm", "num_score_evals")

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """Those of its statistics by level; None where the priors' schedules say them."""
        return self._levels

    def _check_model(self, reading: Reading) -> None:
        super()._check_model(reading)
        concrete = self._levels is not None or self._restart_level is not None  # to be compared with the schedules
        sites = reading.sites() if concrete else reading.sites_in_the_abstract()
        for name, site in sites.items():
            if self._levels is not None:
                check_within("levels", self._levels, name, site)
            if self._metropolis and Density("denoiser").source_of(site.prior) is None:
                raise ValueError(
                    f"metropolis=True needs a density at every noise level, and the denoiser at site {name!r} has a "
                    'score only. Use an exact denoiser or a network with target="energy", or metropolis=False; '
                    "DiffusionPCN tests its moves without a density"
                )
        if self._restart_level is not None:
            name, site = next(iter(sites.items()))
            check_within("restart_level", [self._restart_level], name, site)

    def _ladder(self, site: PriorSite) -> jax.Array:
        """The times of the levels on a site's own clock."""
        if self._levels is None:
            return UniformLogSNR()(site.denoiser.schedule, self._num_levels)
        return time_of(self._levels, site.denoiser.schedule)

    def _steps(self, site: PriorSite, times: jax.Array) -> jax.Array:
        """The step at each level, in squared units of the noisy point."""
        sigma = site.denoiser.schedule.sigma(times)
        if self._step_rule == "snr":
            return snr_step_size(sigma, self._step_size)
        return self._step_size * (sigma / sigma[-1]) ** 2

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> AnnealedLangevinState:
        key, key_start = jax.random.split(key)
        z = start(key_start, reading, init_params, self._init_strategy)
        by_level = jnp.full(self._num_levels, jnp.nan)
        count = jnp.zeros((), jnp.int32)
        nan = jnp.full((), jnp.nan)
        return AnnealedLangevinState(z, nan, by_level, by_level, by_level, count, jnp.array(False), key)

    def _step(self, state: AnnealedLangevinState, reading: Reading) -> AnnealedLangevinState:
        posterior = self._posterior(reading)
        times = {name: self._ladder(site) for name, site in posterior.sites.items()}
        steps = {name: self._steps(site, times[name]) for name, site in posterior.sites.items()}
        key, key_start, key_walk = jax.random.split(state.rng_key, 3)
        first = self._first_level(posterior, times)
        x_t, by_level, diverging = self._walk(key_walk, posterior, state.z, times, steps, first, key_start)
        clean = posterior.guided(x_t, {name: times[name][-1] for name in times})
        z = posterior.to_unconstrained({name: prediction.x0 for name, prediction in clean.items()})
        z, not_finite = keep_finite(z, state.z)
        visited = jnp.arange(self._num_levels) >= first
        step_size = jnp.where(visited, next(iter(steps.values())), jnp.nan)
        evaluations = (self._num_levels - first) * (self._steps_per_level + self._metropolis) + 1
        return AnnealedLangevinState(
            z=z,
            accept_prob=jnp.nanmean(by_level.accept_prob),
            level_accept_prob=by_level.accept_prob,
            level_step_size=step_size.astype(by_level.score_norm.dtype),
            level_score_norm=by_level.score_norm,
            num_score_evals=jnp.asarray(evaluations, jnp.int32),
            diverging=diverging | not_finite,
            rng_key=key,
        )

    def _first_level(self, posterior: NoisyPosterior, times: dict[str, jax.Array]) -> ArrayLike:
        """The index of the highest level at or below the restart."""
        if self._restart_level is None:
            return 0
        name, site = next(iter(posterior.sites.items()))
        levels = site.denoiser.schedule.noise_level(times[name])
        return jnp.minimum(jnp.sum(levels > self._restart_level * (1 + 1e-5)), self._num_levels - 1)

    def _walk(
        self,
        key: jax.Array,
        posterior: NoisyPosterior,
        z: Point,
        times: dict[str, jax.Array],
        steps: dict[str, jax.Array],
        first: ArrayLike,
        key_start: jax.Array,
    ) -> tuple[Point, LevelStatistics, jax.Array]:
        """From the first level to the last: the noisy point there, statistics by level, and whether one diverged."""
        at = lambda values, k: {name: values[name][k] for name in values}  # noqa: E731
        walk = level_walk.adjusted if self._metropolis else level_walk.unadjusted
        top = at(times, first)
        x_t = (
            posterior.from_noise(key_start, top) if self._restart_level is None else posterior.noise(key_start, z, top)
        )

        def level(k: ArrayLike, carry: tuple) -> tuple:
            x_t, by_level, diverging = carry
            keys = jax.random.split(jax.random.fold_in(key, k), self._steps_per_level)
            x_t, statistics, bad = walk(keys, posterior, x_t, at(times, k), at(steps, k))
            return x_t, jax.tree.map(lambda all_, one: all_.at[k].set(one), by_level, statistics), diverging | bad

        empty = jnp.full(self._num_levels, jnp.nan)
        return jax.lax.fori_loop(first, self._num_levels, level, (x_t, LevelStatistics(empty, empty), jnp.array(False)))

    def get_diagnostics_str(self, state: AnnealedLangevinState) -> str:
        """For the progress bar."""
        accepted = f"acc. prob={state.accept_prob:.2f}, " if self._metropolis else ""
        return f"{accepted}{state.num_score_evals} score evaluations"
