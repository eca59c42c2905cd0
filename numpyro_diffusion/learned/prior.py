r"""A learned joint law of several sites, as the prior of a model.

A diffusion prior of whitened vectors $w$ and two fixed maps make the sites: $u = m + L w$ (`units`), and from $u$ to
values in their supports (`layout`),

$$w \sim p_w, \qquad \theta = T(m + L w).$$

In a model this is one `DiffusionPrior` site and a deterministic site for each $\theta_k$. The prior of $\theta$ is the
law that the maps push forward, so that no Jacobian enters a model: data speak to $\theta$, the density and the moves
are those of $w$. Only who asks for the density of $\theta$ itself needs it,

$$\log p(\theta) = \log p_w(w) - \log \det L - \log |\det \partial T / \partial u| .$$

The draws are not kept: what is kept is the network, $m$, $L$ and the names and supports of the sites.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.handlers import reparam
from numpyro.infer.reparam import Reparam

from numpyro_diffusion import _checks, _precision, checkpoint
from numpyro_diffusion.denoise import NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.learned.faithfulness import Faithfulness
from numpyro_diffusion.learned.layout import Layout, Site
from numpyro_diffusion.learned.units import Units
from numpyro_diffusion.solve import DPMSolverPP, Solver

SITE = "learned"
FLOW_SOLVER = DPMSolverPP(20)
"""Of the law in noise space: 20 evaluations of the network."""


@checkpoint.saved_with_denoiser
@jax.tree_util.register_pytree_node_class
class LearnedPrior:
    """A joint law of named sites; made by `prior_from_samples` and `prior_from_idata`.

    A pytree of the network's weights and the maps, so that it can be a model argument: new draws of the same sites then
    compile nothing anew. It pickles, and `save` and `load` keep it in one file, with its report and without solvers.

    Args:
        prior: of the whitened vectors.
        layout: the sites.
        units: the vectors' location and factor.
        report: how near the law is to its draws; None if that was not asked, or inside of a model.

    Example:
        >>> import jax, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_diffusion import prior_from_samples
        >>> draws = {"rate": dist.Gamma(3.0, 2.0).sample(jax.random.key(0), (500,))}
        >>> prior = prior_from_samples(draws, {"rate": constraints.positive}, num_steps=50, report=False)
        >>> def model(y, prior):
        ...     theta = prior()
        ...     numpyro.sample("y", dist.Poisson(theta["rate"]), obs=y)
        >>> bool(prior.sample(jax.random.key(1), (1000,))["rate"].min() > 0.0)
        True
    """

    def __init__(self, prior: DiffusionPrior, layout: Layout, units: Units, report: Faithfulness | None = None) -> None:
        self.prior, self.layout, self.units, self.report = prior, layout, units, report

    def __call__(self, *, rename: Mapping[str, str] | None = None, site: str = SITE) -> dict[str, jax.Array]:
        """Declares all sites in the model that calls it.

        Args:
            rename: new names of sites, by old ones.
            site: name of the site of the whitened vector; a second learned prior in one model needs another.

        Returns:
            The values, by the old names.

        Raises:
            ValueError: if a name in `rename` is none of the sites, or two sites get one name.
        """
        names = self._names(rename)
        values = self.constrain(numpyro.sample(site, self.prior))
        return {old: numpyro.deterministic(names[old], value) for old, value in values.items()}

    def in_place_of_priors(
        self, model: Callable, *, rename: Mapping[str, str] | None = None, site: str = SITE
    ) -> Callable:
        """A model whose priors are these: its own `sample` statements of the sites become deterministic.

        For the same model on more data. What it says of these sites' priors no longer counts.

        Args:
            model: a NumPyro model with latent sites of these names.
            rename: the model's names of the sites, by those of the draws.
            site: name of the site of the whitened vector.

        Returns:
            A model. It raises `ValueError` when it runs if the model lacks a site, or has it in another shape.

        Raises:
            ValueError: if a name in `rename` is none of the sites, or two sites get one name.
        """
        return _Sequel(self, model, self._names(rename), site)

    def constrain(self, w: jax.Array) -> dict[str, jax.Array]:
        """Values by site, (..., *shape), of whitened vectors (..., d)."""
        with _precision.highest():
            return self.layout.constrain(self.units.vector(w))

    def unconstrain(self, values: Mapping[str, ArrayLike]) -> jax.Array:
        """Whitened vectors, (..., d), of values by site, (..., *shape).

        Raises:
            ValueError: if a site is missing or of another shape.
        """
        with _precision.highest():
            return self.units.whitened(self.layout.unconstrain(self._check(values)))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> dict[str, jax.Array]:
        """Draws by the stochastic solver, by site, (*sample_shape, *shape)."""
        return self.constrain(self.prior.sample(key, sample_shape))

    def flow(self, z: jax.Array) -> dict[str, jax.Array]:
        """Values by site, (..., *shape), of standard normal noise (..., d)."""
        return self.constrain(self.prior.flow(z))

    def log_prob(self, values: Mapping[str, ArrayLike]) -> jax.Array:
        """The log-density of the sites' values jointly, in nats, of shape (...) for values (..., *shape).

        Normalised, with respect to the coordinates that NumPyro's densities of such supports have.

        Raises:
            ValueError: if a site is missing or of another shape.
            NotImplementedError: if the prior of the whitened vectors has no density.
        """
        with _precision.highest():
            u = self.layout.unconstrain(self._check(values))
            return self.prior.log_prob(self.units.whitened(u)) - self.units.log_det - self.layout.log_det(u)

    def using(self, *, flow_solver: Solver = FLOW_SOLVER, **options: Any) -> "LearnedPrior":
        """The same law with other solvers, or another source of its density.

        Args:
            flow_solver: a deterministic solver.
            **options: those of `DiffusionPrior`.
        """
        prior = DiffusionPrior(self.prior.denoiser, flow_solver=flow_solver, **options)
        return LearnedPrior(prior, self.layout, self.units, self.report)

    def _names(self, rename: Mapping[str, str] | None) -> dict[str, str]:
        rename, names = dict(rename or {}), self.layout.names
        if unknown := [name for name in rename if name not in names]:
            raise ValueError(f"rename must have names of learned sites, {names}; got {unknown}")
        renamed = {name: rename.get(name, name) for name in names}
        if len(set(renamed.values())) < len(names):
            raise ValueError(f"rename must give each site a name of its own; got {renamed}")
        return renamed

    def _check(self, values: Mapping[str, ArrayLike]) -> Mapping[str, ArrayLike]:
        if missing := [name for name in self.layout.names if name not in values]:
            raise ValueError(f"values must have the learned sites {self.layout.names}; {missing} are missing")
        for site in self.layout.sites:
            _checks.shape(f"values[{site.name!r}]", values[site.name], site.shape)
        return values

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name}{list(site.shape) or ''}" for site in self.layout.sites)
        return f"LearnedPrior({sites})"

    def to_saved(self) -> tuple[NetworkDenoiser, dict[str, Any], dict[str, jax.Array]]:
        """Its denoiser, plain JSON values and arrays, for `checkpoint.save`."""
        report = None if self.report is None else self.report.describe()
        sites = [site.describe() for site in self.layout.sites]
        network: NetworkDenoiser = self.prior.denoiser  # type: ignore[assignment]  # what `fit` has returned
        return network, {"sites": sites, "report": report}, self.units._asdict()

    @classmethod
    def from_saved(
        cls, denoiser: NetworkDenoiser, described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> "LearnedPrior":
        """What `to_saved` was given."""
        layout = Layout(tuple(Site.read(site) for site in described["sites"]))
        size, units = layout.size, Units(*(jnp.asarray(arrays[name]) for name in Units._fields))
        if denoiser.event_shape != (size,) or units.location.shape != (size,) or units.factor.shape != (size, size):
            raise ValueError(f"its sites have {size} entries; its network has shape {denoiser.event_shape}")
        report = described["report"] and Faithfulness.read(described["report"])
        return cls(DiffusionPrior(denoiser, flow_solver=FLOW_SOLVER), layout, units, report)

    def tree_flatten(self) -> tuple[tuple, Any]:
        return (self.prior, self.units), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Layout, leaves: tuple) -> "LearnedPrior":
        prior, units = leaves
        return cls(prior, layout, units)


class _Sequel:
    """A model with other priors; a class, so that it pickles if the model does."""

    def __init__(self, prior: LearnedPrior, model: Callable, names: Mapping[str, str], site: str) -> None:
        self.prior, self.model, self.names, self.site = prior, model, names, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = self.prior.constrain(numpyro.sample(self.site, self.prior.prior))
        given = {self.names[old]: _Given(value) for old, value in values.items()}
        with reparam(config=given):
            result = self.model(*args, **kwargs)
        if missing := [name for name, each in given.items() if not each.used]:
            raise ValueError(
                f"the model must have latent sites {list(given)}; {missing} are missing. Rename sites by rename=, or "
                "leave them out of the draws that the prior is learned from"
            )
        return result


class _Given(Reparam):
    """Puts a value in the place of a sample statement."""

    def __init__(self, value: jax.Array) -> None:
        self.value, self.used = value, False

    def __call__(self, name: str, fn: dist.Distribution, obs: Any) -> tuple[None, jax.Array]:
        if obs is not None:
            raise ValueError(f"site {name!r} is observed: it cannot have a learned prior")
        if tuple(fn.shape()) != jnp.shape(self.value):
            raise ValueError(
                f"site {name!r} must have the shape of its draws, {jnp.shape(self.value)}; got {fn.shape()}"
            )
        self.used = True
        return None, self.value
