r"""Products and mixtures of denoisers: laws put together at inference, without training.

**A mixture** $\sum_i w_i p_i$ is noised term by term, so it is a denoiser like any other: with the normalised densities
$p_{i,t}$ of its members at noise,

$$\hat x_0(x_t) = \sum_i r_i(x_t)\, \hat x_{0,i}(x_t), \qquad r_i \propto w_i\, p_{i,t}(x_t),$$

exactly and at every time.

**A product** $\prod_i p_i^{w_i}$ is not. Its factors give only the product of the noised laws,

$$\tilde p_t(x_t) = \prod_i p_{i,t}(x_t)^{w_i}, \qquad
\nabla \log \tilde p_t = \sum_i w_i \nabla \log p_{i,t}, \qquad
\hat x_0 = \sum_i w_i\, \hat x_{0,i} + \left( 1 - \sum_i w_i \right) \frac{x_t}{\alpha_t},$$

and **that is the noised product only at $t = 0$**. At noise the two differ: $n$ factors $N(0, 1)$ together have the
precision $n / (1 + \sigma^2)$, while their product, noised, has $1 / (1 / n + \sigma^2)$. A walk down the reverse
process by the summed scores therefore ends elsewhere: here, finely solved and from far above, at the variance
$1 / (2n - 1)$ instead of $1 / n$, and the probability flow shrinks to a point. But the $\tilde p_t$ are a path of
densities from noise to the product, known up to a constant if the factors are. So a kernel that tests its moves by
them at every level, or only at the last one, targets the product (`infer.AnnealedLangevin` with `metropolis=True`,
`infer.MALA`). `DiffusionPCN` and `NoiseSpace` take the reverse process or the flow for the prior, and cannot do this.
But a product with one factor that can be evaluated is a posterior with the other one as prior. Written as such in a
NumPyro model, it can be sampled by both, and needs nothing from this file.

A power below zero takes a factor out: a negation, or a prior that was counted too often, as in

$$p(\theta \mid y_1, \dots, y_n) \propto p(\theta)^{-(n-1)} \prod_i p(\theta \mid y_i).$$

A law must be left. Far out, a noised factor of bounded data falls as $e^{-\|x_t\|^2 / 2 \sigma_t^2}$, so the
powers must have a positive sum. Where factors have wide tails of their own, those that are taken out must be wider
than those that stay: $\sum_i w_i / (v_i + \sigma_t^2) > 0$ at every level for Gaussians of variances $v_i$.

References:
    Du et al., Reduce, reuse, recycle: compositional generation with energy-based diffusion models and MCMC, 2023,
    https://arxiv.org/abs/2302.11552.
    Liu et al., Compositional visual generation with composable diffusion models, 2022 (summed scores, negation),
    https://arxiv.org/abs/2206.01714.
    Geffner et al., Compositional score modeling for simulation-based inference, 2023 (a prior taken out),
    https://arxiv.org/abs/2209.14249.
"""

from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.prediction import Denoiser, DensityKind, Prediction, density_kind, require_denoiser
from numpyro_diffusion.noise import Schedule


class _Composed:
    """What the two have in common: members of one event shape and one schedule, and a number for each."""

    denoisers: tuple[Denoiser, ...]

    @property
    def schedule(self) -> Schedule:
        return self.denoisers[0].schedule

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.denoisers[0].event_shape)

    def _moments(self) -> tuple[jax.Array, jax.Array]:
        """Locations, (n, *event_shape), and scales, (n,), of the members."""
        locations = [jnp.broadcast_to(d.location, self.event_shape) for d in self.denoisers]
        return jnp.stack(locations), jnp.stack([jnp.asarray(d.scale) for d in self.denoisers])

    def _predictions(self, x_t: jax.Array, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Posterior means and noises of the members, each (n, *event_shape)."""
        predictions = [denoiser(x_t, t) for denoiser in self.denoisers]
        return jnp.stack([p.x0 for p in predictions]), jnp.stack([p.eps for p in predictions])

    def _log_densities(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        return jnp.stack([denoiser.log_density(x_t, t) for denoiser in self.denoisers])  # type: ignore[attr-defined]


@jax.tree_util.register_pytree_node_class
class Product(_Composed):
    r"""The product of the noised laws, $\prod_i p_{i,t}^{w_i}$: a path of densities that ends at $\prod_i p_i^{w_i}$.

    Its `log_density` is known up to a constant that depends on time and powers, and its score is $\sum_i w_i s_i$. It
    is not a noised law: a reverse process with it is biased, and so is its probability flow; see the module. Give it to
    a `DiffusionPrior` for kernels that test by the density, or that are biased anyway.

    Args:
        denoisers: the factors, of one event shape and one schedule.
        powers: $w_i$, shape (n,), of positive sum; one for each by default. Below zero is negation.

    Raises:
        TypeError: if a factor is not a denoiser.
        ValueError: if event shapes or noise levels differ, or powers are not finite or their sum is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, Product
        >>> product = Product([Gaussian([-1.0]), Gaussian([3.0])])
        >>> product(jnp.array([1.0]), 0.0).x0.tolist()
        [1.0]
    """

    def __init__(self, denoisers: Sequence[Denoiser], powers: npt.ArrayLike | None = None) -> None:
        self.denoisers = _agreed(denoisers)
        self.powers = _numbers("powers", jnp.ones(len(self.denoisers)) if powers is None else powers, self.denoisers)
        if not isinstance(self.powers, jax.core.Tracer) and not np.sum(self.powers) > 0:
            raise ValueError(
                f"powers must have a positive sum, or there is no law at noise; got {np.asarray(self.powers)}. Raise "
                "those of the factors to keep"
            )

    @property
    def location(self) -> jax.Array:
        """The mean that Gaussians of the factors' locations and scales would have together, of `event_shape`."""
        return self._gaussian()[0]

    @property
    def scale(self) -> jax.Array:
        """The standard deviation that these Gaussians would have together; a scalar."""
        return self._gaussian()[1]

    def _gaussian(self) -> tuple[jax.Array, jax.Array]:
        """The product of Gaussians, or where it has no variance (negation) the widest of them at their mean place."""
        locations, scales = self._moments()
        precisions = self.powers / scales**2
        total = precisions.sum()
        proper = total > 0
        divisor = jnp.where(proper, total, 1.0)
        location = jnp.where(proper, _weighted(precisions, locations) / divisor, locations.mean(0))
        return location, jnp.where(proper, divisor**-0.5, scales.max())

    @property
    def density_kind(self) -> DensityKind | None:
        return "unnormalized" if all(density_kind(d) for d in self.denoisers) else None

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        r"""The clean point that the summed scores stand for, $(x_t + \sigma_t^2 \sum_i w_i s_i) / \alpha_t$."""
        means, noises = self._predictions(x_t, t)
        powers = self.powers.astype(means.dtype)
        x0 = _weighted(powers, means) + (1.0 - powers.sum()) * x_t / self.schedule.alpha(t)
        return Prediction(x0.astype(means.dtype), _weighted(powers, noises), x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""$\sum_i w_i \log p_{i,t}(x_t)$: a log-density up to a constant that depends on time and powers.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.

        Returns:
            A scalar, whose gradient in `x_t` is the score of the prediction.

        Raises:
            TypeError: if a factor has a score but no density.
        """
        without = [i for i, denoiser in enumerate(self.denoisers) if density_kind(denoiser) is None]
        if without:
            raise TypeError(
                f"log_density needs one of every factor, and denoisers[{without[0]}] has a score only. Use exact "
                'denoisers, FromDensity, or networks with target="energy"'
            )
        densities = self._log_densities(x_t, t)
        return jnp.dot(self.powers.astype(densities.dtype), densities, precision="highest")

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.denoisers, self.powers), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple) -> Self:
        self = object.__new__(cls)
        self.denoisers, self.powers = leaves
        return self


@jax.tree_util.register_pytree_node_class
class MixtureOf(_Composed):
    r"""The exact denoiser of a mixture $\sum_i w_i p_i$ of laws with exact denoisers.

    For Gaussians, take `GaussianMixture`.

    Args:
        denoisers: the members, of one event shape and one schedule, each with a normalised density at every time.
        weights: $w_i$, shape (n,), non-negative; they are normalised.

    Raises:
        TypeError: if a member is not a denoiser.
        ValueError: if event shapes or noise levels differ, a member has no normalised density, or a weight is negative
            or all are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian, MixtureOf
        >>> mixture = MixtureOf([Gaussian([-3.0]), Gaussian([3.0])], [0.5, 0.5])
        >>> float(mixture(jnp.array([0.0]), 0.5).x0[0])
        0.0
    """

    density_kind = "normalized"

    def __init__(self, denoisers: Sequence[Denoiser], weights: npt.ArrayLike) -> None:
        self.denoisers = _agreed(denoisers)
        for i, denoiser in enumerate(self.denoisers):
            if density_kind(denoiser) != "normalized":
                raise ValueError(
                    f"a mixture weighs its members by their normalised densities at every time, and denoisers[{i}] has "
                    f"{'one up to a constant' if density_kind(denoiser) else 'a score only'}. Use exact denoisers or "
                    "FromDensity(..., normalized=True), or train one network with the member as its condition"
                )
        weights = _numbers("weights", weights, self.denoisers)
        if not isinstance(weights, jax.core.Tracer):
            known = np.asarray(weights)
            if not ((known >= 0).all() and known.any()):
                raise ValueError(f"weights must be non-negative with a positive sum; got {known}")
        self.log_weights = jax.nn.log_softmax(jnp.log(weights))

    @property
    def location(self) -> jax.Array:
        """The mean of the members' locations, of `event_shape`."""
        return _weighted(jnp.exp(self.log_weights), self._moments()[0])

    @property
    def scale(self) -> jax.Array:
        """The root mean square distance to it per dimension, a scalar."""
        locations, scales = self._moments()
        between = jnp.mean((locations - self.location) ** 2, axis=tuple(range(1, locations.ndim)))
        return jnp.sqrt(jnp.dot(jnp.exp(self.log_weights), scales**2 + between, precision="highest"))

    def _log_joint(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        densities = self._log_densities(x_t, t)
        return self.log_weights.astype(densities.dtype) + densities

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        responsibilities = jax.nn.softmax(self._log_joint(x_t, t))
        x0, eps = (_weighted(responsibilities, of_each) for of_each in self._predictions(x_t, t))
        return Prediction(x0, eps, x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""The noised log-density $\log \sum_i w_i p_{i,t}(x_t)$, normalised, in nats.

        Args:
            x_t: noisy point of `event_shape`.
            t: its time, a scalar.

        Returns:
            A scalar.
        """
        return jax.nn.logsumexp(self._log_joint(x_t, t))

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.denoisers, self.log_weights), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple) -> Self:
        self = object.__new__(cls)
        self.denoisers, self.log_weights = leaves
        return self


def _weighted(numbers: jax.Array, values: jax.Array) -> jax.Array:
    """The sum of values (n, *event_shape) weighted by (n,) numbers, in full precision on any device."""
    return jnp.tensordot(numbers.astype(values.dtype), values, 1, precision="highest")


def _agreed(denoisers: Sequence[Denoiser]) -> tuple[Denoiser, ...]:
    """Denoisers that can be put together: at least one, of one event shape and one schedule."""
    denoisers = tuple(denoisers)
    _checks.at_least(1, **{"the number of denoisers": len(denoisers)})
    for i, denoiser in enumerate(denoisers):
        require_denoiser(denoiser, f"denoisers[{i}]")
        if tuple(denoiser.event_shape) != tuple(denoisers[0].event_shape):
            raise ValueError(
                f"denoisers must have one event_shape; got {tuple(denoisers[0].event_shape)} and, of denoisers[{i}], "
                f"{tuple(denoiser.event_shape)}"
            )
        if not _same_levels(denoisers[0].schedule, denoiser.schedule):
            raise ValueError(
                f"denoisers must have one schedule, in the units of the data; got {denoisers[0].schedule} and, of "
                f"denoisers[{i}], {denoiser.schedule}. Give them the same one (the default of an exact law follows its "
                f"scale), or use Rescheduled(denoisers[{i}], denoisers[0].schedule)"
            )
    return denoisers


def _same_levels(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules have the same signal and noise at every time, as far as they are known."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((one, other))):
        return True
    if (one.t_min, one.t_max) != (other.t_min, other.t_max):
        return False
    with jax.ensure_compile_time_eval():
        times = jnp.linspace(one.t_min, one.t_max, 9)
        pairs = [(one.alpha(times), other.alpha(times)), (one.sigma(times), other.sigma(times))]
        return all(np.allclose(a, b, rtol=1e-4, atol=0.0) for a, b in pairs)


def _numbers(name: str, values: npt.ArrayLike, denoisers: tuple[Denoiser, ...]) -> jax.Array:
    """One finite number for each denoiser."""
    values = jnp.asarray(values, jnp.result_type(float))
    if values.shape != (len(denoisers),):
        raise ValueError(f"{name} must have shape ({len(denoisers)},), one for each denoiser; got {values.shape}")
    if not isinstance(values, jax.core.Tracer):
        _checks.finite(name, values)
    return values
