"""What `verdict` says of runs with known faults, and nested R-hat by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from numpyro_diffusion.diagnostics import by_level, nested_rhat, to_arviz, verdict
from numpyro_diffusion.diagnostics.nested import early_late_rhat, standard_error
from numpyro_diffusion.diagnostics.runs import Run

GOOD = np.random.default_rng(0).normal(size=(4, 500, 3))


def run_of(draws, problems=()):
    """What `verdict` reads of a particle sampler."""
    return SimpleNamespace(get_samples=lambda group_by_chain: {"x": draws}, problems=problems)


def test_nested_rhat_by_hand():
    """Two islands of two chains of two draws."""
    draws = np.array([[[0.0, 2.0], [1.0, 1.0]], [[4.0, 4.0], [2.0, 6.0]]])
    between = np.var([1.0, 4.0], ddof=1)
    within = np.mean([0.0 + np.mean([2.0, 0.0]), 0.0 + np.mean([0.0, 8.0])])
    assert nested_rhat(draws) == pytest.approx(np.sqrt(1.0 + between / within))
    with pytest.raises(ValueError, match="two islands or more"):
        nested_rhat(draws[:1])


def test_standard_error_covers():
    """Of islands of independent draws it is sd / sqrt(all draws), on average."""
    draws = np.random.default_rng(1).normal(size=(4, 20, 5, 2000))
    assert np.sqrt(np.mean(standard_error(draws) ** 2)) == pytest.approx(1.0 / 20.0, rel=0.05)


def test_two_runs_that_agree_are_rarely_apart():
    """Of 65 entries, five with chains that move a tenth as fast: the largest distance exceeds 4 in one of 70 pairs.

    With the variance between the four islands alone it would in one of three.
    """
    rng, far = np.random.default_rng(1), 0
    speed = np.where(np.arange(65) < 5, 3.0, 0.3)  # sd of a chain's own level, for draws of unit variance around it
    for _ in range(200):
        runs = rng.normal(size=(2, 4, 64, 1, 65)) * speed + rng.normal(size=(2, 4, 64, 4, 65))
        distance = (runs[0].mean((0, 1, 2)) - runs[1].mean((0, 1, 2))) / np.hypot(*map(standard_error, runs))
        far += np.abs(distance).max() > 4.0
    assert far <= 200 / 70 + 4 * np.sqrt(200 / 70)


def test_drift_is_seen_early_against_late():
    draws = np.random.default_rng(1).normal(size=(4, 50, 10))
    assert early_late_rhat(draws) < 1.01
    assert early_late_rhat(draws + np.linspace(0.0, 1.0, 10)) > 1.05


def test_good_draws_have_converged():
    said = verdict(run_of(GOOD))
    assert said.converged and not said.problems and said.ess > 400 and said.worst.startswith("x[")
    assert str(said).startswith("converged")


def test_what_a_sampler_has_said_is_not_said_again():
    draws = GOOD[:, :50]
    (short,) = [problem for problem in verdict(run_of(draws)).problems if "effective" in problem]
    told = verdict(run_of(draws, (f"{short}. Raise the budget",))).problems
    assert [problem for problem in told if "effective" in problem] == [f"{short}. Raise the budget"]


def test_a_chain_apart_is_named():
    draws = GOOD.copy()
    draws[2, :, 1] += 2.0
    said = verdict(run_of(draws))
    assert not said.converged and said.worst == "x[1]"
    assert said.groups == ((0, 1, 3), (2,))
    assert "4 chains fall into 2 groups" in said.problems[0] and "; 2 (mean 2" in said.problems[0]
    assert (
        any("modes that no chain leaves" in problem for problem in said.problems) and "ParallelTempering" in said.advice
    )


def test_few_draws_and_the_samplers_own_problems():
    said = verdict(run_of(GOOD[:, :60], problems=("weights degenerate",)))
    assert not said.converged and said.problems[0] == "weights degenerate"
    assert any("effective sample size" in problem for problem in said.problems)


def test_frozen_chains_are_chains():
    """Chains at -10, -3, 3, 10, which a library with its axes swapped calls converged; as arrays and through ArviZ."""
    frozen = np.array([-10.0, -3.0, 3.0, 10.0])[:, None, None] + 1e-3 * GOOD
    for run in (frozen, to_arviz(frozen.swapaxes(0, 1), sample_dims=("draw", "chain"))):
        said = verdict({"x": run} if isinstance(run, np.ndarray) else run)
        assert said.r_hat > 2.5 and said.groups == ((0,), (1,), (2,), (3,))  # of ranks, and so bounded
        assert "4 groups" in said.problems[0] and "PopulationHMC" in said.advice
    said = verdict({"x": frozen.round()})  # nothing moves at all
    assert said.r_hat == np.inf and said.ess == 4
    assert "4 of 4 chains have not moved" in str(said) and "init_params" in said.advice


def test_chains_that_differ_in_spread():
    """Folded ranks see what means do not, and the error of a mean is one over the root of the draws."""
    draws = GOOD.copy()
    assert verdict({"x": draws}).mcse == pytest.approx(1.0 / np.sqrt(2000), rel=0.15)
    draws[0, :, 2] *= 4.0
    said = verdict({"x": draws})
    assert said.worst == "x[2]" and said.r_hat > 1.1 and len(said.groups) == 1


def test_drift_asks_for_warm_up():
    said = verdict({"x": GOOD + np.linspace(0.0, 3.0, 500)[None, :, None]})
    assert "all chains move in one direction" in str(said) and "num_warmup" in said.advice


def test_what_cannot_be_judged():
    """Constant entries, flags, NaN, one chain, three draws, nothing: said, and the rest is judged."""
    some = np.concatenate([GOOD, np.ones((4, 500, 2))], -1)
    said = verdict({"x": some, "flag": GOOD[..., 0] > 0})
    assert said.converged and said.notes == ("entries that never change are not judged: 2 of 5 in 'x'",)
    assert np.isnan(said.sites["x"].r_hat[3:]).all() and said.sites["x"].ess_tail[0] > 400

    said = verdict({"x": np.ones((4, 500))})
    assert not said.converged and said.problems == ("no draw differs from any other",) and np.isnan(said.r_hat)

    bad = GOOD.copy()
    bad[1, 7, 2] = np.nan
    said = verdict({"x": bad, "z": GOOD[..., 0]})
    assert "draws of 'x' are not finite: 1 of 6000 numbers, in chains [1]" in said.problems
    assert np.isnan(said.sites["x"].r_hat[2]) and said.sites["x"].r_hat[0] < 1.01 and "constrain" in said.advice

    said = verdict({"x": GOOD.reshape(1, 2000, 3)})
    assert not said.converged and "cannot see what it has missed" in said.problems[0]
    assert said.r_hat < 1.01 and str(said).startswith("CONVERGENCE NOT SHOWN") and "four chains" in said.advice

    said = verdict({"x": GOOD[:, :3]})
    assert not said.converged and "too few for R-hat" in said.problems[0] and np.isnan(said.r_hat)
    for wrong, message in (({"x": np.ones((4, 0))}, "no draws"), ({"x": GOOD, "z": GOOD[:2]}, "alike at all sites")):
        with pytest.raises(ValueError, match=message):
            verdict(wrong)
    with pytest.raises(TypeError, match="run must be"):
        verdict(3.0)
    with pytest.raises(RuntimeError, match="run.. must come first"):
        verdict(MCMC(NUTS(funnel), num_warmup=1, num_samples=1))


@pytest.mark.filterwarnings("ignore:Found chain dimension")
def test_many_short_chains_on_islands():
    """By ranks, held to ArviZ where it has them; agreement by island, with ten draws of a chain.

    Islands of 400 independent draws are apart by more than an R-hat of 1.01, eight times B's mean, once in 5e4 entries.
    """
    draws = np.random.default_rng(1).normal(size=(160, 10, 2))
    said = verdict({"x": draws}, num_islands=4)
    assert said.converged and said.nested_r_hat < 1.01 and "nested R-hat" in str(said)
    apart = draws + np.repeat([0.0, 0.0, 0.0, 1.0], 40)[:, None, None]
    said = verdict({"x": apart}, num_islands=4)
    assert said.problems[0].startswith("nested R-hat") and said.nested_r_hat > 1.05
    with pytest.raises(ValueError, match="divide the 160 chains; got 3"):
        verdict({"x": draws}, num_islands=3)

    spread = (apart**3).reshape(4, 40, 10, 2) * np.array([1.0, 1.0, 1.0, 2.0])[:, None, None, None]
    found = nested_rhat(spread, method="rank")
    assert (nested_rhat(np.exp(spread / 50), method="rank")[0] > 1.05) and nested_rhat(spread)[0] != found[0]
    az = pytest.importorskip("arviz")
    if hasattr(az, "rhat_nested"):
        flat = az.convert_to_dataset({"x": spread.reshape(160, 10, 2)})
        theirs = az.rhat_nested(flat, superchain_ids=np.repeat(np.arange(4), 40), method="rank")
        halves = np.concatenate([spread[:, :, :5], spread[:, :, 5:]], 1)  # which ArviZ takes for chains of an island
        np.testing.assert_allclose(nested_rhat(halves, method="rank"), np.asarray(theirs["x"]), rtol=1e-6)


def levels_run(thinning=1):
    """Draws with moves at levels of .1 to 10: the lower half accepted, to independent draws, the upper never."""
    level = 10.0 ** np.random.default_rng(1).uniform(-1.0, 1.0, size=(4, 500))
    accepted = level < 1.0
    last = np.maximum.accumulate(np.where(accepted, np.arange(500), 0), axis=1)
    draws = np.take_along_axis(GOOD, last[..., None], axis=1)
    statistics = {"noise_level": level, "acceptance_rate": accepted.astype(float)}
    return Run({"x": draws}, statistics, {}, {"thinning": thinning})


def test_by_noise_level():
    """Four groups of a quarter of the draws each: two of independent draws, two of none."""
    found = by_level(levels_run())
    np.testing.assert_allclose(found["share"], 0.25, atol=0.01)
    np.testing.assert_allclose(found["acceptance_rate"], [1.0, 1.0, 0.0, 0.0], atol=0.1)
    np.testing.assert_allclose(found["jump"][[0, 3]], [1.0, 0.0], atol=0.15)  # sqrt(2 / 500 / 3) = .04, 4 of them
    assert (found["lowest"] <= found["noise_level"]).all() and (found["noise_level"] <= found["highest"]).all()
    assert np.isnan(by_level(levels_run(thinning=5))["jump"]).all()

    statistics = {"level_accept_prob": np.stack([np.full((4, 500), v) for v in (np.nan, 0.2, 0.8)], -1)}
    ladder = Run({"x": GOOD}, statistics, {}, {}, (10.0, 3.0, 1.0))
    np.testing.assert_allclose(by_level(ladder)["acceptance_rate"], [np.nan, 0.2, 0.8])
    np.testing.assert_allclose(by_level(ladder)["noise_level"], [10.0, 3.0, 1.0])
    annealed = Run({"x": GOOD}, {}, {"temperature": np.ones(3), "num_blind": np.ones((3, 7))}, {})
    assert list(by_level(annealed)) == ["temperature"] and by_level(Run({"x": GOOD}, {}, {}, {})) == {}


def judged(statistics, draws=GOOD, **attributes):
    """The verdict on draws with statistics, as they come back from ArviZ."""
    data = to_arviz({"x": draws}, sample_dims=("chain", "draw"), attributes=attributes)
    import xarray as xr

    group = xr.Dataset({n: (("chain", "draw", "level")[: v.ndim], v) for n, v in statistics.items()})
    if hasattr(data, "add_groups"):
        data.add_groups({"sample_stats": group})
    else:
        data["sample_stats"] = xr.DataTree(group)
    return verdict(data)


def test_statistics_of_moves_through_arviz():
    """Levels that accept nothing, low acceptance by chain, trees, short moves: the cause goes before the symptom."""
    run = levels_run()
    said = judged(run.statistics, run.draws["x"], thinning=1, kernel="DiffusionPCN")
    assert any("are never accepted" in problem for problem in said.problems) and "largest noise level" in said.advice
    assert "% accepted, jump" in str(said) and said.levels["share"].shape == (4,)

    rate = np.full((4, 500), 0.8)
    rate[2] = 0.004
    few = GOOD[:, :60]
    said = judged({"acceptance_rate": rate[:, :60]}, few)
    assert "0.4% of the moves are accepted in chains [2], below 10%" in said.problems and "warm up" in said.advice
    said = judged({"acceptance_rate": rate})
    assert said.converged and "in chains [2]" in said.notes[0]  # nothing against it but a note
    assert said.acceptance == pytest.approx(0.601)

    steps = np.full((4, 60), 7)
    said = judged({"n_steps": steps, "reached_max_treedepth": steps == 7}, few, kernel="NoiseSpace")
    assert "100% of the trees are saturated at 7 steps" in said.problems and "64 chains" in said.advice
    short = {"acceptance_rate": np.ones((4, 60)), "step_size": np.full((4, 60), 1e-3)}
    assert "the moves are too short" in judged(short, few).advice
    assert judged({"diverging": rate < 0.1}).divergences == 500
    assert judged({}, few).advice.startswith("run 2 times as long")


def funnel():
    scale = numpyro.sample("scale", dist.Normal(0.0, 3.0))
    with numpyro.plate("points", 5):
        numpyro.sample("x", dist.Normal(0.0, np.e ** (0.5 * 1.0) * jax.numpy.exp(0.5 * scale)))


def test_trees_and_divergences_of_a_run():
    """NUTS with shallow trees in a funnel."""
    kernel = NUTS(funnel, max_tree_depth=3, step_size=0.3, adapt_step_size=False)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=200, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("num_steps",))
    said = verdict(mcmc)
    assert not said.converged
    assert any("saturated at 7 steps" in problem for problem in said.problems)
    assert any("diverged" in problem for problem in said.problems)
    again = verdict(to_arviz(mcmc))
    assert again.problems == said.problems and again.advice == said.advice and str(again) == str(said)
