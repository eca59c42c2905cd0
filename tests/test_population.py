"""A population of Hamiltonian chains: laws and evidence in closed form, exactness of its moves, and what it refuses."""

import io
import itertools
import pickle
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import (
    Y,
    assert_ranks,
    normal_data,
    pair,
    pair_posterior,
    quadrature,
    standard,
    two_modes,
    two_modes_posterior,
    unknown_noise,
)
from tqdm.auto import tqdm

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.diagnostics import nested_rhat, to_arviz, verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import PopulationHMC
from numpyro_diffusion.infer.kernel.choose import systematic
from numpyro_diffusion.infer.kernel.metric import estimate
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.infer.noise import lattice
from numpyro_diffusion.infer.noise.vector import NoiseVector
from numpyro_diffusion.infer.particles.evidence import evidence_of, resample_islands
from numpyro_diffusion.infer.particles.population import climb, parts, rounds
from numpyro_diffusion.infer.particles.population.climb import Chains
from numpyro_diffusion.infer.particles.population.sampler import _tell
from numpyro_diffusion.infer.particles.population.walkers import (
    Moves,
    Nodes,
    Target,
    Walker,
    followed,
    make_moves,
    tuned,
)
from numpyro_diffusion.solve import Heun

KEY = jax.random.key(0)


def quiet(model, walkers=256, **options):
    return PopulationHMC(model, walkers, progress_bar=False, **options)


@pytest.fixture(scope="module")
def runs():
    """Draws of four runs, and the sampler: a diffusion site and an unknown noise level, which moves are summed over."""
    sampler = quiet(unknown_noise, collapsed="noise")
    return [sampler.run(key, Y).get_samples(group_by_chain=True) for key in jax.random.split(KEY, 4)], sampler


@pytest.fixture(scope="module")
def joint(runs):
    return runs[1]


def log_evidence(y):
    log_noise = np.linspace(-4.0, 4.0, 4001)
    variance = 1.0 + np.exp(2.0 * log_noise)
    each = -0.5 * (log_noise / 0.5) ** 2 - 0.5 * sum(v**2 / variance + np.log(2.0 * np.pi * variance) for v in y)
    weights = np.full(log_noise.shape, log_noise[1] - log_noise[0]) / (0.5 * np.sqrt(2.0 * np.pi))
    return np.log(np.sum(weights * np.exp(each)))


def test_law_and_evidence_of_a_joint_posterior(runs):
    """Means and variances of four runs, within 4.5 standard errors.

    Errors are standard deviations over 120 keys of a run: its own would be smallest where the tail has been missed.
    """
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    (of_runs, joint), draws = runs, runs[1].get_samples(group_by_chain=True)
    errors = {"x": ([0.0167, 0.0130], [0.0290, 0.0220]), "noise": (0.0129, 0.0341)}
    for name, mean, variance in [("x", x_mean, x_variance), ("noise", noise_mean, noise_variance)]:
        values = np.concatenate([np.asarray(run[name], float) for run in of_runs])
        found = values.mean((0, 1)), ((values - mean) ** 2).mean((0, 1))
        for value, truth, error in zip(found, (mean, variance), errors[name], strict=True):
            assert (np.abs(value - truth) < 4.5 * np.array(error) / np.sqrt(len(of_runs))).all()
    np.testing.assert_allclose(draws["twice"], 2.0 * draws["x"], rtol=1e-6)
    value, error, islands = joint.log_evidence
    assert islands.shape == (4,) and abs(value - log_evidence(np.asarray(Y))) < 4.0 * error + 0.02
    assert joint.converged and len(joint.rounds) >= 2 and np.isnan(joint.rounds[0].distance)
    assert ["distance" in str(each) for each in joint.rounds[:2]] == [False, True]


def test_reports(joint, capsys):
    """Draws by island, walkers one after the other; the verdict; ArviZ; gradients counted; a summary."""
    shape = 4, 64 * 24, 2
    assert joint.get_samples(group_by_chain=True)["x"].shape == shape
    assert joint.get_samples()["x"].shape == (4 * 64 * 24, 2)
    said = verdict(joint)
    assert said.converged and said.r_hat < 1.01 and said.ess > 400
    attributes = to_arviz(joint)["posterior"].attrs
    assert attributes["kernel"] == "PopulationHMC" and attributes["exact"] == "yes"
    again = pickle.loads(pickle.dumps(joint))
    np.testing.assert_array_equal(again.get_samples()["x"], joint.get_samples()["x"])
    history = joint.temperatures
    assert history[-1].temperature == 1.0 and all(np.diff([step.temperature for step in history]) > 0)
    first, last = joint.rounds[0], joint.rounds[-1]
    assert (first.num_walkers, first.factor, last.num_walkers, last.factor) == (256, 1, 256, 2)
    draws = 24 * -(-int(history[-1].num_moves) // 24)
    moves = sum(int(step.num_moves) for step in history) + draws
    gradients_of_a_move = 16 + 1  # the noise level is summed over a new lattice in each
    assert last.num_gradients == 256 * (gradients_of_a_move * moves + 1 + len(history))
    joint.print_summary()
    assert "nested R-hat" in capsys.readouterr().out


def test_another_round_compiles_nothing(joint, compiling, monkeypatch):
    """Other data and another key; one round, since more of them may ask for more walkers."""
    key, y = jax.random.key(2), Y + 0.5
    monkeypatch.setattr(joint, "_max_gradients", 1)
    with compiling() as programs, pytest.warns(UserWarning, match="did not suffice for a second round"):
        joint.run(key, y)
    assert len(joint.rounds) == 1 and not programs


def test_islands_are_kept_apart():
    """Resampling never crosses islands: with weights on one island only, all others keep their own walkers."""
    log_weights = jnp.zeros((4, 8)).at[0].set(100.0)
    ancestors = resample_islands(KEY, log_weights)
    assert (ancestors // 8 == jnp.arange(4)[:, None]).all()
    assert (systematic(KEY, log_weights.reshape(-1)) < 8).all()  # which resampling in common would not do


@pytest.mark.slow
def test_modes_have_their_weights():
    """Twelve standard deviations apart, without a diffusion site: within the error of a few hundred walkers."""
    law = two_modes_posterior()
    exact = law.draw(np.random.default_rng(0), 100_000)["x"]
    sampled = quiet(two_modes, 1024).run(KEY, *law.args)
    share = np.asarray(sampled.get_samples(group_by_chain=True)["x"] > 0).mean(1)
    assert abs(share.mean() - (exact > 0).mean()) < 4.0 * max(share.std(ddof=1) / 2.0, 0.5 / np.sqrt(1024))


@pytest.mark.parametrize("summed", [None, pytest.param("noise", marks=pytest.mark.slow)])
def test_chains_leave_exact_draws_in_place(summed):
    """Moves of the chains at the end, from exact draws, under a metric, a step and a lattice that are given.

    The metric is so wide that steps follow the gradient: without their density in the test ranks are off. The lattice
    is coarse, and some draws lie outside of it.
    """
    law, count = (
        pair_posterior() if summed is None else normal_data(standard(flow_solver=Heun(8)), noise_space=True),
        20_000,
    )
    coordinates = NoiseVector(Record(law.model).at(law.args, {}))
    target = Target(coordinates, jnp.ones(()), summed)
    z = law.draw(np.random.default_rng(1), count)
    if summed is not None:
        z["noise"] = np.exp(z["noise"])
    q = jax.vmap(coordinates.flatten)({name: jnp.asarray(value, jnp.float32) for name, value in z.items()})

    @jax.jit
    def move(q):
        walkers = jax.vmap(target.at)(q)
        tuning = tuned(target, jax.tree.map(lambda leaf: leaf[:100], walkers), jnp.asarray(0.3), 2)
        tuning = tuning._replace(metric=tuning.metric._replace(scale=8.0 * tuning.metric.scale))
        if summed is not None:
            tuning = tuning._replace(lattice=lattice.Lattice(jnp.full(2, -0.8), jnp.full(2, 1.5)))
        there, sums = make_moves(jax.random.split(KEY, count), target, walkers, tuning, 4, num_steps=3)
        return jax.vmap(coordinates.report)(there.q), sums.accept_prob

    values, accepted = move(q)
    assert 0.4 < accepted.mean() / 4 < 0.99
    assert_ranks(law.ranks({name: np.asarray(value) for name, value in values.items()}))


def many(size):
    numpyro.sample("x", dist.Laplace(0.0, 1.0).expand([size]).to_event(1))


def test_a_metric_of_many_dimensions_does_not_bias_the_walkers():
    """Draws of a law in 64 dimensions stay such while walkers adapt, 64 on each of four islands, in 16 populations.

    Their mean square has the error of 16 x 256 x 64 squares. By a metric of all walkers it would be 6 % off. (A
    Gaussian law would not do: its metric is exact, whoever has a part in it.)
    """
    target = Target(NoiseVector(Record(many).at((64,), {})), jnp.ones(()))

    def adapt(operands):
        q, key = operands
        walkers = jax.vmap(target.at)(q)

        def some(carry, key):
            walkers, step_size = carry
            tuning = tuned(target, walkers, step_size, 4)
            walkers, sums = make_moves(jax.random.split(key, 256), target, walkers, tuning, 2, num_steps=8)
            return (walkers, followed(step_size, sums, 2)), None

        start = walkers, jnp.asarray(0.3)
        return jax.lax.scan(some, start, jax.random.split(key, 5))[0][0].q

    q = jax.random.laplace(jax.random.key(1), (16, 256, 64))
    moved = jax.jit(partial(jax.lax.map, adapt))((q, jax.random.split(KEY, 16)))
    assert float(jnp.mean(moved**2)) == pytest.approx(2.0, abs=4.0 * np.sqrt(20.0 / moved.size))


@pytest.mark.parametrize(("cores", "number"), [(1, 1), (3, 2), (8, 4)])
def test_islands_are_moved_in_threads(cores, number, monkeypatch, x64):
    """One for each core of a number that divides the islands; in the precision of the thread that starts them."""
    monkeypatch.setattr("numpyro_diffusion.infer.particles.population.parts._num_cores", lambda: cores)
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")  # on others there is one
    islands = parts.Parts(4)
    assert islands.number == number

    def add(offset, operands, shared):
        return operands[0] + offset + shared, jnp.full(len(operands[1]), len(operands[1]))

    q, metric = jnp.arange(24.0).reshape(12, 2), np.zeros(4)
    moved, islands_of_part = islands.run(partial(jax.jit(add), 10.0), (q, metric), jnp.asarray(0.1))
    assert moved.dtype == np.float64
    np.testing.assert_array_equal(moved, q + 10.0 + 0.1)
    np.testing.assert_array_equal(islands_of_part, 4 // number)
    assert pickle.loads(pickle.dumps(islands)).number == number


def test_draws_of_a_key_do_not_depend_on_the_number_of_cores(monkeypatch):
    """But by rounding: every walker has keys of its own, whichever part its island is in."""
    draws = []
    for cores in (1, 2):
        monkeypatch.setattr("numpyro_diffusion.infer.particles.population.parts._num_cores", lambda n=cores: n)
        with pytest.warns(UserWarning, match="Raise the budget"):
            draws.append(quiet(pair, 16, num_draws=2, max_gradients=1).run(KEY, 3.0).get_samples()["x"])
    np.testing.assert_allclose(*draws, atol=1e-2)


def round_of(values, num_walkers, starts=None):
    moves = Moves(*map(np.asarray, (8, 0.1, 0, np.full(4 * num_walkers, 0.7), 0)))
    history = [rounds.Temperature(*np.ones(11), num_blind=np.zeros(1))]
    starts = values if starts is None else starts
    return rounds.Round(values, starts, evidence_of(jnp.zeros(4)), history, moves, 1, 1.0, 1.0, num_walkers, 2)


def test_chains_go_on_while_that_brings_draws():
    """Too few draws, and nothing else wrong: more of them, or walkers where twice the length brought hardly any."""
    this, last = (round_of({"x": np.random.default_rng(i).normal(size=(4, 8, 8))}, 8) for i in range(2))
    found = rounds.look(this, last, ["x"])
    assert 150 < found.own_ess < 400 and found.problems and found.needs_draws and not found.needs_walkers
    for before, says in ((0.5, "needs_draws"), (0.9, "needs_walkers")):
        seen = rounds.look(this, last, ["x"], replace(found, own_ess=before * found.own_ess))
        assert (seen.needs_draws, seen.needs_walkers) == (says == "needs_draws", says == "needs_walkers")


def test_draws_of_rounds_that_agree_are_pooled():
    """Slow chains of both rounds have twice the effective draws of one, and as many draws; drift is of one round."""
    rng = np.random.default_rng(0)
    slow = [rng.normal(size=(4, 64, 1, 2)) + 0.2 * rng.normal(size=(4, 64, 9, 2)) for _ in range(2)]
    this, last = (round_of({"x": x}, 64) for x in slow)
    alone, both = rounds.look(this, None, ["x"]), rounds.look(this, last, ["x"])
    assert not alone.is_pooled and both.is_pooled and "of both rounds" in str(both)
    assert alone.ess == alone.own_ess == both.own_ess < 400 and both.converged
    assert 1.6 * alone.ess < both.ess < 2.4 * alone.ess
    assert both.drift == alone.drift
    values = rounds.pooled(this, last)["x"]
    np.testing.assert_array_equal(values, np.concatenate([slow[1][:, :, 1::2], slow[0][:, :, ::2]], 2))
    for other in (round_of({"x": slow[1] + 1.0}, 64), round_of({"x": slow[1][:, :32]}, 32)):
        assert not rounds.look(this, other, ["x"]).is_pooled  # they disagree, or the walkers are others


def test_a_run_has_the_draws_of_rounds_that_agree(monkeypatch):
    sampler, seen = quiet(pair, num_draws=4), []
    monkeypatch.setattr(sampler, "_round", lambda *args: seen.append(PopulationHMC._round(sampler, *args)) or seen[-1])
    sampler.run(KEY, 3.0)
    (first, _), (second, look) = seen[-2:]
    assert sampler.converged and look.is_pooled
    np.testing.assert_array_equal(
        sampler.get_samples(group_by_chain=True)["x"], rounds.pooled(second, first)["x"].reshape(4, -1)
    )


@pytest.mark.parametrize(("more", "kept"), [(4, [1, 3, 5, 7]), (2, [1, 2, 4, 5]), (1, [1, 2, 3, 4])])
def test_more_draws_are_thinned_evenly(more, kept):
    """To as many as before; all of them at once are twice as far from each other."""
    moves = Moves(*map(np.asarray, (3, 0.1, 0, np.ones(2), 0)))
    counter = itertools.count()
    programs = SimpleNamespace(
        move=lambda key, stage, *_, **__: (stage, moves), values=lambda stage: {"x": np.full(2, next(counter))}
    )
    chains = Chains(programs, KEY, SimpleNamespace(walkers=Walker(*np.zeros((4, 2)))), 3)
    chains.draw(4, lambda: None)
    assert int(chains.draw(more, lambda: None).num_moves) == 3 * (4 + more)
    np.testing.assert_array_equal(chains.values(2)["x"][0, 0], kept)
    assert chains.between == (6 if more == 4 else 3)


def test_log_likelihoods_of_draws_stay_on_their_islands():
    chains = SimpleNamespace(_log_likelihoods=[np.arange(4.0), np.arange(10.0, 14.0)])
    np.testing.assert_array_equal(Chains.log_likelihoods(chains, 2), [[0.0, 10.0, 1.0, 11.0], [2.0, 12.0, 3.0, 13.0]])


@pytest.mark.parametrize(("width", "length", "speaks"), [(2.0, 8, True), (1.2, 8, False), (2.0, 64, False)])
def test_chains_must_be_long_where_no_walker_starts(width, length, speaks):
    """A posterior twice as wide as its prior asks for five effective draws of each walker, one like it does not."""
    rng = np.random.default_rng(2)
    starts, chains = rng.normal(size=(4, 64, 1)), rng.normal(size=(4, 64, 1)) + 0.5 * rng.normal(size=(4, 64, length))
    values = {"x": width * (chains if length == 8 else rng.normal(size=(4, 64, length)))}
    starts = {"x": starts, "is_large": starts > 1.0, "undefined": np.full(starts.shape, np.nan)}
    values |= {"is_large": values["x"] > 1.0, "undefined": np.full(values["x"].shape, np.nan)}
    this = round_of(values, 64, starts)
    assert any("times as far as its prior" in text for text in rounds.look(this, None, ["x"]).problems) == speaks


@pytest.mark.parametrize(("change", "says"), [(lambda x: x + 0.3, "means of x"), (lambda x: 1.3 * x, "spreads of x")])
def test_rounds_that_differ_in_mean_or_spread_disagree(change, says):
    """A round with the other's draws does not; a spread is too small where walkers have not reached the tails."""
    values = {
        "x": np.random.default_rng(0).normal(size=(4, 32, 8)),
        "z": np.random.default_rng(1).normal(size=(4, 32, 8)),
    }
    this = round_of(values, 32)
    for other, disagrees in ((values["x"], False), (change(values["x"]), True)):
        found = rounds.look(this._replace(values={**values, "x": other}), this, ["x", "z"])
        assert (
            any(
                f"two rounds disagree, the second with more moves or walkers: their {says}" in problem
                for problem in found.problems
            )
            == disagrees
        )


def test_rounds_that_agree_are_seldom_sent_on():
    """Independent draws of the same law, 65 entries on four islands: in some five runs of a hundred."""
    rng, limit = np.random.default_rng(0), rounds.largest_distance(65)
    pairs = [rng.normal(size=(2, 4, 16, 1, 65)) for _ in range(200)]
    as_rounds = [[SimpleNamespace(values={"x": values}) for values in pair] for pair in pairs]
    sent_on = np.mean([rounds._distance(*pair)[0] > limit for pair in as_rounds])
    assert 0.01 < sent_on < 0.12  # of 200, with a standard error of .015


def test_lattices():
    """The nodes of a lattice have the same lattice; a shift keeps the cell; outside, a value is alone.

    The two lattices about a value are about each of their nodes too, by some shift that is as likely.
    """
    given = lattice.Lattice(jnp.asarray(-1.0), jnp.asarray(0.05))
    nodes = given.through(jnp.asarray(0.31))
    assert nodes[0] >= -1.0 and nodes[-1] < -1.0 + 0.05 * lattice.NUM_NODES
    np.testing.assert_allclose(jax.vmap(given.through)(nodes), jnp.tile(nodes, (len(nodes), 1)), atol=1e-5)
    shifted = given.shifted(jnp.asarray(0.31), jax.random.uniform(KEY, (1000,)))
    assert shifted.min() >= 0.3 - 1e-6 and shifted.max() < 0.35 and np.std(shifted) > 0.013  # uniform: .0144
    both = given.around(jnp.asarray(0.31), jnp.asarray(0.4)).reshape(2, -1)
    np.testing.assert_allclose(both[0], nodes, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(given.through)(both[1]), jnp.tile(both[1], (len(nodes), 1)), atol=1e-5)
    for outside in (-1.2, 2.5):
        assert (given.around(jnp.asarray(outside), jnp.asarray(0.4)) == outside).all()


def test_what_is_drawn_by_the_ends_of_a_uniform_number_has_probability():
    """The first and the last value have none here; the two between are one in four and three in four."""
    nodes = Nodes(jnp.log(jnp.array([0.0, 1.0, 3.0, 0.0])), jnp.arange(4.0))
    walker = Walker(jnp.zeros(2), jnp.zeros(()), jnp.zeros(2), jnp.zeros(()))
    u = jnp.array([0.0, 0.2, 0.3, 1.0])  # the last by rounding
    drawn = jax.vmap(lambda u: Target.drawn(SimpleNamespace(index=1), u, walker, 10.0 * jnp.arange(4.0), nodes))(u)
    np.testing.assert_array_equal(drawn.q, [[0.0, 10.0], [0.0, 10.0], [0.0, 20.0], [0.0, 20.0]])
    np.testing.assert_array_equal(drawn.log_likelihood, [1.0, 1.0, 2.0, 2.0])


def in_many_dimensions(is_dear, y, prior):
    """A scale of two data, or one inside of what is dear, behind the flow."""
    x = numpyro.sample("x", prior)
    shift, scale = numpyro.sample("shift", dist.Normal(0.0, 1.0)), numpyro.sample("scale", dist.HalfNormal(1.0))
    if is_dear:
        x = jnp.exp(-scale * jnp.square(jnp.arange(64.0)[:, None] - jnp.arange(64.0))) @ x
    numpyro.sample("y", dist.Normal(x[:2] + shift, 0.1 if is_dear else scale).to_event(1), obs=y)


def test_the_site_to_sum_over():
    """The scale of Gaussian data before another scalar, if the sum is cheap; none where it is not or without a flow."""
    prior = DiffusionPrior(Gaussian(jnp.zeros(64)))
    for is_dear, site in ((False, "scale"), (True, None)):
        assert lattice.site_to_sum(Record(partial(in_many_dimensions, is_dear)).at((Y, prior), {})) == site
    assert lattice.site_to_sum(Record(hierarchical).at((SEEN,), {})) is None
    with pytest.raises(ValueError, match="collapsed must name a continuous scalar site"):
        quiet(pair, 16, collapsed="x").run(KEY, 3.0)


def test_coordinates_have_the_models_density():
    """Prior and likelihood apart, and together the model's own density in noise space, with its Jacobian."""
    coordinates = NoiseVector(Record(unknown_noise).at((Y,), {}))
    q = jnp.array([0.4, 0.3, -1.2])
    assert coordinates.names == ["noise", "x_noise", "x_noise"]
    parts, values = coordinates.log_density(q), coordinates.report(q)
    noise = np.exp(0.4)
    prior = -0.5 * np.sum(q[1:] ** 2) + dist.Normal(0.0, 0.5).log_prob(q[0])  # the normal constant is left out
    likelihood = dist.Normal(values["x"], noise).log_prob(Y).sum()
    np.testing.assert_allclose([parts.prior, parts.likelihood], [prior, likelihood], rtol=1e-5)
    np.testing.assert_allclose([values["noise"], *values["twice"]], [noise, *2.0 * values["x"]], rtol=1e-5)


@pytest.mark.parametrize("size, number", [(5, 400), (400, 256), (256, 400)])
def test_metric_of_a_population(size, number):
    """Directions that data narrow are found: dense from the draws, of low rank from the gradients."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=size) / np.sqrt(size)
    direction /= np.linalg.norm(direction)
    precision = np.eye(size) + 99.0 * np.outer(direction, direction)
    q = rng.normal(size=(number, size))
    q -= 0.9 * np.outer(q @ direction, direction)
    metric = estimate(jnp.asarray(q, jnp.float32), jnp.asarray(-q @ precision, jnp.float32))
    push = np.asarray(metric.push(jnp.eye(size)))
    spread = np.linalg.norm(push @ direction) ** 2  # the metric's variance in the narrow direction: exactly .01
    other = rng.normal(size=size)
    other -= other @ direction * direction
    other /= np.linalg.norm(other)
    assert spread < 0.1 and 0.5 < np.linalg.norm(push @ other) ** 2 < 2.0
    np.testing.assert_allclose(metric.pull(jnp.asarray(direction, jnp.float32)), push @ direction, atol=1e-4)


def test_the_bar_says_how_far_islands_agree():
    """The worst of all entries; nothing is computed for a bar that is not shown."""
    rng = np.random.default_rng(0)
    values = {"x": rng.normal(size=(4, 100, 2, 3))}
    values["x"][0, ..., 1] += 1.0
    shown, hidden = io.StringIO(), SimpleNamespace(disable=True, update=lambda number: None)
    with tqdm(total=1, file=shown) as bar:
        _tell(bar, SimpleNamespace(values=lambda islands: values), 4)
    expected = nested_rhat(values["x"])[1]
    assert expected > 1.05 and f"nested R-hat {expected:.3f} (x[1])" in shown.getvalue()
    _tell(hidden, None, 4)


def test_a_budget_that_ends_first_is_told():
    with pytest.warns(UserWarning, match="did not suffice for a second round"):
        sampled = quiet(pair, 16, num_draws=4, max_gradients=1).run(KEY, 3.0)
    assert not sampled.converged and len(sampled.rounds) == 1
    assert not verdict(sampled).converged and "NOT CONVERGED" in str(verdict(sampled))


def test_what_is_left_of_a_budget_goes_into_draws():
    """Where it does not suffice for a second round; the run has not converged by that."""
    sampler, spent = quiet(pair, 16, num_draws=4, max_gradients=1), []
    for _ in range(2):
        with pytest.warns(UserWarning, match="did not suffice for a second round"):
            sampler.run(KEY, 3.0)
        spent.append(sampler.num_gradients)
        assert len(sampler.rounds) == 1 and sampler.get_samples()["x"].shape == (64,)
        sampler._max_gradients = int(2.9 * spent[0])
    assert spent[0] < spent[1] <= 2.9 * spent[0]


def test_a_round_is_given_up_where_the_budget_ends_on_the_way(monkeypatch):
    """One of 64 times the moves, which was thought to fit: the round before stands, and what was spent is counted."""
    sampler = quiet(pair, 16, num_draws=4, max_gradients=6000)
    monkeypatch.setattr(sampler, "_following", lambda this, _: None if sampler._looks else (this.num_walkers, 64))
    with pytest.warns(UserWarning, match="did not suffice for a second round"):
        sampler.run(KEY, 3.0)
    (only,) = sampler.rounds
    assert only.num_gradients < 6000 < sampler.num_gradients
    assert not sampler.converged and sampler.get_samples()["x"].shape == (64,)


def test_walkers_that_are_slow_to_forget_move_further(monkeypatch):
    """One step a move: after two moves, here, there are two steps in each, and as many gradients as are made."""
    advance, made = climb.Programs._advance, []

    def counted(programs, key, stage, num_moves, num_steps, *, anew):
        made.append(num_moves * num_steps + anew)
        return advance(programs, key, stage, num_moves, num_steps, anew=anew)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = quiet(pair, 64, num_steps=8, max_gradients=1).run(KEY, 3.0)
        monkeypatch.setattr(climb, "_MANY", 2)
        monkeypatch.setattr(climb.Programs, "_advance", counted)
        slow = quiet(pair, 64, num_steps=1, max_gradients=1).run(KEY, 3.0)
    assert {int(each.num_steps) for each in fast.temperatures} == {8}
    history = slow.temperatures
    lengthened = [int(each.num_steps) for each in history].index(2)
    for i, each in enumerate(history):
        short = 0 if i > lengthened else 2 if i == lengthened else each.num_moves
        assert each.num_gradients == 2 * each.num_moves - short and each.num_steps == 1 + (i >= lengthened)
    assert made[-1] % 2 == 0 and slow.rounds[0].num_gradients == 64 * sum(made)


def test_long_moves_count_twice_where_walkers_never_forget(compiling, monkeypatch):
    """None are where they forget nearly, however little must be left; they compile nothing."""
    for name, value in ("_MANY", 2), ("_MUCH", 1.0), ("least_correlation", lambda q: 0.0):
        monkeypatch.setattr(climb, name, value)
    with pytest.warns(UserWarning, match="did not suffice for a second round"):
        never = quiet(pair, 16, num_draws=4, num_steps=1, max_moves=20, correlation=1e-9, max_gradients=1).run(KEY, 3.0)
        assert {int(each.num_steps) for each in never.temperatures} == {1}
        monkeypatch.setattr(climb, "_MUCH", 0.0)
        with compiling() as programs:
            never.run(KEY, 3.0)
    assert not programs and {int(each.num_steps) for each in never.temperatures} == {2}
    assert all(20 <= each.num_gradients < 24 for each in never.temperatures)  # two long moves at once


def test_draws_lie_closer_where_a_round_takes_more_than_expected(monkeypatch):
    """Ten draws 8 moves apart, of 100 gradients and a second: 5,000 gradients are left, or 29 seconds, or none."""
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    sampler = quiet(pair, 16, num_draws=10, max_gradients=7000, max_seconds=50.0)
    sampler._looks, sampler._started = [SimpleNamespace(num_gradients=1500)], 0.0
    last = SimpleNamespace(seconds_each=0.01)
    assert sampler._moves_between(75, 500, 100, None) == 8
    assert sampler._moves_between(75, 500, 100, last) == 5
    sampler._max_seconds = 29.0
    assert sampler._moves_between(75, 500, 100, last) == 2
    sampler._max_seconds = 1.0
    assert sampler._moves_between(75, 500, 100, last) == 1


BAD = {
    "walkers": ({"num_walkers": 7}, "num_walkers must be a multiple of num_islands=4"),
    "islands": ({"num_islands": 1, "num_walkers": 4}, "num_islands must be at least 2"),
    "budget": ({"max_gradients": 0}, "max_gradients must be at least 1"),
    "seconds": ({"max_seconds": 0.0}, "max_seconds must be positive"),
    "threshold": ({"ess_threshold": 1.0}, "ess_threshold must be at most 0.999"),
    "correlation": ({"correlation": 1.0}, "correlation must lie in"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PopulationHMC(pair, **options)


def cannot_be_drawn():
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


def discrete():
    numpyro.sample("y", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=1.0)


def impossible():
    numpyro.factor("never", jnp.where(numpyro.sample("x", dist.Normal(0.0, 1.0)) > 1e9, 0.0, -jnp.inf))


REFUSED = {
    "improper": (cannot_be_drawn, "the prior of site 'x' cannot be drawn"),
    "discrete": (discrete, "discrete"),
    "impossible": (impossible, "likelihood must be positive"),
    "empty": (lambda: numpyro.factor("y", 0.0), "needs a latent site"),
}


@pytest.mark.parametrize("model, message", REFUSED.values(), ids=REFUSED)
def test_refused(model, message):
    with pytest.raises(ValueError, match=message):
        quiet(model, 16).run(KEY)


def blind():
    """The gradient is NaN below zero, where the density is fine."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(jnp.where(x > 0, jnp.sqrt(x), 0.0), 1.0), obs=0.0)


def test_gradients_that_are_not_finite_are_counted_and_named():
    with pytest.warns(UserWarning, match="the gradient in x is not finite at"):
        sampled = quiet(blind, 64, num_draws=4, max_gradients=1).run(KEY)
    assert not sampled.converged and sampled.temperatures[-1].num_blind[0] > 10


@pytest.mark.slow
def test_walkers_double_where_islands_disagree():
    """Few walkers on far modes: stationary islands that disagree ask for walkers, not for moves."""
    args = two_modes_posterior().args
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampled = quiet(two_modes, 16, num_draws=8, max_gradients=150_000, max_moves=8).run(KEY, *args)
    numbers = [(seen.num_walkers, seen.factor) for seen in sampled.rounds]
    assert sampled.get_samples()["x"].shape[0] == numbers[-1][0] * 8
    assert numbers[:2] == [(16, 1), (16, 2)] and numbers[-1][0] > 16
    assert not sampled.converged


SEEN = jnp.asarray(0.5 * np.random.default_rng(0).normal(size=9))


def hierarchical(y):
    """Effects about zero that the data hardly tell from zero: the posterior is a funnel's neck."""
    log_variance = numpyro.sample("log_variance", dist.Normal(0.0, 3.0))
    effects = numpyro.sample("effects", dist.Normal(0.0, jnp.exp(log_variance / 2.0)).expand([9]).to_event(1))
    numpyro.sample("y", dist.Normal(effects, 0.5).to_event(1), obs=y)


@pytest.mark.slow
@pytest.mark.optimised
def test_walkers_enter_the_neck_of_a_funnel():
    """Mean, standard deviation and evidence by quadrature, in the mean of four keys, within 4 standard errors.

    Errors are standard deviations over 40 keys of a run, all of which converged: those of four may be lucky.
    """
    grid = np.linspace(-25.0, 15.0, 8001)
    variance = np.exp(grid) + 0.25
    log_joint = -0.5 * (np.square(SEEN)[:, None] / variance + np.log(2.0 * np.pi * variance)).sum(0)
    log_joint += -0.5 * (grid / 3.0) ** 2 - np.log(3.0 * np.sqrt(2.0 * np.pi))
    weights = np.exp(log_joint - log_joint.max())
    evidence = np.log(weights.sum() * (grid[1] - grid[0])) + log_joint.max()
    weights /= weights.sum()
    mean = (weights * grid).sum()
    spread = np.sqrt((weights * (grid - mean) ** 2).sum())
    sampler, found = quiet(hierarchical, 512, max_gradients=10_000_000), []  # a run in sixteen takes over 5 million
    for seed in range(4):
        run = sampler.run(jax.random.key(seed), SEEN)
        draws = np.asarray(run.get_samples()["log_variance"], float)
        assert run.converged and run.rounds[-1].stuck < 0.005
        found.append([draws.mean(), draws.std(), float(run.log_evidence.value)])
    errors = np.array([0.042, 0.036, 0.065]) / np.sqrt(len(found))
    assert (abs(np.mean(found, 0) - [mean, spread, evidence]) < 4.0 * errors).all()
