r"""A noise-denoise move that is screened by a cheap draw of x given x_t and confirmed by a dear one.

Given the noisy point $x_t$, both are maps of the same noise $z \sim N(0, I)$: the dear one $x = F(x_t, z)$ by a solver
in many evaluations, the cheap one $G(x_t, z)$ by one in few, or by a `solve.GivenMap` in two. The current point has the
noise $z_0 = F^{-1}(x_t, x)$, so that under the posterior, given $x_t$,

$$z \sim N(0, I)\, L(F(x_t, z)), \qquad \text{and under the surrogate} \quad z \sim N(0, I)\, L(G(x_t, z)).$$

Of $M$ fresh noises $z_1 \dots z_M$ and $z_0$, Metropolised Gibbs chooses one, $z_j$, by the cheap likelihoods, which is
reversible for the surrogate. The choice is then accepted by the ratio of the two laws, as in delayed acceptance,

$$a = \min\left(1, \frac{L(F(x_t, z_j))\, L(G(x_t, z_0))}{L(F(x_t, z_0))\, L(G(x_t, z_j))}\right).$$

So the step has the law of the dear draw, up to the errors of its solver, **whatever the cheap one is**: a poor one is
rejected. A step costs a flow up, to find $z_0$, and one down if the screen has chosen another: twice that of a plain
one, for $M$ candidates.

References:
    Christen and Fox, Markov chain Monte Carlo using an approximation, 2005, https://doi.org/10.1198/106186005X76983.
    Liu, Peskun's theorem and a modified discrete-state Gibbs sampler, 1996, https://doi.org/10.1093/biomet/83.3.681.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.infer.kernel.choose import Choice, metropolis, metropolised_gibbs, without_improper
from numpyro_diffusion.infer.kernel.contract import pooled
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.solve import GivenMap, Solver, evaluations_given, flow_given, noise_given
from numpyro_diffusion.solve.given import evaluations_back

Points = dict[str, jax.Array]


class Draws(NamedTuple):
    """A dear and a cheap draw of x given x_t, and the time of x_t under a denoiser's schedule."""

    dear: Solver
    cheap: Solver | GivenMap
    time: Callable[[Denoiser], jax.Array]


def screened(
    key: jax.Array,
    draws: Draws,
    sites: dict[str, PriorSite],
    z: Points,
    log_likelihood: jax.Array,
    count: int,
    reading: Reading,
) -> tuple[Choice, jax.Array]:
    """Moves all diffusion sites together.

    Args:
        key: random key.
        draws: how to draw.
        sites: the sites.
        z: their values, in NumPyro's unconstrained coordinates.
        log_likelihood: of the rest of the model there.
        count: number of candidates.
        reading: the model.

    Returns:
        The choice, of a point and its log-likelihood, and the denoiser evaluations, per point.
    """
    key_noise, key_screen, key_accept = jax.random.split(key, 3)
    noisy, noises, cheap = {}, {}, {}
    for key_site, (name, site) in zip(jax.random.split(key_noise, len(sites)), sites.items(), strict=True):
        u = site.to_denoiser(z[name])
        eps = jax.random.normal(key_site, (*site.batch_shape, count + 1, *site.denoiser.event_shape), u.dtype)

        def look(denoiser: Denoiser, u: jax.Array, eps: jax.Array) -> tuple[jax.Array, ...]:
            t, schedule = draws.time(denoiser), denoiser.schedule
            x_t = (schedule.alpha(t) * u + schedule.sigma(t) * eps[0]).astype(u.dtype)
            now = noise_given(draws.dear, denoiser, x_t, t, u)
            noises = jnp.concatenate([eps[1:], now[None]])
            return x_t, noises, jax.vmap(lambda z: flow_given(draws.cheap, denoiser, x_t, t, z))(noises)

        noisy[name], noises[name], made = site.over_points(look, u, eps)
        cheap[name] = jax.vmap(site.from_denoiser)(jnp.moveaxis(made, len(site.batch_shape), 0).astype(u.dtype))
    surrogate = jax.vmap(reading.log_rest)(cheap)
    here, numbers = without_improper(surrogate[-1]), jnp.arange(count)
    screen = metropolised_gibbs(key_screen, surrogate[:-1], here, (numbers, surrogate[:-1]), (jnp.array(count), here))
    chosen, there = screen.point

    def confirm() -> tuple[Points, jax.Array]:
        moved = {}
        for name, site in sites.items():

            def draw(denoiser: Denoiser, x_t: jax.Array, noises: jax.Array) -> jax.Array:
                return flow_given(draws.dear, denoiser, x_t, draws.time(denoiser), noises[chosen])

            clean = site.over_points(draw, noisy[name], noises[name])
            moved[name] = site.from_denoiser(clean.astype(z[name].dtype)).astype(z[name].dtype)
        return moved, reading.log_rest(moved).astype(log_likelihood.dtype)

    old = z, log_likelihood
    new = jax.lax.cond(pooled(screen.accepted.astype(float)) > 0.0, confirm, lambda: old)
    log_ratio = new[1] - log_likelihood - (there - here)
    choice = metropolis(key_accept, jnp.where(screen.accepted, log_ratio, -jnp.inf), new, old, new[1])
    after_mean = 1 if isinstance(draws.cheap, GivenMap) else evaluations_given(draws.cheap) - 1  # type: ignore[operator]
    evaluations = evaluations_back(draws.dear) + (count + 1) * after_mean + 1
    evaluations += screen.accepted * evaluations_given(draws.dear)  # type: ignore[operator]
    return choice._replace(diverging=choice.diverging | screen.diverging), evaluations
