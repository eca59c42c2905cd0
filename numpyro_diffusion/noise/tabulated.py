r"""A schedule given by numbers instead of a formula: learned, adaptive, or read from a paper's table.

The variance-preserving schedule with $\log \mathrm{SNR}(t)$ linear between knots,

$$\alpha_t^2 = \mathrm{sigmoid}(\ell_t), \qquad \sigma_t^2 = \mathrm{sigmoid}(-\ell_t), \qquad
\ell_{k / K} = \ell^{(k)}, \quad k = 0, \dots, K.$$

If $t$ is uniform, the log-SNR has the density $p(\ell) = |\mathrm{d}t / \mathrm{d}\ell|$. So a schedule is a choice of
where the effort goes, and can be made from one: `Tabulated.from_density`. Kingma et al. learn it such that the variance
of the loss is least; with the density proportional to the loss at each level, every time contributes equally.

A variance-preserving schedule is no loss of generality: two schedules with the same log-SNR differ only by a scaling of
$x_t$ (`schedule`).

References:
    Kingma et al., Variational diffusion models, 2021, section 4 and appendix I, https://arxiv.org/abs/2107.00630.
    Kingma and Gao, Understanding diffusion objectives as the ELBO with simple data augmentation, 2023, appendix F,
    https://arxiv.org/abs/2303.00848.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from numpyro_diffusion import _checks
from numpyro_diffusion.noise.schedule import Schedule


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tabulated(Schedule):
    r"""Log-SNR at evenly spaced times, linear in between, variance preserving.

    Args:
        knots: values of the log-SNR at times $0, 1/K, \dots, 1$, strictly decreasing, two or more.
        t_min: cleanest time used.
        t_max: noisiest time used.

    Raises:
        ValueError: if the knots are fewer than two, not finite or not strictly decreasing.

    Example:
        >>> from numpyro_diffusion.noise import Tabulated
        >>> schedule = Tabulated([12.0, 0.0, -9.0])
        >>> [round(float(schedule.log_snr(t)), 3) for t in (0.0, 0.25, 1.0)]
        [12.0, 6.0, -9.0]
    """

    knots: Sequence[float]
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _checks.fraction(t_min=self.t_min, t_max=self.t_max)
        _checks.exceeds("t_max", self.t_max, "t_min", self.t_min)
        knots = np.asarray(self.knots, np.float64)
        if knots.ndim != 1 or len(knots) < 2:
            raise ValueError(f"knots must be a list of two or more log-SNRs; got shape {knots.shape}")
        _checks.finite("knots", knots)
        rises = np.flatnonzero(np.diff(knots) >= 0)
        if len(rises):
            k = rises[0]
            raise ValueError(f"knots must be strictly decreasing; got {knots[k]} and then {knots[k + 1]}")
        object.__setattr__(self, "knots", tuple(knots.tolist()))

    @classmethod
    def from_density(cls, edges: npt.ArrayLike, density: npt.ArrayLike, num_knots: int = 65) -> "Tabulated":
        r"""The schedule under which a uniform time has a given density of the log-SNR.

        Args:
            edges: edges of bins of the log-SNR, increasing, shape (bins + 1,).
            density: positive density in each bin, up to a factor, shape (bins,).
            num_knots: number of knots of the schedule.

        Returns:
            The schedule from the last edge (clean) to the first (noise).

        Raises:
            ValueError: if the edges do not increase or the density is not positive.
        """
        edges, density = np.asarray(edges, np.float64), np.asarray(density, np.float64)
        if edges.shape != (len(density) + 1,) or not (np.diff(edges) > 0).all():
            raise ValueError(f"edges must increase, one more than bins; got shapes {edges.shape} and {density.shape}")
        if not (density > 0).all() or not np.isfinite(density).all():
            raise ValueError("density must be positive and finite in every bin. Mix it with a uniform one")
        _checks.at_least(2, num_knots=num_knots)
        mass = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
        return cls(np.interp(np.linspace(1.0, 0.0, num_knots), mass / mass[-1], edges).tolist())

    def log_snr(self, t: ArrayLike) -> jax.Array:
        return _log_snr(np.asarray(self.knots, jnp.result_type(float)), t)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(self.log_snr(t)))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.exp(0.5 * jax.nn.log_sigmoid(-self.log_snr(t)))

    def inverse_log_snr(self, log_snr: ArrayLike) -> jax.Array:
        return _inverse_log_snr(np.asarray(self.knots[::-1], jnp.result_type(float)), log_snr)


@partial(jax.jit, inline=True)
def _log_snr(knots: jax.Array, t: ArrayLike) -> jax.Array:
    place = jnp.asarray(t) * (len(knots) - 1)
    k = jnp.clip(jnp.floor(place).astype(int), 0, len(knots) - 2)
    return knots[k] + (place - k) * (knots[k + 1] - knots[k])


@partial(jax.jit, inline=True)
def _inverse_log_snr(rising: jax.Array, log_snr: ArrayLike) -> jax.Array:
    k = jnp.clip(jnp.searchsorted(rising, log_snr, side="right") - 1, 0, len(rising) - 2)
    place = k + (jnp.asarray(log_snr) - rising[k]) / (rising[k + 1] - rising[k])
    return 1.0 - place / (len(rising) - 1)
