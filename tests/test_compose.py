"""Cycles and mixtures of kernels, and any kernel vectorized: laws in closed form, what they cost, and refusals."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import pair, run
from moments import assert_moments
from numpyro.diagnostics import gelman_rubin
from numpyro.infer import AIES, HMC, MCMC, NUTS, BarkerMH, Gibbs

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    Cycle,
    DiffusionGibbs,
    DiffusionKernel,
    DiffusionPCN,
    Mixture,
    NoiseSpace,
    Vectorize,
    with_density,
)
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

SLOW = pytest.mark.slow
LEAP = partial(HMC, num_steps=3, trajectory_length=None)


def cycle(model):
    return Cycle([LEAP, MALA], model=model)


def mixture(model):
    return Mixture([LEAP, MALA], [0.3, 0.7], model=model)


def nested(model):
    return Cycle([mixture, MALA], model=model)


@SLOW
@pytest.mark.parametrize("make", [cycle, mixture])
def test_no_kernel_adapts_after_warmup(make):
    """Each has made just the moves that it was told it would get, and its step size stands still."""
    steps = ["kernel_states.0.adapt_state.step_size", "kernel_states.1.adapt_state.step_size"]
    mcmc = run(make(pair), 3.0, num_warmup=101, num_samples=50, chains=2, fields=steps)
    extra = mcmc.get_extra_fields(group_by_chain=True)
    for step in steps:
        assert (extra[step] == extra[step][:, :1]).all()
    counts = make(pair)
    counts._num_warmup = 101
    assert counts._warmups() == ([101, 101] if make is cycle else [30, 71])


@pytest.mark.parametrize("make", [cycle, mixture])
def test_caches_belong_to_the_point(make):
    """What MALA holds when it has moved, accepted or not, is the density where the chain is."""
    kernel = make(pair)
    state = kernel.init(jax.random.split(jax.random.key(0), 400), 0, None, (3.0,), {})
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 5, lambda _, s: kernel.sample(s, (3.0,), {}), state))(state)
    x, s, normal = state.z["x"], state.z["s"], dist.Normal(0.0, 1.0)
    true = np.asarray(normal.log_prob(s) + normal.log_prob(x - s) + normal.log_prob(3.0 - x))
    moved = np.asarray(state.kernel_index) == 1 if make is mixture else np.ones(400, bool)
    cached = np.asarray(state.kernel_states[1].evaluation.log_density)
    assert moved.any()
    np.testing.assert_allclose(cached[moved], true[moved], rtol=1e-4)


@pytest.mark.parametrize("make", [Cycle, Mixture])
def test_a_point_from_outside(make):
    """A composite kernel moves the point and refreshes: steps far too long are rejected, at the new point's density."""
    kernel = make([MALA(pair, step_size=1e3, target_accept_prob=None)])
    step = jax.jit(lambda state: kernel.sample(state, (3.0,), {}))
    state = kernel.init(jax.random.key(0), 0, {"x": jnp.array(1.0), "s": jnp.array(0.0)}, (3.0,), {})
    state = step(state)._replace(z={"x": jnp.array(2.0), "s": jnp.array(1.0)})
    state = step(jax.jit(lambda state: kernel.refresh(state, (3.0,), {}))(state))
    assert state.z["x"] == 2.0 and state.kernel_index == 0
    cached = state.kernel_states[0].evaluation.log_density
    np.testing.assert_allclose(cached, 3.0 * dist.Normal().log_prob(1.0), rtol=1e-6)


class CountedState(NamedTuple):
    z: dict
    diverging: jax.Array
    rng_key: jax.Array


class Counted(DiffusionKernel):
    """Stays where it is and tells the host, once for each chain."""

    takes_point = True
    statistics = ()
    calls = 0

    def _start(self, key, init_params, reading):
        return CountedState(init_params, jnp.array(False), key)

    def _step(self, state, reading):
        jax.debug.callback(self._tell, state.z["x"])
        return state

    def _tell(self, x):
        Counted.calls += np.size(x)

    def refresh(self, state, model_args, model_kwargs):
        return state


@pytest.mark.slow
@pytest.mark.parametrize(("method", "runs_all"), [("vectorized", False), (jax.vmap, True)])
def test_cost_of_the_kernels_that_do_not_move(method, runs_all):
    """Chains run together share the index, so the other kernels do not run; under jax.vmap they all do."""
    Counted.calls, chains = 0, 3
    mcmc = run(Mixture([LEAP, Counted], [0.9, 0.1], model=pair), 3.0, num_samples=100, chains=chains, method=method)
    jax.effects_barrier()
    index = mcmc.get_extra_fields(group_by_chain=True)["kernel_index"]
    assert bool((index == index[:1]).all()) is not runs_all
    assert 0 < (index == 1).mean() < 0.3
    assert Counted.calls == (chains * 400 if runs_all else (index == 1).sum() + chains * 30)


MODES = jnp.array([[-6.0, 0.0], [6.0, 0.0]])


@with_density
def two_modes(y):
    """Modes twelve standard deviations apart, of weights .3 and .7 before the data."""
    prior = DiffusionPrior(GaussianMixture([0.3, 0.7], MODES, 1.0, VE(0.01, 80.0)), sampler=DPMSolverPP(24, eta=1.0))
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0], 8.0), obs=y)


SHALLOW = partial(NUTS, max_tree_depth=4)
START = {"init_params": {"x": jnp.tile(MODES, (4, 1))}}
EIGHT = {"num_chains": 8, "chain_method": "vectorized", "progress_bar": False}


@SLOW
def test_nuts_alone_stays_in_its_mode():
    mcmc = MCMC(SHALLOW(two_modes), num_warmup=200, num_samples=200, **EIGHT)
    mcmc.run(jax.random.key(0), -4.0, **START)
    assert gelman_rubin(np.asarray(mcmc.get_samples(group_by_chain=True)["x"]))[0] > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("within", [MALA, pytest.param(SHALLOW, marks=SLOW)])
def test_modes(within):
    """What NUTS alone cannot do: with moves of DiffusionPCN between, the modes have the posterior's weights."""
    evidence = np.array([0.3, 0.7]) * np.exp(-0.5 * (np.array([-6.0, 6.0]) + 4.0) ** 2 / 65.0)
    right = evidence[1] / evidence.sum()
    mcmc = MCMC(Mixture([within, DiffusionPCN], [0.5, 0.5], model=two_modes), num_warmup=200, num_samples=1000, **EIGHT)
    mcmc.run(jax.random.key(1), -4.0, **START)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    assert gelman_rubin(x).max() < 1.05
    assert_moments((x[..., 0] > 0).astype(float), right, right * (1 - right))
    for sign in (-1.0, 1.0):
        inside = x[np.sign(x[..., 0]) == sign]
        centre, variance = sign * 6.0 + (-4.0 - sign * 6.0) / 65.0, 1.0 - 1.0 / 65.0
        assert abs(inside[:, 0].mean() - centre) < 0.1 and abs(inside[:, 0].var() - variance) < 0.15


STANDARD = DiffusionPrior(Gaussian([0.0], 1.0, VE(0.01, 40.0)), sampler=DPMSolverPP(24, eta=1.0))


def shifted(y):
    """As `pair`, with x = s + u and u a diffusion site."""
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    u = numpyro.sample("u", STANDARD)
    numpyro.sample("y", dist.Normal(s + u[0], 1.0), obs=y)


def jump_and_walk(model):
    return Mixture([DiffusionPCN, MALA], [0.5, 0.5], model=model)


@SLOW
def test_in_diffusion_gibbs():
    samples = run(DiffusionGibbs(shifted, x_kernel=jump_and_walk), 3.0, num_samples=1500).get_samples(True)
    assert_moments(samples["u"][..., 0], 1.0, 2.0 / 3.0)
    assert_moments(samples["s"], 1.0, 2.0 / 3.0)


@SLOW
def test_in_noise_space():
    """As the inner kernel: both move the noise of u and the other site."""
    samples = run(NoiseSpace(shifted, inner=cycle), 3.0).get_samples(group_by_chain=True)
    assert_moments(samples["u"][..., 0], 1.0, 2.0 / 3.0)
    assert_moments(samples["s"], 1.0, 2.0 / 3.0)


def nuts_and_pcn(model):
    return Mixture([NUTS, DiffusionPCN], model=model)


def both(y):
    pair(y)
    numpyro.sample("u", STANDARD)


def normal(x):
    return 0.5 * x**2


REFUSED = {
    "none": (lambda: Cycle([]), ValueError, "Cycle needs at least one kernel; got none"),
    "no_kernel": (lambda: Cycle([3], model=pair), TypeError, "Cycle takes kernels, or model= .*; got 3"),
    "no_model": (lambda: Cycle([MALA]), TypeError, "and no model"),
    "no_factory": (
        lambda: Mixture([lambda m: m], model=pair),
        TypeError,
        "must make an MCMCKernel",
    ),
    "models": (lambda: Cycle([MALA(pair), LEAP(both)]), ValueError, "one and the same model object"),
    "noise_space": (
        lambda: Cycle([NoiseSpace], model=shifted),
        ValueError,
        "NoiseSpace cannot be handed a point",
    ),
    "gibbs": (lambda: Mixture([DiffusionGibbs], model=shifted), ValueError, "DiffusionGibbs cannot be handed a point"),
    "numpyros_gibbs": (lambda: Cycle([Gibbs([(LEAP(pair), None)])]), ValueError, "Gibbs cannot be handed a point"),
    "barker": (lambda: Cycle([BarkerMH], model=pair), ValueError, "BarkerMH cannot be handed a point"),
    "potential": (lambda: Cycle([NUTS(potential_fn=normal)]), ValueError, "got NUTS on a potential function"),
    "sum": (
        lambda: Mixture([MALA, LEAP], [0.5, 0.6], pair),
        ValueError,
        r"got \[0.5, 0.6\], of sum 1.1",
    ),
    "negative": (lambda: Mixture([MALA, LEAP], [-0.5, 1.5], pair), ValueError, "probabilities must be positive"),
    "nan": (lambda: Mixture([MALA, LEAP], [np.nan, 1.0], pair), ValueError, "probabilities must be positive"),
    "length": (lambda: Mixture([MALA, LEAP], [1.0], pair), ValueError, r"each of the 2 kernels; got shape \(1,\)"),
    "vectorize": (lambda: Vectorize(3), TypeError, "kernel must be an MCMCKernel .*; got 3"),
    "ensemble": (lambda: Vectorize(AIES(pair)), ValueError, "AIES moves an ensemble of chains"),
    "vectorize_potential": (lambda: Vectorize(NUTS(potential_fn=normal)), ValueError, "NUTS on a potential function"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Part(Counted):
    """Moves some of the sites only."""

    def _start(self, key, init_params, reading):
        return CountedState({"x": jnp.zeros(())}, jnp.array(False), key)


REFUSED_MODELS = {
    "dropped_prior": (DiffusionGibbs(shifted, x_kernel=nuts_and_pcn), r"priors of sites \['u'\] are dropped .* NUTS"),
    "other_sites": (Cycle([DiffusionPCN, MALA], model=shifted), r"latent sites \['s'\]. Use DiffusionGibbs"),
    "different_sites": (Cycle([LEAP, Part], model=pair), r"Part moves \['x'\], those before it \['s', 'x'\]"),
    "vectorized_check": (Vectorize(DiffusionPCN(pair)), "it has no DiffusionPrior site"),
}


@pytest.mark.parametrize(("kernel", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_refused_models(kernel, message):
    with pytest.raises(ValueError, match=message):
        run(kernel, 3.0, num_warmup=2, num_samples=2, chains=2)


def far_off(y):
    numpyro.factor("near", jnp.where(numpyro.sample("x", dist.Normal(0.0, 1.0)) < 100.0, 0.0, -jnp.inf))


@pytest.mark.parametrize("kernel", [Cycle([MALA], model=far_off), Vectorize(MALA(far_off))])
def test_a_start_that_is_not_finite(kernel):
    """The kernels' own checks are made."""
    options = {"num_chains": 2, "chain_method": "vectorized", "progress_bar": False}
    with pytest.raises(ValueError, match="not finite at the start of . of . chains"):
        MCMC(kernel, num_warmup=1, num_samples=1, **options).run(
            jax.random.key(0), 3.0, init_params={"x": jnp.full(2, 200.0)}
        )


def test_status():
    """A composition is as exact as the worst of its parts, and one that does not say is not."""
    status = nested(pair).status
    assert status.exact and "MALA" in status.statement and "density" in status.needs
    assert not Mixture([MALA(pair), Counted(pair)]).status.exact
    assert Vectorize(LEAP(pair)).status.exact
    assert [type(k).__name__ for k in cycle(pair).kernels] == ["HMC", "MALA"]
    assert isinstance(Vectorize(MALA(pair)).kernel, MALA)
