"""Moves by a surrogate, confirmed by the model: what is counted, what it accepts, and what is refused.

The law is in `test_kernel_laws.py`, the ways to run in `test_kernels.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.infer import HMC, MCMC, NUTS, BarkerMH
from scipy.special import erfc

from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, CrankNicolson, Cycle, DelayedAcceptance, EllipticalSlice, with_flow
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, FlowMap, StochasticHeun

LEAP = partial(HMC, trajectory_length=1.5, step_size=0.5, adapt_step_size=False, adapt_mass_matrix=False)


def at(shift):
    x = numpyro.sample("x", dist.Normal(shift, 1.0))
    numpyro.deterministic("twice", 2.0 * x)


def shifted(shift):
    numpyro.sample("x", dist.Normal(shift + 1.0, 1.0))


def seen(y, prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


def run(kernel, *args, num_samples=60, num_chains=200, num_warmup=0):
    options = {"num_chains": num_chains, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, **options)
    mcmc.run(jax.random.key(0), *args)
    fields = {name: np.asarray(v) for name, v in mcmc.get_extra_fields(group_by_chain=True).items()}
    return mcmc.get_samples(group_by_chain=True), fields


def test_acceptance_is_that_of_independent_ends():
    """Surrogate N(1, 1) of N(0, 1): the log-ratio has deviation 1, so that distant ends are accepted with erfc(1/2)."""
    draws, fields = run(DelayedAcceptance(at, shifted, LEAP, num_moves=8), 0.0)
    later = fields["accept_prob"][:, 10:]
    error = later.mean(1).std(ddof=1) / np.sqrt(len(later))
    assert error < 0.01 and abs(later.mean() - erfc(0.5)) < 4.0 * error
    np.testing.assert_allclose(draws["twice"], 2.0 * draws["x"], rtol=1e-6)
    assert (fields["num_likelihood_evals"] == 1).all() and (fields["num_score_evals"] == 0).all()
    np.testing.assert_array_equal(fields["num_surrogate_evals"], fields["num_steps"] + 2)
    assert (fields["num_steps"] == 8 * 3).all() and not fields["diverging"].any()


def test_nothing_is_evaluated_where_the_screen_rejects():
    """One move of pCN: the model is asked only where that was accepted, and a perfect surrogate is always confirmed."""
    screen = partial(CrankNicolson, gradient=False, step_size=1.9, target_accept_prob=None)
    draws, fields = run(DelayedAcceptance(at, at, screen), 2.0, num_chains=20)
    moved = np.diff(np.asarray(draws["x"]), axis=1) != 0.0
    np.testing.assert_array_equal(fields["num_likelihood_evals"][:, 1:], moved)
    assert 0.2 < moved.mean() < 0.9
    np.testing.assert_allclose(fields["accept_prob"], 1.0, atol=1e-5)


PRIOR = DiffusionPrior(Gaussian([0.5], 2.25, VE(0.02, 40.0)), flow_solver=DPMSolverPP(10))


@pytest.mark.slow
def test_a_flow_as_a_surrogate_counts_its_own_evaluations():
    """A step takes ten evaluations of the model's own flow, and two of a map for each evaluation of the surrogate."""
    network = NetworkDenoiser(MLP((1,), features=8, rngs=nnx.Rngs(0)), location=[0.5], scale=1.5)
    kernel = DelayedAcceptance(seen, FlowMap(network, (1.0,)), LEAP)
    _, fields = run(kernel, 1.0, PRIOR, num_samples=4, num_chains=2)
    evaluations = 10 * fields["num_likelihood_evals"] + 2 * fields["num_surrogate_evals"]
    np.testing.assert_array_equal(fields["num_score_evals"], evaluations)


def test_with_flow_changes_the_flow_alone():
    """In plates too; draws stay what they were."""

    def in_plate():
        with numpyro.plate("rows", 3):
            numpyro.sample("x", PRIOR)

    def flows(model):
        sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
        return sites["x"]["fn"].base_dist.flow_solver, sites["x"]["value"]

    (before, x), (after, same) = flows(in_plate), flows(with_flow(in_plate, Ancestral(3, eta=0.0)))
    assert (before, after) == (DPMSolverPP(10), Ancestral(3, eta=0.0))
    np.testing.assert_array_equal(x, same)
    assert PRIOR.flow_solver == DPMSolverPP(10)


@pytest.mark.slow
def test_warm_up_adapts_to_the_surrogate_and_then_rests():
    kernel = DelayedAcceptance(at, shifted, NUTS, num_moves=3)
    _, fields = run(kernel, 0.0, num_samples=20, num_chains=4, num_warmup=30)
    assert (fields["step_size"] == fields["step_size"][:1, :1]).all() and fields["step_size"][0, 0] != 1.0
    assert 0.5 < fields["screen_accept_prob"].mean() < 1.0


def other_site(shift):
    numpyro.sample("u", dist.Normal(shift, 1.0))


def discrete(shift):
    numpyro.sample("x", dist.Bernoulli(0.5))


def random(shift):
    numpyro.sample("x", dist.Normal(jax.random.normal(numpyro.prng_key()), 1.0))


def nowhere(shift):
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("never", -jnp.inf)


def cycle(model):
    return Cycle([LEAP, LEAP], model=model)


REFUSED = [
    (lambda: DelayedAcceptance(at, 3), TypeError, "surrogate must be a NumPyro model"),
    (lambda: DelayedAcceptance(at, StochasticHeun()), TypeError, "surrogate must be a deterministic solver"),
    (lambda: DelayedAcceptance(3, at), TypeError, "model must be a NumPyro model"),
    (lambda: DelayedAcceptance(at, at, num_moves=0), ValueError, "num_moves must be at least 1"),
    (lambda: DelayedAcceptance(at, at, BarkerMH), ValueError, "inner must be a reversible kernel"),
    (lambda: DelayedAcceptance(at, at, cycle), ValueError, "inner must be a reversible kernel"),
    (lambda: run(DelayedAcceptance(at, other_site), 0.0), ValueError, "surrogate must have the sites of the model"),
    (lambda: run(DelayedAcceptance(at, discrete), 0.0), ValueError, "discrete"),
    (lambda: run(DelayedAcceptance(at, random), 0.0), ValueError, "fixed function of its sites"),
    (lambda: run(DelayedAcceptance(nowhere, at), 0.0, num_chains=2), ValueError, "not finite at the start of 2 of 2"),
    (lambda: DelayedAcceptance(at, at, ULA), ValueError, "inner must be a reversible kernel"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("inner", [NUTS, HMC, MALA, CrankNicolson, EllipticalSlice])
def test_reversible_kernels_are_taken(inner):
    DelayedAcceptance(at, at, inner)
