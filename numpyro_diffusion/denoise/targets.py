r"""The meaning of a network's output.

In standardised units, where $u_t = \alpha_t u + \sigma_t \varepsilon$ and the data has unit variance, let $F$ be the
output of a network and $h^2 = \alpha^2 + \sigma^2$. Each `target` is a linear reading of the same answer:

    target   F stands for                      posterior mean of u              noise
    x0       u                                 F                                (u_t - alpha F) / sigma
    eps      the noise                         (u_t - sigma F) / alpha          F
    score    sigma times the score, -eps       (u_t + sigma F) / alpha          -F
    v        alpha eps - sigma u               (alpha u_t - sigma F) / h^2      (sigma u_t + alpha F) / h^2
    velocity alpha' u + sigma' eps             (sigma F - sigma' u_t) / k       (alpha' u_t - alpha F) / k
    edm      what a linear guess leaves over   (alpha u_t + sigma h F) / h^2    (sigma u_t - alpha h F) / h^2
    energy   a potential whose gradient is F   as edm                           as edm

with $k = \sigma \alpha' - \alpha \sigma'$. Both columns are computed as they stand: the second, computed from the
first, would lose digits at low noise. Only x0 has no better formula.

The edm target is the preconditioning of Karras et al. for any $(\alpha, \sigma)$: $u_t$ times $\alpha / h^2$ is the
best linear guess for data of unit variance, its residual has standard deviation $\sigma / h$, and $F$ estimates that
residual in units of its deviation, of order one at every time. It is the default; `eps` and `score` divide by $\alpha$
and lose precision where the noise is large. The velocity is that of flow matching and of stochastic interpolants:
eps - u for `Rectified`; under `VE` it grows with sigma.

References:
    Karras et al., Elucidating the design space of diffusion-based generative models, 2022,
    https://arxiv.org/abs/2206.00364.
    Song and Ermon, Improved techniques for training score-based generative models, 2020 (output divided by sigma),
    https://arxiv.org/abs/2006.09011.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]
Reading = Callable[..., Pair]


def _edm(u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, *_: jax.Array) -> Pair:
    h = jnp.hypot(a, s)
    return (a * u_t + s * h * out) / h**2, (s * u_t - a * h * out) / h**2


def _x0(u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, *_: jax.Array) -> Pair:
    return out, (u_t - a * out) / s


def _eps(u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, *_: jax.Array) -> Pair:
    return (u_t - s * out) / a, out


def _score(u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, *_: jax.Array) -> Pair:
    return (u_t + s * out) / a, -out


def _v(u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, *_: jax.Array) -> Pair:
    square = a**2 + s**2
    return (a * u_t - s * out) / square, (s * u_t + a * out) / square


def _velocity(
    u_t: jax.Array, out: jax.Array, a: jax.Array, s: jax.Array, a_slope: jax.Array, s_slope: jax.Array
) -> Pair:
    determinant = s * a_slope - a * s_slope
    return (s * out - s_slope * u_t) / determinant, (a_slope * u_t - a * out) / determinant


# Posterior mean and noise in standardised units from (u_t, network output, alpha, sigma, alpha', sigma').
TARGETS: dict[str, Reading] = {
    "edm": _edm,
    "x0": _x0,
    "eps": _eps,
    "v": _v,
    "velocity": _velocity,
    "score": _score,
    "energy": _edm,  # of the gradient of the energy
}
