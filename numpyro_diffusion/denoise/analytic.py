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

import jax
import jax.numpy as jnp
import numpy as np
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
        self, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike = 1.0, schedule: Schedule | None = None
    ) -> None:
        with _as_known(weights, means, covariances):
            self._build(*(jnp.asarray(a, jnp.result_type(float)) for a in (weights, means, covariances)), schedule)

    def _build(self, weights: jax.Array, means: jax.Array, covariances: jax.Array, schedule: Schedule | None) -> None:
        if means.ndim != 2:
            raise ValueError(f"means must have shape (components, dimensions); got {means.shape}")
        count, dimension = means.shape
        if weights.shape != (count,):
            raise ValueError(f"weights must have shape ({count},), one for each of the means; got {weights.shape}")
        self.log_weights = jax.nn.log_softmax(jnp.log(weights))
        self.means = means
        self.variances, self.rotations = _decompose(covariances, count, dimension)
        self._check_values({"weights": weights, "means": means, "covariances": covariances})
        present = jnp.isfinite(self.log_weights)[:, None]
        narrowest = jnp.sqrt(jnp.min(jnp.where(present, self.variances, jnp.inf)))
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
        return jnp.dot(jnp.exp(self.log_weights), self.means, precision="highest")

    @property
    def scale(self) -> jax.Array:
        """The root mean square distance to the mean per dimension, a scalar."""
        spread = jnp.mean((self.means - self.location) ** 2 + self.variances, axis=-1)
        return jnp.sqrt(jnp.dot(jnp.exp(self.log_weights), spread, precision="highest"))

    def _rotate(self, x: jax.Array) -> jax.Array:
        return x if self.rotations is None else jnp.einsum("kij,ki->kj", self.rotations, x, precision="highest")

    def _unrotate(self, x: jax.Array) -> jax.Array:
        return x if self.rotations is None else jnp.einsum("kij,kj->ki", self.rotations, x, precision="highest")

    def _components(self, x_t: jax.Array, t: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Log of weight times density of each component at `x_t`, (K,); its pull and its noise there, both (K, d).

        The pull is how far its posterior mean lies from its mean.
        """
        if jnp.shape(x_t) != self.event_shape:
            raise ValueError(f"x_t must be one point of shape {self.event_shape}; got {jnp.shape(x_t)}. Use jax.vmap")
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variances = alpha**2 * self.variances + sigma**2
        residual = self._rotate(x_t - alpha * self.means)
        quadratic = jnp.sum(residual**2 / variances + jnp.log(2.0 * math.pi * variances), axis=-1)
        whitened = residual / variances
        pulls, noises = alpha * self.variances * whitened, sigma * whitened
        return self.log_weights - 0.5 * quadratic, self._unrotate(pulls), self._unrotate(noises)

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        log_joint, pulls, noises = self._components(x_t, t)
        x0, eps = (_weighted(jax.nn.softmax(log_joint), v) for v in (self.means + pulls, noises))
        return Prediction(x0, eps, x_t, t, self.schedule)

    def log_density(self, x_t: jax.Array, t: ArrayLike) -> jax.Array:
        r"""The diffused log-density $\log p_t(x_t)$, normalised, in nats.

        Args:
            x_t: noisy point, shape (d,).
            t: its time, a scalar.

        Returns:
            A scalar.
        """
        return jax.nn.logsumexp(self._components(x_t, t)[0])

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Exact draws of the clean law, shape `sample_shape + (d,)`."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, self.log_weights, shape=sample_shape)
        noise = jnp.sqrt(self.variances)[k] * jax.random.normal(key_noise, (*sample_shape, *self.event_shape))
        if self.rotations is not None:
            noise = jnp.einsum("...ij,...j->...i", self.rotations[k], noise, precision="highest")
        return self.means[k] + noise

    def tree_flatten(self):
        return (self.log_weights, self.means, self.variances, self.rotations, self._schedule), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
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

    def __init__(self, mean: ArrayLike, covariance: ArrayLike = 1.0, schedule: Schedule | None = None) -> None:
        with _as_known(mean, covariance):
            mean, covariance = jnp.asarray(mean), jnp.asarray(covariance)
            if mean.ndim != 1:
                raise ValueError(f"mean must have shape (dimensions,); got {mean.shape}")
            covariances = covariance if covariance.ndim == 0 else covariance[None]
            super().__init__(np.ones(1), mean[None], covariances, schedule)


def _as_known(*arrays: ArrayLike) -> AbstractContextManager:
    """A context in which values computed from known arrays are known too, also inside jit."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))
    return nullcontext() if traced else jax.ensure_compile_time_eval()


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """The mean of values (K, d), in full precision on any device; of one component, the value itself."""
    return values[0] if len(values) == 1 else jnp.dot(weights, values, precision="highest")


def _decompose(covariances: jax.Array, count: int, dimension: int) -> tuple[jax.Array, jax.Array | None]:
    """Eigenvalues (K, d) and eigenvectors (K, d, d), the latter None where covariances are diagonal."""
    if covariances.ndim == 3:
        _checks.shape("covariances", covariances, (count, dimension, dimension))
        return jnp.linalg.eigh(covariances)
    if covariances.ndim == 2:
        _checks.shape("covariances", covariances, (count, dimension), "a full covariance is (components, d, d)")
        return covariances, None
    if covariances.shape not in ((), (count,)):
        raise ValueError(
            f"covariances must be a scalar or have shape ({count},), ({count}, {dimension}) or "
            f"({count}, {dimension}, {dimension}); got {covariances.shape}"
        )
    return jnp.broadcast_to(covariances.reshape(-1, 1), (count, dimension)), None
