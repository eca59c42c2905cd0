"""Parallel tempering: modes and their weights, the ladder, chains alone and together, and what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import known_noise, plain, run, standard
from moments import assert_moments
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS, BarkerMH, Gibbs

from numpyro_diffusion import NoiseReparam
from numpyro_diffusion.diagnostics import verdict
from numpyro_diffusion.infer import MALA, Cycle, DiffusionPCN, NoiseSpace, ParallelTempering
from numpyro_diffusion.infer.combine.ladder import ends_of_rounds, equal_rejection, first_ladder

FIELDS = ("ladder.temperatures", "kernel_states.step_size", "swap_rates", "round_trips", "log_evidence", "diverging")


def folded(y):
    """|x| is seen: two modes, 24 standard deviations apart, of which the one above 0 is three times as heavy."""
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    numpyro.factor("heavier", jnp.log(3.0) * (x > 0.0))
    numpyro.sample("y", dist.Normal(jnp.abs(x), 0.5), obs=y)


MEAN, VARIANCE = 6.0 * 100.0 / 100.25, 0.25 * 100.0 / 100.25
LOG_EVIDENCE = float(np.log(4.0) + dist.Normal(0.0, np.sqrt(100.25)).log_prob(6.0))


@pytest.fixture(scope="module")
def tempered():
    kernel = ParallelTempering(folded, MALA, num_temperatures=5)
    return run(kernel, 6.0, num_warmup=300, num_samples=1500, fields=FIELDS)


def test_modes_and_their_weights(tempered):
    x = tempered.get_samples(group_by_chain=True)["x"]
    above = np.asarray(x > 0.0, float)
    assert_moments(above, 0.75, 0.75 * 0.25)
    assert_moments(jnp.abs(x), MEAN, VARIANCE)
    trips = np.asarray(tempered.last_state.round_trips)
    assert (trips > 100).all() and (trips < 1500).all()


def test_few_round_trips_are_told(tempered):
    assert "from the prior to the posterior" not in str(verdict(tempered))
    few = run(ParallelTempering(folded, MALA, num_temperatures=5), 6.0, num_warmup=300, num_samples=10)
    told = next(each for each in verdict(few).problems if "from the prior to the posterior" in each)
    assert told.startswith(f"only {int(few.last_state.round_trips.sum())} points")


def test_evidence(tempered):
    """Eight chains' estimates, within 4 of their own standard errors."""
    estimates = np.asarray(tempered.last_state.log_evidence)
    assert abs(estimates.mean() - LOG_EVIDENCE) < 4.0 * estimates.std(ddof=1) / np.sqrt(8.0) < 0.2


def test_rungs_are_rejected_equally_and_stay(tempered):
    """One ladder for the chains that run together, equal rates on it; nothing adapts after warm-up."""
    fields = tempered.get_extra_fields(group_by_chain=True)
    temperatures, steps = np.asarray(fields["ladder.temperatures"]), np.asarray(fields["kernel_states.step_size"])
    assert (temperatures == temperatures[:1, :1]).all()
    assert (steps == steps[:, :1]).all() and np.ptp(steps[0, 0]) > 0.0
    rates = np.asarray(fields["swap_rates"][:, -1].mean(0))
    assert np.ptp(rates) < 0.1 and 0.4 < rates.min()
    assert not np.asarray(fields["diverging"]).any()


def test_a_ladder_that_is_not_to_adapt():
    ladder = np.float32([0.0, 0.2, 1.0])
    kernel = ParallelTempering(plain, MALA, temperatures=ladder, adapt_temperatures=False)
    mcmc = run(kernel, 3.0, num_warmup=20, num_samples=1)
    np.testing.assert_array_equal(mcmc.last_state.ladder.temperatures, np.broadcast_to(ladder, (8, 3)))


@pytest.mark.slow
def test_chains_alone_are_those_that_run_together():
    """After warm-up no chain knows of another: the same keys give the same steps."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = ParallelTempering(plain, MALA, temperatures=(0.0, 0.2, 1.0))

    def steps(keys):
        state = kernel.init(keys, 0, None, model_args=(3.0,), model_kwargs={})
        return jax.jit(lambda state: jax.lax.fori_loop(0, 7, lambda _, s: kernel.sample(s, (3.0,), {}), state))(state)

    together = steps(keys)
    alone = [steps(key) for key in keys]
    apart = jnp.stack([state.points["x"] for state in alone])
    np.testing.assert_allclose(together.points["x"], apart, rtol=1e-4, atol=1e-4)
    assert jnp.ptp(together.z["x"]) > 0.0


def test_equal_rejection():
    """Rungs that are rejected equally stay; others go where rejections are; first rungs are in equal ratios."""
    ladder = jnp.array([0.0, 0.01, 0.1, 1.0])
    np.testing.assert_allclose(equal_rejection(ladder, jnp.full(3, 0.6)), ladder, rtol=1e-5)
    moved = equal_rejection(ladder, jnp.array([0.1, 0.9, 0.9]))
    assert (np.diff(moved) > 0.0).all() and (moved[1:-1] < ladder[1:-1]).all()
    assert moved[0] == 0.0 and moved[-1] == 1.0
    np.testing.assert_allclose(first_ladder(4, jnp.array(100.0)), ladder, rtol=1e-5)
    assert ends_of_rounds(100).tolist() == [12, 25, 50] and not len(ends_of_rounds(0))


def flat(y):
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.slow
def test_a_prior_that_cannot_be_drawn():
    """The posterior of a flat prior is N(y, 1)."""
    mcmc = run(ParallelTempering(flat, MALA, temperatures=(0.1, 0.3, 1.0)), 3.0)
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"], 3.0, 1.0)


def shell(y, prior):
    """The square of a diffusion site is seen, so that its sign is not known: a mode each way."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0] ** 2, 0.5), obs=y)


def pcn_in_a_cycle(model):
    return Cycle([partial(ParallelTempering, kernel=DiffusionPCN, num_temperatures=4), MALA], model=model)


def nuts_in_noise_space(model):
    kernel = partial(NUTS, max_tree_depth=3, find_heuristic_step_size=True)
    return ParallelTempering(reparam(model, config={"x": NoiseReparam()}), kernel, num_temperatures=4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [pcn_in_a_cycle, nuts_in_noise_space])
def test_kernels_that_it_holds_and_that_hold_it(make):
    """Both signs of a diffusion site, and the law of its size by quadrature."""
    grid = np.linspace(0.0, 6.0, 6001)
    weight = np.exp(-0.5 * grid**2 - 2.0 * (4.0 - grid**2) ** 2)
    weight /= weight.sum()
    mean, square = (weight * grid).sum(), (weight * grid**2).sum()
    x = run(make(shell), 4.0, standard(), num_warmup=200).get_samples(group_by_chain=True)["x"][..., 0]
    assert_moments(jnp.abs(x), mean, square - mean**2)
    assert_moments(x, 0.0, square)


def discrete():
    numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=1.0)


def beside(value, y):
    numpyro.factor("y", value + 0.0 * numpyro.sample("x", dist.Normal(0.0, 1.0)))


MADE = {
    "one": (lambda: ParallelTempering(plain, num_temperatures=1), "num_temperatures must be at least 2; got 1"),
    "falling": (lambda: ParallelTempering(plain, temperatures=[0.0, 0.5, 0.3, 1.0]), "rise from 0 or above to 1"),
    "alone": (lambda: ParallelTempering(plain, temperatures=[1.0]), "at least two"),
    "barker": (lambda: ParallelTempering(plain, BarkerMH), "BarkerMH cannot be handed a point.*NUTS, HMC, MALA"),
    "noise": (lambda: ParallelTempering(known_noise, NoiseSpace), "NoiseSpace cannot be handed.*under NoiseReparam"),
}
STARTED = {
    "flat": (lambda: ParallelTempering(flat, MALA), (3.0,), "'x' cannot be drawn.*begin above 0.*geomspace"),
    "discrete": (lambda: ParallelTempering(discrete, MALA), (), r"sites \['k'\] are discrete"),
    "empty": (lambda: ParallelTempering(lambda: numpyro.factor("y", 0.0)), (), "needs a latent site"),
    "zero": (lambda: ParallelTempering(partial(beside, -jnp.inf), MALA), (0.0,), "zero, NaN or infinite at 8 of the 8"),
    "nan": (lambda: ParallelTempering(partial(beside, jnp.nan), MALA), (0.0,), "zero, NaN or infinite at 8 of the 8"),
    "inside": (
        lambda: NoiseSpace(known_noise, partial(ParallelTempering, kernel=MALA)),
        (jnp.ones(2), standard()),
        "cannot be a block or an inner kernel.*NoiseReparam",
    ),
}


@pytest.mark.parametrize(("make", "message"), MADE.values(), ids=MADE)
def test_refused_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("make", "args", "message"), STARTED.values(), ids=STARTED)
def test_refused_at_the_start(make, args, message):
    with pytest.raises(ValueError, match=message):
        make().init(jax.random.key(0), 0, None, model_args=args, model_kwargs={})


def test_no_block_of_another():
    def pair(y):
        s = numpyro.sample("s", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(s, 1.0)), 1.0), obs=y)

    kernel = Gibbs([(ParallelTempering(pair, MALA), ["x"]), (NUTS(pair), ["s"])])
    with pytest.raises(ValueError, match="cannot be a block or an inner kernel"):
        MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False).run(jax.random.key(0), 3.0)
