"""ULA, MALA and ScoreHMC: laws in closed form, detailed balance, the bias that theory predicts, and refusals."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from laws import (
    SCHEDULE,
    SQUARED,
    Y,
    known_noise,
    mixture_prior,
    on_mixture,
    quadrature,
    run,
    standard,
    unknown_noise,
    without_diffusion,
)
from moments import assert_moments
from numpyro.infer import MCMC
from numpyro.infer.util import log_density
from scipy.stats import norm

from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser, Prediction, Product
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, ULA, Density, LineIntegral, Score, ScoreHMC, Tweedie, with_density
from numpyro_diffusion.infer.gradient.hmc import leapfrog
from numpyro_diffusion.infer.gradient.langevin import log_reversal
from numpyro_diffusion.infer.gradient.target import Evaluation, Target
from numpyro_diffusion.infer.kernel.adapt import Root
from numpyro_diffusion.infer.model.record import Record
from numpyro_diffusion.nn import MLP

SLOW = pytest.mark.slow


def transformed(transform, y):
    """The transform of a standard normal u, observed with unit noise: u has the posterior of `known_noise`."""
    x = numpyro.sample("x", standard(transform=transform))
    numpyro.sample("y", dist.Normal(transform.inv(x), 1.0).to_event(1), obs=y)


SCORE_ONLY = partial(known_noise, prior=standard(density="none"))
LINE = LineIntegral()
PARTIAL = {"num_steps": 3, "momentum_refresh": 0.3}
ON_UNKNOWN_NOISE = {
    "mala_dense": MALA(unknown_noise, dense_mass=True),
    "hmc_partial": ScoreHMC(unknown_noise, **PARTIAL),
}


@SLOW
@pytest.mark.parametrize("kernel", ON_UNKNOWN_NOISE.values(), ids=ON_UNKNOWN_NOISE)
def test_joint_posterior(kernel):
    """Diffusion site and noise level together, against quadrature."""
    x_mean, x_variance, noise_mean, noise_variance = quadrature()
    samples = run(kernel, Y, num_warmup=500, num_samples=2000).get_samples(group_by_chain=True)
    assert_moments(samples["x"], x_mean, x_variance)
    assert_moments(samples["noise"], noise_mean, noise_variance)
    if "twice" in samples:
        np.testing.assert_allclose(samples["twice"], 2.0 * samples["x"], rtol=1e-6)


# The bias of ULA


def standard_normal():
    numpyro.sample("x", dist.Normal(0.0, 1.0))


def vectorized_draws(kernel, chains, num_warmup, num_samples, *args):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=chains,
                chain_method="vectorized", progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(0), *args)
    return mcmc


@pytest.mark.parametrize("step_size", [pytest.param(0.05, marks=SLOW), pytest.param(0.2, marks=SLOW), 0.5])
def test_ula_has_the_variance_that_theory_predicts(step_size):
    """1 / (1 - h / 2) on N(0, 1), to 2 %; 4,000 chains leave a Monte Carlo error below 0.5 %."""
    kernel = ULA(standard_normal, step_size=step_size, adapt_mass_matrix=False)
    x = vectorized_draws(kernel, 4000, 200, 800).get_samples()["x"]
    assert float(x.var()) == pytest.approx(1.0 / (1.0 - step_size / 2.0), rel=0.02)


@SLOW
@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "dense"])
def test_ula_estimates_its_preconditioner(dense):
    """Scales of 1/2 and 10: with the estimate the bias is that of a unit scale, within the 6 % of the estimate."""

    def model():
        numpyro.sample("x", dist.Normal(jnp.array([0.0, 5.0]), jnp.array([0.5, 10.0])).to_event(1))

    kernel = ULA(model, step_size=0.4, dense_mass=dense)
    x = vectorized_draws(kernel, 500, 2000, 1000).get_samples()["x"] / jnp.array([0.5, 10.0])
    np.testing.assert_allclose(x.var(0), 1.0 / (1.0 - 0.2), rtol=0.05)


@SLOW
def test_ula_on_a_score_only_prior():
    """The score suffices; posterior variance 1/2 and step h: 1/2 / (1 - h)."""
    kernel = ULA(SCORE_ONLY, step_size=0.1, adapt_mass_matrix=False)
    x = vectorized_draws(kernel, 1000, 200, 400, Y).get_samples()["x"]
    assert (abs(x.mean(0) - Y / 2) < 0.02).all()
    np.testing.assert_allclose(x.var(0), 0.5 / 0.9, rtol=0.02)


# Detailed balance and invariance


def double_well(q):
    return jnp.sum(-0.25 * q**4 + q**2 + 0.3 * q)


@jax.jit
@jax.vmap
def evaluate(q):
    return Evaluation(*jax.value_and_grad(double_well)(q))


def root():
    return Root(jnp.full(1, 0.7), jnp.full(1, 1 / 0.7), jnp.zeros(()))


WELL = SimpleNamespace(evaluate=lambda q: Evaluation(*jax.value_and_grad(double_well)(q)))


def test_mala_is_in_detailed_balance(x64):
    """pi(q) k(q' | q) a(q, q') is symmetric on a grid, with k written down anew."""
    q = jnp.linspace(-3.0, 3.0, 41)[:, None]
    at, h, C = evaluate(q), 0.3, 0.49
    forward = norm.pdf(q[:, 0], (q[:, 0] + h * C * at.gradient[:, 0])[:, None], np.sqrt(2 * h * C))  # [from, to]
    density = jnp.exp(at.log_density)

    def log_ratio(i, j):
        reversal = log_reversal(q[i], q[j], at.gradient[i], at.gradient[j], root(), root(), h)
        return at.log_density[j] - at.log_density[i] + reversal

    index = jnp.arange(len(q))
    ratios = jax.jit(jax.vmap(jax.vmap(log_ratio, (None, 0)), (0, None)))(index, index)
    accept = jnp.exp(jnp.minimum(ratios, 0.0))
    flow = density[:, None] * forward * accept
    assert float(accept.min()) < 0.5
    np.testing.assert_allclose(flow, flow.T, rtol=1e-9)


def test_hmc_walks_back_and_keeps_volume(x64):
    """With the momentum turned round, a leapfrog is its own inverse, of unit Jacobian.

    For such a map, a ratio test on the total energy is in detailed balance.
    """
    grid = jnp.stack(jnp.meshgrid(jnp.linspace(-2, 2, 9), jnp.linspace(-2, 2, 9)), -1).reshape(-1, 2)

    def involution(point):
        q, p = point[:1], point[1:]
        q, p, _ = leapfrog(WELL, q, p, WELL.evaluate(q), root(), jnp.asarray(0.3), 5)
        return jnp.concatenate([q, -p])

    walked = jax.jit(jax.vmap(involution))
    there = walked(grid)
    assert float(jnp.abs(there - grid).max()) > 1.0
    np.testing.assert_allclose(walked(there), grid, atol=1e-10)
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(involution)))(grid))
    np.testing.assert_allclose(np.abs(np.linalg.det(jacobians)), 1.0, rtol=1e-10)


# The line integral

learned_mixture = partial(on_mixture, prior=mixture_prior(density="none"))


def learned():
    return NetworkDenoiser(MLP((2,), features=8, num_blocks=1, rngs=nnx.Rngs(0)))


@jax.tree_util.register_static
class Rotating:
    """A score with a rotation on top: no gradient, of circulation 2 x area x rate."""

    rate = 0.3

    def __init__(self):
        self.base = Gaussian([0.0, 0.0], 1.0, SCHEDULE)
        self.schedule, self.event_shape, self.location, self.scale = SCHEDULE, (2,), 0.0, 1.0

    def __call__(self, x_t, t, cond=None):
        p = self.base(x_t, t)
        turn = self.rate * jnp.array([-x_t[1], x_t[0]])
        return Prediction.from_x0(p.x0 + self.schedule.sigma(t) ** 2 * turn, x_t, t, self.schedule)


@pytest.mark.slow
def test_line_integral_and_circulation(x64):
    """The work of a mixture's score is the difference of its log-density; in a circle, only a rotating field works."""
    a, b, c = jnp.array([0.0, 0.0]), jnp.array([1.0, 0.5]), jnp.array([-0.5, 1.0])
    at_end = Target(Record(learned_mixture).at((1.0,), {}), LineIntegral(21), {"x": a})
    exact = Target(Record(learned_mixture).at((1.0,), {}), Density("denoiser"), {"x": a})
    found = at_end.log_ratio(at_end.evaluate(a), at_end.evaluate(b), a, b)
    truth = exact.evaluate(b).log_density - exact.evaluate(a).log_density
    assert float(found) == pytest.approx(float(truth), abs=1e-5)
    assert abs(float(at_end.circulation(a, b, c))) < 1e-4 and np.isnan(exact.circulation(a, b, c))
    record = Record(partial(known_noise, Y, DiffusionPrior(Rotating(), density="none")))
    rotating = Target(record.at((), {}), LINE, {"x": a})
    area = 0.5 * abs(float(b[0] * c[1] - b[1] * c[0]))
    assert float(rotating.circulation(a, b, c)) == pytest.approx(2.0 * area * Rotating.rate, rel=1e-6)


@SLOW
def test_circulation_reaches_the_user(x64):
    """Simpson's rule is exact for a Gaussian's score; in single precision the rounding of x0 makes 1e-2 of it."""
    exact = partial(known_noise, prior=DiffusionPrior(Gaussian(jnp.zeros(2), 1.0, SCHEDULE), density="none"))
    fields = run(MALA(exact, density=LINE), jnp.array([3.0, -1.0]), num_warmup=50, num_samples=50).get_extra_fields()
    assert 0.0 < float(jnp.abs(fields["circulation"]).max()) < 1e-9 and "potential_energy" not in fields


# Refusals


def discrete(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def simulator(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    mean = jax.pure_callback(lambda x: np.round(x), jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential")
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def dependent(y):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    numpyro.sample("x", DiffusionPrior(Gaussian(jnp.full(2, centre), 1.0, SCHEDULE)))


def impossible(y):
    numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("never", -jnp.inf)


def nothing(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.0)


REFUSED = {
    "score_only_flow": (
        partial(MALA, density="flow"),
        SCORE_ONLY,
        r"MALA needs a density, and .* site 'x' .*LineIntegral\(\) \(approximate\).*NoiseSpace.*DiffusionPCN",
    ),
    "product_flow": (
        partial(MALA, density="flow"),
        partial(known_noise, prior=DiffusionPrior(Product([Gaussian(jnp.zeros(2), 1.0, SCHEDULE)] * 2))),
        r"MALA needs a density, and .*of no use for a Product",
    ),
    "no_own_density": (
        partial(ScoreHMC, density=Density("denoiser")),
        partial(known_noise, prior=DiffusionPrior(learned())),
        "ScoreHMC needs a density",
    ),
    "discrete": (MALA, discrete, r"sites \['k'\] are discrete.*DiscreteGibbs"),
    "simulator": (ULA, simulator, "ULA needs a model that JAX can differentiate. Use DiffusionPCN"),
    "dependent": (ULA, dependent, r"prior of site 'x' depends on other latent sites.*NoiseSpace"),
    "nothing": (MALA, nothing, "needs a latent site"),
    "impossible": (MALA, impossible, "not finite at the start of 2 of 2 chains"),
    "tweedie_without_site": (partial(MALA, preconditioner=Tweedie()), without_diffusion, "latent DiffusionPrior"),
    "tweedie_transform": (
        partial(MALA, preconditioner=Tweedie()),
        partial(transformed, SQUARED),
        "denoiser's own coordinates",
    ),
}


@pytest.mark.parametrize(("make", "model", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(make, model, message):
    with pytest.raises(ValueError, match=message):
        run(make(model), Y, num_warmup=1, num_samples=1, chains=2)


def test_with_density_takes_no_other_than_it_was_told():
    """A network has no density of its own; the flow's is not put in its place."""
    model = with_density(partial(known_noise, prior=DiffusionPrior(learned())), "denoiser")
    with pytest.raises(NotImplementedError, match=r"no density for Density\(source='denoiser', .*NoiseSpace"):
        log_density(model, (Y,), {}, {"x": jnp.zeros(2)})


BAD_ARGUMENTS = {
    "density": (lambda: MALA(known_noise, density=None), TypeError, 'density must be "auto".* a LogPrior.*; got None'),
    "unknown": (lambda: MALA(known_noise, density="none"), ValueError, "density must be one of"),
    "score": (lambda: MALA(known_noise, density=Score()), ValueError, "nothing to test with. Use density="),
    "score_hmc": (lambda: ScoreHMC(known_noise, density=Score()), ValueError, "ScoreHMC tests its moves"),
    "preconditioner": (lambda: MALA(known_noise, preconditioner="full"), TypeError, "preconditioner must be Tweedie"),
    "step_size": (lambda: ULA(known_noise, step_size=-0.1), ValueError, "step_size must be positive"),
    "target": (lambda: MALA(known_noise, target_accept_prob=1.0), ValueError, r"must lie in \(0, 1\); got 1.0"),
    "num_steps": (lambda: ScoreHMC(known_noise, num_steps=0), ValueError, "num_steps must be at least 1"),
    "refresh": (
        lambda: ScoreHMC(known_noise, momentum_refresh=0.0),
        ValueError,
        r"momentum_refresh must lie in \(0, 1\]",
    ),
    "source": (lambda: Density("score"), ValueError, "source must be one of"),
    "gradient": (lambda: Density(gradient="value"), ValueError, "gradient must be one of"),
    "even": (lambda: LineIntegral(4), ValueError, "must be odd for Simpson's rule; got 4"),
    "rule": (lambda: LineIntegral(3, "trapezoid"), ValueError, "rule must be one of"),
    "level": (lambda: Tweedie(0.0), ValueError, "level must be positive"),
    "model": (lambda: MALA(3), TypeError, "must be a NumPyro model"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
