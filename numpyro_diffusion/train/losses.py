r"""Losses whose minimiser is the score: denoising, stable, implicit, sliced, second order, at one point and one time.

Let $s$ be the model's score at time $t$, $\hat\varepsilon = -\sigma_t s$ its noise, $x_t = \alpha_t x + \sigma_t
\varepsilon$. Per dimension,

$$\text{denoising:} \quad \tfrac1d \| \hat\varepsilon(x_t) - \varepsilon \|^2, \qquad
\text{implicit:} \quad 1 + \tfrac{\sigma_t^2}{d} \left( \| s \|^2 + 2\, \mathrm{tr}\, \nabla s \right), \qquad
\text{sliced:} \quad 1 + \tfrac{\sigma_t^2}{d} \left( (z^\top s)^2 + 2\, z^\top \nabla s\, z \right)$$

for random $z$ with $E[z z^\top] = I$. By Stein's identity all three have the same mean, whatever the model, and so the
same minimiser, the score of $p_t$. The first needs the clean point; the others do not, so they can also be used when
the data themselves have noise. They also differ in variance and cost: the implicit one takes $d$ Jacobian-vector
products, or as many as there are probes.

The second-order loss also matches the Jacobian, which may be wrong even if the error of the score is small, and on
which the density of the probability flow depends. By Tweedie's second formula $I + \sigma_t^2 \nabla s$ is the
covariance of $\varepsilon$ given $x_t$, so with the residual $\ell = \varepsilon - \hat\varepsilon$, held constant, and
probes $z$,

$$\tfrac1d \left\| (I + \sigma_t^2 \nabla s)\, z - \ell\, (\ell^\top z) \right\|^2 .$$

The target of denoising score matching is noisy itself, by the spread of the clean point given $x_t$. Which of $K$
examples was noised to $x_t$? Row $j$ with a probability $p_j$ proportional to $N(x_t; \alpha_t x_j, \sigma_t^2 I)$, so
that, by Rao and Blackwell,

$$\text{stable target:} \quad \tfrac1d \frac{\alpha_t^2}{\sigma_t^2} \Big\| \hat x_0(x_t) - \sum_j p_j x_j \Big\|^2 ,
\qquad p_j = \frac{N(x_t; \alpha_t x_j, \sigma_t^2 I)}{\sum_k N(x_t; \alpha_t x_k, \sigma_t^2 I)}$$

has the mean gradient of the denoising loss, whatever $K$, and less variance.

For the levels at which a loss is taken see `levels`, for its weight there `weighting`. A loss is a function
`loss(denoiser, key, x, t, cond)` of one point; `fit` takes any function of this signature.

References:
    Vincent, A connection between score matching and denoising autoencoders, 2011,
    https://doi.org/10.1162/NECO_a_00142.
    Hyvärinen, Estimation of non-normalized statistical models by score matching, 2005,
    https://jmlr.org/papers/v6/hyvarinen05a.html.
    Song et al., Sliced score matching: a scalable approach to density and score estimation, 2019,
    https://arxiv.org/abs/1905.07088.
    Meng et al., Estimating high order gradients of the data distribution by denoising, 2021,
    https://arxiv.org/abs/2111.04726.
    Xu, Tong and Jaakkola, Stable target field for reduced variance score estimation in diffusion models, 2023,
    https://arxiv.org/abs/2302.00670.
    Lu et al., Maximum likelihood training for score-based diffusion ODEs by high-order denoising score matching, 2022,
    https://arxiv.org/abs/2206.08265.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.noise import perturb

__all__ = [
    "DenoisingScoreMatching",
    "ImplicitScoreMatching",
    "SecondOrderScoreMatching",
    "SlicedScoreMatching",
    "StableTargetField",
]

Loss = Callable[..., jax.Array]  # loss(denoiser, key, x, t, cond) -> scalar


@jax.tree_util.register_static
@dataclass(frozen=True)
class DenoisingScoreMatching:
    r"""The squared error of the noise, $\| \hat\varepsilon(x_t, t) - \varepsilon \|^2 / d$.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.train.losses import DenoisingScoreMatching
        >>> bool(DenoisingScoreMatching()(Gaussian(jnp.zeros(2)), jax.random.key(0), jnp.ones(2), 0.5) > 0)
        True
    """

    def __call__(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of one point.

        Args:
            denoiser: any denoiser.
            key: random key.
            x: clean point of the denoiser's event shape, in the units of the data.
            t: time, a scalar.
            cond: what a conditional denoiser is conditioned on.

        Returns:
            A scalar; per dimension, so that events of different sizes compare.
        """
        x0 = denoiser(perturb(key, denoiser.schedule, x, t).astype(x.dtype), t, *_held(cond)).x0
        return _mean_square(_error_of_noise(denoiser, x, x0, t))


@dataclass(frozen=True, eq=False)
class StableTargetField:
    r"""Denoising score matching on the mean of the possible clean points, $\| \hat x_0 - \sum_j p_j x_j \|^2$ as above.

    For few dimensions: in many, one row has all the probability, and the target is that of denoising score matching.

    Args:
        rows: examples of the law that is trained on, (rows, *event_shape), in the units that the loss is taken in. In
            `fit` these are standardised ones: give it a `NetworkDenoiser` of a known `location` and `scale`, and here
            `(data - location) / scale`. They are compiled in, as a constant.
        num_others: how many of them are drawn, with replacement, to be pooled with each point; $K - 1$.

    Raises:
        ValueError: if `num_others` is below one, or, when called, with a condition: examples under other conditions do
            not belong to the same law.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.train.losses import StableTargetField
        >>> law = Gaussian(jnp.zeros(2))
        >>> loss = StableTargetField(law.sample(jax.random.key(1), (1000,)), num_others=64)
        >>> loss(law, jax.random.key(0), jnp.ones(2), 0.5).shape
        ()
    """

    rows: jax.Array = field(repr=False)
    num_others: int = 1024

    def __post_init__(self) -> None:
        _checks.at_least(1, num_others=self.num_others)

    def __call__(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of one point; arguments as those of `DenoisingScoreMatching`, but no condition."""
        if cond is not None:
            raise ValueError(
                "StableTargetField pools examples of one law, so cond must be None; use DenoisingScoreMatching()"
            )
        key_noise, key_rows = jax.random.split(key)
        schedule = denoiser.schedule
        x_t = perturb(key_noise, schedule, x, t).astype(x.dtype)
        others = self.rows[jax.random.randint(key_rows, (self.num_others,), 0, len(self.rows))]
        points = jnp.concatenate([x[None], others.astype(x.dtype)])
        distances = jnp.sum((x_t - schedule.alpha(t) * points).reshape(len(points), -1) ** 2, axis=-1)
        shares = jax.nn.softmax(-0.5 * distances / schedule.sigma(t) ** 2).astype(x.dtype)
        return _mean_square(_error_of_noise(denoiser, jnp.tensordot(shares, points, 1), denoiser(x_t, t).x0, t))


@jax.tree_util.register_static
@dataclass(frozen=True)
class ImplicitScoreMatching:
    r"""Hyvärinen's loss of the noisy law, $1 + \sigma_t^2 ( \| s \|^2 + 2\, \mathrm{tr} \nabla s ) / d$.

    Args:
        num_probes: number of Hutchinson probes for the trace; None for the exact one, d Jacobian-vector products.

    Raises:
        ValueError: if `num_probes` is below one.
    """

    num_probes: int | None = None

    def __post_init__(self) -> None:
        if self.num_probes is not None:
            _checks.at_least(1, num_probes=self.num_probes)

    def __call__(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of one point; arguments as those of `DenoisingScoreMatching`."""
        key_noise, key_probes = jax.random.split(key)
        scaled_score, jvp = _linearize(denoiser, key_noise, x, t, cond)
        if self.num_probes is None:
            probes = np.sqrt(x.size) * jnp.eye(x.size, dtype=x.dtype)  # their mean square is the trace, exactly
        else:
            probes = jax.random.rademacher(key_probes, (self.num_probes, x.size), x.dtype)
        trace = jnp.mean(jnp.sum(probes * jax.vmap(jvp)(probes), axis=-1))
        return 1.0 + (jnp.sum(scaled_score**2) + 2.0 * trace) / max(1, x.size)


@jax.tree_util.register_static
@dataclass(frozen=True)
class SlicedScoreMatching:
    r"""Song et al.'s loss along random directions, $1 + \sigma_t^2 ( (z^\top s)^2 + 2\, z^\top \nabla s\, z ) / d$.

    Args:
        num_projections: number of directions.
        variance_reduced: whether $(z^\top s)^2$ is replaced by its mean $\| s \|^2$ (their SSM-VR).
        projections: law of the directions.

    Raises:
        ValueError: if `num_projections` is below one or `projections` unknown.
    """

    num_projections: int = 1
    variance_reduced: bool = True
    projections: Literal["normal", "rademacher"] = "normal"

    def __post_init__(self) -> None:
        _checks.at_least(1, num_projections=self.num_projections)
        _checks.one_of("projections", self.projections, ("normal", "rademacher"))

    def __call__(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of one point; arguments as those of `DenoisingScoreMatching`."""
        key_noise, key_probes = jax.random.split(key)
        scaled_score, jvp = _linearize(denoiser, key_noise, x, t, cond)
        draw = jax.random.normal if self.projections == "normal" else jax.random.rademacher
        z = draw(key_probes, (self.num_projections, x.size), x.dtype)
        curvature = jnp.mean(jnp.sum(z * jax.vmap(jvp)(z), axis=-1))
        square = jnp.sum(scaled_score**2) if self.variance_reduced else jnp.mean((z @ scaled_score) ** 2)
        return 1.0 + (square + 2.0 * curvature) / max(1, x.size)


@jax.tree_util.register_static
@dataclass(frozen=True)
class SecondOrderScoreMatching:
    r"""Denoising score matching, of the score and of its Jacobian along Rademacher probes.

    $\| \hat\varepsilon - \varepsilon \|^2 / d + \mathrm{strength}\, \| (I + \sigma_t^2 \nabla s) z - \ell\,
    (\ell^\top z) \|^2 / d$ with $\ell = \varepsilon - \hat\varepsilon$ held constant. An error of the score enters the
    second target by its square.

    Args:
        strength: of the second-order term, positive.
        num_probes: number of probes, one Jacobian-vector product each.

    Raises:
        ValueError: if `num_probes` is below one or `strength` not positive.
    """

    strength: float = 1.0
    num_probes: int = 1

    def __post_init__(self) -> None:
        _checks.positive(strength=self.strength)
        _checks.at_least(1, num_probes=self.num_probes)

    def __call__(
        self, denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None = None
    ) -> jax.Array:
        """The loss of one point; arguments as those of `DenoisingScoreMatching`."""
        key_noise, key_probes = jax.random.split(key)
        scaled_score, jvp = _linearize(denoiser, key_noise, x, t, cond)
        eps = jax.random.normal(key_noise, x.shape, x.dtype).reshape(-1)  # the one that `perturb` draws
        residual = eps + scaled_score
        z = jax.random.rademacher(key_probes, (self.num_probes, x.size), x.dtype)
        held = jax.lax.stop_gradient(residual)
        second = z + jax.vmap(jvp)(z) - (z @ held)[:, None] * held
        return _mean_square(residual) + self.strength * _mean_square(second)


def _error_of_noise(denoiser: Denoiser, x: jax.Array, x0: jax.Array, t: ArrayLike) -> jax.Array:
    """The error of the noise from that of the clean point, to which it is proportional."""
    schedule = denoiser.schedule
    return (jnp.exp(0.5 * schedule.log_snr(t)) * (x0 - x)).astype(x.dtype)


def _linearize(
    denoiser: Denoiser, key: jax.Array, x: jax.Array, t: ArrayLike, cond: ArrayLike | None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    r"""$\sigma_t s$ at a noisy point, flat, and products with $\sigma_t^2 \nabla s$."""
    schedule = denoiser.schedule
    sigma = schedule.sigma(t).astype(x.dtype)
    x_t = perturb(key, schedule, x, t).astype(x.dtype)

    def scaled_score(flat: jax.Array) -> jax.Array:
        return -denoiser(flat.reshape(x.shape), t, *_held(cond)).eps.reshape(-1).astype(x.dtype)

    value, jvp = jax.linearize(scaled_score, x_t.reshape(-1))
    return value, lambda z: sigma * jvp(z)


def _mean_square(values: jax.Array) -> jax.Array:
    return jnp.sum(values**2) / max(1, values.size)


def _held(cond: ArrayLike | None) -> tuple[ArrayLike, ...]:
    """A condition as further arguments of a denoiser: none for an unconditional one."""
    return () if cond is None else (cond,)
