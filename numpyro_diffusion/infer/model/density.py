r"""What stands for the log-density of a diffusion prior, and how far it can be trusted.

A kernel on the joint posterior moves by the gradient of $\log p(x) + \log L(x)$ and, if it tests its moves, needs the
difference of this between two points. For the likelihood both are available. For $\log p$ of a diffusion prior there
are three choices, the `density=` of a kernel, and the `status` of each says how far it can be trusted:

* `Score`: the gradient alone, $\nabla \log p$ at the smallest noise level. No test can be made with it.
* `Density`: a log-density. The denoiser's own, $\log p_t(\alpha_t x)$ at the smallest noise level, where it has one (an
  exact denoiser, an energy network), or that of the probability flow, by one solve. A test with it leaves the law of
  that density invariant.
* `LineIntegral`: differences only, as the work of the score along the segment between two points,

$$\log p(x') - \log p(x) \approx \int_0^1 s(x + \tau (x' - x))^\top (x' - x)\, \mathrm{d}\tau,$$

by quadrature. A learned score need not be a gradient. Where it is not, the integral depends on the path, and there is
no law that the test would leave invariant. The *circulation*, the work around a closed triangle, measures how far the
score is from a gradient: for a gradient it is zero, up to the quadrature.

`with_density` replaces the priors' own `log_prob` by the value of `Density`. The result is an ordinary NumPyro model,
also for NumPyro's own kernels. The values of the others are not densities and stay inside this package.

References:
    Song et al., Score-based generative modeling through stochastic differential equations, 2021,
    https://arxiv.org/abs/2011.13456.
    Du et al., Reduce, reuse, recycle, 2023 (a Metropolis test by the line integral of the score),
    https://arxiv.org/abs/2302.11552.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import reparam
from numpyro.infer.reparam import Reparam

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.denoise.prediction import density_kind
from numpyro_diffusion.density import Gradient, clean_score
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer.model.handlers import Model, as_written, is_diffusion_site

Source = Literal["auto", "denoiser", "flow"]
SOURCES = get_args(Source)

_WITHOUT_DENSITY = (
    "AnnealedLangevin and ULA need the score alone (biased), NoiseSpace gradients through the flow, DiffusionPCN and "
    "DiffusionGibbs the likelihood alone"
)


class Status(NamedTuple):
    """What a kernel is exact for, for its users."""

    needs: str  # from the prior: "score", "density", "line integral", "flow", "reverse process"
    exact: bool  # whether the kernel leaves a known law invariant
    statement: str  # that law, or what is approximate


class LogPrior(abc.ABC):
    """What stands for the log-density of a diffusion prior; a frozen dataclass of plain numbers.

    Attributes:
        status: what it is, and how far it can be trusted.
        has_density: whether its value is a log-density.
        can_test: whether a Metropolis test can be made with it.
    """

    status: ClassVar[Status]
    has_density: ClassVar[bool] = False
    can_test: ClassVar[bool] = True

    @abc.abstractmethod
    def value(self, prior: DiffusionPrior, u: jax.Array) -> jax.Array:
        """A function of points of the denoiser's space whose gradient is the score.

        Args:
            prior: the prior.
            u: points of shape `(..., *noise_shape)`.

        Returns:
            The log-density of each if `has_density`; otherwise the values mean nothing.
        """

    @abc.abstractmethod
    def check(self, name: str, prior: DiffusionPrior, depends: bool, kernel: str) -> None:
        """Raises unless it can stand for the prior at a site, which may depend on other latent sites, in a kernel."""

    @abc.abstractmethod
    def evaluations(self, prior: DiffusionPrior, values: int = 1, tests: int = 0) -> int:
        """Denoiser evaluations behind some values with their gradients, and behind some tests, per point."""

    def work(self, gradient: Callable[[jax.Array], jax.Array], start: jax.Array, end: jax.Array) -> jax.Array:
        """What a test adds to the difference of the values at two points of shape (D,), by the priors' gradient."""
        return jnp.zeros((), start.dtype)

    def work_around(
        self, gradient: Callable[[jax.Array], jax.Array], a: jax.Array, b: jax.Array, c: jax.Array
    ) -> jax.Array:
        """The circulation of the priors' gradient around a triangle, in nats; NaN where it is not measured."""
        return jnp.full((), jnp.nan, a.dtype)


def log_prior_of(density: "LogPrior | Source") -> LogPrior:
    """What the `density=` of a kernel stands for: "auto", "denoiser" and "flow" are short for `Density` of these.

    Raises:
        TypeError: if it is neither a string nor a `LogPrior`.
        ValueError: if the string is unknown.
    """
    if isinstance(density, str):
        _checks.one_of("density", density, SOURCES)
        return Density(density)
    if not isinstance(density, LogPrior):
        raise TypeError(
            f'density must be "auto", "denoiser", "flow", or a LogPrior such as infer.LineIntegral(); got {density!r}'
        )
    return density


@dataclass(frozen=True)
class Score(LogPrior):
    """The score at the smallest noise level, and nothing else."""

    status = Status("score", False, "moves by the score without a test: biased by the order of its step")
    can_test = False

    def value(self, prior: DiffusionPrior, u: jax.Array) -> jax.Array:
        def one(denoiser: Denoiser, u: jax.Array) -> jax.Array:
            score = jax.lax.stop_gradient(clean_score(denoiser, u))
            return jnp.vdot(score, u).astype(u.dtype)

        return prior.over_points(one, u.shape[: u.ndim - len(prior.noise_shape)], u)

    def check(self, name: str, prior: DiffusionPrior, depends: bool, kernel: str) -> None:
        if depends:
            raise ValueError(
                f"the prior of site {name!r} depends on other latent sites, and {type(self).__name__}() has no "
                f"gradient in them for {kernel}. Use MALA(model), NoiseSpace(model) or DiffusionGibbs(model)"
            )

    def evaluations(self, prior: DiffusionPrior, values: int = 1, tests: int = 0) -> int:
        return values


@dataclass(frozen=True)
class Density(LogPrior):
    """A log-density.

    Args:
        source: "denoiser" for the denoiser's own at the smallest noise level, one evaluation; "flow" for that of the
            probability flow, one solve with its trace; "auto" for the first that the prior has.
        gradient: of the flow's density: "score" for the denoiser's at the smallest noise level, which a learned one may
            have far from it; "solve" for the gradient of the value, through the solve, at a few times the cost. None
            takes the prior's `density_gradient`.

    Raises:
        ValueError: if `source` or `gradient` is unknown.
    """

    source: Source = "auto"
    gradient: Gradient | None = None

    status = Status("density", True, "leaves the law of the prior's density invariant: the denoiser's, or the flow's")
    has_density = True

    def __post_init__(self) -> None:
        _checks.one_of("source", self.source, SOURCES)
        if self.gradient is not None:
            _checks.one_of("gradient", self.gradient, get_args(Gradient))

    def source_of(self, prior: DiffusionPrior) -> Literal["denoiser", "flow"] | None:
        """Where the density of a prior comes from: "denoiser", "flow", or None if it has none."""
        if self.source != "flow" and density_kind(prior.denoisers) is not None:
            return "denoiser"
        return "flow" if self.source != "denoiser" and prior.has_flow_density else None

    def value(self, prior: DiffusionPrior, u: jax.Array) -> jax.Array:
        source = self.source_of(prior)
        if source is None:
            raise NotImplementedError(
                f'a DiffusionPrior has a score but no density for {self}. Give it density="auto" (of no use for a '
                f"Product, which has no flow), or take another kernel: {_WITHOUT_DENSITY}"
            )
        return DiffusionPrior.log_density(prior, u, source, self.gradient)

    def check(self, name: str, prior: DiffusionPrior, depends: bool, kernel: str) -> None:
        source = self.source_of(prior)
        if depends and source == "denoiser" and density_kind(prior.denoisers) == "unnormalized":
            raise ValueError(
                f"the density at site {name!r} is known but for a constant that depends on other latent sites: "
                f'{kernel} cannot move those by it. Use density="flow", NoiseSpace(model) or DiffusionGibbs(model)'
            )
        if source is None:
            raise ValueError(
                f"{kernel} needs a density, and the DiffusionPrior at site {name!r} has a score but no density for "
                f'{self}. Give the prior density="auto" (of no use for a Product, which has no flow), or the kernel '
                f"density=LineIntegral() (approximate), or take another kernel: {_WITHOUT_DENSITY}"
            )

    def evaluations(self, prior: DiffusionPrior, values: int = 1, tests: int = 0) -> int:
        if self.source_of(prior) == "denoiser":
            return values
        solve = 2 * (prior.density_solver.num_times - 1)
        return values * (solve + ((self.gradient or prior.density_gradient) == "score"))


@dataclass(frozen=True)
class LineIntegral(Score):
    """Differences of the log-density as the work of the score along a segment, by quadrature.

    Args:
        num_points: points of the rule: for Simpson's, which reuses both ends, an odd number of at least 3; for
            Gauss-Legendre's at least 1.
        rule: "simpson" or "gauss-legendre".
        circulation: whether to measure the work around a triangle with every test, which costs some evaluations.

    Raises:
        ValueError: if the rule is unknown or cannot have that many points.
    """

    num_points: int = 3
    rule: Literal["simpson", "gauss-legendre"] = "simpson"
    circulation: bool = True

    status = Status(
        "line integral",
        False,
        "tests by the work of the score along a segment: exact only where the score is a gradient; see `circulation`",
    )
    can_test = True

    def __post_init__(self) -> None:
        _checks.one_of("rule", self.rule, ("simpson", "gauss-legendre"))
        _checks.at_least(3 if self.rule == "simpson" else 1, num_points=self.num_points)
        if self.rule == "simpson" and self.num_points % 2 == 0:
            raise ValueError(f"num_points must be odd for Simpson's rule; got {self.num_points}")

    def _nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Places on [0, 1] and their weights."""
        if self.rule == "gauss-legendre":
            places, weights = np.polynomial.legendre.leggauss(self.num_points)
            return 0.5 * (places + 1.0), 0.5 * weights
        weights = np.full(self.num_points, 2.0)
        weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
        return np.linspace(0.0, 1.0, self.num_points), weights / weights.sum()

    def work(self, gradient: Callable[[jax.Array], jax.Array], start: jax.Array, end: jax.Array) -> jax.Array:
        """The work of a vector field from one point to another, both of shape (D,)."""
        places, weights = (jnp.asarray(v, start.dtype) for v in self._nodes())
        values = jax.vmap(lambda place: gradient(start + place * (end - start)))(places)
        return weights @ values @ (end - start)

    def work_around(
        self, gradient: Callable[[jax.Array], jax.Array], a: jax.Array, b: jax.Array, c: jax.Array
    ) -> jax.Array:
        """The circulation around the triangle a, b, c: zero for a gradient, up to the quadrature."""
        if not self.circulation:
            return super().work_around(gradient, a, b, c)
        return self.work(gradient, a, b) + self.work(gradient, b, c) + self.work(gradient, c, a)

    def evaluations(self, prior: DiffusionPrior, values: int = 1, tests: int = 0) -> int:
        return values + tests * self.num_points * (4 if self.circulation else 1)


def with_density(model: Model, density: Source = "auto") -> Model:
    """A model for NumPyro's own kernels, with the cheapest density that its diffusion priors have.

    It makes a difference for energy networks: their own density costs one evaluation, where the `log_prob` of a
    `DiffusionPrior` solves the probability flow by default. An energy is a log-density up to a constant: good for
    moving x, but not for comparing models. Exact denoisers have their closed form either way.

    Args:
        model: NumPyro model.
        density: where it comes from, the `source` of `Density`. When run, a prior without that density is a
            `NotImplementedError`.

    Returns:
        A model with the same sites.

    Example:
        >>> import jax, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import with_density
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(NUTS(with_density(model)), num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """
    return partial(_run_with, Density(density), model)


def _run_with(density: Density, model: Model, *args: Any, **kwargs: Any) -> Any:
    """Module-level, so that kernels on it can be pickled."""

    def config(site: dict) -> Callable | None:
        return _WithDensity(density, as_written(site)) if is_diffusion_site(site) else None

    return reparam(model, config=config)(*args, **kwargs)


class _WithDensity(Reparam):
    """Replaces the log-density of a site's prior by a `Density`."""

    def __init__(self, density: Density, fn: dist.Distribution) -> None:
        self.density, self.fn = density, fn

    def __call__(self, name: str, fn: dist.Distribution, obs: jax.Array | None) -> tuple:
        prior, expand_shape, event_dim = self._unwrap(self.fn)
        return self._wrap(_PriorOfDensity.of(prior, self.density), expand_shape, event_dim), obs


class _PriorOfDensity(DiffusionPrior):
    """A prior whose log-density is the value of a `Density`; made by `with_density`."""

    pytree_aux_fields = ("log_prior",)

    @classmethod
    def of(cls, prior: DiffusionPrior, log_prior: Density) -> "_PriorOfDensity":
        self = object.__new__(cls)
        self.__dict__.update(vars(prior), log_prior=log_prior)
        return self

    def log_density(self, u: jax.Array, source: str | None = None, gradient: Gradient | None = None) -> jax.Array:
        return self.log_prior.value(self, u)
