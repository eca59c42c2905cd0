r"""Preconditioned Crank-Nicolson about N(0, I), with or without the gradient: pCNL and pCN.

A target is written as $\pi(z) \propto N(z; 0, I)\, L(z)$ (`reference`). A step of size $\delta$ of the Crank-Nicolson
scheme for the Langevin equation of $\pi$, implicit in its linear part alone, is a rotation by an angle with
$\cos\theta = (2 - \delta) / (2 + \delta)$ about $g(z) = \nabla \log L(z)$:

$$z' = g + \cos\theta\, (z - g) + \sin\theta\, \xi, \qquad \xi \sim N(0, I).$$

Without the gradient, $g = 0$, it keeps N(0, I), and is accepted by the ratio of the likelihoods alone. With it, the
proposal's density beside that of the rotation is that of a shift by $m(z) = (1 - \cos\theta)\, g(z)$,

$$\log t(z, z') = \frac{\langle z' - \cos\theta\, z,\; m(z) \rangle - |m(z)|^2 / 2}{\sin^2\theta}, \qquad
a = \min\left(1, \frac{L(z')\, t(z', z)}{L(z)\, t(z, z')}\right).$$

Nothing in either ratio grows with the dimension. At $\delta = 2$ the point is forgotten in one step; larger steps would
only reflect it. Warm-up steers $\delta$ to an acceptance of .574 with the gradient, of .234 without it.

`DiffusionPCN` is the same move in the space of $x$: its rotation is to noise the point and to denoise it. This one
rotates the noise behind it: `NoiseSpace(model, CrankNicolson)`.

References:
    Cotter, Roberts, Stuart, White, MCMC methods for functions, 2013 (pCN and pCNL), https://arxiv.org/abs/1202.0709.
    Hairer, Stuart, Vollmer, Spectral gaps for a Metropolis-Hastings algorithm in infinite dimensions, 2014 (a gap that
    does not close as the dimension grows), https://arxiv.org/abs/1112.1392.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_diffusion.infer.kernel.adapt import Adaptation
from numpyro_diffusion.infer.kernel.choose import all_finite, metropolis
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.noise.reference import Point, ReferenceKernel

_LARGEST_STEP = 2.0


class CrankNicolsonState(NamedTuple):
    """State of `CrankNicolson`.

    Args:
        i: number of steps done.
        z: unconstrained values by site.
        potential_energy: negative log-density of the model there.
        gradient: of the log-likelihood, the density beside N(0, I), as a vector; None without `gradient`.
        adapt_state: state of the step size's adaptation.
        accept_prob: acceptance probability of the last step.
        step_size: the step of the next proposal.
        diverging: whether the density or the gradient was not finite at the proposal, which was rejected.
        rng_key: random key.
    """

    i: jax.Array
    z: Point
    potential_energy: jax.Array
    gradient: jax.Array | None
    adapt_state: Any
    accept_prob: jax.Array
    step_size: jax.Array
    diverging: jax.Array
    rng_key: jax.Array


class CrankNicolson(ReferenceKernel[CrankNicolsonState]):
    """Preconditioned Crank-Nicolson (pCN, pCNL) about N(0, I): for noise space, or models near that law.

    Args:
        model: NumPyro model without diffusion sites; for one with them take `NoiseSpace(model, CrankNicolson)`.
        gradient: whether proposals follow the gradient of the likelihood (pCNL) or not (pCN).
        step_size: where the step starts, in (0, 2]; 2 proposes independently of the point.
        target_accept_prob: acceptance to which it adapts in warm-up, in (0, 1); "auto" is .574 with the gradient and
            .234 without it; None keeps `step_size`.
        init_strategy: where chains start, as in NumPyro; None starts uniformly on (-2, 2), as NumPyro does.

    Raises:
        TypeError: if `model` is not callable.
        ValueError: if a number is out of its range; when run, for a model with diffusion sites, with discrete sites, or
            without latent sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.distributions import DiffusionPrior
        >>> from numpyro_diffusion.infer import CrankNicolson, NoiseSpace
        >>> def model(y):
        ...     x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0])))
        ...     numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)
        >>> mcmc = MCMC(NoiseSpace(model, CrankNicolson), num_warmup=200, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bool(abs(mcmc.get_samples()["x"].mean() - 1.5) < 0.3)
        True
    """

    statistics = ("accept_prob", "potential_energy", "step_size")
    reversible = True

    def __init__(
        self,
        model: Model,
        *,
        gradient: bool = True,
        step_size: float = 0.5,
        target_accept_prob: float | str | None = "auto",
        init_strategy: Strategy | None = None,
    ) -> None:
        super().__init__(model, init_strategy)
        if not 0.0 < step_size <= _LARGEST_STEP:
            raise ValueError(f"step_size must lie in (0, 2], where 2 forgets the point; got {step_size}")
        if isinstance(target_accept_prob, str):
            if target_accept_prob != "auto":
                raise ValueError(f'target_accept_prob must be a number, None or "auto"; got {target_accept_prob!r}')
            target_accept_prob = 0.574 if gradient else 0.234
        self._gradient = gradient
        self._adaptation = Adaptation(False, False, step_size, target_accept_prob)

    def _evaluate(self, reading: Reading, z: Point) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Log-likelihood and log-density at a point, and the gradient of the former as a vector if it is used."""
        q, unflatten = ravel_pytree(z)

        def value(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._log_likelihood(reading, unflatten, q)

        if not self._gradient:
            return *value(q), None
        (log_likelihood, log_density), gradient = jax.value_and_grad(value, has_aux=True)(q)
        return log_likelihood, log_density, gradient

    def _is_valid(self, reading: Reading, z: Point) -> jax.Array:
        return all_finite(self._evaluate(reading, z))

    def _start(self, key: jax.Array, init_params: dict | None, reading: Reading) -> CrankNicolsonState:
        key, key_start, key_adapt = jax.random.split(key, 3)
        z = self._first(key_start, init_params, reading)
        _, log_density, gradient = self._evaluate(reading, z)
        q, _ = ravel_pytree(z)
        adapt_state = self._adaptation.start(self._num_warmup, q, key_adapt)
        one = jnp.ones_like(log_density)
        return CrankNicolsonState(
            i=jnp.zeros((), jnp.int32),
            z=z,
            potential_energy=-log_density,
            gradient=gradient,
            adapt_state=adapt_state,
            accept_prob=one,
            step_size=adapt_state.step_size,
            diverging=jnp.array(False),
            rng_key=key,
        )

    def _step(self, state: CrankNicolsonState, reading: Reading) -> CrankNicolsonState:
        key, key_noise, key_accept = jax.random.split(state.rng_key, 3)
        q, unflatten = ravel_pytree(state.z)
        step_size = state.adapt_state.step_size.astype(q.dtype)
        cos, sin = (2.0 - step_size) / (2.0 + step_size), jnp.sqrt(8.0 * step_size) / (2.0 + step_size)

        def shift(gradient: jax.Array | None) -> jax.Array:
            return jnp.zeros_like(q) if gradient is None else (1.0 - cos) * gradient

        def log_tilt(q: jax.Array, q_new: jax.Array, gradient: jax.Array | None) -> jax.Array:
            """Log-density of proposing `q_new` from `q` beside that of a rotation."""
            m = shift(gradient)
            return (jnp.sum((q_new - cos * q) * m) - 0.5 * jnp.sum(m**2)) / sin**2

        q_new = cos * q + shift(state.gradient) + sin * jax.random.normal(key_noise, q.shape, q.dtype)
        log_likelihood, log_density, gradient = self._evaluate(reading, unflatten(q_new))
        here = 0.5 * jnp.sum(q**2) - state.potential_energy.astype(q.dtype)
        log_ratio = log_likelihood - here
        log_ratio += log_tilt(q_new, q, gradient) - log_tilt(q, q_new, state.gradient)
        new, old = (q_new, -log_density, gradient), (q, state.potential_energy, state.gradient)
        choice = metropolis(key_accept, log_ratio, new, old, log_density, gradient)
        q, potential_energy, gradient = choice.point
        adapt_state = self._adaptation.update(state.adapt_state, state.i, self._num_warmup, choice.accept_prob, q)
        adapt_state = adapt_state._replace(step_size=jnp.minimum(adapt_state.step_size, _LARGEST_STEP))
        return CrankNicolsonState(
            i=state.i + 1,
            z=unflatten(q),
            potential_energy=potential_energy,
            gradient=gradient,
            adapt_state=adapt_state,
            accept_prob=choice.accept_prob.astype(state.accept_prob.dtype),
            step_size=adapt_state.step_size,
            diverging=choice.diverging,
            rng_key=key,
        )

    def refresh(self, state: CrankNicolsonState, model_args: tuple, model_kwargs: dict | None) -> CrankNicolsonState:
        """Evaluates the model anew after a composite kernel has moved what it is conditioned on."""
        _, log_density, gradient = self._evaluate(self.read(model_args, model_kwargs), state.z)
        return state._replace(potential_energy=-log_density, gradient=gradient)

    def get_diagnostics_str(self, state: CrankNicolsonState) -> str:
        """For the progress bar."""
        return f"step {state.step_size:.2g}, accepted {state.accept_prob:.2g}"
