"""Every run in ArviZ, old and new: groups, names, dimensions, what a kernel is exact for; and in a file."""

import subprocess
import sys
import time
import tracemalloc

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from matplotlib import pyplot
from numpyro.handlers import reparam
from numpyro.infer import HMC, MCMC, Predictive

from numpyro_diffusion.denoise import FromFunction, Gaussian
from numpyro_diffusion.diagnostics import to_arviz, verdict
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    ULA,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    LineIntegral,
    NoiseSpace,
    PopulationHMC,
    TemperedSMC,
    TwistedSMC,
)
from numpyro_diffusion.infer.particles import tempered
from numpyro_diffusion.infer.particles.evidence import Draws, Evidence, Outcome
from numpyro_diffusion.infer.particles.population import rounds
from numpyro_diffusion.infer.particles.twisted import Level
from numpyro_diffusion.noise import VE
from numpyro_diffusion.reparam import NoiseReparam
from numpyro_diffusion.solve import DPMSolverPP


def model(y=1.0):
    x = numpyro.sample("x", DiffusionPrior(Gaussian([0.0, 0.0])))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def short_run(kernel):
    mcmc = MCMC(kernel, num_warmup=5, num_samples=10, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("accept_prob",) if not isinstance(kernel, ULA) else ())
    return mcmc


def test_status_travels_with_the_draws(tmp_path):
    data = to_arviz(short_run(MALA(model, density=LineIntegral())))
    attributes = dict(data["posterior"].attrs)
    assert attributes["kernel"] == "MALA" and attributes["exact"] == "no"
    assert "circulation" in attributes["statement"] and "circulation" in data["sample_stats"]
    assert data["posterior"]["x"].shape == (2, 10, 2) and "acceptance_rate" in data["sample_stats"]
    assert "log_likelihood" not in data
    data.to_netcdf(tmp_path / "draws.nc")
    assert dict(az.from_netcdf(tmp_path / "draws.nc")["posterior"].attrs)["statement"] == attributes["statement"]


def test_kernels_of_numpyro_have_no_status():
    attributes = to_arviz(
        short_run(HMC(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), num_steps=1, trajectory_length=None))
    )["posterior"].attrs
    assert attributes["kernel"] == "HMC" and "exact" not in attributes
    assert attributes["inference_library"] == "numpyro" and "schedule" not in attributes


@pytest.mark.parametrize(
    ("kernel", "exact"),
    [(ULA(model), False), (MALA(model), True), (NoiseSpace(model), True), (DiffusionPCN(model), False),
     (DiffusionGibbs(model, x_kernel=NoiseSpace), True)],
    ids=lambda k: type(k).__name__,
)  # fmt: skip
def test_every_kernel_says_what_it_is_exact_for(kernel, exact):
    assert kernel.status.exact is exact and len(kernel.status.statement) > 20


SCHEDULE = VE(0.05, 20.0)


def white(x_t, t, parameters):
    """The score of N(0, I) under noise."""
    return -x_t / (1.0 + SCHEDULE.sigma(t) ** 2)


DENOISER = FromFunction(white, (2, 3), "score", SCHEDULE)
IMAGE = DiffusionPrior(DENOISER, sampler=DPMSolverPP(6, eta=1.0), flow_solver=DPMSolverPP(4))
SEEN = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)


def picture(prior=IMAGE, y=SEEN):
    """Two images with named pixels in a plate, a level that is unknown, data in the same plate, and a factor."""
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    with numpyro.plate("patient", 2):
        x = numpyro.sample("x", prior, infer={"event_dims": ["row", "col"]})
        numpyro.sample(
            "y", dist.Normal(x.sum(-1) + level, 1.0).to_event(1), obs=y[:, :2], infer={"event_dims": ["row"]}
        )
    numpyro.factor("soft", -0.1 * level**2)


def in_noise(prior=IMAGE, y=SEEN):
    """The same in noise, by a handler inside of the model."""
    with reparam(config={"x": NoiseReparam()}):
        picture(prior, y)


class NoFlow(DiffusionPrior):
    """Its flow must not be solved."""

    def flow(self, z):
        raise AssertionError("the flow was solved")


def runs_of_pictures():
    yield short_run(NoiseSpace(picture, max_tree_depth=2))
    yield short_run(DiffusionGibbs(picture))
    yield short_run(HMC(in_noise, num_steps=2, trajectory_length=None))
    yield short_run(HMC(reparam(picture, config={"x": NoiseReparam()}), num_steps=2, trajectory_length=None))


def log_likelihood_of(data):
    """Of the data of `picture`, in closed form."""
    x, level = (np.asarray(data["posterior"][name]) for name in ("x", "level"))
    mean = x.sum(-1) + level[:, :, None, None]
    return (-0.5 * (SEEN[:, :2] - mean) ** 2 - 0.5 * np.log(2.0 * np.pi)).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4), ids=["noise_space", "gibbs", "reparam_inside", "reparam_outside"])
def test_named_pixels_survive_kernels_and_noise(index):
    """Dimensions by name, the data and the likelihood at every draw, in closed form, without one solve of the flow."""
    mcmc = next(run for i, run in enumerate(runs_of_pictures()) if i == index)
    check_pictures(mcmc)


def check_pictures(mcmc):
    mcmc._args = (NoFlow(DENOISER, flow_solver=DPMSolverPP(4)), SEEN)
    data = to_arviz(mcmc, log_likelihood=True, coords={"row": ["top", "bottom"]})
    assert data["posterior"]["x"].dims == ("chain", "draw", "patient", "row", "col")
    assert list(data["posterior"]["row"].values) == ["top", "bottom"]
    if "x_noise" in data["posterior"]:
        assert data["posterior"]["x_noise"].dims == data["posterior"]["x"].dims
    assert data["observed_data"]["y"].dims == ("patient", "row") and set(data["observed_data"].data_vars) == {"y"}
    np.testing.assert_array_equal(data["observed_data"]["y"], SEEN[:, :2])
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "patient")
    np.testing.assert_allclose(data["log_likelihood"]["y"], log_likelihood_of(data), rtol=1e-4, atol=1e-4)
    attributes = data["posterior"].attrs
    assert attributes["schedule"].startswith("x: VE(") and attributes["thinning"] == 1


def test_named_pixels_in_noise():
    rng, shapes = np.random.default_rng(0), {"x": (2, 2, 3), "x_noise": (2, 2, 3), "level": ()}
    draws = {name: rng.normal(size=(2, 10, *shape)).astype(np.float32) for name, shape in shapes.items()}
    kernel = HMC(in_noise, num_steps=2, trajectory_length=None)
    check_pictures(given(MCMC(kernel, num_warmup=0, num_samples=10, progress_bar=False), draws))


def test_plain_draws_and_frozen_chains(tmp_path):
    """Leading axes as they are said; chains at -10, -3, 3, 10 keep their axis; not said is an error."""
    frozen = np.array([-10.0, -3.0, 3.0, 10.0])[:, None] + 0.01 * np.random.default_rng(0).normal(size=(4, 50))
    for draws, order in ((frozen, ("chain", "draw")), (frozen.T, ("draw", "chain"))):
        data = to_arviz(draws, sample_dims=order, name="z", attributes={"sampling_time": 1.5})
        np.testing.assert_allclose(data["posterior"]["z"].mean("draw"), [-10.0, -3.0, 3.0, 10.0], atol=0.01)
        assert float(az.rhat(data)["z"]) > 2.5 and data["posterior"].attrs["sampling_time"] == 1.5
    drawn = to_arviz({"x": IMAGE.sample(jax.random.key(0), (20,))}, sample_dims=("draw",), group="prior",
                     dims={"x": ["row", "col"]})  # fmt: skip
    assert drawn["prior"]["x"].shape == (1, 20, 2, 3) and drawn["prior"]["x"].dims[2:] == ("row", "col")
    drawn.to_netcdf(tmp_path / "prior.nc")
    for wrong, error, message in (
        ({"run": frozen}, TypeError, "sample_dims must say"),
        ({"run": {"a": frozen, "b": frozen[:3]}, "sample_dims": ("chain", "draw")}, ValueError, "same number"),
        ({"run": np.ones(3), "sample_dims": ("chain", "draw")}, ValueError, "leading axes"),
        ({"run": frozen, "sample_dims": ("draw",), "log_likelihood": True}, ValueError, "needs a model with data"),
        ({"run": data, "sample_dims": ("draw",)}, TypeError, "are for plain draws"),
    ):
        with pytest.raises(error, match=message):
            to_arviz(**wrong)


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("point", len(x)):
        numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def of_a_line(slope, size=60):
    """Exact draws of the posterior of a slope as a run that MCMC might have made."""
    x = np.linspace(-1.0, 1.0, size).astype(np.float32)
    y = slope * x + np.random.default_rng(2).normal(size=size).astype(np.float32)
    mcmc = MCMC(
        HMC(line, num_steps=1, trajectory_length=None), num_warmup=0, num_samples=1000, num_chains=4, progress_bar=False
    )
    variance = 1.0 / (1.0 + (x**2).sum())
    draws = variance * (x * y).sum() + np.sqrt(variance) * np.random.default_rng(3).normal(size=(4, 1000))
    return given(mcmc, {"slope": draws.astype(np.float32)}, x, y), x, y


def given(mcmc, draws, *args, **fields):
    """A run with draws and statistics that are known, (chains, draws, ...); `MCMC` keeps them so."""
    shape = next(iter(draws.values())).shape[:2]
    states = jax.tree.map(jnp.asarray, {"z": draws, "diverging": np.zeros(shape, bool), **fields})
    mcmc._states, mcmc._last_state, mcmc._args, mcmc._kwargs = states, (), args, {}
    mcmc._states_flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), states)
    return mcmc


@pytest.mark.slow
def test_arviz_runs_on_the_result(tmp_path):
    """Summary, leave-one-out, comparison and plots, and through a file; predictions in both orders."""
    mcmc, x, y = of_a_line(1.5)
    key, samples = jax.random.key(0), mcmc.get_samples()
    data = to_arviz(
        mcmc,
        log_likelihood=True,
        prior=Predictive(line, num_samples=50)(key, x),
        posterior_predictive={"y": Predictive(line, samples)(key, x)["y"]},
    )
    assert data["prior"]["slope"].shape == (1, 50) and data["prior_predictive"]["y"].dims == ("chain", "draw", "point")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "point")
    data.to_netcdf(tmp_path / "line.nc")
    data = az.from_netcdf(tmp_path / "line.nc")
    assert verdict(data).converged and "slope" in az.summary(data).index
    flat = given(mcmc, {"slope": 0.01 * mcmc.get_samples(group_by_chain=True)["slope"]}, x, y)
    other = to_arviz(flat, log_likelihood=True)
    loo = az.loo(data)
    assert loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd
    assert az.compare({"fitted": data, "none": other}).index[0] == "fitted"
    az.plot_trace(data)
    az.plot_rank(data)
    if hasattr(az, "plot_ecdf_pit"):
        az.plot_loo_pit(data)
        ranks = to_arviz(
            {"slope": np.random.default_rng(0).uniform(size=100)}, sample_dims=("draw",), group="prior_sbc"
        )
        az.plot_ecdf_pit(ranks)
    else:
        az.plot_loo_pit(data, y="y")
    pyplot.close("all")
    with pytest.raises(ValueError, match=r"must be \(4, 1000\) or \(4000, ...\); got \(3, 60\)"):
        to_arviz(mcmc, posterior_predictive={"y": np.ones((3, 60))})


@pytest.mark.slow
def test_log_likelihood_of_many_data_in_bounded_memory():
    """4 x 1000 draws of 10,000 data: seconds, and no more memory than the result and a block."""
    mcmc, x, y = of_a_line(1.0, 10_000)
    began = time.process_time()
    tracemalloc.start()
    data = to_arviz(mcmc, log_likelihood=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    slope = np.asarray(data["posterior"]["slope"])[3, 999]
    expected = -0.5 * (y - slope * x) ** 2 - 0.5 * np.log(2.0 * np.pi)
    np.testing.assert_allclose(data["log_likelihood"]["y"][3, 999], expected, rtol=1e-4, atol=1e-5)
    assert data["log_likelihood"]["y"].shape == (4, 1000, 10_000) and peak < 1.5 * 4e7 * 4
    assert time.process_time() - began < 20.0


def test_likelihoods_that_cannot_be_had():
    def latent():
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=0.0)

    def part():
        with numpyro.plate("data", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=0.0)

    def factor():
        numpyro.factor("soft", -(numpyro.sample("x", dist.Normal(0.0, 1.0)) ** 2))

    for model, name, message in ((latent, "other", r"\['x'\] have none"), (part, "x", "show a part"),
                                 (factor, "x", "factors are no data")):  # fmt: skip
        mcmc = given(
            MCMC(HMC(model, num_steps=1, trajectory_length=None), num_warmup=0, num_samples=3, progress_bar=False),
            {name: np.zeros((1, 3))},
        )
        with pytest.raises(ValueError, match=message):
            to_arviz(mcmc, log_likelihood=True)


def test_statistics_by_level():
    """Levels of a draw are a dimension with their values, names are ArviZ's, and sums of evaluations an attribute."""
    rng, shape = np.random.default_rng(0), (2, 300)
    by_level = {"level_accept_prob": rng.uniform(size=(*shape, 3)), "level_step_size": rng.uniform(size=(*shape, 3))}
    fields = {"accept_prob": rng.uniform(size=shape), "potential_energy": rng.normal(size=shape),
              "num_score_evals": np.full(shape, 7), **by_level, "adapt_state.step_size": np.ones(shape)}  # fmt: skip
    kernel = DiffusiveGibbs(model, noise_levels=(10.0, 3.0, 1.0))
    mcmc = MCMC(kernel, num_warmup=0, num_samples=300, progress_bar=False)
    data = to_arviz(given(mcmc, {"x": rng.normal(size=(*shape, 2))}, **fields))
    stats = data["sample_stats"]
    assert stats["level_step_size"].dims == ("chain", "draw", "level") and list(stats["level"].values) == [10, 3, 1]
    assert {"acceptance_rate", "diverging", "num_score_evals", "step_size"} <= set(stats.data_vars)
    np.testing.assert_allclose(stats["lp"], -fields["potential_energy"], rtol=1e-6)
    for said in (verdict(data), verdict(mcmc)):
        np.testing.assert_allclose(
            said.levels["acceptance_rate"], by_level["level_accept_prob"].mean((0, 1)), rtol=1e-5
        )
        np.testing.assert_allclose(said.levels["noise_level"], [10.0, 3.0, 1.0])
    attributes = data["posterior"].attrs
    assert attributes["num_score_evals"] == 4200 and attributes["density"] == "Density(source='auto', gradient=None)"


def level_of(size):
    """What a walk of `TwistedSMC` may have said, by noise level."""
    return Level(*(np.linspace(2.0 + i, 1.0, size) for i in range(len(Level._fields))))


@pytest.mark.parametrize("cls", [TwistedSMC, TemperedSMC, PopulationHMC])
def test_particles_that_have_run(cls, tmp_path):
    """Islands are chains; the evidence, the problems and what happened on the way come back from a file."""
    rng = np.random.default_rng(0)
    sampler = cls(model, 40, progress_bar=False)
    steps = {TemperedSMC: tempered.Temperature, PopulationHMC: rounds.Temperature}
    history = level_of(5)
    if cls is not TwistedSMC:
        step = steps[cls]
        history = [step(*(np.full((3,) if field in ("log_growth", "num_blind") else (), k + 1)
                          for field in step._fields)) for k in range(5)]  # fmt: skip
    islands = rng.normal(size=4)
    evidence = Evidence(np.float32(-1.5), np.float32(0.25), islands)
    draws = Draws({"x": jnp.asarray(rng.normal(size=(40, 2)))}, jnp.zeros(40, int), jnp.arange(40).reshape(4, 10))
    sampler._outcome = Outcome(draws, evidence, history, ("one; and more", "two"))
    sampler._arguments = (2.0,), {}

    to_arviz(sampler, log_likelihood=True).to_netcdf(tmp_path / "run.nc")
    data = az.from_netcdf(tmp_path / "run.nc")
    np.testing.assert_allclose(data["posterior"]["x"], draws.values["x"].reshape(4, 10, 2))
    assert np.unique(data["observed_data"]["y"]) == [2.0]
    expected = dist.Normal(draws.values["x"], 1.0).log_prob(2.0).sum(-1)
    np.testing.assert_allclose(np.ravel(data["log_likelihood"]["y"]), expected, rtol=1e-5)
    attributes = data["posterior"].attrs
    assert attributes["kernel"] == cls.__name__ and attributes["log_evidence"] == -1.5
    np.testing.assert_allclose(attributes["log_evidence_islands"], islands)
    name = "noise_level" if cls is TwistedSMC else "temperature"
    assert data["annealing"][name].dims == ("level",) and len(data["annealing"][name]) == 5
    said, again = verdict(sampler), verdict(data)
    assert said.problems[:2] == ("one; and more", "two") and again.problems == said.problems
    assert said.advice == ("Raise the budget" if cls is PopulationHMC else "what the first problem says")
    np.testing.assert_allclose(again.levels[name], said.levels[name])
    with pytest.raises(ValueError, match="batch_ndims=2"):
        to_arviz(sampler, posterior_predictive={"y": np.ones((40, 2))})


@pytest.mark.slow
def test_arviz_may_be_imported_first():
    """ArviZ 1.x then loads NumPyro lazily, and its own converter misses a module of it."""
    code = """
import arviz, jax, jax.numpy as jnp
from numpyro.infer import MCMC
from numpyro_diffusion.diagnostics import to_arviz
from numpyro_diffusion.infer import ULA
import numpyro
import numpyro.distributions as dist
jax.config.update("jax_disable_most_optimizations", True)
mcmc = MCMC(ULA(lambda: numpyro.sample("x", dist.Normal(jnp.zeros(1), 1.0))), num_warmup=0, num_samples=3)
mcmc.run(jax.random.key(0))
print(to_arviz(mcmc)["posterior"]["x"].shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("(1, 3, 1)"), result.stderr
