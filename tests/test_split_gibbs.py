"""Split Gibbs against the law of its split, Gaussian in closed form or a matrix on a grid; and its refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import standard, unknown_noise
from moments import assert_moments
from numpyro.distributions import transforms
from numpyro.infer import HMC, MCMC

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionGibbs, SplitGibbs, Status
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.noise import VE, VP, Karras, UniformLogSNR, UniformTime, grid_from
from numpyro_diffusion.solve import Adams, DPMSolverPP, EulerMaruyama, Heun, draw_given

SLOW = pytest.mark.slow
CHAINS, RHO, NOISE = 64, 0.6, 0.8
MEAN, COVARIANCE = np.array([1.0, -1.0]), np.array([[1.5, 0.6], [0.6, 1.0]])
Y = jnp.array([3.0, -1.0])
VE_PRIOR, VP_PRIOR = (
    DiffusionPrior(Gaussian(MEAN, COVARIANCE, schedule), density="none") for schedule in (VE(0.01, 40.0), VP())
)
ROUGH = DPMSolverPP(8, eta=1.0, grid=Karras())


def model(y, prior=VE_PRIOR):
    """The sum of both entries is observed, and the first one."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(jnp.stack([x[0], x.sum()]), NOISE).to_event(1), obs=y)


def nearly_known_noise(y):
    x = numpyro.sample("x", VE_PRIOR)
    noise = numpyro.sample("noise", dist.LogNormal(jnp.log(NOISE), 1e-3))
    numpyro.sample("y", dist.Normal(jnp.stack([x[0], x.sum()]), noise).to_event(1), obs=y)


STANDARD = standard(density="none")


def run(kernel, *args, num_warmup=150, num_samples=300, chains=CHAINS, method="vectorized", fields=(), **options):
    options = {"num_chains": chains, "chain_method": method, "progress_bar": False, **options}
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, **options)
    mcmc.run(jax.random.key(0), *args, extra_fields=fields)
    return mcmc


def split_law(rho, y=Y):
    """Mean (4,) and covariance (4, 4) of prior side and likelihood side together, for `model`."""
    rows = np.array([[1.0, 0.0], [1.0, 1.0]]) / NOISE
    spring, prior = np.eye(2) / rho**2, np.linalg.inv(COVARIANCE)
    precision = np.block([[prior + spring, -spring], [-spring, spring + rows.T @ rows]])
    covariance = np.linalg.inv(precision)
    return covariance @ np.concatenate([prior @ MEAN, rows.T @ np.asarray(y, float) / NOISE]), covariance


@pytest.mark.slow
@pytest.mark.parametrize("prior", [VE_PRIOR, pytest.param(VP_PRIOR, marks=SLOW)], ids=["VE", "VP"])
def test_law_of_the_split(prior):
    """Means, variances and covariances of both sides; x is not the posterior's but the smoothed one's, and says so."""
    mcmc = run(SplitGibbs(model, rho=RHO), Y, prior, fields=("likelihood_side",))
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    z = np.asarray(mcmc.get_extra_fields(group_by_chain=True)["likelihood_side"]["x"])
    both = np.concatenate([x, z], axis=-1)
    mean, covariance = split_law(RHO)
    assert_moments(both, mean, np.diag(covariance))
    for weights in ([1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0]):
        assert_moments(both @ np.array(weights), mean @ weights, np.array(weights) @ covariance @ weights)
    assert covariance[0, 0] > 1.5 * split_law(1e-3)[1][0, 0]  # the smoothing is there to be seen
    extra = mcmc.get_extra_fields()
    assert not extra["diverging"].any() and (extra["accept_prob"] > 0.6).mean() > 0.9
    np.testing.assert_allclose(extra["noise_level"], RHO, rtol=1e-6)
    assert (extra["num_score_evals"] == 32).all()


@SLOW
def test_other_sites():
    """With an unknown noise s, x and s have the posterior of the noise sqrt(s^2 + rho^2): by quadrature over s."""
    log_noise = np.linspace(-4.0, 4.0, 4001)
    noise2 = np.exp(2.0 * log_noise)
    smooth = noise2 + RHO**2
    y = np.asarray(Y)[:, None]
    log_weight = -0.5 * (log_noise / 0.5) ** 2 - 0.5 * (y**2 / (1 + smooth) + np.log(1 + smooth)).sum(0)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean, variance = y / (1 + smooth), smooth / (1 + smooth)
    x_mean = (weight * mean).sum(1)
    noise_mean = (weight * np.exp(log_noise)).sum()
    samples = run(SplitGibbs(unknown_noise, rho=RHO), Y, STANDARD, num_samples=400).get_samples(group_by_chain=True)
    assert set(samples) == {"x", "noise", "twice"}
    assert_moments(samples["x"], x_mean, (weight * (variance + mean**2)).sum(1) - x_mean**2)
    assert_moments(samples["noise"], noise_mean, (weight * noise2).sum() - noise_mean**2)
    np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)


def sweep_law(schedule, sweeps):
    """Mean and covariance of x after many draws, each a sweep at every coupling: both conditionals are affine."""
    rows = np.array([[1.0, 0.0], [1.0, 1.0]]) / NOISE
    prior, data, y = np.linalg.inv(COVARIANCE), rows.T @ rows, np.asarray(Y, float)
    mean, covariance = MEAN, COVARIANCE
    for _ in range(sweeps):
        for rho in schedule:
            for inverse, shift in [(data, rows.T @ y / NOISE), (prior, prior @ MEAN)]:  # z given x, then x given z
                conditional = np.linalg.inv(inverse + np.eye(2) / rho**2)
                gain = conditional / rho**2
                mean, covariance = gain @ mean + conditional @ shift, gain @ covariance @ gain.T + conditional
    return mean, covariance


@pytest.mark.slow
def test_schedule_is_the_recursion_of_its_sweeps():
    """Decoupled annealing: the second bias, that of starting from the coupling above, is the one predicted."""
    mcmc = run(SplitGibbs(model, rho=0.4, couplings=[5.0, 1.5], num_inner=4), Y, num_samples=200)
    mean, covariance = sweep_law([5.0, 1.5, 0.4], 50)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    assert_moments(x, mean, np.diag(covariance))
    assert_moments(x.sum(-1), mean.sum(), covariance.sum())
    assert (np.abs(mean - split_law(0.4)[0][:2]) > 0.1).any()
    assert (mcmc.get_extra_fields()["num_score_evals"] == 3 * 32).all()
    assert mcmc.get_extra_fields()["diverging"].mean() < 0.002


@SLOW
def test_schedule_changes_mode_and_a_small_coupling_does_not():
    """A mixture at -6 and 6 with vague data: the sweeps as a matrix on a grid give the weight of each mode."""
    mixture = GaussianMixture([0.3, 0.7], [[-6.0], [6.0]], 1.0, VE(0.01, 80.0))
    schedule, rho, noise, y = [20.0, 6.0, 2.0], 0.7, 8.0, -4.0

    def bimodal(y):
        x = numpyro.sample("x", DiffusionPrior(mixture))
        numpyro.sample("y", dist.Normal(x[0], noise), obs=y)

    grid = np.linspace(-60.0, 60.0, 1201)
    log_prior = np.logaddexp(np.log(0.3) - 0.5 * (grid + 6) ** 2, np.log(0.7) - 0.5 * (grid - 6) ** 2)
    chain = np.eye(len(grid))
    for level in (*schedule, rho):
        for log_factor in (-0.5 * ((y - grid) / noise) ** 2, log_prior):
            step = log_factor - 0.5 * ((grid[:, None] - grid) / level) ** 2
            step = np.exp(step - step.max(1, keepdims=True))
            chain = chain @ (step / step.sum(1, keepdims=True))
    law = np.ones(len(grid)) / len(grid)
    for _ in range(200):
        law = law @ chain
    right = law[grid > 0].sum()
    kernel = partial(SplitGibbs, bimodal, rho=rho)
    annealed = run(kernel(couplings=schedule, num_inner=4), y).get_samples(group_by_chain=True)["x"][..., 0]
    assert_moments((annealed > 0).astype(float), right, right * (1 - right))
    stuck = run(kernel(), y).get_samples(group_by_chain=True)["x"][..., 0]
    crossings = lambda x: float(jnp.mean((x[:, 1:] > 0) != (x[:, :-1] > 0)))  # noqa: E731
    assert crossings(stuck) < 0.01 < 0.1 < crossings(annealed)


@SLOW
def test_sites_plates_and_transforms():
    """Two sites of different schedules, one positive and in a plate: the coupling is in the denoiser's own space."""
    positive = DiffusionPrior(Gaussian([0.5], 1.0, VP()), transform=transforms.ExpTransform())
    data = jnp.array([2.0, -1.0, 0.3])

    def both(y, y_plate):
        model(y)
        with numpyro.plate("points", 3):
            v = numpyro.sample("v", positive)
            numpyro.sample("y_plate", dist.Normal(jnp.log(v[:, 0]), NOISE), obs=y_plate)

    samples = run(SplitGibbs(both, rho=RHO), Y, data, num_samples=400).get_samples(group_by_chain=True)
    assert samples["v"].shape == (CHAINS, 400, 3, 1) and (samples["v"] > 0).all()
    mean, covariance = split_law(RHO)
    assert_moments(samples["x"], mean[:2], np.diag(covariance)[:2])
    smooth = NOISE**2 + RHO**2
    assert_moments(jnp.log(samples["v"][..., 0]), (0.5 * smooth + data) / (1 + smooth), smooth / (1 + smooth))


def test_the_solver_starts_at_the_coupling_and_its_conditional_law_is_right():
    """Every grid begins at the level itself, and p(x | z) of the default is better than those of the alternatives."""
    denoiser = Gaussian([0.0], 1.0, VE(0.01, 40.0))
    start = denoiser.schedule.inverse_noise_level(0.5)
    for grid in (Karras(), UniformLogSNR(), UniformTime()):
        times = grid_from(grid, denoiser.schedule, start, 9)
        levels = np.asarray(denoiser.schedule.noise_level(times))
        np.testing.assert_allclose(levels[[0, -1]], [0.5, 0.01], rtol=1e-3)
        assert (np.diff(levels) < 0).all()

    @partial(jax.jit, static_argnums=0)
    def draws(solver):
        keys = jax.random.split(jax.random.key(0), 40_000)
        return jax.vmap(lambda key: draw_given(solver, denoiser, jnp.full(1, 2.0), start, key)[0])(keys)

    error = 0.2 * np.sqrt(2.0 / 40_000)
    solvers = Adams(16), DPMSolverPP(16, eta=1.0, grid=Karras()), EulerMaruyama(16)
    off = [abs(float(draws(solver).var()) - 0.2) for solver in solvers]
    for solver, distance in zip(solvers[:2], off, strict=False):
        assert abs(float(draws(solver).mean()) - 1.6) < 4 * np.sqrt(0.2 / 40_000) and distance < 4 * error
    assert 4 * error < off[2] < 0.15 * 0.2


QUICK = partial(SplitGibbs, rho=RHO, solver=ROUGH, rest_kernel=partial(HMC, num_steps=2, trajectory_length=None))


GIVEN = {"x": jnp.array([7.0, 8.0]), "noise": jnp.array(0.3)}


@pytest.fixture(scope="module")
def started():
    """A kernel and its state at given values, before 20 draws of warm-up."""
    kernel = QUICK(unknown_noise)
    return kernel, kernel.init(jax.random.key(0), 20, GIVEN, (Y, STANDARD), {})


def test_init_params_are_where_a_chain_begins(started):
    kernel, state = started
    for values in (state.z, {**state.z, **state.likelihood_side}):
        assert jnp.array_equal(values["x"], GIVEN["x"]) and jnp.array_equal(values["noise"], GIVEN["noise"])
    constrained = kernel.get_constrain_fn((Y, STANDARD), {})(state.z)
    np.testing.assert_allclose(constrained["noise"], np.exp(0.3), rtol=1e-6)


def test_coupling_falls_in_warm_up(started):
    """From `rho_start`, by default the prior's scale, to `rho` over the first half of 20 draws, and stays there."""
    kernel, state = started
    np.testing.assert_allclose(state.noise_level, 1.0, rtol=1e-6)
    sites = Record(unknown_noise).at((Y, STANDARD), {}).sites()
    for start, one in [(1.0, kernel), (3.0, QUICK(unknown_noise, rho_start=3.0))]:
        one._num_warmup = 20
        couplings = jax.vmap(partial(one._coupling_at, sites=sites))(jnp.arange(25))
        expected = RHO * (start / RHO) ** np.clip(1.0 - np.arange(25) / 10.0, 0.0, 1.0)
        np.testing.assert_allclose(couplings[:, 0], expected, rtol=1e-5)


def test_what_is_not_finite_is_counted(started):
    """A denoiser that returns NaN: the chain stays where it is, and says so."""
    kernel, state = started
    broken = DiffusionPrior(Gaussian([0.0, 0.0], 1.0, VE(0.01, 40.0)), density="none")
    broken.denoiser.means = jnp.full_like(broken.denoiser.means, jnp.nan)
    state = jax.jit(lambda state, prior: kernel.sample(state, (Y, prior), {}))(state, broken)
    assert bool(state.diverging) and jnp.array_equal(state.z["x"], GIVEN["x"])


@SLOW
def test_as_a_block_of_gibbs():
    """The x-kernel of `DiffusionGibbs`: with a noise that is all but known, the law of the split of the known one."""
    kernel = DiffusionGibbs(nearly_known_noise, x_kernel=partial(SplitGibbs, rho=RHO))
    x = run(kernel, Y, num_samples=800, chains=16, method=jax.vmap).get_samples(group_by_chain=True)["x"]
    mean, covariance = split_law(RHO)
    assert_moments(x, mean[:2], np.diag(covariance)[:2])


def test_status():
    status = SplitGibbs(no_prior, rho=0.5).status
    assert isinstance(status, Status) and not status.exact and status.needs == "reverse process"


def no_prior(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def hierarchy(y):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", DiffusionPrior(Gaussian(jnp.full(1, centre))))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y[0])


REFUSED = {
    "no_site": (no_prior, {"rho": 0.5}, "it has no DiffusionPrior site"),
    "dependent": (hierarchy, {"rho": 0.5}, r"the priors of \['x'\] depend on other latent sites"),
    "rho_small": (model, {"rho": 1e-3}, "rho must lie within .* 0.01 to 40; got 0.001"),
    "rho_start": (model, {"rho": 0.5, "rho_start": 90.0}, "rho_start must lie within .*; got 90"),
    "schedule": (model, {"rho": 0.5, "couplings": [90.0, 1.0]}, "couplings must lie within .*; got 90"),
}


@pytest.mark.parametrize(("bad_model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(bad_model, options, message):
    with pytest.raises(ValueError, match=message):
        run(SplitGibbs(bad_model, **options), Y, num_warmup=1, num_samples=1, chains=1)


BAD_ARGUMENTS = {
    "rho_zero": ({"rho": 0.0}, ValueError, "rho must be positive and finite; got 0.0"),
    "rho_negative": ({"rho": -1.0}, ValueError, "rho must be positive and finite; got -1.0"),
    "start_below": ({"rho": 0.5, "rho_start": 0.1}, ValueError, "rho_start must not lie below rho=0.5; got 0.1"),
    "start_zero": ({"rho": 0.5, "rho_start": 0.0}, ValueError, "rho_start must be positive"),
    "rising": ({"rho": 0.5, "couplings": [1.0, 2.0]}, ValueError, "strictly decreasing; got 1 and then 2"),
    "not_above": ({"rho": 0.5, "couplings": [1.0, 0.5]}, ValueError, "strictly decreasing; got 0.5 and then 0.5"),
    "both": ({"rho": 0.5, "couplings": [1.0], "rho_start": 2.0}, ValueError, "give one of them"),
    "num_inner": ({"rho": 0.5, "num_inner": 0}, ValueError, "num_inner must be at least 1; got 0"),
    "solver": ({"rho": 0.5, "solver": Heun}, TypeError, "solver must be a solver such as"),
    "rest_kernel": ({"rho": 0.5, "rest_kernel": lambda model: model}, TypeError, "rest_kernel must make an MCMCKernel"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        SplitGibbs(model, **options)
