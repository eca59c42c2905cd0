r"""A diffusion model as a NumPyro distribution.

`DiffusionPrior` wraps a denoiser and says three things about the law it stands for:

* `sample` draws from it by a stochastic solver;
* `flow` maps standard normal noise to it by a deterministic solver, $x = F(z)$, which is all that noise-space inference
  needs: no density, no inverse;
* `log_prob` is its log-density by the probability flow, with the score as gradient, or an error where the user has
  asked for none. It is never a stand-in: a constant with the right gradient makes a Metropolis test drop the prior.

A conditional denoiser stands for a family of laws, and `cond=` picks one, $p(x \mid c)$. The condition may be another
quantity of the model: `flow`, `log_prob` and `sample` all depend on it, and the first two are differentiable in it.

With a `transform` $T$ the diffusion lives on $u = T^{-1}(x)$, in its own unconstrained space, and
$\log p(x) = \log p_u(T^{-1}(x)) - \log |\det \partial T / \partial u|$.

The three laws agree up to the solvers' errors, not bit for bit. How a prior is conditioned on data is the matter of
`infer` and `reparam`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import sum_rightmost, validate_sample

from numpyro_diffusion import _checks, density, solve
from numpyro_diffusion.denoise import Conditioned, Denoiser, require_denoiser
from numpyro_diffusion.solve import DPMSolverPP, Heun, Solver


class DiffusionPrior(dist.Distribution):
    r"""A diffusion model as a distribution over points of the denoiser's `event_shape`.

    A registered pytree: its leaves are the denoiser's arrays (and the transform's, if it has any), so that a prior
    passed as a model argument brings new weights without a recompilation.

    Args:
        denoiser: the model, learned or exact.
        cond: what a conditional denoiser is conditioned on, one condition for all points drawn.
        transform: a bijection from the denoiser's space to the support, for constrained sites.
        sampler: a stochastic solver for `sample` and for the kernels that noise and denoise.
        flow_solver: a deterministic solver for `flow`.
        density: "ode" for the probability-flow density, "none" if no one must rely on a density.
        density_solver: the grid of that solve.
        validate_args: NumPyro's switch for checking values.

    Raises:
        TypeError: if `denoiser` is no denoiser, `transform` no NumPyro transform, or a solver of the wrong kind.
        ValueError: if `density` is unknown.

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

    arg_constraints = {}
    # One field on purpose: NumPyro gathers several through a set, whose order changes between processes.
    pytree_data_fields = ("_parts",)
    pytree_aux_fields = ("sampler", "flow_solver", "density", "density_solver")

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        cond: ArrayLike | None = None,
        transform: Transform | None = None,
        sampler: Solver = DPMSolverPP(64, eta=1.0),  # noqa: B008
        flow_solver: Solver = Heun(),  # noqa: B008
        density: Literal["ode", "none"] = "ode",
        density_solver: Heun = Heun(64),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        require_denoiser(denoiser)
        if transform is not None and not isinstance(transform, Transform):
            raise TypeError(f"transform must be a NumPyro Transform; got {type(transform).__name__}")
        if not (isinstance(sampler, Solver) and sampler.stochastic):
            raise TypeError(f"sampler must be a stochastic solver such as solve.DPMSolverPP(eta=1.0); got {sampler!r}")
        if not (isinstance(flow_solver, Solver) and not flow_solver.stochastic):
            raise TypeError(f"flow_solver must be a deterministic solver such as solve.Heun(); got {flow_solver!r}")
        if not isinstance(density_solver, Heun) or density_solver.stochastic:
            raise TypeError(f"density_solver must be solve.Heun with its grid; got {density_solver!r}")
        _checks.one_of("density", density, ("ode", "none"))
        denoiser = denoiser if cond is None else Conditioned(denoiser, cond)
        self._parts = (denoiser, transform)
        self.sampler = sampler
        self.flow_solver = flow_solver
        self.density = density
        self.density_solver = density_solver
        event_shape = tuple(denoiser.event_shape)
        if transform is not None:
            event_shape = tuple(transform.forward_shape(event_shape))
        super().__init__((), event_shape, validate_args=validate_args)

    @property
    def denoiser(self) -> Denoiser:
        """The model, on the unconstrained side of the transform."""
        return self._parts[0]

    @property
    def transform(self) -> Transform | None:
        """The bijection from the denoiser's space to the support, or None."""
        return self._parts[1]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise behind one point: the denoiser's `event_shape`."""
        return tuple(self.denoiser.event_shape)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        codomain = constraints.real if self.transform is None else self.transform.codomain
        return constraints.independent(codomain, self.event_dim - codomain.event_dim)

    def _constrain(self, u: jax.Array) -> jax.Array:
        return u if self.transform is None else self.transform(u)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws points by the stochastic solver.

        Args:
            key: random key.
            sample_shape: how many independent draws.

        Returns:
            Points of shape `sample_shape + event_shape`.
        """
        return self._constrain(_draw(self.sampler, self.denoiser, key, tuple(sample_shape)))

    def flow(self, z: jax.Array) -> jax.Array:
        """Maps standard normal noise to points by the deterministic solver.

        Args:
            z: noise of shape `(..., *noise_shape)`.

        Returns:
            Points of shape `(..., *event_shape)`, differentiable in `z`.

        Raises:
            ValueError: if `z` does not end with `noise_shape`.
        """
        _checks.shape("z", z, self.noise_shape)
        return self._constrain(_flow(self.flow_solver, self.denoiser, z))

    @validate_sample
    def log_prob(self, value: jax.Array, intermediates: Any = None) -> jax.Array:
        """The log-density in nats, of the batch shape of `value`; its gradient is the score.

        Raises:
            NotImplementedError: if the prior was made with `density="none"`.
            ValueError: if `value` does not end with `event_shape`.
        """
        _checks.shape("value", value, self.event_shape)
        if self.transform is None:
            return self._log_density(value)
        u = self.transform.inv(value)
        log_det = self.transform.log_abs_det_jacobian(u, value)
        log_det = sum_rightmost(log_det, jnp.ndim(log_det) - (jnp.ndim(value) - self.event_dim))
        return self._log_density(u) - log_det

    def _log_density(self, u: jax.Array) -> jax.Array:
        """The log-density in the denoiser's own space, for any number of points."""
        if self.density == "none":
            raise NotImplementedError(
                'this DiffusionPrior has density="none": it has a score but no log_prob. Sample it with '
                "infer.NoiseSpace (gradients through the flow), infer.DiffusionPCN or infer.DiffusionGibbs (the "
                "likelihood alone), infer.AnnealedLangevin or infer.ULA (the score, biased), or construct it with "
                'density="ode"'
            )
        return _log_prob(self.density_solver, self.denoiser, u)


def _over_batch(function: Callable[[jax.Array], jax.Array], x: jax.Array, event_dim: int) -> jax.Array:
    """Applies a function of one point over all leading dimensions."""
    for _ in range(jnp.ndim(x) - event_dim):
        function = jax.vmap(function)
    return function(x)


# Module-level and jitted, so that a model traced again (a second run, another chain) finds them compiled.
@partial(jax.jit, static_argnames="sample_shape")
def _draw(solver: Solver, denoiser: Denoiser, key: jax.Array, sample_shape: tuple[int, ...]) -> jax.Array:
    return solve.sample(solver, denoiser, key, sample_shape)


@jax.jit
def _flow(solver: Solver, denoiser: Denoiser, z: jax.Array) -> jax.Array:
    def one(z: jax.Array) -> jax.Array:
        return solve.solve(solver, denoiser, solve.terminal_point(denoiser, z))

    return _over_batch(one, z, len(denoiser.event_shape))


@jax.jit
def _log_prob(solver: Heun, denoiser: Denoiser, x: jax.Array) -> jax.Array:
    return _over_batch(lambda x: density.log_prob(denoiser, x, solver).value, x, len(denoiser.event_shape))
