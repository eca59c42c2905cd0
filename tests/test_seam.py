"""The seam to NumPyro: a model is read once, refused by name where it cannot be read, and started where it is told."""

import pickle
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import around, standard
from moments import assert_moments
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import HMC, MCMC, NUTS, Gibbs, init_to_value

from numpyro_diffusion.denoise import FromFunction, Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    ULA,
    AnnealedLangevin,
    Cycle,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    GuidedPCN,
    GuidedReverse,
    Independence,
    LineIntegral,
    Mixture,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    ScoreHMC,
    SplitGibbs,
    TemperedSMC,
    with_density,
)
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, StochasticHeun

SAMPLER = DPMSolverPP(8, eta=1.0)
PRIOR = standard(sampler=SAMPLER)
Y = jnp.array([3.0, -1.0])


def observed(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def with_scale(y):
    x = numpyro.sample("x", PRIOR)
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def start(kernel, *args, chains=2, init_params=None):
    keys = jax.random.split(jax.random.key(0), chains)
    return kernel.init(keys, 0, init_params, model_args=args, model_kwargs={})


# What cannot be read


def subsampled(y):
    x = numpyro.sample("x", PRIOR)
    with numpyro.plate("rows", 4, subsample_size=2):
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=numpyro.subsample(jnp.tile(y, (4, 1)), event_dim=1))


def drawing(y):
    x = numpyro.sample("x", PRIOR)
    noise = jax.random.normal(numpyro.prng_key(), (2,))
    numpyro.sample("y", dist.Normal(x + noise, 1.0).to_event(1), obs=y)


def in_scan(y):
    def step(total, y):
        total = total + numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=y)
        return total, None

    scan(step, jnp.zeros(2), jnp.stack([y, y]))


def discrete(y):
    x = numpyro.sample("x", PRIOR)
    k = numpyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    numpyro.sample("y", dist.Normal(x, jnp.where(k == 1, 10.0, 1.0)).to_event(1), obs=y)


def with_missing(y):
    x = numpyro.sample("x", PRIOR)
    with numpyro.plate("pixels", 2):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y, obs_mask=jnp.array([True, False]))


def with_x_noise(y):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, numpyro.sample("x_noise", dist.LogNormal(0.0, 0.5))).to_event(1), obs=y)


KERNELS = {
    "pcn": DiffusionPCN,
    "guided_pcn": GuidedPCN,
    "mala": MALA,
    "ula": ULA,
    "noise_space": NoiseSpace,
    "split_gibbs": partial(SplitGibbs, rho=0.5),
    "annealed": AnnealedLangevin,
    "independence": Independence,
    "mixture": lambda model: Mixture([DiffusionPCN, Independence], model=model),
}


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (subsampled, r"needs all data at every step; the plates \['rows'\] .* Drop subsample_size"),
        (drawing, r"numpyro.prng_key\(\) outside of a sample site"),
        (in_scan, r"diffusion sites \['x'\] inside numpyro's scan"),
    ],
    ids=["subsampled", "drawing", "in_scan"],
)
def test_models_that_cannot_be_read_are_refused_by_all(make, model, message):
    with pytest.raises(ValueError, match=message):
        start(make(model), Y)


REFUSED = {
    "gibbs_subsampled": (DiffusionGibbs, subsampled, "needs all data"),
    "pcn_discrete": (DiffusionPCN, discrete, r"sites \['k'\] are discrete.*DiscreteGibbs"),
    "gibbs_discrete": (DiffusionGibbs, discrete, r"sites \['k'\] are discrete.*DiscreteGibbs"),
    "pcn_missing": (DiffusionPCN, with_missing, r"sites \['y'\] are sampled with obs_mask=.*numpyro.handlers.mask"),
    "annealed_missing": (AnnealedLangevin, with_missing, r"sites \['y'\] are sampled with obs_mask="),
    "pcn_others": (DiffusionPCN, with_scale, r"latent sites \['scale'\]. Use DiffusionGibbs\(model\)"),
    "guided_others": (GuidedPCN, with_scale, r"DiffusionGibbs\(model, x_kernel=GuidedPCN\)"),
    "name": (NoiseSpace, with_x_noise, r"needs the site names \['x_noise'\] for itself"),
    "law": (partial(DiffusionPCN, solver=StochasticHeun(8)), observed, "law='marginals'. Use solve.Adams"),
}


@pytest.mark.parametrize(("make", "model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(make, model, message):
    with pytest.raises(ValueError, match=message):
        start(make(model), Y)


def test_a_sampler_of_particles_refuses_a_part_of_the_data():
    with pytest.raises(ValueError, match="TemperedSMC needs all data at every step"):
        TemperedSMC(subsampled, num_particles=8, progress_bar=False).run(jax.random.key(0), Y)


def test_first_order_in_the_reverse_process_is_warned_of():
    with pytest.warns(UserWarning, match="first order in its steps"):
        start(DiffusionPCN(observed, solver=Ancestral(8)), Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(DiffusionPCN(observed), Y)


# What is read


def hierarchical(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", DiffusionPrior(Gaussian(mean * jnp.ones(2), 1.0, VE(0.05, 20.0))))
    with numpyro.plate("rows", 3):
        z = numpyro.sample("z", PRIOR)
    w = numpyro.sample("w", PRIOR.expand([4]).to_event(1))
    numpyro.deterministic("total", x.sum() + z.sum() + w.sum())
    numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)


def test_record_knows_the_model():
    """Names, shapes, dependence and the parts of the density, from one execution at most for each kind of argument."""
    runs = []

    def counted(y):
        runs.append(1)
        hierarchical(y)

    reading = Record(counted).at((Y,), {})
    structure = reading.structure
    assert (structure.diffusion, structure.others) == (["x", "z", "w"], ["mean", "scale"])
    assert structure.dependent == ["x"] and structure.latent["x"].depends_on == {"mean"}
    assert [structure.latent[name].shape for name in ("x", "z", "w")] == [(2,), (3, 2), (4, 2)]
    assert structure.deterministic == ("total",) and len(runs) == 1

    @jax.jit
    def parts(z):
        return reading.evaluate(z), reading.evaluate(jax.tree.map(lambda leaf: leaf + 1.0, z))

    z = {name: 0.3 * jnp.ones(site.unconstrained_shape) for name, site in structure.latent.items()}
    at, _ = parts(z)
    assert len(runs) == 2
    scale = jnp.exp(0.3)
    expected = dist.Normal(0.0, 1.0).log_prob(0.3) + dist.HalfNormal(1.0).log_prob(scale)
    expected += dist.Normal(0.3, scale).log_prob(Y).sum()
    np.testing.assert_allclose(at.log_rest, expected, rtol=1e-5)
    np.testing.assert_allclose(at.log_jacobian["scale"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(at.priors["x"].denoisers.location, [0.3, 0.3], rtol=1e-6)
    np.testing.assert_allclose(at.values["scale"], scale, rtol=1e-6)


ALL_KERNELS = {
    "pcn": (DiffusionPCN, observed),
    "guided_pcn": (GuidedPCN, observed),
    "particle_gibbs": (ParticleGibbs, observed),
    "independence": (Independence, with_scale),
    "split_gibbs": (partial(SplitGibbs, rho=0.5), with_scale),
    "mala": (partial(MALA, density=LineIntegral()), with_scale),
    "hmc": (partial(ScoreHMC, density=LineIntegral()), with_scale),
    "ula": (ULA, with_scale),
    "diffusive_gibbs": (DiffusiveGibbs, with_scale),
    "annealed": (AnnealedLangevin, observed),
    "guided_reverse": (partial(GuidedReverse, guidance="mmps"), observed),
    "parallel_tempering": (partial(ParallelTempering, kernel=partial(MALA, density=LineIntegral())), with_scale),
    "noise_space": (NoiseSpace, with_scale),
    "gibbs": (DiffusionGibbs, with_scale),
    "gibbs_guided": (partial(DiffusionGibbs, x_kernel=GuidedPCN), with_scale),
    "gibbs_noise": (partial(DiffusionGibbs, x_kernel=NoiseSpace), with_scale),
    "cycle": (lambda model: Cycle([DiffusionPCN, Independence], model=model), observed),
    "mixture": (lambda model: Mixture([NUTS, DiffusionPCN], [0.5, 0.5], model=model), observed),
}


@pytest.mark.parametrize(("make", "model"), ALL_KERNELS.values(), ids=ALL_KERNELS)
def test_executions_of_the_model(make, model):
    """At most six before the first draw: all that `MCMC` traces in a first run, with nothing compiled."""
    runs = []

    def counted(y):
        runs.append(1)
        model(y)

    kernel, keys = make(counted), jax.random.split(jax.random.key(0), 2)
    state = jax.eval_shape(lambda keys: kernel.init(keys, 2, None, model_args=(Y,), model_kwargs={}), keys)
    kernel._compiled_start.bind((Y,), {})
    jax.eval_shape(lambda state: kernel.sample(state, (Y,), {}), state)
    jax.eval_shape(jax.vmap(kernel.postprocess_fn((Y,), {})), state.z)
    assert 2 <= len(runs) <= 6


def test_executions_of_a_second_run():
    """A start that is compiled, and one on new data that finds it so: what inner kernels keep is still right."""
    runs = []

    def counted(y):
        runs.append(1)
        with_scale(y)

    for kernel in (NoiseSpace(counted, HMC, num_steps=2), DiffusionGibbs(counted, rest_kernel=HMC)):
        for y in (Y, Y + 1.0):
            before = len(runs)
            state = start(kernel, y)
            jax.eval_shape(lambda state, y=y, kernel=kernel: kernel.sample(state, (y,), {}), state)
            assert 2 <= len(runs) - before <= 5


def test_an_inner_kernels_own_start():
    """`init_strategy` of NUTS is one for the sites of the model, whatever coordinates NUTS has inside."""
    strategy = init_to_value(values={"scale": 2.0})
    inner = partial(NUTS, init_strategy=strategy)
    z = start(NoiseSpace(with_scale, inner), Y).z
    np.testing.assert_allclose(z["scale"], 2.0, rtol=1e-5)
    state = start(DiffusionGibbs(with_scale, rest_kernel=inner), Y)
    np.testing.assert_allclose(state.values["scale"], 2.0, rtol=1e-5)


@pytest.mark.slow
def test_a_composite_kernel_inside():
    """NumPyro's `Gibbs` as the inner kernel of a block: what is given to the block is not what `Gibbs` gives."""

    def model(y):
        x = numpyro.sample("x", PRIOR)
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + shift, scale).to_event(1), obs=y)

    short = partial(HMC, step_size=0.1, trajectory_length=0.2)
    inner = lambda model: Gibbs([(short(model), ["x_noise"]), (short(model), None)])  # noqa: E731
    kernel = Gibbs([(NoiseSpace(model, inner), ["x", "shift"]), (short(model), ["scale"])])
    mcmc = MCMC(kernel, num_warmup=0, num_samples=8, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    samples = mcmc.get_samples()
    assert set(samples) == {"x", "scale", "shift"} and bool((samples["scale"] > 0.0).all())
    assert all(float(jnp.ptp(values)) > 0.0 for values in (samples["x"][:, 0], samples["scale"], samples["shift"]))


@pytest.mark.slow
def test_expanded_sites_are_all_their_points():
    """`prior.expand([3]).to_event(1)`: three posteriors N(y / 2, 1 / 2), by the prior's moves and by gradients."""
    rows = jnp.array([[3.0, 3.0], [0.0, 0.0], [-3.0, -3.0]])

    def model(y):
        x = numpyro.sample("x", standard().expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)

    for kernel, draws in ((DiffusionPCN(model, num_proposals=16), 400), (MALA(model), 800)):
        mcmc = MCMC(kernel, num_warmup=200, num_samples=draws, num_chains=8, chain_method="vectorized")
        mcmc.run(jax.random.key(0), rows)
        assert_moments(mcmc.get_samples(group_by_chain=True)["x"], rows / 2, 0.5)


BATCHED = {"pcn": partial(DiffusionPCN, num_proposals=8), "mala": MALA, "noise_space": NoiseSpace}


@pytest.mark.slow
@pytest.mark.parametrize("make", BATCHED.values(), ids=BATCHED)
def test_a_batch_of_conditions_is_a_batch_of_priors(make):
    """x_i ~ N(c_i, 1) in a plate, y_i = x_i + noise: means (c_i + y_i) / 2."""
    centres, y = jnp.array([-2.0, 0.0, 1.5]), jnp.array([0.0, 2.0, 1.5])

    def model(y):
        with numpyro.plate("rows", 3):
            x = numpyro.sample("x", around(centres, sampler=DPMSolverPP(48, eta=1.0)))
            numpyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    mcmc = MCMC(make(model), num_warmup=200, num_samples=400, num_chains=8, chain_method="vectorized")
    mcmc.run(jax.random.key(0), y)
    assert_moments(mcmc.get_samples(group_by_chain=True)["x"][..., 0], (centres + y) / 2, 0.5)


DATA = jnp.array(3.0)


def of_a_global():
    x = numpyro.sample("x", standard())
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=DATA * jnp.ones(2))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(DiffusionPCN, num_proposals=8), id="pcn", marks=pytest.mark.slow),
        pytest.param(MALA, id="mala"),
    ],
)
def test_data_that_the_model_reads_from_elsewhere_are_read_anew(make, monkeypatch):
    """A kernel that runs twice, with data in a global that changes in between: posterior means 2.4 and -2.4."""
    kernel, means = make(of_a_global), []
    for value in (3.0, -3.0):
        monkeypatch.setattr("test_seam.DATA", jnp.array(value))
        mcmc = MCMC(kernel, num_warmup=200, num_samples=200, num_chains=8, chain_method="vectorized")
        mcmc.run(jax.random.key(0))
        means.append(float(mcmc.get_samples()["x"].mean()))
    np.testing.assert_allclose(means, [2.4, -2.4], atol=0.3)


@pytest.mark.slow
def test_supports_made_inside_the_model():
    """Bounds that are computed from data or from another site; a branch of the model; a network's parameters."""

    def model(y):
        bound = numpyro.sample("bound", dist.HalfNormal(5.0))
        inside = numpyro.sample("inside", dist.Uniform(0.0, bound))
        wide = numpyro.sample("wide", dist.Uniform(jnp.zeros(2), jnp.max(y) + 1.0).to_event(1))
        shift = cond(True, lambda v: v + 1.0, lambda v: v, inside)
        unused = jax.random.normal(numpyro.prng_key(), (2,))
        numpyro.deterministic("unused", unused)
        numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR) + shift + wide, 1.0).to_event(1), obs=y)

    for make in (MALA, NoiseSpace, partial(SplitGibbs, rho=0.5)):
        assert bool(jnp.isfinite(start(make(model), Y).z["x"]).all())


@pytest.mark.slow
def test_bounds_made_of_data_in_blocks():
    def model(y):
        wide = numpyro.sample("wide", dist.Uniform(jnp.zeros(2), jnp.max(y) + 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR) + wide, 1.0).to_event(1), obs=y)

    mcmc = MCMC(DiffusionGibbs(model, rest_kernel=HMC), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    wide = mcmc.get_samples()["wide"]
    assert bool(((wide > 0.0) & (wide < 4.0)).all())


def test_a_support_that_another_block_moves_is_refused():
    def model(y):
        bound = numpyro.sample("bound", dist.HalfNormal(5.0))
        numpyro.sample("inside", dist.Uniform(0.0, bound))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR), bound).to_event(1), obs=y)

    kernel = Gibbs([(NUTS(model), ["bound"]), (MALA(model), ["x", "inside"])])
    with pytest.raises(ValueError, match=r"supports of sites \['inside'\] depend on sites of other blocks"):
        MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False).run(jax.random.key(0), Y)


@pytest.mark.slow
def test_a_block_in_noise_space_starts_where_it_can():
    """A draw of the prior outside of a constraint is no start: the chain would stand there for good."""

    def model(y):
        x = numpyro.sample("x", PRIOR)
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.factor("positive", jnp.log(x[0] - 0.3))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)

    mcmc = MCMC(DiffusionGibbs(model, x_kernel=partial(NoiseSpace, inner=HMC)), num_warmup=30, num_samples=30)
    for seed in range(2):
        mcmc.run(jax.random.key(seed), Y)
        x = mcmc.get_samples()["x"]
        assert bool((x[:, 0] > 0.3).all()) and float(x[:, 0].std()) > 0.0


def with_mask(y, mask):
    x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x[mask], 1.0).to_event(1), obs=y[mask])


def with_size(y, n):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR) + jnp.zeros(n), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "argument"), [(with_mask, np.array([True, False])), (with_size, np.int64(2))], ids=["mask", "size"]
)
def test_arguments_that_must_be_known(model, argument):
    assert bool(jnp.isfinite(start(DiffusionPCN(model), Y, argument).log_likelihood).all())


# Where it starts


def test_starts_where_it_is_told():
    """By `init_to_value` and by `init_params`, integers too; in noise space by the inverse flow."""
    x = jnp.array([2.0, -1.5])
    strategy = init_to_value(values={"x": x, "scale": 2.0})
    for make in (MALA, partial(SplitGibbs, rho=0.5), NoiseSpace):
        state = start(make(with_scale, init_strategy=strategy), Y)
        np.testing.assert_allclose(state.z["x"], jnp.stack([x, x]), atol=0.02)
    z = start(NoiseSpace(with_scale, init_strategy=strategy), Y).z
    np.testing.assert_allclose(z["scale"], 2.0, rtol=1e-5)
    given = {"x": jnp.stack([x, x]), "scale": jnp.zeros(2, int)}
    for make in (MALA, NoiseSpace):
        state = start(make(with_scale), Y, init_params=given)
        np.testing.assert_allclose(state.z["x"], given["x"], atol=0.02)
    at_rest = {"x_noise": jnp.zeros((2, 2), int), "scale": jnp.zeros(2, int)}
    np.testing.assert_allclose(start(NoiseSpace(with_scale), Y, init_params=at_rest).z["x"], 0.0, atol=0.02)
    assert start(DiffusionPCN(observed), Y, init_params={"x": jnp.ones((2, 2), int)}).z["x"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"init_params must have the latent sites \['x'\]; got \['z'\]"):
        start(DiffusionPCN(observed), Y, init_params={"z": jnp.stack([x, x])})


# Kernels inside kernels


def posterior_mean(kernel, *args, draws=300):
    mcmc = MCMC(kernel, num_warmup=200, num_samples=draws, num_chains=4, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), *args)
    return np.asarray(mcmc.get_samples()["x"].mean(0))


class ShortHMC(HMC):
    """Its default trajectory is a whole period of a Gaussian whose mass matrix is right, and ends where it began."""

    def __init__(self, model, **options):
        super().__init__(model, **{"trajectory_length": 1.0, **options})


@pytest.mark.parametrize(
    "inner",
    [ShortHMC, partial(HMC, trajectory_length=1.0), ShortHMC(observed), lambda model: ShortHMC(model)],
    ids=["class", "partial", "instance", "function"],
)
def test_an_inner_kernel_is_a_class_a_factory_or_a_kernel(inner):
    np.testing.assert_allclose(posterior_mean(NoiseSpace(observed, inner), Y), Y / 2, atol=0.15)


@pytest.mark.slow
def test_numpyros_kernel_on_the_diffusion_sites():
    """NUTS as x-kernel has the priors in its model: without them x would follow the data."""

    def fixed(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("other", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    kernel = DiffusionGibbs(fixed, x_kernel=NUTS)
    mcmc = MCMC(kernel, num_warmup=200, num_samples=300, num_chains=2, chain_method=jax.vmap, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    np.testing.assert_allclose(mcmc.get_samples()["x"].mean(0), Y / 2, atol=0.2)


def test_what_is_no_kernel_is_refused():
    with pytest.raises(TypeError, match="inner must be a kernel or make one from a model"):
        NoiseSpace(observed, 3)
    with pytest.raises(TypeError, match="x_kernel must make an MCMCKernel"):
        DiffusionGibbs(observed, x_kernel=lambda model: model)
    with pytest.raises(ValueError, match=r"give the options \['num_steps'\] to it"):
        NoiseSpace(observed, HMC(observed), num_steps=3)


WITH_DENSITY = with_density(observed)


def test_runs_on_a_model_with_density_pickle():
    mcmc = MCMC(Mixture([HMC, DiffusionPCN], model=WITH_DENSITY), num_warmup=2, num_samples=2, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    again = pickle.loads(pickle.dumps(mcmc))
    np.testing.assert_array_equal(again.get_samples()["x"], mcmc.get_samples()["x"])


# What it costs

CALLS, SCHEDULE = [0], VE(0.01, 40.0)


def told(x_t, t, _):
    """The score of N(0, 1) under noise."""
    jax.debug.callback(lambda _: CALLS.__setitem__(0, CALLS[0] + 1), x_t)
    return -x_t / (1.0 + SCHEDULE.sigma(t) ** 2)


COUNTED = {
    "ula": ULA,
    "mala_line": partial(MALA, density=LineIntegral()),
    "mala_line_uncirculated": partial(MALA, density=LineIntegral(5, circulation=False)),
    "hmc_line": partial(ScoreHMC, num_steps=8, density=LineIntegral()),
    "pcn": partial(DiffusionPCN, num_proposals=2, global_fraction=1.0),
    "annealed": partial(AnnealedLangevin, num_levels=4, steps_per_level=3),
}


@pytest.mark.parametrize("make", COUNTED.values(), ids=COUNTED)
def test_score_evaluations_are_those_made(make):
    """A step of one chain, by a score that tells the host of every call."""
    denoiser = FromFunction(told, (1,), "score", schedule=SCHEDULE)
    prior = DiffusionPrior(denoiser, density="none", sampler=SAMPLER)

    def model():
        numpyro.sample("y", dist.Normal(numpyro.sample("x", prior)[0], 1.0), obs=1.0)

    kernel = make(model)
    state = kernel.init(jax.random.key(0), 0, None, model_args=(), model_kwargs={})
    step = jax.jit(lambda state: kernel.sample(state, (), {}))
    jax.block_until_ready(step(state))
    jax.effects_barrier()
    CALLS[0] = 0
    state = jax.block_until_ready(step(state))
    jax.effects_barrier()
    assert CALLS[0] == int(state.num_score_evals) > 0


def test_matrix_products_of_a_step_are_in_full_precision():
    """TF32 is the default of NVIDIA GPUs: a linear likelihood of small noise would be another one."""
    matrix = jnp.array([[1.0, 2.0, 3.0], [0.5, 1.0, 0.0]]).T

    def model(y):
        x = numpyro.sample("x", PRIOR)
        numpyro.sample("y", dist.Normal(matrix @ x, 0.002).to_event(1), obs=y)

    for kernel in (DiffusionPCN(model), MALA(model), NoiseSpace(model, HMC, num_steps=2)):
        state = start(kernel, jnp.ones(3))
        text = jax.jit(lambda state, kernel=kernel: kernel.sample(state, (jnp.ones(3),), {})).lower(state).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "3x2" in line]
        assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
