"""Ranks of simulated truths: samplers that are exact, wrong by a known amount, correlated, or that fail.

The sampler is a kernel that draws from the exact posterior of a normal model, so that nothing here depends on mixing.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key
from scipy.stats import kstest

from numpyro_diffusion.diagnostics import (
    coverage,
    ecdf_bands,
    simulations_needed,
    spread_skill,
    uniformity_p_value,
)
from numpyro_diffusion.infer import MALA, SBC

DIMENSION = 4
SIZES = {"num_warmup": 0, "num_samples": 40, "num_chains": 2}


def model(y, scale=1.0):
    """Posterior N(y / 2, 1/2)."""
    x = numpyro.sample("x", dist.Normal(0.0, scale).expand([DIMENSION]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


class State(NamedTuple):
    z: dict
    rng_key: jax.Array


class Exact(MCMCKernel):
    """Draws of N(y / 2 + shift sd, inflation / 2), with a given correlation from draw to draw."""

    sample_field = "z"

    def __init__(self, model, shift=0.0, inflation=1.0, correlation=0.0, blind=False, broken=None):
        self.model, self.shift, self.inflation, self.broken = model, shift, inflation, broken
        self.correlation, self.blind = correlation, blind

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        start = lambda key: State({"x": self._draw(key, model_args[0])}, key)  # noqa: E731
        return start(rng_key) if is_prng_key(rng_key) else jax.vmap(start)(rng_key)

    def _moments(self, y):
        mean = jnp.zeros(DIMENSION) if self.blind else 0.5 * y
        deviation = jnp.sqrt(1.0 if self.blind else 0.5)
        return mean + self.shift * deviation, deviation * jnp.sqrt(self.inflation)

    def _draw(self, key, y):
        mean, deviation = self._moments(y)
        return mean + deviation * jax.random.normal(key, (DIMENSION,))

    def sample(self, state, model_args, model_kwargs):
        def step(state):
            key, key_draw = jax.random.split(state.rng_key)
            y = model_args[0]
            mean, _ = self._moments(y)
            fresh, rho = self._draw(key_draw, y), self.correlation
            x = mean + rho * (state.z["x"] - mean) + jnp.sqrt(1.0 - rho**2) * (fresh - mean)
            if self.broken == "nan":  # for one datum in six
                x = jnp.where(y[0] > 1.4, jnp.nan, x)
            if self.broken == "frozen":
                x = jnp.where(y[0] > 1.4, state.z["x"], x)
            return State({"x": x}, key)

        return step(state) if is_prng_key(state.rng_key) else jax.vmap(step)(state)


def run(seed=0, sampler=Exact, posterior=model, size=600, args=(None,), **options):
    return SBC(sampler, posterior, num_simulations=size, **{**SIZES, **options}).run(jax.random.key(seed), *args)


@pytest.fixture(scope="module")
def exact():
    energy = {"energy": lambda values, data: jnp.sum((values["x"] - data["y"]) ** 2)}
    return run(size=1000, log_joint=True, quantities=energy)


def test_probability_of_staying_inside_is_exact():
    """Against all ways in which four levels fall into four cells, and p-values of uniform levels are uniform."""
    cells = np.array(list(itertools.product(range(4), repeat=4)))
    counts = np.stack([(cells < k).sum(1) for k in (1, 2, 3)], 1)
    for lower, upper in (((0, 1, 1), (2, 3, 4)), ((1, 1, 2), (3, 3, 4))):
        inside = np.all((counts >= lower) & (counts <= upper), 1).mean()
        assert np.isclose(coverage._probability(4, np.array(lower), np.array(upper)), inside, atol=1e-12)
    levels = np.random.default_rng(0).uniform(size=(80, 400))
    p_values = uniformity_p_value(levels)
    assert kstest(p_values, "uniform").pvalue > 1e-3
    bands = ecdf_bands(80, 0.9)
    function = (levels[None] <= bands.points[:, None, None]).mean(1)
    inside = np.all((function >= bands.lower[:, None]) & (function <= bands.upper[:, None]), 0).mean()
    assert abs(inside - 0.9) < 4 * np.sqrt(0.09 / 400) + 0.02  # the bands are discrete, on the safe side
    assert uniformity_p_value(levels[:, 0] ** 2) < 1e-6


def test_exact_sampler(exact):
    """All that is reported is right within four standard errors."""
    assert exact.calibrated and exact.p_value > 0.01, str(exact)
    assert set(exact.ranks) == {"x", "log_likelihood", "log_joint", "energy"} and exact.ranks["x"].shape == (1000, 4)
    assert exact.ranks["x"].max() == exact.num_ranks
    for probability in (0.5, 0.9):
        found = [*exact.coverage(probability).values(), exact.expected_coverage(probability)]
        for value, error in (*found, exact.highest_density_coverage(probability)):
            assert np.all(np.abs(value - probability) < 4.0 * error)
    value, error = exact.spread_skill()["x"]
    assert np.all(np.abs(value - 1.0) < 4.0 * error) and np.all(error < 0.03)
    assert "calibrated" in str(exact) and "19 times in 20" in str(exact)


WRONG = {
    "shift": (partial(Exact, shift=0.2), {("x", "shift")}, 0.2),
    "spread": (partial(Exact, inflation=1.3), {("x", "spread")}, 1.3),
    "narrow": (partial(Exact, inflation=0.7), {("x", "spread")}, 0.7),
    "blind": (partial(Exact, blind=True), {("log_likelihood", "shift")}, None),
}


@pytest.mark.parametrize(("sampler", "tests", "estimate"), WRONG.values(), ids=WRONG)
def test_wrong_by_a_known_amount(sampler, tests, estimate):
    """Caught, named and measured: 4 standard errors, of a mean the largest of four. The prior itself has uniform x."""
    result = run(sampler=sampler)
    assert result.miscalibrated and "NOT CALIBRATED" in str(result)
    found = {(t.name.split("[")[0], t.kind): t for t in result.tests if t.p_value * len(result.tests) < 0.01}
    assert tests <= set(found)
    if estimate is None:
        assert not any(name == "x" for name, _ in found)
    else:
        error = 1.0 / np.sqrt(600) if estimate == 0.2 else estimate * np.sqrt(2.0 / (600 * DIMENSION))
        assert abs(found[next(iter(tests))].estimate - estimate) < 4.0 * error


def test_correlated_draws_are_thinned():
    """A chain of correlation .9 has ranks among a twentieth of its draws, and is calibrated."""
    result = run(sampler=partial(Exact, correlation=0.9), num_samples=800)
    assert 20 <= result.num_ranks <= 60 and result.p_value > 0.01, str(result)


@pytest.mark.parametrize(("broken", "reason"), [("nan", "not finite"), ("frozen", "did not move")])
def test_failures_are_counted_and_named(broken, reason):
    result = run(sampler=partial(Exact, broken=broken), size=120)
    (said, where), *rest = result.failures.items()
    assert reason in said and not rest and 5 < len(where) < 40
    assert len(result.tarp) == 120 - len(where) and not result.calibrated
    assert f"failed in {len(where)} of 120 simulations ({where[0]}, " in str(result)


class Posterior:
    """A sampler with a run of its own, which refuses some data, and warns of others."""

    def __init__(self, model, refused=np.inf):
        self.refused, self.problems = refused, ()

    def run(self, rng_key, y):
        if y[0] > self.refused:
            raise ValueError("all weights are zero")
        self.problems = ("a lag of 0.3 nats",) if y[0] < -1.5 else ()
        self.draws = 0.5 * y + np.sqrt(0.5) * jax.random.normal(rng_key, (60, DIMENSION))

    def get_samples(self):
        return {"x": self.draws}


def test_samplers_with_a_run_of_their_own():
    result = run(sampler=Posterior, size=150)
    assert result.p_value > 0.01 and np.all(np.isnan(result.r_hat)) and not result.failures
    assert result.warnings.keys() == {"a lag of .. nats"} and not result.calibrated
    refused = run(sampler=partial(Posterior, refused=1.4), size=60)
    assert refused.failures.keys() == {"ValueError: all weights are zero"} and "too few simulations" in str(refused)
    assert len(refused.tarp) == 60 - len(refused.failures["ValueError: all weights are zero"])
    with pytest.raises(ValueError, match="failed in all 3 simulations"):
        run(sampler=partial(Posterior, refused=-np.inf), size=3)


def test_batches_simulator_and_names_of_data():
    """Batches change nothing; a simulator with another prior is seen; data may have an argument of another name."""

    def renamed(observations, scale=1.0):
        x = numpyro.sample("x", dist.Normal(0.0, scale).expand([DIMENSION]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=observations)

    whole = run(size=130, posterior=renamed, data={"y": "observations"})
    parts = run(size=130, posterior=renamed, data={"y": "observations"}, args=(jnp.zeros(DIMENSION),), batch_size=50)
    np.testing.assert_allclose(whole.truths["x"], parts.truths["x"], rtol=1e-5)
    np.testing.assert_allclose(whole.means["x"], parts.means["x"], rtol=1e-4, atol=1e-5)
    assert run(simulator=partial(model, scale=1.5)).miscalibrated


def test_discrete_sites_have_ties_at_random():
    """A count whose posterior is its prior, N(0, 1) beside it."""

    def counts(y):
        n = numpyro.sample("n", dist.Poisson(0.7))
        numpyro.sample("y", dist.Normal(n - n, 1.0), obs=y)

    class Prior(Posterior):
        def run(self, rng_key, y):
            self.draws = jax.random.poisson(rng_key, 0.7, (60,))

        def get_samples(self):
            return {"n": self.draws}

    assert run(sampler=Prior, posterior=counts, size=150).p_value > 0.01


def no_data(y):
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def factor(y):
    numpyro.factor("f", -jnp.square(numpyro.sample("x", dist.Normal(0.0, 1.0))))


def other_name(y):
    numpyro.sample("z", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)


BAD = [
    (lambda: SBC(MALA(model), model), TypeError, "must make a kernel from a model, such as MALA itself"),
    (lambda: SBC(MALA, None), TypeError, "model must be callable; got None"),
    (lambda: SBC(MALA, model, quantities={"q": 1.0}), TypeError, "q must be callable"),
    (lambda: SBC(MALA, model, num_simulations=1), ValueError, "num_simulations must be at least 2; got 1"),
    (lambda: run(posterior=no_data), ValueError, "the model has no observed site"),
    (lambda: run(posterior=factor), ValueError, "'f' is a factor, which cannot be simulated"),
    (lambda: run(posterior=other_name, args=(1.0,)), ValueError, "say which one brings its data"),
    (lambda: simulations_needed(), ValueError, "either shift or inflation"),
    (lambda: simulations_needed(inflation=1.0), ValueError, "inflation not 1"),
    (lambda: ecdf_bands(1), ValueError, "size must be at least 2"),
    (lambda: ecdf_bands(10, 1.0), ValueError, "strictly between 0 and 1"),
    (lambda: uniformity_p_value(np.array([0.5, np.nan])), ValueError, "levels must be ranks over their number"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_to_arviz_and_density(exact):
    group = exact.to_arviz()["prior_sbc"]
    assert group["x"].shape == (1, 1000, DIMENSION) and group.attrs["num_simulations"] == 1000
    np.testing.assert_array_equal(np.asarray(group["energy"])[0], exact.levels["energy"])
    with pytest.raises(ValueError, match="log_joint=True"):
        run(size=2).highest_density_coverage()


def test_simulations_needed_has_its_power():
    """Of tests at the level, 95 % of as many simulations as that see the error: 4 standard errors of a binomial."""
    rng = np.random.default_rng(0)
    for error, scores in (
        ({"shift": 0.3}, lambda n: rng.normal(0.3, 1.0, (400, n))),
        (
            {"inflation": 1.5},
            lambda n: rng.normal(0.0, 1.5**0.5, (400, n)),
        ),
    ):
        levels = coverage.norm.cdf(scores(simulations_needed(**error)))
        if "shift" in error:
            seen = np.mean(coverage.shift_p_value(levels.T) < 0.01)
        else:
            seen = np.mean([coverage.spread_p_value(row) < 0.01 for row in levels])
        assert abs(seen - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400) + 0.02  # the normal approximation of a variance


def test_spread_skill():
    rng = np.random.default_rng(0)
    truths = rng.normal(size=(4000, 2))
    value, error = spread_skill(truths, np.zeros_like(truths), np.full_like(truths, 1.2))
    assert np.all(np.abs(value - 1.2) < 4.0 * error) and np.all(np.abs(error - 1.2 / np.sqrt(8000)) < 2e-3)


@pytest.mark.slow
def test_a_kernel_is_calibrated():
    result = SBC(MALA, model, num_simulations=300).run(jax.random.key(0), None)
    assert result.calibrated, str(result)
