r"""A model's stand-in: what a NumPyro kernel that is held inside another runs in place of the user's model.

NumPyro's kernels execute a model many times to make their programs. A stand-in has the same law in coordinates of its
own, and takes it from the `Record` of the run, so that the user's model is not executed again. With the diffusion sites
written as images $x = f(w; \theta)$ of standard normal sites $w$, and the other sites $\theta$ in unconstrained
coordinates, it is

$$\pi(w, \theta) \propto N(w; 0, I)\; p(\theta)\, |\det J(\theta)|\; p(y \mid f(w; \theta), \theta),$$

as sites whose support is the real line and one factor. `StandIn` is the base; `Unconstrained` leaves the diffusion
sites as they are, and `infer.noise` and `infer.reverse.split_model` say what else $f$ may be.

Where a composite kernel conditions the model, the inner kernel must not see how: it may be composite itself, in the
coordinates of the stand-in. `inside` hides what is given from it.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.gibbs import GIBBS_SITES_KWARG

from numpyro_diffusion import _precision
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Evaluation, Reading, Record
from numpyro_diffusion.infer.model.structure import Structure

Point = dict[str, jax.Array]
_GIVEN = "_numpyro_diffusion_given"
_FACTOR = "_numpyro_diffusion_log_density"
_RADIUS = 2.0


class Transformed(NamedTuple):
    """A model at a point of the stand-in's coordinates, and the parts of its log-density there, scalars."""

    log_normal: jax.Array  # of the standard normal sites
    log_others: jax.Array  # prior of the other sites, with their Jacobians, and of diffusion sites that are left
    log_likelihood: jax.Array
    values: Point  # constrained, of the model's latent sites
    deterministic: Point  # of its deterministic sites

    @property
    def log_prior(self) -> jax.Array:
        """Of all sites of the stand-in."""
        return self.log_normal + self.log_others

    @property
    def log_density(self) -> jax.Array:
        """Of the posterior, not normalised."""
        return self.log_prior + self.log_likelihood


class StandIn(abc.ABC):
    """A model in other coordinates, for inner kernels; called as the model is.

    Args:
        model: NumPyro model.
    """

    keyword: ClassVar[str | None] = None
    """A keyword argument that the change of coordinates takes besides those of the model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._record: Record | None = None

    @property
    def model(self) -> Model:
        """The model in its own coordinates."""
        return self._model

    def use(self, reading: Reading) -> None:
        """Reads the model through the record of a run."""
        self._record = reading.record

    @abc.abstractmethod
    def normal_shapes(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the standard normal sites."""

    @abc.abstractmethod
    def images(self, reading: Reading, point: Point, given: Any) -> Point:
        """Constrained values of the diffusion sites at a point of the stand-in.

        Args:
            reading: the model at its arguments.
            point: values of all sites of the stand-in.
            given: the keyword argument of `keyword`.
        """

    def shapes(self, reading: Reading) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all sites of the stand-in: normal ones, and the others in unconstrained coordinates."""
        structure = reading.structure
        others = {name: structure.latent[name].unconstrained_shape for name in structure.others}
        return {**self.normal_shapes(structure), **others}

    def evaluate(self, reading: Reading, point: Point, given: Any = None) -> Transformed:
        """The model at a point of the stand-in.

        Args:
            reading: the model at its arguments.
            point: values of all sites of the stand-in.
            given: the keyword argument of `keyword`.

        Returns:
            A `Transformed`.
        """
        parts = reading.evaluate(self._others(reading, point), self.images(reading, point, given))
        return self._transformed(reading, point, parts)

    def _others(self, reading: Reading, point: Point) -> Point:
        return {name: point[name] for name in reading.structure.others}

    def _transformed(self, reading: Reading, point: Point, parts: Evaluation) -> Transformed:
        normal = (-0.5 * jnp.sum(point[name] ** 2) for name in self.normal_shapes(reading.structure))
        others = (*parts.log_others.values(), *parts.log_jacobian.values())
        zero = jnp.zeros(())
        return Transformed(
            sum(normal, start=zero), sum(others, start=zero), parts.log_likelihood, parts.values, parts.deterministic
        )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """The stand-in as a NumPyro model of the arguments of the model, see `inside`."""
        extra = None if self.keyword is None else kwargs.pop(self.keyword)
        given = kwargs.pop(_GIVEN, None)
        record = Record(self._model) if self._record is None else self._record
        reading = record.at(args, kwargs if given is None else {**kwargs, GIBBS_SITES_KWARG: given})
        normal, point = self.normal_shapes(reading.structure), {}
        for name, shape in self.shapes(reading).items():
            law = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)) if name in normal else Anywhere(shape)
            point[name] = numpyro.sample(name, law)
        with _precision.highest():
            parts = self.evaluate(reading, point, extra)
        numpyro.factor(_FACTOR, parts.log_others + parts.log_likelihood)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None}


class Unconstrained(StandIn):
    """The model itself in NumPyro's unconstrained coordinates; diffusion sites have the density of their priors."""

    def normal_shapes(self, structure: Structure) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def images(self, reading: Reading, point: Point, given: Any) -> Point:
        """None: the diffusion sites are sites of the stand-in."""
        return {}

    def shapes(self, reading: Reading) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all latent sites."""
        return {name: site.unconstrained_shape for name, site in reading.structure.latent.items()}

    def _others(self, reading: Reading, point: Point) -> Point:
        return point

    def _transformed(self, reading: Reading, point: Point, parts: Evaluation) -> Transformed:
        transformed = super()._transformed(reading, point, parts)
        latent = reading.structure.latent
        priors = (
            jnp.sum(prior.log_prob(parts.values[name]))
            for name, prior in parts.priors.items()
            if not latent[name].is_dropped
        )
        return transformed._replace(log_others=sum(priors, start=transformed.log_others))


def inside(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a model as a kernel on its stand-in gets them: without what a composite kernel gives."""
    hidden = {_GIVEN: kwargs[GIBBS_SITES_KWARG]} if GIBBS_SITES_KWARG in kwargs else {}
    return {**{name: value for name, value in kwargs.items() if name != GIBBS_SITES_KWARG}, **hidden}


class Anywhere(dist.ImproperUniform):
    """A site whose density is elsewhere: flat on the real line, and drawn where NumPyro starts chains.

    Args:
        shape: of the site.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(constraints.real, (), shape)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Uniform draws from (-2, 2)."""
        return jax.random.uniform(key, (*sample_shape, *self.event_shape), minval=-_RADIUS, maxval=_RADIUS)
