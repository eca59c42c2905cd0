"""Kernels of guided walks: exact for the solver's walk, in however few steps; masks, several sites, lost guidance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from moments import assert_moments
from numpyro.handlers import mask
from numpyro.infer import MCMC

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import AnnealedLangevin, DiffusionGibbs, GuidedPCN, ParticleGibbs, TwistedSMC
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, ExponentialEuler, terminal_point

SLOW = pytest.mark.slow
COUNT = 20_000
ROUGH = DiffusionPrior(
    GaussianMixture([0.4, 0.6], jnp.array([[-2.0, 0.5], [1.5, -1.0]]), 0.5, VE(0.1, 10.0)),
    sampler=DPMSolverPP(6, eta=1.0),
    density="none",
)
FINE = DPMSolverPP(64, eta=1.0)
PRIOR = DiffusionPrior(Gaussian(jnp.zeros(3), 1.0, VE(0.01, 40.0)), sampler=FINE, density="none")
GUIDED = {"guided_pcn": GuidedPCN, "particle_gibbs": partial(ParticleGibbs, num_particles=3)}
each_kernel = pytest.mark.parametrize("make", GUIDED.values(), ids=GUIDED)


def run(kernel, *args, num_warmup=100, num_samples=400, chains=8, start=None):
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": chains}
    mcmc = MCMC(kernel, **options, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), *args, init_params=start)
    return mcmc


def rough(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", ROUGH).sum(), 0.5), obs=y)


def exact_walks(key, y, solver):
    """Walks of the solver's own law times the likelihood, by rejection: (COUNT, levels, 2) and their clean ends."""
    denoiser = ROUGH.denoiser
    times = solver.times(denoiser)

    def walk(key):
        key, key_first = jax.random.split(key)
        first = terminal_point(denoiser, jax.random.normal(key_first, (2,)))

        def down(carry, k):
            x_t, memory = solver.step(denoiser, *carry, times[k], times[k + 1], jax.random.fold_in(key, k))
            return (x_t, memory), x_t

        _, later = jax.lax.scan(down, (first, solver.init(denoiser, first)), jnp.arange(len(times) - 1))
        return jnp.concatenate([first[None], later]), denoiser(later[-1], times[-1]).x0

    key_walks, key_kept = jax.random.split(key)
    walks, clean = jax.jit(jax.vmap(walk))(jax.random.split(key_walks, 8 * COUNT))
    kept = jax.random.uniform(key_kept, (len(clean),)) < jnp.exp(-0.5 * ((y - clean.sum(1)) / 0.5) ** 2)
    assert int(kept.sum()) >= COUNT
    return walks[kept][:COUNT], clean[kept][:COUNT]


EULER = ExponentialEuler(6, eta=1.0, grid=ROUGH.sampler.grid)
STEPS = {
    "guided_pcn": (GuidedPCN, {"guidance": "pigdm"}),
    "guided_pcn_3": (GuidedPCN, {"guidance": "dps", "num_proposals": 3, "global_fraction": 0.8, "solver": EULER}),
    "particle_gibbs": (ParticleGibbs, {"guidance": "flat", "num_particles": 3}),
    "particle_gibbs_euler": (ParticleGibbs, {"num_particles": 3, "solver": EULER}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), STEPS.values(), ids=STEPS)
def test_steps_keep_the_law_of_a_rough_walk(kind, options):
    """Five steps from noise to data, a guidance that is not exact: ranks against fresh draws, Kolmogorov-Smirnov."""
    y, kernel = 1.0, kind(rough, **options)
    solver = options.get("solver", ROUGH.sampler)
    (walk, x), (_, fresh) = (exact_walks(jax.random.key(seed), y, solver) for seed in (1, 2))
    state = kernel.init(jax.random.split(jax.random.key(3), COUNT), 0, {"x": x}, (y,), {})
    state = state._replace(walk=walk)
    step = jax.jit(lambda state: kernel.sample(state, (y,), {}))
    for _ in range(4):
        state = step(state)
    moved = state.z["x"]
    assert float(jnp.mean(jnp.any(moved != x, axis=1))) > 0.4
    for direction in jnp.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]]):
        a, b = np.sort(moved @ direction), np.sort(fresh @ direction)
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid) - np.searchsorted(b, grid)).max() / COUNT
        assert distance < 1.95 * np.sqrt(2.0 / COUNT)  # the 0.1 % point of the two-sample statistic


@SLOW
@each_kernel
def test_an_unknown_noise_level_does_not_collapse(make):
    """Ten pixels and their noise, against quadrature: an error of the walk would feed on itself in the sweep."""
    y = np.random.default_rng(3).normal(size=(2, 10)).T @ [1.0, 0.5]

    def model(y):
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        x = numpyro.sample("x", DiffusionPrior(Gaussian(jnp.zeros(10)), sampler=FINE, density="none"))
        numpyro.sample("y", dist.Normal(x, s).to_event(1), obs=y)

    s = np.linspace(0.005, 3.0, 4000)
    log_weight = -0.5 * (s**2 + ((y**2)[:, None] / (1 + s**2) + np.log1p(s**2)).sum(0))
    weight = np.exp(log_weight - log_weight.max())
    mean, square = (weight @ s**n / weight.sum() for n in (1, 2))
    rng, chains = np.random.default_rng(4), 32
    scale = rng.choice(s, chains, p=weight / weight.sum())[:, None]
    x = y / (1 + scale**2) + scale / np.sqrt(1 + scale**2) * rng.normal(size=(chains, 10))
    start = {"x": jnp.array(x, jnp.float32), "s": jnp.log(jnp.array(scale[:, 0], jnp.float32))}  # the posterior itself
    kernel = DiffusionGibbs(model, x_kernel=make)
    draws = run(kernel, jnp.array(y), num_warmup=100, num_samples=300, chains=chains, start=start)
    assert_moments(draws.get_samples(group_by_chain=True)["s"], mean, square - mean**2)


SEEN = jnp.array([True, True, False])
DATA, HIDDEN = jnp.array([1.0, -0.5, jnp.nan]), jnp.array([1.0, -0.5, -100.0])


def masked(y):
    x = numpyro.sample("x", PRIOR)
    with numpyro.plate("pixel", 3), mask(mask=SEEN):
        numpyro.sample("y", dist.Normal(x, 0.3), obs=y)


def annealed(model):
    """Finely: what it lacks is of the order of its Langevin steps."""
    return AnnealedLangevin(model, guidance="mmps", num_levels=48, steps_per_level=8)


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[SLOW] * (name != "guided_pcn")) for name, make in GUIDED.items()]
    + [pytest.param(annealed, id="annealed", marks=SLOW)],
)
def test_what_a_mask_hides_is_not_seen(make):
    """Two pixels of three, the third a NaN: the posterior of these, the prior of the third."""
    x = run(make(masked), DATA).get_samples(group_by_chain=True)["x"]
    mean, variance = jnp.where(SEEN, DATA / 1.09, 0.0), jnp.where(SEEN, 0.09 / 1.09, 1.0)
    if make is annealed:
        assert (abs(x.mean((0, 1)) - mean) < 0.1 * jnp.sqrt(variance)).all()
        assert (abs(x.std((0, 1)) / jnp.sqrt(variance) - 1.0) < 0.1).all()
    else:
        assert_moments(x, mean, variance)


@pytest.mark.slow
def test_twisted_smc_sees_no_more():
    """Nor does what stands under the mask, a number, move the evidence: that of two pixels."""
    smc = TwistedSMC(masked, 2000).run(jax.random.key(0), HIDDEN)
    truth = dist.Normal(0.0, jnp.sqrt(1.09)).log_prob(DATA[:2]).sum()
    assert abs(smc.log_evidence.value - truth) < 4.0 * smc.log_evidence.standard_error + 0.02
    x = smc.get_samples()["x"]
    assert (
        abs(x.mean(0) - jnp.where(SEEN, DATA / 1.09, 0.0)) < 5.0 * jnp.sqrt(jnp.where(SEEN, 0.083, 1.0) / 2000)
    ).all()


def two_sites(y):
    """Two sites of other units and ladders, one in a plate: y = a_1 + a_2 + b / 100 + 0.5 eps."""
    with numpyro.plate("two", 2):
        a = numpyro.sample("a", DiffusionPrior(Gaussian(jnp.zeros(1), 1.0, VE(0.01, 40.0)), sampler=FINE))
    wide = Gaussian(jnp.array([100.0]), 1e4, VE(1.0, 4000.0))
    b = numpyro.sample("b", DiffusionPrior(wide, sampler=FINE))
    numpyro.sample("y", dist.Normal(a.sum(0) + b / 100.0, 0.5).to_event(1), obs=y)


Y, GAIN = jnp.array([3.0]), 1.0 / 3.25


@pytest.mark.slow
def test_several_sites():
    """Prior means 0, 0 and 1, variances 1: each has the mean m + 2 / 3.25 and the variance 1 - 1 / 3.25."""
    for make in GUIDED.values():
        draws = run(make(two_sites), Y).get_samples(group_by_chain=True)
        x = jnp.concatenate([draws["a"][..., 0], draws["b"] / 100.0], -1)
        assert_moments(x, jnp.array([0.0, 0.0, 1.0]) + 2.0 * GAIN, 1.0 - GAIN)
    smc = TwistedSMC(two_sites, 2000).run(jax.random.key(0), Y)
    truth = dist.Normal(1.0, jnp.sqrt(3.25)).log_prob(Y).sum()
    assert abs(smc.log_evidence.value - truth) < 4.0 * smc.log_evidence.standard_error + 0.02
    assert abs(smc.get_samples()["b"].mean() / 100.0 - 1.0 - 2.0 * GAIN) < 5.0 * np.sqrt(0.7 / 2000)


def rooted(y):
    """The gradient is NaN wherever x <= 0: JAX's, of a square root that `where` leaves out."""
    x = numpyro.sample("x", DiffusionPrior(Gaussian(jnp.zeros(1), 1.0, VE(0.01, 40.0)), sampler=FINE))
    numpyro.sample("y", dist.Normal(jnp.where(x > 0.0, jnp.sqrt(x), 0.0), 0.5).to_event(1), obs=y)


@pytest.mark.slow
def test_a_guidance_that_is_not_a_number_counts_as_none():
    """And is counted; posterior and evidence are those of quadrature."""
    x = np.linspace(-8.0, 8.0, 8001)
    weight = np.exp(-0.5 * x**2 - 0.5 * ((0.4 - np.sqrt(np.maximum(x, 0.0))) / 0.5) ** 2)
    mean, square = (weight @ x**n / weight.sum() for n in (1, 2))
    for make in GUIDED.values():
        mcmc = run(make(rooted), jnp.array([0.4]))
        assert_moments(mcmc.get_samples(group_by_chain=True)["x"], mean, square - mean**2)
        fields = mcmc.get_extra_fields()
        assert fields["num_unguided"].sum() > 0 and not fields["diverging"].any()
    smc = TwistedSMC(rooted, 2000).run(jax.random.key(0), jnp.array([0.4]))
    truth = np.log(weight.sum() * 0.002 / (2.0 * np.pi * 0.5))
    assert abs(smc.log_evidence.value - truth) < 4.0 * smc.log_evidence.standard_error + 0.02
    assert smc.levels.unguided.max() > 0.0


def copies(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", PRIOR), 1.0), obs=y, obs_mask=SEEN)


def other_samplers(y):
    for name, steps in (("a", 8), ("b", 9)):
        numpyro.sample(name, DiffusionPrior(Gaussian(jnp.zeros(1)), sampler=DPMSolverPP(steps, eta=1.0)))


def other_spans(y):
    for name, schedule in (("a", VE(0.01, 40.0)), ("b", VE(0.01, 80.0))):
        numpyro.sample(name, DiffusionPrior(Gaussian(jnp.zeros(1), 1.0, schedule), sampler=FINE))


def one_on_another(y):
    a = numpyro.sample("a", DiffusionPrior(Gaussian(jnp.zeros(1)), sampler=FINE))
    numpyro.sample("b", DiffusionPrior(Gaussian(a), sampler=FINE))


REFUSED = {
    "dependent": (one_on_another, r"diffusion sites \['b'\] depend on other diffusion sites"),
    "copies": (copies, r"sites \['y'\] are sampled with obs_mask=.*numpyro.handlers.mask"),
    "spans": (other_spans, "same ratio of highest to lowest"),
    "samplers": (other_samplers, "different samplers"),
}


@pytest.mark.parametrize("make", [*GUIDED.values(), TwistedSMC], ids=[*GUIDED, "twisted_smc"])
@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model, message, make):
    with pytest.raises(ValueError, match=message):
        make(model).run(jax.random.key(0), Y) if make is TwistedSMC else run(make(model), Y)
