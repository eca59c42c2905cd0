r"""Laws whose denoiser is known in closed form; everything else is tested against them.

If $x$ follows a mixture $\sum_k w_k N(\mu_k, \Sigma_k)$, then so does $x_t = \alpha_t x + \sigma_t \varepsilon$, with
means $\alpha_t \mu_k$ and covariances $S_k = \alpha_t^2 \Sigma_k + \sigma_t^2 I$. Hence the diffused density is exact
at every time, and so is

$$E[x \mid x_t] = \sum_k r_k(x_t) \left( \mu_k + \alpha_t \Sigma_k S_k^{-1} (x_t - \alpha_t \mu_k) \right), \qquad
r_k \propto w_k N(x_t; \alpha_t \mu_k, S_k),$$

$$E[\varepsilon \mid x_t] = \sum_k r_k(x_t)\, \sigma_t S_k^{-1} (x_t - \alpha_t \mu_k).$$

Both come from the residuals $x_t - \alpha_t \mu_k$, so that the score has its digits wherever the law lies.
Covariances are decomposed once, $\Sigma_k = U_k \Lambda_k U_k^\top$, so that no step factorises a matrix; isotropic
and diagonal ones skip the rotation. Networks are not here: see `network`.

References:
    Efron, Tweedie's formula and selection bias, 2011, https://doi.org/10.1198/jasa.2011.tm11181.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise.prediction import Prediction
from numpyro_diffusion.noise import Schedule, schedule_for


@jax.tree_util.register_pytree_node_class
class GaussianMixture:
    r"""The exact denoiser of a Gaussian mixture $\sum_k w_k N(\mu_k, \Sigma_k)$ in $d$ dimensions.

    Args:
        weights: mixture weights, shape (K,), non-negative; they are normalised.
        means: component means, shape (K, d).
        covariances: a scalar variance for all, or shape (K,) isotropic, (K, d) diagonal or (K, d, d) full.
        schedule: the noising process, in the units of the data. The default has the levels of `VE()` in units of the
            law: from .002 times its narrowest standard deviation to 80 times its `scale`, see `noise.schedule_for`.

    Raises:
        TypeError: if `schedule` is not a schedule.
        ValueError: if shapes do not agree, a value is not finite, a weight is negative or all are zero, a covariance is
            not symmetric and positive definite, or the schedule's log-SNR does not fall or its lowest noise level is
            above the narrowest standard deviation.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import GaussianMixture
        >>> mixture = GaussianMixture([0.5, 0.5], jnp.array([[-3.0], [3.0]]), 1.0)
        >>> float(mixture(jnp.array([0.0]), 0.5).x0[0])
        0.0
    """

    def __init__(
        self,
        weights: npt.ArrayLike,
        means: npt.ArrayLike,
        covariances: npt.ArrayLike = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        with _as_known(weights, means, covariances):
            numpy, arrays = _numpy_for(weights, means, covariances)
            weights, means, covariances = (numpy.asarray(a, jnp.result_type(float)) for a in arrays)
            self._build(numpy, weights, means, covariances, schedule)

    def _build(self, numpy: Any, weights: Any, means: Any, covariances: Any, schedule: Schedule | None) -> None:
        if means.ndim != 2:
            raise ValueError(f"means must have shape (components, dimensions); got {means.shape}")
        count, dimension = means.shape
        if weights.shape != (count,):
            raise ValueError(f"weights must have shape ({count},), one for each of the means; got {weights.shape}")
        _check_shape(covariances, count, dimension)
        self._check_values({"weights": weights, "means": means, "covariances": covariances})
        with np.errstate(divide="ignore"):
            self.log_weights = jnp.asarray(numpy.log(weights / numpy.sum(weights)))
        variances, self.rotations = _decompose(numpy, covariances, count, dimension)
        self.means, self.variances = jnp.asarray(means), jnp.asarray(variances)
        narrowest = numpy.sqrt(numpy.min(numpy.where(weights[:, None] > 0, variances, math.inf)))
        self._schedule = schedule_for(self.scale, narrowest, schedule)

    def _check_values(self, given: dict[str, jax.Array]) -> None:
        """Checks the arguments that are known, in NumPy: inside jit even the sum of a constant is traced."""
        known = {name: np.asarray(value) for name, value in given.items() if not isinstance(value, jax.core.Tracer)}
        for name, value in known.items():
            _checks.finite(name, value)
        if "weights" in known and not ((known["weights"] >= 0).all() and known["weights"].any()):
            raise ValueError(f"weights must be non-negative with a positive sum; got {known['weights']}")
        if "covariances" in known:
            values = known["covariances"]
            if values.ndim == 3 and not np.allclose(values, values.swapaxes(-1, -2), atol=1e-5 * values.max()):
                raise ValueError("covariances must be symmetric; got one that is not. Is it a Cholesky factor?")
            if not ((np.linalg.eigvalsh(values) if values.ndim == 3 else values) > 0).all():
                raise ValueError("covariances must be positive definite; got an eigenvalue at or below zero")

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.means.shape[-1],)

    @property
    def schedule(self) -> Schedule:
        """The noising process, in the units of the data; no gradient flows into its scale."""
        return jax.tree.map(jax.lax.stop_gradient, self._schedule)

    @property
    def location(self) -> jax.Array:
        """The mean of the mixture, shape (d,)."""
        numpy, (log_weights, means) = _numpy_for(self.log_weights, self.means)
        return jnp.asarray(numpy.sum(numpy.exp(log_weights)[:, None] * means, axis=0))

    @property
    def scale(self) -> jax.Array:
        """The root mean square distance to the mean per dimension, a scalar."""
        numpy, (log_weights, means, variances) = _numpy_for(self.log_weights, self.means, self.variances)
        weights = numpy.exp(log_weights)
        spread = numpy.mean((means - numpy.sum(weights[:, None] * means, axis=0)) ** 2 + variances, axis=-1)
        return jnp.asarray(numpy.sqrt(numpy.sum(weights * spread)))

    def _at(self, x_t: jax.Array, t: ArrayLike) -> tuple:
        """What the density and its means are computed from."""
        if jnp.shape(x_t) != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {jnp.shape(x_t)}. Use jax.vmap")
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return self.log_weights, self.means, self.variances, self.rotations, x_t, alpha, sigma

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        x0, eps = _means(*self._at(x_t, t))
        return Prediction(x0, eps, x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""The diffused log-density $\log p_t(x_t)$, normalised, in nats.

        Args:
            x_t: noisy point, shape (d,).
            t: its time, a scalar.

        Returns:
            A scalar.
        """
        return _log_density(*self._at(x_t, t))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Exact draws of the clean law, shape `sample_shape + (d,)`."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, self.log_weights, shape=sample_shape)
        noise = jnp.sqrt(self.variances)[k] * jax.random.normal(key_noise, (*sample_shape, *self.event_shape))
        if self.rotations is not None:
            noise = jnp.einsum("...ij,...j->...i", self.rotations[k], noise, precision="highest")
        return self.means[k] + noise

    def tree_flatten(self) -> tuple[tuple, None]:
        return (self.log_weights, self.means, self.variances, self.rotations, self._schedule), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple) -> Self:
        self = object.__new__(cls)
        self.log_weights, self.means, self.variances, self.rotations, self._schedule = leaves
        return self


@jax.tree_util.register_pytree_node_class
class Gaussian(GaussianMixture):
    r"""The exact denoiser of $N(\mu, \Sigma)$ in $d$ dimensions: a mixture of one.

    Args:
        mean: shape (d,).
        covariance: a scalar variance, or shape (d,) diagonal or (d, d) full.
        schedule: the noising process, in the units of the data; by default the levels of `VE()` in units of the law.

    Raises:
        TypeError: if `schedule` is not a schedule.
        ValueError: if shapes do not agree, a value is not finite, a variance is not positive, or the lowest noise level
            of the schedule is above the narrowest standard deviation.
    """

    def __init__(self, mean: npt.ArrayLike, covariance: npt.ArrayLike = 1.0, schedule: Schedule | None = None) -> None:
        with _as_known(mean, covariance):
            numpy, arrays = _numpy_for(mean, covariance)
            centre, spread = map(numpy.asarray, arrays)
            if centre.ndim != 1:
                raise ValueError(f"mean must have shape (dimensions,); got {centre.shape}")
            super().__init__(np.ones(1), centre[None], spread if spread.ndim == 0 else spread[None], schedule)


@partial(jax.jit, inline=True)
def _components(
    log_weights: jax.Array,
    means: jax.Array,
    variances: jax.Array,
    rotations: jax.Array | None,
    x_t: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log of weight times density of each component at `x_t`, (K,); its pull and its noise there, both (K, d).

    The pull is how far its posterior mean lies from its mean.
    """

    def turn(subscripts: str, x: jax.Array) -> jax.Array:
        return x if rotations is None else jnp.einsum(subscripts, rotations, x, precision="highest")

    noisy = alpha**2 * variances + sigma**2
    residual = turn("kij,ki->kj", x_t - alpha * means)
    quadratic = jnp.sum(residual**2 / noisy + jnp.log(2.0 * math.pi * noisy), axis=-1)
    whitened = residual / noisy
    pulls, noises = alpha * variances * whitened, sigma * whitened
    return log_weights - 0.5 * quadratic, turn("kij,kj->ki", pulls), turn("kij,kj->ki", noises)


@partial(jax.jit, inline=True)
def _means(log_weights: jax.Array, means: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """E[x | x_t] and E[eps | x_t], each of shape (d,)."""
    log_joint, pulls, noises = _components(log_weights, means, *rest)
    weights = jax.nn.softmax(log_joint)
    return _weighted(weights, means + pulls), _weighted(weights, noises)


@partial(jax.jit, inline=True)
def _log_density(*parts: Any) -> jax.Array:
    """The log of the mixture's density, a scalar."""
    return jax.nn.logsumexp(_components(*parts)[0])


def _numpy_for(*arrays: npt.ArrayLike) -> tuple[Any, tuple[Any, ...]]:
    """NumPy and the arrays in it if all are known, since it compiles nothing; else JAX's and the arrays as they are."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
        return jnp, arrays
    return np, tuple(np.asarray(array) for array in arrays)


def _as_known(*arrays: npt.ArrayLike) -> AbstractContextManager:
    """A context in which values computed from known arrays are known too, also inside jit."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))
    return nullcontext() if traced else jax.ensure_compile_time_eval()


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """The mean of values (K, d), in full precision on any device; of one component, the value itself."""
    return values[0] if len(values) == 1 else jnp.dot(weights, values, precision="highest")


def _check_shape(covariances: Any, count: int, dimension: int) -> None:
    if covariances.ndim == 3:
        _checks.shape("covariances", covariances, (count, dimension, dimension))
    elif covariances.ndim == 2:
        _checks.shape("covariances", covariances, (count, dimension), "a full covariance is (components, d, d)")
    elif covariances.shape not in ((), (count,)):
        raise ValueError(
            f"covariances must be a scalar or have shape ({count},), ({count}, {dimension}) or "
            f"({count}, {dimension}, {dimension}); got {covariances.shape}"
        )


def _decompose(numpy: Any, covariances: Any, count: int, dimension: int) -> tuple[Any, jax.Array | None]:
    """Eigenvalues (K, d) and eigenvectors (K, d, d), the latter None where covariances are diagonal."""
    if covariances.ndim == 3:
        values, vectors = jnp.linalg.eigh(jnp.asarray(covariances))  # NumPy's has other signs: other draws of a key
        return numpy.asarray(values), vectors
    rows = covariances if covariances.ndim == 2 else covariances.reshape(-1, 1)
    return numpy.broadcast_to(rows, (count, dimension)), None
