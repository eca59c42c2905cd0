r"""The posterior under noise: its score at every level is not known exactly, and guidance approximates it.

At time $t$ the noised posterior is $p_t(x_t)\, E[L(x) \mid x_t]$, with $L$ the rest of the model. The score of the
first factor is the denoiser's. The second factor is an average over clean points, which a denoiser does not give; a
*guidance* is a formula for its logarithm in terms of the denoiser's prediction,

$$\nabla \log p_t(x_t) + \nabla_{x_t} G(\hat x_0(x_t), \dots), \qquad G \approx \log E[L(x) \mid x_t].$$

`at_clean_point`, $G = \log L(\hat x_0)$, takes the clean point as known (DPS). It is right in the limit of no noise
and overconfident above: its curvature, $J^\top \nabla^2 \log L\, J$ with $J = \partial \hat x_0 / \partial x_t$, can
far exceed the right one, and make a Langevin step unstable. If the model's data are a Gaussian observation, the other
choices of `guidance.Guided` are better founded; a name such as "mmps" selects one of them.

All sites, and all points in plates, are one joint point; each site keeps its own schedule, and has its own time for a
common level. Coordinates are the denoisers' own, where a transform's Jacobian does not enter. `annealed` and
`guided_reverse` walk down these levels.

References:
    Chung et al., Diffusion posterior sampling for general noisy inverse problems, 2023,
    https://arxiv.org/abs/2209.14687.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from numpyro_diffusion.denoise import Denoiser, Prediction
from numpyro_diffusion.guidance import Guided
from numpyro_diffusion.infer.model.observation import guided_site
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.noise import Schedule, perturb
from numpyro_diffusion.solve.langevin import langevin_step

Point = dict[str, jax.Array]  # a value for each site, of shape (*batch_shape, *noise_shape)
Guidance = Callable[[Callable[[Point], jax.Array], dict[str, Prediction]], jax.Array]
"""From the log-density of the rest of the model at clean points of the denoisers' spaces, and the prediction at each
site, to a scalar: the logarithm of the likelihood of the noisy points."""


def at_clean_point(log_likelihood: Callable[[Point], jax.Array], predictions: Mapping[str, Prediction]) -> jax.Array:
    """The guidance of DPS: the likelihood of the predicted clean points, as if they were known.

    Args:
        log_likelihood: log-density of the rest of the model at clean points, a dict by site.
        predictions: what the denoisers predict at the noisy points, by site.

    Returns:
        What stands for the log-likelihood of the noisy points, a scalar.

    References:
        Chung et al., Diffusion posterior sampling for general noisy inverse problems, 2023,
        https://arxiv.org/abs/2209.14687.
    """
    return log_likelihood({name: prediction.x0 for name, prediction in predictions.items()})


@dataclass(frozen=True)
class NoisyPosterior:
    """The posterior of the diffusion sites at noise; made by `noisy_posterior`.

    Args:
        sites: the diffusion sites.
        log_likelihood: log-density of the rest of the model at clean points of the denoisers' spaces.
        guidance: what stands for the likelihood of noisy points.
    """

    sites: dict[str, PriorSite]
    log_likelihood: Callable[[Point], jax.Array]
    guidance: Guidance

    def predictions(self, x_t: Point, t: Mapping[str, ArrayLike]) -> dict[str, Prediction]:
        """The predictions of the clean points by the priors alone."""
        return {name: _predict(site, x_t[name], t[name]) for name, site in self.sites.items()}

    def noisy_log_likelihood(self, x_t: Point, t: Mapping[str, ArrayLike]) -> tuple[jax.Array, dict[str, Prediction]]:
        """The guidance's value, and the predictions that it was made from."""
        predictions = self.predictions(x_t, t)
        return self.guidance(self.log_likelihood, predictions), predictions

    def guided(self, x_t: Point, t: Mapping[str, ArrayLike]) -> dict[str, Prediction]:
        r"""The predictions given the data, $\hat x_0 + (\sigma_t^2 / \alpha_t) \nabla G$, with the guided score."""
        gradient, predictions = jax.grad(self.noisy_log_likelihood, has_aux=True)(x_t, t)
        return {name: shifted(predictions[name], gradient[name]) for name in self.sites}

    def score(self, x_t: Point, t: Mapping[str, ArrayLike]) -> Point:
        """The guided score."""
        return {name: prediction.score for name, prediction in self.guided(x_t, t).items()}

    def log_density(self, x_t: Point, t: Mapping[str, ArrayLike]) -> jax.Array:
        """Log of the noised prior's density times the guidance's likelihood, where all denoisers have a density."""
        total = self.noisy_log_likelihood(x_t, t)[0]
        for name, site in self.sites.items():
            density = site.over_points(lambda denoiser, x, n=name: denoiser.log_density(x, t[n]), x_t[name])
            total += jnp.sum(density)
        return total

    def noise(self, key: jax.Array, z: Point, t: Mapping[str, ArrayLike]) -> Point:
        """Noises a point, given in NumPyro's unconstrained coordinates, to a level."""
        keys = dict(zip(self.sites, jax.random.split(key, len(self.sites)), strict=True))
        clean = {name: site.to_denoiser(z[name]) for name, site in self.sites.items()}
        return {
            name: perturb(keys[name], site.denoiser.schedule, clean[name], t[name]).astype(clean[name].dtype)
            for name, site in self.sites.items()
        }

    def from_noise(self, key: jax.Array, t: Mapping[str, ArrayLike]) -> Point:
        r"""Draws the start of a walk at a high level, $N(\alpha_t m, \alpha_t^2 s^2 + \sigma_t^2)$."""
        keys = jax.random.split(key, len(self.sites))
        return {name: _terminal(k, site, t[name]) for k, (name, site) in zip(keys, self.sites.items(), strict=True)}

    def to_unconstrained(self, u: Point) -> Point:
        """From the denoisers' own spaces to NumPyro's unconstrained coordinates."""
        return {name: site.from_denoiser(u[name]) for name, site in self.sites.items()}


@dataclass(frozen=True)
class MomentPosterior(NoisyPosterior):
    """The posterior of a single site at noise, with the score of `guidance.Guided`, which is not a gradient.

    Args:
        denoiser: the guided denoiser of all points of the site.
    """

    denoiser: Guided

    def guided(self, x_t: Point, t: Mapping[str, ArrayLike]) -> dict[str, Prediction]:
        """The prediction given the data, of the only site."""
        ((name, value),) = x_t.items()
        return {name: self.denoiser(value, t[name])}


def shifted(prediction: Prediction, gradient: jax.Array) -> Prediction:
    """A prediction after a term with this gradient has been added to the log-density."""
    schedule, t = prediction.schedule, prediction.t
    return prediction.shifted(schedule.sigma(t) ** 2 / schedule.alpha(t) * gradient)


def noisy_posterior(reading: Reading, guidance: Guidance | str | None = None) -> NoisyPosterior:
    """The noisy posterior of a model all of whose latent sites are diffusion sites.

    Args:
        reading: the model at its arguments.
        guidance: what stands for the likelihood of noisy points, or one of `guidance.GUIDANCES`; None takes
            `at_clean_point`.

    Returns:
        A `NoisyPosterior`.

    Raises:
        ValueError: for a guidance that cannot handle the likelihood.
    """
    sites = reading.sites()

    def log_likelihood(u: Point) -> jax.Array:
        return reading.log_rest({name: site.from_denoiser(u[name]) for name, site in sites.items()})

    if isinstance(guidance, str):
        _, _, denoiser = guided_site(reading, guidance)
        return MomentPosterior(sites, log_likelihood, at_clean_point, denoiser)
    return NoisyPosterior(sites, log_likelihood, at_clean_point if guidance is None else guidance)


def langevin_steps(key: jax.Array, x_t: Point, score: Point, step_size: Mapping[str, ArrayLike]) -> Point:
    """One unadjusted Langevin step of the joint point, each site with its own step size."""
    keys = jax.random.split(key, len(x_t))
    return {
        name: langevin_step(k, x, score[name], step_size[name]).astype(x.dtype)
        for k, (name, x) in zip(keys, x_t.items(), strict=True)
    }


class GuidedSite:
    """A diffusion site given the data, as a denoiser: all points of its plates at once, the other sites where they are.

    It is for solvers, which move one point of one schedule. With a single site it is the guided denoiser of the model.

    Args:
        posterior: the noisy posterior.
        name: the site.
        x_t: the noisy point, of all sites.
        t: where the other sites are.
    """

    def __init__(self, posterior: NoisyPosterior, name: str, x_t: Point, t: Mapping[str, ArrayLike]) -> None:
        self._posterior, self._name, self._x_t, self._t = posterior, name, x_t, t
        site = posterior.sites[name]
        self._denoiser: Denoiser = site.denoiser
        self.event_shape = (*site.batch_shape, *self._denoiser.event_shape)

    @property
    def schedule(self) -> Schedule:
        return self._denoiser.schedule

    @property
    def location(self) -> ArrayLike:
        return self._denoiser.location

    @property
    def scale(self) -> ArrayLike:
        return self._denoiser.scale

    def __call__(self, x_t: jax.Array, t: ArrayLike) -> Prediction:
        return self._posterior.guided({**self._x_t, self._name: x_t}, {**self._t, self._name: t})[self._name]


def _predict(site: PriorSite, x_t: jax.Array, t: ArrayLike) -> Prediction:
    def predict(denoiser: Denoiser, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        prediction = denoiser(x, t)
        return prediction.x0.astype(x.dtype), prediction.eps.astype(x.dtype)

    x0, eps = site.over_points(predict, x_t)
    return Prediction(x0, eps, x_t, t, site.denoiser.schedule)


def _terminal(key: jax.Array, site: PriorSite, t: ArrayLike) -> jax.Array:
    denoiser = site.denoiser
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    z = jax.random.normal(key, (*site.batch_shape, *site.prior.noise_shape))
    return (alpha * denoiser.location + jnp.hypot(alpha * denoiser.scale, sigma) * z).astype(z.dtype)
