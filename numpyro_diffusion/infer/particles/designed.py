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

What is estimated badly costs effective walks, and that is seen. How badly depends on the dimension: at high noise the
clean point has the law $\pi$ itself, which a handful of particles from the prior must find. In some ten dimensions, or
from a prior much wider than the posterior, they do not, and `TemperedSMC` or `PopulationHMC` are the tools.

References:
    Phillips, Dau, Hutchinson, De Bortoli, Deligiannidis, Doucet, Particle denoising diffusion sampler, 2024 (the
    weighted walk, with a trained network), https://arxiv.org/abs/2402.06320.
    Huang, Dong, Hao, Ma, Zhang, Reverse diffusion Monte Carlo, 2024, https://arxiv.org/abs/2307.02037.
    Fearnhead, Papaspiliopoulos, Roberts, Stuart, Random-weight particle filtering, 2010 (unbiased estimates for
    weights), https://arxiv.org/abs/0901.3246.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from jax.typing import ArrayLike
from numpyro.infer.util import unconstrain_fn

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import FromTarget
from numpyro_diffusion.denoise.designed.target import Particles, check_numbers, posterior
from numpyro_diffusion.infer.gradient import target
from numpyro_diffusion.infer.gradient.langevin import MALA
from numpyro_diffusion.infer.kernel.choose import without_improper
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.model.density import Density, Status
from numpyro_diffusion.infer.model.handlers import Model, draw_prior
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.particles.evidence import (
    Draws,
    Outcome,
    ParticleSampler,
    evidence_of,
    harmonic_mean,
    pool_islands,
    resample_islands,
    resample_uneven,
)
from numpyro_diffusion.infer.particles.mutate import NUM_STEP_SIZES, move

_DRAWS = 1000
"""Draws of the prior that location and scale are taken from."""
_AT_ONCE = 256
"""Walks whose particles are in memory together."""
_CORRELATION = 0.1
"""With their ancestors, at which the moves in the end have done their work."""
_FEW = 10.0
"""Number of effective walks of an island below which its estimate is not reliable."""


class Level(NamedTuple):
    """What happened at one noise level."""

    noise_level: jax.Array  # in units of the scale
    effective_size: jax.Array  # of all islands together, before resampling
    per_island: jax.Array  # of one island, its harmonic mean over islands, before resampling
    resampled: jax.Array  # share of the islands
    inner_size: jax.Array  # effective particles behind an estimate, the median over walks


class Cloud(NamedTuple):
    """Weighted walks, island by island."""

    points: jax.Array  # (islands * n, D)
    seen: Particles  # what the particles of each say there
    log_weights: jax.Array  # (islands, n), since the last resampling
    log_evidence: jax.Array  # (islands,), up to the last resampling


class DesignedDiffusion(ParticleSampler):
    r"""Samples an ordinary model by denoising without training, and estimates its evidence.

    Args:
        model: NumPyro model, all of whose latent sites are continuous.
        num_particles: walks in all, at least 2 an island.
        num_inner: particles behind each estimate of the denoiser, even.
        num_steps: Langevin steps of each of these, 0 for none; see `denoise.FromTarget`.
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
        num_inner: int = 64,
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
        check_numbers(num_inner, num_steps, "num_inner")
        _checks.at_least(2, num_levels=num_levels)
        _checks.at_least(0, num_moves=num_moves)
        highest, lowest = noise_levels
        _checks.positive(**{"noise_levels[1]": lowest})
        _checks.exceeds("noise_levels[0]", highest, "noise_levels[1]", lowest)
        if (location is None) != (scale is None):
            raise ValueError(f"location and scale must be given together; got {location=}, {scale=}")
        self._inner = {"num_particles": num_inner, "num_steps": num_steps}
        self._noise_levels = np.geomspace(highest, lowest, num_levels)
        self._num_moves, self._given = num_moves, None if scale is None else (dict(location), dict(scale))
        self._compiled = Compiled(model, self._units, self._start, self._down, self._finish)

    @property
    def levels(self) -> Level:
        """What happened at each noise level, as arrays over levels."""
        return self._ran.history

    @property
    def num_evaluations(self) -> int:
        """Of the model's density with its gradient, all walks and their particles together."""
        _ = self._ran
        each = self._inner["num_particles"] * (1 + self._inner["num_steps"]) * len(self._noise_levels)
        return self._shape[0] * self._shape[1] * (each + self._moves_made + 1)

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
        units, reading = self._prepare(key_units, args, kwargs)
        self._arguments, self._last_units = (args, kwargs), units

        def log_density(w: jax.Array, units: tuple) -> jax.Array:
            return _Vector(reading, units).log_density(w)

        shape = units[0].shape
        return FromTarget(log_density, shape, key, 0.0, 1.0, parameters=units, **self._inner)

    def constrain(self, vectors: jax.Array) -> dict[str, jax.Array]:
        """Values by site, with the deterministic ones, of vectors (..., D) that the last `denoiser` is of."""
        vector = _Vector(self._reading(), self._last_units)
        flat = vectors.reshape(-1, vectors.shape[-1])
        values = jax.lax.map(vector.constrain, flat)
        return {name: value.reshape(*vectors.shape[:-1], *value.shape[1:]) for name, value in values.items()}

    def _prepare(self, key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Reading]:
        reading = Record(self._model).at(args, kwargs)
        target.check(reading, Density("auto"), type(self).__name__)
        if self._given is not None:
            names = sorted(reading.structure.latent)
            for name, value in zip(("location", "scale"), self._given, strict=True):
                if sorted(value) != names:
                    raise ValueError(f"{name} must have the latent sites {names}; got {sorted(value)}")
        location, scale = self._compiled.bind(args, kwargs)[0](key)
        if not bool(jnp.isfinite(location).all() & jnp.isfinite(scale).all() & (scale > 0).all()):
            source = "the moments of the prior's draws are not" if self._given is None else "those given are not"
            raise ValueError(
                f"{type(self).__name__} needs a finite location and a positive scale of every latent site; {source}. "
                "Give location= and scale=, unconstrained values by site"
            )
        return (location, scale), reading

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        key_units, key_start, key_steps, key_finish = jax.random.split(rng_key, 4)
        units, _ = self._prepare(key_units, args, kwargs)
        _, start, down, finish = self._compiled.bind(args, kwargs)
        levels = [jnp.asarray(level, float) for level in self._noise_levels]
        cloud, history = start(key_start, units, levels[0]), []
        with self._bar(len(levels), "noise level") as bar:
            for k, (above, below) in enumerate(zip(levels, levels[1:], strict=False)):
                _look(cloud, above)
                cloud, level = down(jax.random.fold_in(key_steps, k), units, cloud, above, below)
                history.append(level)
                bar.update()
            _look(cloud, levels[-1])
            draws, islands, level, moves = finish(key_finish, units, cloud, levels[-1])
            bar.update()
        self._last_units, self._moves_made = units, int(moves)
        found = jax.tree.map(lambda *leaves: np.array(leaves), *history, level)
        evidence, problems = evidence_of(islands), self._problems(found)
        if problems:
            evidence = evidence._replace(standard_error=jnp.full((), jnp.inf))
        return Outcome(draws, evidence, found, problems)

    def _problems(self, levels: Level) -> tuple[str, ...]:
        """A message if few walks had all the weight at some level."""
        poor = levels.per_island < min(_FEW, 0.25 * self._shape[1])
        if not poor.any():
            return ()
        worst = int(np.argmin(levels.per_island))
        return (
            f"the weights degenerate at {poor.sum()} of {len(poor)} noise levels: of the {self._shape[1]} walks of an "
            f"island only {levels.per_island[worst]:.1f} are effective at noise level {levels.noise_level[worst]:.3g}, "
            f"where estimates of the denoiser have {levels.inner_size[worst]:.1f} effective particles of "
            f"{self._inner['num_particles']}. Draws are copies of a few and modes may be lost; the log evidence is "
            "most likely too small by more than islands show, so its error is infinite. Raise num_inner or num_steps, "
            "give a location and a scale nearer to the posterior, or use TemperedSMC(model)",
        )

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        levels, total = self.levels, self._shape[0] * self._shape[1]
        for name, sizes, of in (
            ("walks", levels.effective_size, total),
            ("particles behind an estimate", levels.inner_size, self._inner["num_particles"]),
        ):
            worst = int(np.argmin(sizes))
            at = f"noise level {levels.noise_level[worst]:.3g}"
            print(f"smallest effective number of {name}: {sizes[worst]:.1f} of {of}, at {at}")

    def _units(self, key: jax.Array, args: tuple, kwargs: dict) -> tuple[jax.Array, jax.Array]:
        """Location and scale of all latent sites, (D,)."""
        if self._given is not None:
            origin = Record(self._model).at(args, kwargs).origin()
            full = [{k: jnp.broadcast_to(jnp.asarray(g[k], float), v.shape) for k, v in origin.items()}
                    for g in self._given]  # fmt: skip
            return tuple(ravel_pytree(values)[0] for values in full)

        def draw(key: jax.Array) -> jax.Array:
            try:
                values = draw_prior(self._model, key, args, kwargs)
            except ValueError as error:
                raise ValueError(
                    "DesignedDiffusion takes its units from draws of the prior, and it cannot be drawn. Give location= "
                    f"and scale=, unconstrained values by site: {error}"
                ) from error
            return ravel_pytree(unconstrain_fn(self._model, args, kwargs, values))[0]

        draws = jax.vmap(draw)(jax.random.split(key, _DRAWS))
        return draws.mean(0), draws.std(0)

    def _look(self, key: jax.Array, vector: "_Vector", points: jax.Array, level: jax.Array) -> Particles:
        """What the particles of each walk say."""

        def one(each: tuple[jax.Array, jax.Array]) -> Particles:
            return posterior(vector.log_density, each[0], each[1], level, 0.0, 1.0, **self._inner)

        keys = jax.random.split(key, len(points))
        return jax.lax.map(one, (keys, points), batch_size=min(_AT_ONCE, len(points)))

    def _vector(self, units: tuple, args: tuple, kwargs: dict) -> "_Vector":
        return _Vector(Record(self._model).at(args, kwargs), units)

    def _start(self, key: jax.Array, units: tuple, level: jax.Array, args: tuple, kwargs: dict) -> Cloud:
        """Walks at the highest level."""
        key_points, key_look = jax.random.split(key)
        islands, n = self._shape
        variance = 1.0 + level**2
        points = jnp.sqrt(variance) * jax.random.normal(key_points, (islands * n, *units[0].shape))
        seen = self._look(key_look, self._vector(units, args, kwargs), points, level)
        log_weights = seen.log_density - _log_normal(points, variance)
        return Cloud(points, seen, log_weights.reshape(self._shape), jnp.zeros(islands))

    def _down(
        self, key: jax.Array, units: tuple, cloud: Cloud, above: jax.Array, below: jax.Array, args: tuple, kwargs: dict
    ) -> tuple[Cloud, Level]:
        """One level down: resamples where weights have become uneven, steps and weighs."""
        key_resample, key_step, key_look = jax.random.split(key, 3)
        log_weights = without_improper(cloud.log_weights)
        ancestors, log_weights, log_gain, sizes, now = resample_uneven(key_resample, log_weights, self._ess_threshold)
        level = Level(above, sizes.sum(), harmonic_mean(sizes), jnp.mean(now), jnp.median(cloud.seen.effective_size))
        x_t, seen = jax.tree.map(lambda leaf: leaf[ancestors], (cloud.points, cloud.seen))
        ratio = (below / above) ** 2
        trust = (seen.effective_size / (seen.effective_size + 1.0))[:, None]
        clean = trust * seen.variance + (1.0 - trust) / (1.0 + above**-2.0)
        variance = (1.0 - ratio) ** 2 * clean + (1.0 - ratio) * below**2
        step = (1.0 - ratio) * seen.shift + jnp.sqrt(variance) * jax.random.normal(key_step, x_t.shape)
        new = self._look(key_look, self._vector(units, args, kwargs), x_t + step, below)
        there = _log_normal(step - (1.0 - ratio) * seen.shift, variance)
        gained = new.log_density - seen.log_density + _log_normal(step, above**2 - below**2) - there
        log_weights = log_weights + gained.reshape(self._shape)
        return Cloud(x_t + step, new, log_weights, cloud.log_evidence + log_gain), level

    def _finish(
        self, key: jax.Array, units: tuple, cloud: Cloud, level: jax.Array, args: tuple, kwargs: dict
    ) -> tuple[Draws, jax.Array, Level, jax.Array]:
        """Clean points, resampled and moved: draws, the evidence of each island, and the effective sizes."""
        key_resample, key_moves, key_pooled = jax.random.split(key, 3)
        log_weights, n = without_improper(cloud.log_weights), self._shape[1]
        log_evidence = cloud.log_evidence + logsumexp(log_weights, axis=1) - jnp.log(n)
        found = resample_uneven(key_resample, log_weights, self._ess_threshold)
        last = Level(
            level,
            found.sizes.sum(),
            harmonic_mean(found.sizes),
            jnp.mean(found.now),
            jnp.median(cloud.seen.effective_size),
        )
        vector = self._vector(units, args, kwargs)
        clean = cloud.seen.draw[resample_islands(key_resample, log_weights).reshape(-1)]
        z, moves = jax.vmap(vector.point)(clean), jnp.zeros((), int)
        if self._num_moves:
            keys, nan = jax.random.split(key_moves, len(clean)), jnp.full((), jnp.nan)
            limits = {"correlation": _CORRELATION, "max_moves": self._num_moves}
            z, made = move(MALA(self._model), keys, z, args, kwargs, nan, jnp.full(NUM_STEP_SIZES, nan), **limits)
            moves = made.num_moves
        values = jax.vmap(partial(vector.reading.constrain, deterministic=True))(z)
        pooled = pool_islands(key_pooled, log_evidence, n)
        return Draws(values, pooled, jnp.arange(len(clean)).reshape(self._shape)), log_evidence, last, moves


class _Vector:
    """A model as a density of standardised vectors (D,).

    Args:
        reading: the model at its arguments.
        units: location and scale, (D,).
    """

    def __init__(self, reading: Reading, units: tuple[jax.Array, jax.Array]) -> None:
        self.reading, (self._location, self._scale) = reading, units
        self._target = target.Target(reading, Density("auto"), reading.origin())

    def log_density(self, w: jax.Array) -> jax.Array:
        value = self._target.log_target(self._location + self._scale * w)
        return (value + jnp.sum(jnp.log(self._scale))).astype(w.dtype)

    def point(self, w: jax.Array) -> dict[str, jax.Array]:
        """Unconstrained values by site."""
        return self._target.unflatten(self._location + self._scale * w)

    def constrain(self, w: jax.Array) -> dict[str, jax.Array]:
        return self.reading.constrain(self.point(w), deterministic=True)


def _log_normal(x: jax.Array, variance: jax.Array) -> jax.Array:
    """Log-density of N(0, variance) at points (..., D)."""
    return -0.5 * jnp.sum(x**2 / variance + jnp.log(2.0 * math.pi * variance), -1)


def _look(cloud: Cloud, level: jax.Array) -> None:
    """Raises if no walk is left."""
    if not bool((without_improper(cloud.log_weights) > -jnp.inf).any()):
        raise ValueError(
            f"the model's density must be positive and finite at some particle; at noise level {float(level):.3g} it "
            "is zero or NaN at all of them. Look for a factor that is not finite, or give location= and scale= nearer "
            "to the posterior"
        )
