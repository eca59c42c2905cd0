r"""Noise, denoise towards the data, accept by the whole walk: the move of `DiffusionPCN` for informative likelihoods.

`DiffusionPCN` proposes from the prior's reverse process, so that where the data say much more than the prior, only
small moves are accepted. Here the walk down is guided. From the noised point $x_t$ a candidate comes by the path
$x_t \to \dots \to x'$ of the guided transitions $q$; under the prior the same path has the transitions $p$. Compare
paths instead of points: the current point has one too, drawn from the noising process seen backwards,
$x_t \to \dots \to x$, which is exact given both ends. On paths the target is $L(x_0) \prod p$ and the proposal
$\prod q$, so the weights

$$\log W = \log L(x_0) + \sum \log \frac{p(x_s \mid x_u)}{q(x_s \mid x_u)},$$

of $M$ candidates and of the current path take the place of the likelihoods in the test. **Nothing is left of the
guidance's errors**: they lower the acceptance and that is all. One path in ten goes unguided, and $q$ is the mixture
(`reverse_path`): without that, a point that the data rule out by many deviations would stay, since the guidance would
hardly take its path either. What is approximate is what is so in `DiffusionPCN`, the finitely many Gaussian steps $p$
that stand for the reverse process; the noising process seen backwards is not quite made of them.

A step costs a walk for each candidate and one for the current point, each with the derivatives that the guidance asks
of the network.

References:
    Corenflos et al., Conditioning diffusion models by explicit forward-backward bridging, 2024 (noising the current
    point for a reference path), https://arxiv.org/abs/2405.13794.
"""

from typing import Any

import jax

from numpyro_diffusion.guidance import Likelihood, Observation
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.observation import check_moment, guided_site
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.infer.reverse.pcn import DiffusionPCN
from numpyro_diffusion.infer.reverse.walk import check_solver, guided_walks
from numpyro_diffusion.solve import Solver


class GuidedPCN(DiffusionPCN):
    """Moves the diffusion site of a model by noising, guided denoising and a test on the whole walk.

    Exact up to the discretisation of the reverse process, for any guidance. Levels are drawn and adapted as in
    `DiffusionPCN`.

    Args:
        model: NumPyro model whose only latent site is a diffusion site, possibly in plates.
        moment: how the guidance looks ahead, see `guidance.Guided`; None takes "mmps" for a Gaussian observation and
            "dps" for any other likelihood.
        observation: what is observed of a point of the denoiser's own space; None reads the model. It steers; the
            test takes the model's likelihood.
        solver: a solver whose steps have a density; None takes the prior's own `sampler`.
        **options: `num_proposals`, `global_fraction` and `target_accept_prob` of `DiffusionPCN`.

    Raises:
        ValueError: for a number out of its range or an unknown moment; when run, for a model with other latent sites or
            several diffusion sites, or a moment that cannot handle the likelihood.
        TypeError: for a model that is not callable or a solver whose steps have no density.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import GuidedPCN
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0]), density="none"))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(GuidedPCN(model), num_warmup=100, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    def __init__(
        self,
        model: Model,
        *,
        moment: str | None = None,
        observation: Observation | Likelihood | None = None,
        solver: Solver | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, solver=None if solver is None else check_solver(solver), **options)
        check_moment(moment)
        self._guidance = moment, observation

    def _check_model(self, reading: Reading) -> None:
        super()._check_model(reading)
        guided_site(self._model, reading.args, reading.kwargs, *self._guidance)

    def _solver_of(self, sites: dict[str, PriorSite]) -> Solver:
        return check_solver(super()._solver_of(sites))

    @property
    def _num_walks(self) -> int:
        return self._num_proposals + 1

    def _propose(
        self,
        key: jax.Array,
        solver: Solver,
        sites: dict[str, PriorSite],
        z: dict[str, jax.Array],
        first: jax.Array,
        reading: Reading,
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        name, site, guided = guided_site(self._model, reading.args, reading.kwargs, *self._guidance)
        u = site.to_denoiser(z[name])
        clean, worth, worth_now = guided_walks(key, solver, guided, u, first, self._num_proposals)
        return {name: jax.vmap(site.from_denoiser)(clean)}, worth, worth_now
