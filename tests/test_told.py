"""A condition held by a denoiser reaches it through solvers and densities: told a mean is as good as knowing it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_diffusion.denoise import Conditioned, Gaussian, NetworkDenoiser, covariance, reschedule
from numpyro_diffusion.density import elbo, elbo_gap, importance_weighted_bound, learn_variances, log_prob
from numpyro_diffusion.nn import Condition
from numpyro_diffusion.noise import VE, VP, Schedule
from numpyro_diffusion.solve import (
    AdaptiveFlow,
    DPMSolverPP,
    Heun,
    PredictorCorrector,
    sample,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Told:
    """N(mean, 1) in two dimensions, its mean known or told by the condition; without either there is no answer."""

    mean: jax.Array | None
    schedule: Schedule = VE(0.05, 20.0)

    event_shape, location, scale = (2,), 0.0, 1.0

    def __call__(self, x_t, t, cond=None):
        assert (cond is None) != (self.mean is None), "the condition was lost"
        return Gaussian(cond if self.mean is None else self.mean, 1.0, self.schedule)(x_t, t)


def given(denoiser, cond):
    return denoiser if cond is None else Conditioned(denoiser, cond)


COND, X, KEY = jnp.array([1.5, -0.5]), jnp.array([0.3, 0.7]), jax.random.key(0)
USES = {
    "sample": lambda d, c: sample(PredictorCorrector(DPMSolverPP(4, eta=1.0)), given(d, c), KEY, (3,)),
    "log_prob": lambda d, c: log_prob(given(d, c), X, Heun(4))[:2],
    "log_prob, probes": lambda d, c: log_prob(given(d, c), X, Heun(4), key=KEY, num_probes=2)[:2],
    "log_prob, adaptive": lambda d, c: log_prob(given(d, c), X, AdaptiveFlow(1e-2, 1e-2))[:2],
    "elbo": lambda d, c: elbo(given(d, c), X, KEY, num_times=4),
    "stepwise elbo": lambda d, c: elbo(given(d, c), X, KEY, num_times=4, transition="beta"),
    "weighted": lambda d, c: importance_weighted_bound(given(d, c), X, KEY, num_times=4),
    "gap": lambda d, c: elbo_gap(given(d, c), X, KEY, solver=Heun(4), num_times=4),
    "variances": lambda d, c: learn_variances(
        d, jnp.stack([X, -X]), KEY, num_times=4, cond=None if c is None else jnp.stack([c, c])
    ),
    "covariance": lambda d, c: covariance(d if c is None else Conditioned(d, c), X, 0.5).dense(),
    "reschedule": lambda d, c: reschedule(d, VP())(X, 0.5, c).x0,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_told_is_as_good_as_known(use):
    told, known = (jax.jit(use)(Told(m), c) for m, c in ((None, COND), (COND, None)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), told, known)


class Switched(nnx.Module):
    """A network of one number that answers by its condition, or by what stands for an absent one."""

    def __init__(self):
        self.event_shape, self.gain = (2,), nnx.Param(jnp.float32(0.3))

    def __call__(self, x, c_noise, cond=None):
        if isinstance(cond, Condition):
            cond = jnp.where(cond.present, cond.value, -1.0)
        return self.gain[...] * jnp.tanh(x + cond)


def test_a_condition_with_a_switch_in_a_density():
    """The density under a present condition and its gradient are those under its array; an absent one has none."""
    denoiser = NetworkDenoiser(Switched())

    @jax.jit
    def both(c, on):
        density = lambda cond: log_prob(Conditioned(denoiser, cond), X, Heun(2)).value  # noqa: E731
        return [jax.value_and_grad(f)(c) for f in (density, lambda c: density(Condition(c, on)))]

    (value, slope), (switched, switched_slope) = both(COND, jnp.asarray(True))
    np.testing.assert_allclose(switched, value, rtol=1e-5)
    np.testing.assert_allclose(switched_slope, slope, rtol=1e-4, atol=1e-5)
    assert (np.abs(slope) > 1e-4).all()
    _, (absent, absent_slope) = both(COND, jnp.asarray(False))
    assert abs(absent - value) > 1e-3 and (absent_slope == 0).all()
