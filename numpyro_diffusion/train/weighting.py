r"""Weights on the log-SNR: what a training objective emphasises, in a form in which objectives can be compared.

Whatever a network predicts and wherever its noise levels are drawn from, its expected squared error is

$$\mathcal L_w = \tfrac12 \int w(\lambda)\; E\, \| \varepsilon - \hat\varepsilon \|^2\, \mathrm{d}\lambda, \qquad
\lambda = \log \frac{\alpha_t^2}{\sigma_t^2},$$

for one $w$. The squared errors of the other views are that of eps times a factor: $e^{-\lambda}$ for x0,
$1 + e^{-\lambda}$ for v (variance preserving), $(1 + e^{-\lambda / 2})^2$ for the velocity of the straight path. Levels
drawn with a density $p(\lambda)$ give another: $|\mathrm{d}t / \mathrm{d}\lambda|$ for uniform times. Hence

    weighting     named loss, mean of                                 w
    EDM           |F|^2, log-normal levels                            N(lambda; -2m, 4s^2) (1 + e^-lambda)
    Simple        |eps|^2, uniform t                                  |dt/dlambda|
    X0            |x0|^2, uniform t                                   |dt/dlambda| e^-lambda
    V             |v|^2, uniform t                                    |dt/dlambda| (1 + e^-lambda)
    MinSNR        min(SNR, gamma) |x0|^2, uniform t                   |dt/dlambda| min(1, gamma e^-lambda)
    FlowMatching  |velocity|^2 of the straight path, uniform t        e^(-lambda/2) / 2
    LogitNormal   the same, logit-normal t                            N(lambda; -2m, 4s^2) (1 + e^(-lambda/2))^2
    Sigmoid       -                                                   sigmoid(k - lambda)
    Likelihood    the variational bound                               1

Under the cosine schedule $|\mathrm{d}t / \mathrm{d}\lambda| = \mathrm{sech}(\lambda / 2) / 2\pi$. Constants are those
of the named loss, so that $2 \mathcal L_w / d$ *is* that loss per dimension. The log-SNR is that of standardised data:
with data of standard deviation $c$, $\sigma$ counts in units of $c$.

If $w$ never increases with $\lambda$ it is `monotonic`, and $\mathcal L_w$ is, up to a constant, the variational bound
averaged over data with Gaussian noise added: a likelihood. This does not depend on where the levels are drawn, which is
importance sampling (`levels`).

References:
    Kingma and Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, 2023, table 1,
    https://arxiv.org/abs/2303.00848.
"""

import abc
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise import Cosine, Schedule, value_and_slope

__all__ = ["EDM", "FlowMatching", "Likelihood", "LogitNormal", "MinSNR", "Sigmoid", "Simple", "V", "Weighting", "X0"]


class Weighting(abc.ABC):
    r"""A weight $w(\lambda)$ on the log-SNR of standardised data: a frozen dataclass of plain numbers, static.

    Attributes:
        monotonic: whether $w$ never increases with the log-SNR, so that the objective is a variational bound on noisy
            data.
    """

    monotonic: bool

    @abc.abstractmethod
    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        r"""$\log w(\lambda)$, elementwise."""

    def __call__(self, log_snr: ArrayLike) -> jax.Array:
        r"""The weight $w(\lambda)$, elementwise.

        Args:
            log_snr: $\lambda$, any shape.

        Returns:
            Non-negative weights of the same shape.
        """
        return jnp.exp(self.log_weight(log_snr))


def check_weighting(weighting: Weighting) -> Weighting:
    """Raises `TypeError` unless it is a `Weighting`."""
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a train.weighting.Weighting such as EDM(); got {weighting!r}")
    return weighting


@jax.tree_util.register_static
@dataclass(frozen=True)
class EDM(Weighting):
    r"""Karras et al.: unit weight for the network's own output, noise levels log-normal.

    $w = N(\lambda; -2 \mathrm{mean}, (2 \mathrm{std})^2)\, (1 + e^{-\lambda})$.

    Karras et al. centre the levels at -1.2 for images of standard deviation 0.5, which is -0.5 in units of it; the
    default spread is wider than their 1.2, because a sampler walks the whole ladder and its noisiest rungs decide how
    much mass each mode receives. Without other `noise_levels`, `fit` draws them from the same normal law.

    Args:
        mean: centre of the log noise level, in units of the data's standard deviation.
        std: its standard deviation, positive.

    Raises:
        ValueError: if `mean` is not finite or `std` not positive.

    References:
        Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
        https://arxiv.org/abs/2206.00364.
    """

    mean: float = -0.5
    std: float = 1.5
    monotonic = False  # it rises to a peak at 2 mean - 4 std^2 or above

    def __post_init__(self) -> None:
        _checks.finite("mean", self.mean)
        _checks.positive(std=self.std)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        log_snr = jnp.asarray(log_snr)
        return norm.logpdf(log_snr, -2.0 * self.mean, 2.0 * self.std) + jax.nn.softplus(-log_snr)


class _OfSchedule(Weighting):
    """A weighting that is the density of uniform times under a schedule, times something."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a noise.Schedule; got {self.schedule!r}")

    def log_density(self, log_snr: ArrayLike) -> jax.Array:
        r"""$\log |\mathrm{d}t / \mathrm{d}\lambda|$ of the schedule."""
        return jnp.log(-value_and_slope(self.schedule.inverse_log_snr, log_snr)[1])

    @property
    def monotonic(self) -> bool:  # type: ignore[override]
        """Looked up on a grid of the schedule's own range."""
        with jax.ensure_compile_time_eval():
            ends = self.schedule.log_snr(self.schedule.t_max), self.schedule.log_snr(self.schedule.t_min)
            log_weights = np.asarray(self.log_weight(jnp.linspace(*ends, 257)))
        return bool((np.diff(log_weights) < 1e-4).all())  # a step of the grid is about 0.1; rounding is below 1e-5


@jax.tree_util.register_static
@dataclass(frozen=True)
class Simple(_OfSchedule):
    r"""Ho et al.: the plain error of eps at uniform times, $w = |\mathrm{d}t / \mathrm{d}\lambda|$.

    Args:
        schedule: under which times are uniform.

    References:
        Ho, Jain, Abbeel, Denoising diffusion probabilistic models, 2020, https://arxiv.org/abs/2006.11239.
    """

    schedule: Schedule = field(default_factory=Cosine)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return self.log_density(log_snr)


@jax.tree_util.register_static
@dataclass(frozen=True)
class X0(_OfSchedule):
    r"""The plain error of the clean point at uniform times, $w = |\mathrm{d}t / \mathrm{d}\lambda|\, e^{-\lambda}$.

    Args:
        schedule: under which times are uniform.
    """

    schedule: Schedule = field(default_factory=Cosine)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return self.log_density(log_snr) - jnp.asarray(log_snr)


@jax.tree_util.register_static
@dataclass(frozen=True)
class V(_OfSchedule):
    r"""Salimans and Ho: the error of v at uniform times.

    $w = |\mathrm{d}t / \mathrm{d}\lambda|\, (\alpha^2 + \sigma^2) (1 + e^{-\lambda})$, where
    $\alpha^2 + \sigma^2 = 1$ if the schedule preserves variance.

    Args:
        schedule: under which times are uniform.

    References:
        Salimans and Ho, Progressive distillation for fast sampling of diffusion models, 2022,
        https://arxiv.org/abs/2202.00512.
    """

    schedule: Schedule = field(default_factory=Cosine)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        log_snr = jnp.asarray(log_snr)
        t = self.schedule.inverse_log_snr(log_snr)
        variance = self.schedule.alpha(t) ** 2 + self.schedule.sigma(t) ** 2
        return self.log_density(log_snr) + jnp.log(variance) + jax.nn.softplus(-log_snr)


@jax.tree_util.register_static
@dataclass(frozen=True)
class MinSNR(_OfSchedule):
    r"""Hang et al.: the SNR as weight of the clean point's error, but no more than gamma.

    $w = |\mathrm{d}t / \mathrm{d}\lambda|\, \min(1, \gamma e^{-\lambda})$.

    Args:
        gamma: bound on the SNR, positive.
        schedule: under which times are uniform.

    Raises:
        ValueError: if `gamma` is not positive.

    References:
        Hang et al., Efficient diffusion training via min-SNR weighting strategy, 2023,
        https://arxiv.org/abs/2303.09556.
    """

    gamma: float = 5.0
    schedule: Schedule = field(default_factory=Cosine)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive(gamma=self.gamma)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return self.log_density(log_snr) + jnp.minimum(0.0, jnp.log(self.gamma) - jnp.asarray(log_snr))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Sigmoid(Weighting):
    r"""Kingma and Gao: $w = \mathrm{sigmoid}(k - \lambda)$, the likelihood without the details below a noise level.

    Args:
        bias: $k$, the log-SNR at which the weight is a half.

    Raises:
        ValueError: if `bias` is not finite.

    References:
        Kingma and Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, 2023,
        https://arxiv.org/abs/2303.00848.
    """

    bias: float = 2.0
    monotonic = True

    def __post_init__(self) -> None:
        _checks.finite("bias", self.bias)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return jax.nn.log_sigmoid(self.bias - jnp.asarray(log_snr))


@jax.tree_util.register_static
@dataclass(frozen=True)
class Likelihood(Weighting):
    """The variational bound itself: every log-SNR counts alike, and half the loss times d is in nats.

    References:
        Kingma et al., Variational diffusion models, 2021, https://arxiv.org/abs/2107.00630.
        Song et al., Maximum likelihood training of score-based diffusion models, 2021,
        https://arxiv.org/abs/2101.09258.
    """

    monotonic = True

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return jnp.zeros_like(log_snr, dtype=jnp.result_type(log_snr, float))


@jax.tree_util.register_static
@dataclass(frozen=True)
class FlowMatching(Weighting):
    r"""Lipman et al., Liu et al.: the error of the straight path's velocity at uniform times, $w = e^{-\lambda/2} / 2$.

    References:
        Lipman et al., Flow matching for generative modeling, 2023, https://arxiv.org/abs/2210.02747.
        Liu et al., Flow straight and fast, 2023, https://arxiv.org/abs/2209.03003.
    """

    monotonic = True

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        return -0.5 * jnp.asarray(log_snr) - jnp.log(2.0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class LogitNormal(Weighting):
    r"""Esser et al. (Stable Diffusion 3): flow matching at times with $\log (t / (1 - t)) \sim N(m, s^2)$.

    $w = N(\lambda; -2 m, 4 s^2)\, (1 + e^{-\lambda / 2})^2$.

    Args:
        mean: $m$; larger is noisier.
        std: $s$, positive.

    Raises:
        ValueError: if `mean` is not finite or `std` not positive.

    References:
        Esser et al., Scaling rectified flow transformers for high-resolution image synthesis, 2024,
        https://arxiv.org/abs/2403.03206.
    """

    mean: float = 0.0
    std: float = 1.0
    monotonic = False

    def __post_init__(self) -> None:
        _checks.finite("mean", self.mean)
        _checks.positive(std=self.std)

    def log_weight(self, log_snr: ArrayLike) -> jax.Array:
        log_snr = jnp.asarray(log_snr)
        return norm.logpdf(log_snr, -2.0 * self.mean, 2.0 * self.std) + 2.0 * jax.nn.softplus(-0.5 * log_snr)
