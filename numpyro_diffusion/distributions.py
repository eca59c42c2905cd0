r"""A diffusion model as a NumPyro distribution.

`DiffusionPrior` wraps a denoiser and gives three views of the law it stands for:

* `sample` draws from it by a stochastic solver;
* `flow` maps standard normal noise to it by a deterministic solver, $x = F(z)$, which is all that noise-space inference
  needs: no density, no inverse;
* `log_prob` is a log-density, or an error where there is none. It is never a stand-in: with a constant that has the
  right gradient, a Metropolis test would ignore the prior.

The log-density comes from one of two places. An exact denoiser has its own in closed form, $\log p_t(\alpha_t x)$ at
the smallest noise level, and an energy network has one up to a constant. Any other denoiser has that of its probability
flow, by one solve; its gradient is the score, or its own. Both are of the law smoothed by the smallest noise level.

A conditional denoiser stands for a family of laws, and `cond=` picks one, $p(x \mid c)$. The condition may be another
quantity of the model: `flow` and `log_prob` are differentiable in it. Each of the leading dimensions of a condition has
its own law $p(x_i \mid c_i)$; they are the `batch_shape`, as with the parameters of any NumPyro distribution.

With a `transform` $T$ the diffusion lives on $u = T^{-1}(x)$, in its own unconstrained space, and
$\log p(x) = \log p_u(T^{-1}(x)) - \log |\det \partial T / \partial u|$.

The three laws agree up to the solvers' errors, not bit for bit. `infer` and `reparam` condition a prior on data.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_diffusion import _checks, _precision, density, solve
from numpyro_diffusion.denoise import Conditioned, Denoiser, require_denoiser
from numpyro_diffusion.denoise.batched import over_points, with_batch
from numpyro_diffusion.denoise.prediction import density_kind
from numpyro_diffusion.density.flow import Gradient, has_flow
from numpyro_diffusion.solve import DPMSolverPP, FlowMap, Heun, Solver
from numpyro_diffusion.solve.flow import check_flow

__all__ = ["DiffusionPrior"]

Source = Literal["denoiser", "flow"]


class DiffusionPrior(dist.Distribution):
    r"""A diffusion model as a distribution over points of the denoiser's `event_shape`.

    A registered pytree: its leaves are the arrays of the denoiser, the transform and a `FlowMap`, so that a prior as an
    argument of a model brings new weights without a recompilation.

    Args:
        denoiser: the model, learned or exact.
        cond: what a conditional denoiser is conditioned on: an array or another pytree of arrays. Leading dimensions
            beyond those of one condition are the `batch_shape`.
        cond_batch_dims: how many leading dimensions of `cond` are batch dimensions. None asks the network for its
            `cond_shape`; if it does not say, `cond` is one condition.
        transform: a bijection from the denoiser's space to the support, for constrained sites.
        sampler: a stochastic solver for `sample`, and for the kernels whose `solver` is None.
        flow_solver: a deterministic solver for `flow`, or a `solve.FlowMap` for this law, so not with `cond`.
        density: where `log_prob` comes from. "denoiser" is the denoiser's own log-density at the smallest noise level;
            that of an energy is known up to a constant, which depends on the condition. "flow" is the density of the
            probability flow. "auto" takes the denoiser's own if it is normalised, and else the flow's. "none" refuses.
        density_solver: the grid of the flow's solve.
        density_probes: number of Hutchinson probes for the trace in that solve; None for the exact trace, which takes
            as many Jacobian-vector products as there are dimensions. The probes are the same for all points and calls,
            those of `jax.random.key(0)`, so that `log_prob` is a function of the point, with the error of the probes.
        density_gradient: that of the flow's density in the point, as in `density.log_prob`: "score" for the denoiser's,
            or "solve" for that of the value, which trajectories need where a network's score is off.
        validate_args: NumPyro's switch for checking values.

    Raises:
        TypeError: if `denoiser` is not a denoiser, `transform` not a NumPyro transform, or a solver of the wrong kind.
        ValueError: if `density` is unknown, "denoiser" without a log-density or "flow" for a `Product`, which has no
            flow; if `density_gradient` is unknown or `density_probes` below one; or if `cond` is missing, or not of the
            network's `cond_shape`.

    References:
        Song et al., Score-based generative modeling through stochastic differential equations, 2021,
        https://arxiv.org/abs/2011.13456.

    Example:
        >>> import jax
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> prior = DiffusionPrior(Gaussian([0.0, 0.0]))
        >>> prior.sample(jax.random.key(0), (3,)).shape
        (3, 2)
    """

    arg_constraints: dict[str, Any] = {}
    # One field on purpose: NumPyro gathers several through a set, whose order changes between processes.
    pytree_data_fields = ("_parts",)
    pytree_aux_fields: tuple[str, ...] = ("sampler", "density", "density_solver", "density_probes", "density_gradient")

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        cond: Any = None,
        cond_batch_dims: int | None = None,
        transform: Transform | None = None,
        sampler: Solver = DPMSolverPP(64, eta=1.0),  # noqa: B008
        flow_solver: Solver | FlowMap = Heun(),  # noqa: B008
        density: Literal["auto", "denoiser", "flow", "none"] = "auto",
        density_solver: Heun = Heun(64),  # noqa: B008
        density_probes: int | None = None,
        density_gradient: Gradient = "score",
        validate_args: bool | None = None,
    ) -> None:
        require_denoiser(denoiser)
        if transform is not None and not isinstance(transform, Transform):
            raise TypeError(f"transform must be a NumPyro Transform; got {type(transform).__name__}")
        if not (isinstance(sampler, Solver) and sampler.stochastic):
            raise TypeError(f"sampler must be a stochastic solver such as solve.DPMSolverPP(eta=1.0); got {sampler!r}")
        if not isinstance(density_solver, Heun) or density_solver.stochastic:
            raise TypeError(f"density_solver must be solve.Heun with its grid; got {density_solver!r}")
        if density_probes is not None:
            _checks.at_least(1, density_probes=density_probes)
        _checks.one_of("density_gradient", density_gradient, get_args(Gradient))
        _check_density(density, denoiser)
        denoiser, batch_shape = with_batch(denoiser if cond is None else Conditioned(denoiser, cond), cond_batch_dims)
        check_flow(flow_solver, tuple(denoiser.event_shape), conditional=cond is not None or bool(batch_shape))
        self._parts = (denoiser, transform, flow_solver)
        self.sampler = sampler
        self.density, self.density_gradient = density, density_gradient
        self.density_solver, self.density_probes = density_solver, density_probes
        event_shape = tuple(denoiser.event_shape)
        if transform is not None:
            event_shape = tuple(transform.forward_shape(event_shape))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def denoiser(self) -> Denoiser:
        """The model, on the unconstrained side of the transform.

        Raises:
            ValueError: if there is one for each condition of a batch.
        """
        if self.batch_shape:
            raise ValueError(
                f"this DiffusionPrior has batch_shape {self.batch_shape}: one denoiser for each condition, not one for "
                "all points. DiffusionPrior.over_points maps a function over points with their denoisers"
            )
        return self._parts[0]

    @property
    def denoisers(self) -> Denoiser:
        """The model, whose condition may have batch dimensions; its schedule, shape and scale have none."""
        return self._parts[0]

    @property
    def transform(self) -> Transform | None:
        """The bijection from the denoiser's space to the support, or None."""
        return self._parts[1]

    @property
    def flow_solver(self) -> Solver | FlowMap:
        """What maps noise to points."""
        return self._parts[2]

    def with_flow(self, flow_solver: Solver | FlowMap) -> "DiffusionPrior":
        """The same prior with another flow."""
        check_flow(flow_solver, self.noise_shape, conditional=bool(self.batch_shape))
        other = copy.copy(self)
        other._parts = (*self._parts[:2], flow_solver)
        return other

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise behind one point: the denoiser's `event_shape`."""
        return tuple(self.denoisers.event_shape)

    @property
    def density_source(self) -> Source | None:
        """Where `log_prob` comes from: "denoiser", "flow", or None if the prior has no density."""
        if self.density != "auto":
            return None if self.density == "none" else self.density
        if density_kind(self.denoisers) == "normalized":
            return "denoiser"
        return "flow" if self.has_flow_density else None

    @property
    def has_flow_density(self) -> bool:
        """Whether `density` allows that of the probability flow, and the flow is that of the prior's law."""
        return self.density in ("auto", "flow") and has_flow(self.denoisers)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        codomain = constraints.real if self.transform is None else self.transform.codomain
        return constraints.independent(codomain, self.event_dim - codomain.event_dim)

    def over_points(self, function: Callable, shape: tuple[int, ...], *arrays: Any) -> Any:
        """Maps a function of one point and its denoiser over all points.

        Args:
            function: called as `function(denoiser, *arrays)`, with what belongs to one point.
            shape: shape of the points, with whose last dimensions the `batch_shape` broadcasts.
            *arrays: arrays, or pytrees of arrays, that all begin with `shape`; at least one.

        Returns:
            What the function returns, with `shape` in front.
        """
        return over_points(function, self.denoisers, len(self.batch_shape), tuple(shape), *arrays)

    def _constrain(self, u: jax.Array) -> jax.Array:
        if self.transform is None:
            return u
        with _precision.highest():
            return self.transform(u)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws points by the stochastic solver.

        Args:
            key: random key.
            sample_shape: how many independent draws.

        Returns:
            Points of shape `sample_shape + batch_shape + event_shape`.
        """
        return self._constrain(_draw(self.sampler, self.denoisers, key, tuple(sample_shape), self.batch_shape))

    def flow(self, z: jax.Array) -> jax.Array:
        """Maps standard normal noise to points by the deterministic solver, or by the map that has learned it.

        Args:
            z: noise of shape `(..., *noise_shape)`; its leading dimensions broadcast with the `batch_shape`.

        Returns:
            Points of shape `(..., *event_shape)`, differentiable in `z`.

        Raises:
            ValueError: if `z` does not end with `noise_shape`.
        """
        _checks.shape("z", z, self.noise_shape)
        return self._constrain(_flow(self.flow_solver, self.denoisers, z, self.batch_shape))

    @validate_sample
    def log_prob(self, value: jax.Array, intermediates: Any = None) -> jax.Array:
        """The log-density in nats, of the batch shape of `value`; its gradient is as `density_gradient` says.

        Raises:
            NotImplementedError: if the prior has no density.
            ValueError: if `value` does not end with `event_shape`.
        """
        _checks.shape("value", value, self.event_shape)
        if self.transform is None:
            return self.log_density(value)
        with _precision.highest():
            u = self.transform.inv(value)
            log_det = self.transform.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, jnp.ndim(log_det) - (jnp.ndim(value) - self.event_dim))
        return self.log_density(u) - log_det

    def log_density(self, u: jax.Array, source: Source | None = None, gradient: Gradient | None = None) -> jax.Array:
        """The log-density in the denoiser's own space, before the transform.

        Args:
            u: points of shape `(..., *noise_shape)`; their leading dimensions broadcast with the `batch_shape`.
            source: "denoiser" or "flow", whatever the prior's `density`; None takes its `density_source`.
            gradient: of the flow's; None takes its `density_gradient`.

        Returns:
            Nats, of the leading shape; normalised, unless it is the denoiser's own and that is not.

        Raises:
            NotImplementedError: if the prior has no density.
        """
        source = self.density_source if source is None else source
        if source is None:
            raise NotImplementedError(_without_density(self.density))
        if source == "denoiser":
            return _own_log_density(self.denoisers, u, self.batch_shape)
        how = self.density_probes, self.density_gradient if gradient is None else gradient
        return _log_density(self.density_solver, self.denoisers, u, self.batch_shape, *how)


def _check_density(source: str, denoiser: Denoiser) -> None:
    _checks.one_of("density", source, ("auto", "denoiser", "flow", "none"))
    if source == "denoiser" and density_kind(denoiser) is None:
        raise ValueError(
            f'density="denoiser" needs a denoiser with a log_density, exact or an energy; {type(denoiser).__name__} '
            'has a score only. density="flow" integrates its probability flow'
        )
    if source == "flow" and not has_flow(denoiser):
        raise ValueError(
            'density="flow" needs a probability flow, and that of a Product is not the flow of its law. '
            'density="denoiser" is its own log-density, up to a constant'
        )


def _without_density(density: str) -> str:
    """Why there is no log_prob, and what to do."""
    if density == "auto":
        return (
            "a Product has no probability flow, and its own log-density is known up to a constant: construct the "
            'DiffusionPrior with density="denoiser" if that is enough, as it is for moving x'
        )
    return (
        'this DiffusionPrior has density="none": it has a score but no log_prob. Sample it with infer.NoiseSpace '
        "(gradients through the flow), infer.DiffusionPCN or infer.DiffusionGibbs (the likelihood alone), "
        'infer.AnnealedLangevin or infer.ULA (the score, biased), or construct it with density="auto"'
    )


# Module-level and jitted, so that a model traced again (a second run, another chain) finds them compiled.
@partial(jax.jit, static_argnums=(3, 4))
def _draw(
    solver: Solver, denoiser: Denoiser, key: jax.Array, sample_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> jax.Array:
    def one(denoiser: Denoiser, key: jax.Array) -> jax.Array:
        return solve.sample(solver, denoiser, key, sample_shape)

    keys = jax.random.split(key, batch_shape) if batch_shape else key
    with _precision.highest():
        x = over_points(one, denoiser, len(batch_shape), batch_shape, keys)
    batch = range(len(batch_shape))
    return jnp.moveaxis(x, batch, [len(sample_shape) + i for i in batch])


@partial(jax.jit, static_argnums=3)
def _flow(solver: Solver | FlowMap, denoiser: Denoiser, z: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
    return _over_all(partial(solve.push_forward, solver), denoiser, z, batch_shape)


@partial(jax.jit, static_argnums=2)
def _own_log_density(denoiser: Denoiser, u: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
    return _over_all(density.clean_log_density, denoiser, u, batch_shape)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _log_density(
    solver: Heun, denoiser: Denoiser, u: jax.Array, batch_shape: tuple[int, ...], probes: int | None, gradient: Gradient
) -> jax.Array:
    key = None if probes is None else jax.random.key(0)
    log_prob = partial(density.log_prob, solver=solver, num_probes=probes, key=key, gradient=gradient)
    return _over_all(lambda denoiser, u: log_prob(denoiser, u).value, denoiser, u, batch_shape)


def _over_all(function: Callable, denoiser: Denoiser, x: jax.Array, batch_shape: tuple[int, ...]) -> jax.Array:
    """Maps a function of one point over all, in the precision of the model's own arithmetic."""
    x, event_shape = jnp.asarray(x, jnp.result_type(x, float)), tuple(denoiser.event_shape)
    shape = jnp.broadcast_shapes(x.shape[: x.ndim - len(event_shape)], batch_shape)
    with _precision.highest():
        return over_points(function, denoiser, len(batch_shape), shape, jnp.broadcast_to(x, (*shape, *event_shape)))
