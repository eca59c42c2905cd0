r"""Diffusion without a trained network: an ordinary model sampled by denoising, with weights for all that is estimated.

Any law $\pi$ has a denoiser. That of a model's joint density is estimated where it is needed, by particles
(`denoise.FromTarget`), in coordinates in which the prior has mean 0 and deviation 1. They also give an unbiased
estimate $\hat p_t(x_t)$ of the noisy density. So a walk from noise to data can be weighted at each of its levels: from
$x_t$, with the estimated mean $\hat x_0$ and variance $V$ of the clean point, it goes to the level below by

$$x_s \sim N\left((1 - \rho)\, \hat x_0 + \rho\, x_t,\; (1 - \rho)^2 V + (1 - \rho)\, \lambda_s^2\right), \qquad
\rho = \lambda_s^2 / \lambda_t^2,$$

$$w \leftarrow w\, \frac{\hat p_s(x_s)\, N(x_t; x_s, \lambda_t^2 - \lambda_s^2)}{\hat p_t(x_t)\, q(x_s \mid x_t)},$$

and walks with small weights are resampled. At the lowest level, one of the particles behind the last estimate, chosen
by its weight, is the draw. An estimate that is unbiased may stand for the density in an SMC sampler: particles and
walks together are a larger space in which all weights are exact. So, in any number of levels, inner particles and
Langevin steps, and for any denoiser, draws are right in the limit of many walks and $\hat Z$, the mean of the weights,
is unbiased. Moves by MALA on $\pi$ itself separate copies in the end.

The density of the levels in between only steers, so that particles may be shared by all walks there: what
finds the modes of the posterior at high noise is paid for once. What is estimated badly costs effective walks, and that
is seen. How badly depends on the dimension: at high noise the clean point has the law $\pi$ itself, which some hundred
particles as wide as the prior must find. In some ten dimensions, or from a prior much wider than the posterior, they do
not, and `TemperedSMC` or `PopulationHMC` are the tools.

References:
    Phillips, Dau, Hutchinson, De Bortoli, Deligiannidis, Doucet, Particle denoising diffusion sampler, 2024 (the
    weighted walk, with a trained network), https://arxiv.org/abs/2402.06320.
    Huang, Dong, Hao, Ma, Zhang, Reverse diffusion Monte Carlo, 2024, https://arxiv.org/abs/2307.02037.
    Fearnhead, Papaspiliopoulos, Roberts, Stuart, Random-weight particle filtering, 2010 (unbiased estimates for
    weights), https://arxiv.org/abs/0901.3246.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import FromTarget
from numpyro_diffusion.denoise.designed.target import Shared, check_numbers
from numpyro_diffusion.infer.kernel.choose import effective_size, without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.density import Status
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.infer.particles.designed.vector import (
    Standardised,
    Units,
    both,
    check_model,
    check_units,
    given_units,
    units_of_prior,
    vector_of,
)
from numpyro_diffusion.infer.particles.designed.walk import Cloud, Level, Walk, check_alive
from numpyro_diffusion.infer.particles.evidence import (
    Draws,
    Outcome,
    ParticleSampler,
    evidence_of,
    harmonic_mean,
    pool_islands,
    resample_islands,
)
from numpyro_diffusion.infer.particles.mutate import separate

_FEW = 10.0
"""Number of effective walks of an island below which its estimate is not reliable."""


class DesignedDiffusion(ParticleSampler):
    r"""Samples an ordinary model by denoising without training, and estimates its evidence.

    Args:
        model: NumPyro model, all of whose latent sites are continuous.
        num_particles: walks in all, at least 2 an island.
        num_inner: particles behind each estimate of the denoiser alone, even.
        num_shared: particles behind all estimates; see `denoise.FromTarget`.
        num_steps: Langevin steps of each inner particle, 0 for none; with steps none are shared.
        num_levels: noise levels, at least 2.
        noise_levels: the highest and the lowest, in units of `scale`.
        num_moves: at most so many moves by MALA in the end, 0 for none.
        location: centre of the law, unconstrained values by site; None takes the mean of draws of the prior.
        scale: standard deviations there, positive, in the same form; None takes those of the prior. The better both fit
            the posterior, the better the walks; a scale that is too small is worse than one that is too large.
        num_islands: independent parts of the population, whose estimates of the evidence give its error.
        ess_threshold: share of an island's walks below which they are resampled, in (0, 1].
        progress_bar: whether to show the noise level.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: for a number out of its range, or one of `location` and `scale` without the other; when run, for a
            model without latent sites, with discrete ones or that cannot be differentiated, a prior that cannot be
            drawn where location and scale are not given, or a density that is zero or NaN wherever it is looked at.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer import DesignedDiffusion
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 3.0))
        ...     numpyro.sample("y", dist.Normal(jnp.abs(x), 0.5), obs=y)
        >>> designed = DesignedDiffusion(model, 400, progress_bar=False).run(jax.random.key(0), 3.0)
        >>> bool(abs((designed.get_samples()["x"] > 0.0).mean() - 0.5) < 0.15)  # the sign is not observed
        True
    """

    status = Status(
        "density", True, "exact in many particles, whatever the error of the denoiser; few effective ones are reported"
    )

    def __init__(
        self,
        model: Model,
        num_particles: int = 1000,
        *,
        num_inner: int = 16,
        num_shared: int = 1000,
        num_steps: int = 0,
        num_levels: int = 32,
        noise_levels: tuple[float, float] = (10.0, 0.01),
        num_moves: int = 20,
        location: Mapping[str, ArrayLike] | None = None,
        scale: Mapping[str, ArrayLike] | None = None,
        num_islands: int = 4,
        ess_threshold: float = 0.5,
        progress_bar: bool = True,
    ) -> None:
        super().__init__(model, num_particles, num_islands, ess_threshold, progress_bar)
        check_numbers(num_inner, num_shared, num_steps, "num_inner")
        _checks.at_least(2, num_levels=num_levels)
        _checks.at_least(0, num_moves=num_moves)
        highest, lowest = noise_levels
        _checks.positive(**{"noise_levels[1]": lowest})
        _checks.exceeds("noise_levels[0]", highest, "noise_levels[1]", lowest)
        self._walk = Walk(self._shape, num_inner, 0 if num_steps else num_shared, num_steps, ess_threshold)
        self._noise_levels = np.geomspace(highest, lowest, num_levels)
        self._num_moves = num_moves
        self._given = both(location, scale)
        self._of_denoiser: tuple[Units, tuple, dict[str, Any]] | None = None
        self._compiled = Compiled(model, self._units, self._start, self._down, self._finish)

    @property
    def levels(self) -> Level:
        """What happened at each noise level, as arrays over levels."""
        return self._ran.history

    @property
    def num_evaluations(self) -> int:
        """Of the model's density with its gradient, all walks and their particles together."""
        _ = self._ran
        each = self._walk.num_inner * (1 + self._walk.num_steps) * len(self._noise_levels)
        return self._shape[0] * self._shape[1] * (each + self._moves_made + 1) + self._walk.num_shared

    def denoiser(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> FromTarget:
        """The denoiser of the model's latent sites as one vector, for any solver and any kernel.

        What a solver draws with it has the bias of its estimates and of the solver's steps, and no weights.

        Args:
            rng_key: random key of location and scale, and of all estimates.
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            A denoiser of vectors of shape (D,): unconstrained values, less the location and over the scale;
            `constrain` makes sites of them.
        """
        key_units, key = jax.random.split(rng_key)
        units = self._prepare(key_units, args, kwargs)
        self._of_denoiser, walk = (units, args, kwargs), self._walk
        reading = Record(self._model).at(args, kwargs)

        def log_density(w: jax.Array, units: Units) -> jax.Array:
            return Standardised(reading, units).log_density(w)

        return FromTarget(
            log_density,
            units[0].shape,
            key,
            0.0,
            1.0,
            num_particles=walk.num_inner,
            num_shared=walk.num_shared,
            num_steps=walk.num_steps,
            parameters=units,
        )

    def constrain(self, vectors: jax.Array) -> dict[str, jax.Array]:
        """Values by site, with the deterministic ones, of vectors (..., D) that the last `denoiser` is of."""
        if self._of_denoiser is None:
            raise RuntimeError("denoiser() must come first")
        vector = vector_of(self._model, *self._of_denoiser)
        flat = vectors.reshape(-1, vectors.shape[-1])
        values = jax.lax.map(vector.constrain, flat)
        return {name: value.reshape(*vectors.shape[:-1], *value.shape[1:]) for name, value in values.items()}

    def _prepare(self, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Units:
        """Checks the model at its arguments, and gives its units."""
        check_model("DesignedDiffusion", Record(self._model).at(args, kwargs), self._given)
        units = self._compiled.bind(args, kwargs)[0](key)
        check_units("DesignedDiffusion", units, self._given is not None)
        return units

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        key_units, key_start, key_steps, key_finish = jax.random.split(rng_key, 4)
        units = self._prepare(key_units, args, kwargs)
        _, start, down, finish = self._compiled.bind(args, kwargs)
        levels = [jnp.asarray(level, float) for level in self._noise_levels]
        (cloud, pool), history = start(key_start, units, levels[0]), []
        with self._bar(len(levels), "noise level") as bar:
            for k, (above, below) in enumerate(zip(levels, levels[1:], strict=False)):
                check_alive(cloud, above)
                pool = pool if k < len(levels) - 2 else None  # where weights must be exact
                cloud, level = down(jax.random.fold_in(key_steps, k), units, pool, cloud, above, below)
                history.append(level)
                bar.update()
            check_alive(cloud, levels[-1])
            draws, islands, level, moves = finish(key_finish, units, cloud, levels[-1])
            bar.update()
        self._moves_made = int(moves)
        found = jax.tree.map(lambda *leaves: np.array(leaves), *history, level)
        evidence, problems = evidence_of(islands), self._problems(found)
        if problems:
            evidence = evidence._replace(standard_error=jnp.full((), jnp.inf))
        return Outcome(draws, evidence, found, problems)

    def _problems(self, levels: Level) -> tuple[str, ...]:
        """A message if few walks or few particles had all the weight at some level."""
        inner = self._walk.num_inner + self._walk.num_shared
        blind = (levels.noise_level >= 1.0) & (levels.inner_size < min(_FEW, 0.25 * inner))
        problems = []
        if blind.any():
            problems.append(
                f"at high noise only {levels.inner_size[blind].min():.1f} of the {inner} particles behind an estimate "
                "are effective: they hardly find the posterior, parts of it may be lost to all islands alike, and the "
                "log evidence is most likely too small, so its error is infinite. Raise num_shared, give a location "
                "and a scale nearer to the posterior, or use TemperedSMC(model)"
            )
        poor = levels.per_island < min(_FEW, 0.25 * self._shape[1])
        if not poor.any():
            return tuple(problems)
        worst = int(np.argmin(levels.per_island))
        problems.append(
            f"the weights degenerate at {poor.sum()} of {len(poor)} noise levels: of the {self._shape[1]} walks of an "
            f"island only {levels.per_island[worst]:.1f} are effective at noise level {levels.noise_level[worst]:.3g}, "
            f"where estimates of the denoiser have {levels.inner_size[worst]:.1f} effective particles of "
            f"{self._walk.num_inner + self._walk.num_shared}. Draws are copies of a few and modes may be lost; the log "
            "evidence is most likely too small by more than islands show, so its error is infinite. Raise num_shared, "
            "num_inner or num_steps, give a location and a scale nearer to the posterior, or use TemperedSMC(model)"
        )
        return tuple(problems)

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        levels, total = self.levels, self._shape[0] * self._shape[1]
        for name, sizes, of in (
            ("walks", levels.effective_size, total),
            ("particles behind an estimate", levels.inner_size, self._walk.num_inner + self._walk.num_shared),
        ):
            worst = int(np.argmin(sizes))
            at = f"noise level {levels.noise_level[worst]:.3g}"
            print(f"smallest effective number of {name}: {sizes[worst]:.1f} of {of}, at {at}")

    def _units(self, key: jax.Array, args: tuple, kwargs: dict) -> Units:
        """Location and scale of all latent sites, (D,)."""
        if self._given is None:
            return units_of_prior("DesignedDiffusion", self._model, key, args, kwargs)
        return given_units(Record(self._model).at(args, kwargs), *self._given)

    def _start(
        self, key: jax.Array, units: Units, level: jax.Array, args: tuple, kwargs: dict
    ) -> tuple[Cloud, Shared | None]:
        """Walks at the highest level."""
        return self._walk.start(key, vector_of(self._model, units, args, kwargs), units[0].size, level)

    def _down(self, key: jax.Array, units: Units, pool: Shared | None, cloud: Cloud, *rest: Any) -> tuple[Cloud, Level]:
        """Walks one level down."""
        above, below, args, kwargs = rest
        return self._walk.down(key, vector_of(self._model, units, args, kwargs), pool, cloud, above, below)

    def _finish(
        self, key: jax.Array, units: tuple, cloud: Cloud, level: jax.Array, args: tuple, kwargs: dict
    ) -> tuple[Draws, jax.Array, Level, jax.Array]:
        """Clean points, resampled and moved: draws, the evidence of each island, and the effective sizes."""
        key_resample, key_moves, key_pooled = jax.random.split(key, 3)
        log_weights, n = without_improper(cloud.log_weights), self._shape[1]
        log_evidence = cloud.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(n)
        sizes, inner = jax.vmap(effective_size)(log_weights), jnp.median(cloud.seen.effective_size)
        last = Level(level, sizes.sum(), harmonic_mean(sizes), jnp.ones(()), inner)
        vector = vector_of(self._model, units, args, kwargs)
        clean = cloud.seen.draw[resample_islands(key_resample, log_weights).reshape(-1)]
        z, moves = separate(self._model, key_moves, jax.vmap(vector.point)(clean), args, kwargs, self._num_moves)
        values = jax.vmap(partial(vector.reading.constrain, deterministic=True))(z)
        pooled = pool_islands(key_pooled, log_evidence, n)
        return Draws(values, pooled, jnp.arange(len(clean)).reshape(self._shape)), log_evidence, last, moves
