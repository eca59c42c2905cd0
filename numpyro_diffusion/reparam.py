r"""Noise space: sample the solver's noise, report the point that it is mapped to.

A deterministic solver is a map $x = F(z)$ with $z \sim N(0, I)$. Sampling $z$ instead of $x$ turns a diffusion site
into a standard normal one followed by a deterministic one, so that any NumPyro kernel, SVI guide or optimiser applies,
and is exact for the law that the solver pushes forward: no density, no log-determinant, no inverse is needed.
`infer.NoiseSpace` does this to a whole model and reports the original sites.

**With a law that is not the prior.** Let $q$ be the law of $F(z)$, an amortised posterior say. The prior $p(x)$ of the
model is kept if the site is moved to the noise behind $q$ with what is between the two as a factor,

$$z \sim N(0, I), \qquad x = F(z), \qquad w(z) = \frac{p(x)}{q(x)} = \frac{p(F(z))}{N(z; 0, I)}
\left| \det \frac{\partial F}{\partial z} \right| .$$

The model is the same for any $q$, right or wrong, in as few steps as one likes. The better $q$ is as a posterior, the
flatter is $w(z)\, p(y \mid F(z))$, and the nearer is the posterior of $z$ to $N(0, I)$, from where every kernel is
fast: `TransportReparam`.

References:
    Parno and Marzouk, Transport map accelerated Markov chain Monte Carlo, 2018, https://arxiv.org/abs/1412.5492.
    Papaspiliopoulos, Roberts, Sköld, A general framework for the parametrization of hierarchical models, 2007,
    https://doi.org/10.1214/088342307000000014.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.util import sum_rightmost
from numpyro.handlers import mask, scale
from numpyro.infer.reparam import Reparam
from numpyro.primitives import _PYRO_STACK, plate

from numpyro_diffusion import _precision
from numpyro_diffusion.density import pushed
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.solve import FlowMap

__all__ = ["NoiseReparam", "TransportReparam"]


def noise_name(site: str) -> str:
    """The name of the noise site that replaces a diffusion site."""
    return f"{site}_noise"


class NoiseReparam(Reparam):
    """Replaces a `DiffusionPrior` site `x` by a standard normal site `x_noise` and a deterministic `x`.

    Example:
        >>> import numpyro
        >>> from numpyro.handlers import reparam, seed, trace
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.reparam import NoiseReparam
        >>> def model():
        ...     numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0])))
        >>> in_noise = reparam(model, config={"x": NoiseReparam()})
        >>> [(s["name"], s["type"]) for s in trace(seed(in_noise, 0)).get_trace().values()]
        [('x_noise', 'sample'), ('x', 'deterministic')]
    """

    def __call__(
        self, name: str, fn: dist.Distribution, obs: jax.Array | None
    ) -> tuple[dist.Distribution | None, jax.Array | None]:
        """Called by `numpyro.handlers.reparam`.

        Args:
            name: the site.
            fn: its distribution, a `DiffusionPrior`, possibly in plates.
            obs: its observed value; there must be none.

        Returns:
            None and the point of the flow, which makes the site deterministic. If the value of the site is known to a
            handler around the model that wants it as written, by its name in `values_as_written` (so `to_arviz` reads
            draws), the distribution and None, which leave the site as it is.

        Raises:
            TypeError: if the site is not a `DiffusionPrior`.
            ValueError: if the site is observed.
        """
        if obs is not None:
            raise ValueError(f"site {name!r} is observed: its noise cannot be sampled; drop the reparameterisation")
        if _is_as_written(name):
            return fn, None
        prior, expand_shape, event_dim = self._unwrap(fn)
        if not isinstance(prior, DiffusionPrior):
            raise TypeError(f"NoiseReparam needs a DiffusionPrior at site {name!r}; got {type(prior).__name__}")
        extra = event_dim - prior.event_dim
        noise = dist.Normal(jnp.zeros(prior.noise_shape), 1.0).to_event(len(prior.noise_shape))
        noise = noise.expand(expand_shape).to_event(extra)
        return None, prior.flow(numpyro.sample(noise_name(name), noise))


class TransportReparam(Reparam):
    r"""Moves a latent site to the noise behind another law $q$ of its values, and leaves the model's law as it is.

    A site `x` becomes a standard normal site `x_noise`, a deterministic `x` and a factor `x_weight`, $\log p(x)/q(x)$.
    With an amortised posterior for $q$ this corrects it where the likelihood is known, by any kernel: `Independence`
    has $q$ for a proposal, with the exact density of its draws; NUTS, `EllipticalSlice`, `TemperedSMC` or
    `PopulationHMC` move in its noise space, and the last two begin with a population drawn from it. Exact if the map of
    noise to points is one-to-one, as that of a smooth flow in enough steps is, whatever its error. It takes the
    determinant of a $d \times d$ Jacobian for each evaluation: for sites of few dimensions. Where $q$ has narrower
    tails than the posterior, weights have no variance: chains stick there, and an evidence is further off than its
    error says.

    Args:
        law: $q$, with its `flow_solver`. One for each point of a plate if its `cond` is a batch. Give it a `transform`
            if the site has a bounded support: points outside have weight zero.

    Raises:
        TypeError: if `law` is not a `DiffusionPrior`.
        ValueError: if its flow is a `FlowMap`, which need not be one-to-one; when run, if the site is observed, of
            another event shape, masked, scaled, or in a subsampling plate.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.handlers import reparam
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import Independence
        >>> from numpyro_diffusion.reparam import TransportReparam
        >>> guess = DiffusionPrior(Gaussian([1.0], 0.8))  # of a posterior that is N(1.5, 0.5)
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> corrected = reparam(model, config={"x": TransportReparam(guess)})
        >>> mcmc = MCMC(Independence(corrected), num_warmup=10, num_samples=2000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.1)
        True
    """

    def __init__(self, law: DiffusionPrior) -> None:
        if not isinstance(law, DiffusionPrior):
            raise TypeError(f"law must be a DiffusionPrior; got {type(law).__name__}")
        if isinstance(law.flow_solver, FlowMap):
            raise ValueError("law must have a solver as flow_solver: a FlowMap need not be one-to-one")
        self.law, self._pushed = law, partial(pushed, law.flow_solver)

    def __call__(self, name: str, fn: dist.Distribution, obs: jax.Array | None) -> tuple[Any, jax.Array | None]:
        """Called by `numpyro.handlers.reparam`.

        Args:
            name: the site.
            fn: its distribution.
            obs: its observed value; there must be none.

        Returns:
            None and the point, which makes the site deterministic; or, as `NoiseReparam` does, the distribution and
            None.

        Raises:
            ValueError: as the class says.
        """
        law = self.law
        _check_latent_and_whole(name, obs)
        if _is_as_written(name):
            return fn, None
        if fn.event_shape != law.event_shape or not _is_within(law.batch_shape, fn.batch_shape):
            raise ValueError(
                f"site {name!r} must have the shape of the law, batches of {law.batch_shape} and events of "
                f"{law.event_shape}; got {fn.batch_shape} and {fn.event_shape}. Use .to_event(...)"
            )
        noise_shape = law.noise_shape
        noise = dist.Normal(jnp.zeros(noise_shape), 1.0).to_event(len(noise_shape)).expand(fn.batch_shape)
        z = numpyro.sample(noise_name(name), noise)
        with _precision.highest():
            u, log_q = law.over_points(self._pushed, fn.batch_shape, z)
            x, log_det = u, 0.0
            if law.transform is not None:
                x = law.transform(u)
                log_det = law.transform.log_abs_det_jacobian(u, x)
                log_det = sum_rightmost(log_det, jnp.ndim(log_det) - len(fn.batch_shape))
            log_p = jnp.where(fn.support(x), fn.log_prob(x), -jnp.inf)
            log_weight = log_p + log_det - log_q  # against N(0, I), which the noise site brings
        numpyro.factor(f"{name}_weight", log_weight)
        return None, x


def _is_as_written(name: str) -> bool:
    """Whether a handler outside has the value of a site: it then stays as it is, and no flow is solved."""
    return any(name in getattr(handler, "values_as_written", ()) for handler in _PYRO_STACK)


def _is_within(batch_shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(batch_shape, other) == other
    except ValueError:
        return False


def _check_latent_and_whole(name: str, obs: jax.Array | None) -> None:
    if obs is not None:
        raise ValueError(f"site {name!r} is observed: its noise cannot be sampled; drop the reparameterisation")
    for handler in _PYRO_STACK:
        if isinstance(handler, mask | scale) or isinstance(handler, plate) and handler.size != handler.subsample_size:
            kind = "subsampling plate" if isinstance(handler, plate) else f"{type(handler).__name__} handler"
            raise ValueError(f"site {name!r} must carry its prior unmasked and unscaled; got a {kind} around it")
