"""Models whose posteriors are known: exact draws to start from, and ranks that are uniform under the posterior.

The ranks are those of Rosenblatt: of a first quantity, of a second one given the first, and so on. Under the right law
they are uniform and independent, so that one test serves every law, and draws need not be compared with other draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import transforms
from numpyro.infer import MCMC
from scipy.special import gammainc, ndtr

from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

Y = jnp.array([3.0, -1.0])
SCHEDULE = VE(0.01, 40.0)
SAMPLER = DPMSolverPP(48, eta=1.0)
FINE = DPMSolverPP(128, eta=1.0)
EXP = transforms.ExpTransform()
SQUARED = transforms.ComposeTransform([transforms.AffineTransform(0.0, 2.0), EXP])  # not NumPyro's for this support


def standard(**options):
    """A prior N(0, 1) in two dimensions."""
    return DiffusionPrior(Gaussian([0.0, 0.0], 1.0, SCHEDULE), **{"sampler": SAMPLER, **options})


def run(kernel, *args, num_warmup=300, num_samples=600, chains=8, method="vectorized", seed=0, fields=(), **options):
    """A run of MCMC without progress bar."""
    start, options = options.pop("start", None), {"progress_bar": False, **options}
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": chains, **options}
    mcmc = MCMC(kernel, chain_method=method, **options)
    mcmc.run(jax.random.key(seed), *args, extra_fields=fields, init_params=start)
    return mcmc


# Models


def known_noise(y, prior=standard()):  # noqa: B008
    """Posterior N(y / 2, 1/2) in each dimension of the denoiser's own space: 1.5 where y is 3."""
    u = own_space(prior, numpyro.sample("x", prior))
    numpyro.sample("y", dist.Normal(u, 1.0).to_event(1), obs=y)


def unknown_noise(y, prior=standard()):  # noqa: B008
    x = numpyro.sample("x", prior)
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(own_space(prior, x), noise).to_event(1), obs=y)


def in_plate(y, prior):
    """Points in a plate, observed with one unknown noise."""
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("points", len(y)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(own_space(prior, x), noise).to_event(1), obs=y)


def own_space(prior, x):
    """A site's value in the denoiser's own space."""
    return x if prior.transform is None else prior.transform.inv(x)


def without_diffusion(y):
    """`unknown_noise` with NumPyro's own distributions."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def plain(y):
    """A vector of one entry N(0, 1), without diffusion, seen with unit noise."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)


WEIGHTS, MEANS = np.array([0.4, 0.6]), np.array([[-2.0, 0.5], [1.5, -1.0]])


def mixture_prior(**options):
    law = GaussianMixture(WEIGHTS, MEANS, 0.5, VE(1e-3, 40.0) if "density" in options else SCHEDULE)
    return DiffusionPrior(law, **{"sampler": FINE, **options})


def on_mixture(y, prior=mixture_prior()):  # noqa: B008
    """A mixture of two Gaussians whose sum of entries is observed."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[0] + x[1], 0.7), obs=y)


def pair(y, scale=1.0):
    """A site x ~ N(s, 1) about s ~ N(0, 1), seen with unit noise: at y = 3, x is N(2, 2/3) and s is N(1, 2/3)."""
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", dist.Normal(s, 1.0))
    numpyro.deterministic("twice", 2.0 * x)
    numpyro.sample("y", dist.Normal(x, scale), obs=y)


def count(y):
    """A rate x ~ Gamma(2, 1) and one count: the posterior is Gamma(2 + y, 2)."""
    numpyro.sample("y", dist.Poisson(numpyro.sample("x", dist.Gamma(2.0, 1.0))), obs=y)


MODES = np.array([-6.0, 6.0])


def two_modes(y):
    """Modes twelve standard deviations apart, of weights .3 and .7 before the data."""
    modes = dist.Normal(jnp.asarray(MODES), jnp.array([1.0, 0.5]))
    x = numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), modes))
    numpyro.sample("y", dist.Normal(x, 8.0), obs=y)


def two_learned_modes(y, prior):
    """Two modes of a diffusion prior, twelve standard deviations apart."""
    numpyro.sample("y", dist.Normal(numpyro.sample("x", prior)[0], 8.0), obs=y)


def half_line(nan_below):
    """A standard normal above .5; minus infinity below, and NaN below `nan_below`."""
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("above", jnp.where(x > 0.5, 0.0, jnp.where(x < nan_below, jnp.nan, -jnp.inf)))


def half_space(nan_below, prior):
    """As `half_line`, for the first entry of a diffusion site."""
    x = numpyro.sample("x", prior)
    numpyro.factor("above", jnp.where(x[0] > 0.5, 0.0, jnp.where(x[0] < nan_below, jnp.nan, -jnp.inf)))


# Models that samplers refuse


def nothing():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)


def discrete():
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=1.0)


def improper():
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))


def not_a_number():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.factor("bad", jnp.nan * x)


# Laws


@dataclass(frozen=True)
class Law:
    """A posterior that is known.

    Args:
        model: the NumPyro model.
        args: its arguments.
        draw: (generator, count) -> exact draws by site, in NumPyro's unconstrained coordinates.
        ranks: draws by site, on their supports -> Rosenblatt ranks, shape (count, number of them).
        place: (generator, state) -> the state with what a kernel keeps besides its point at exact draws too.
    """

    model: Callable
    args: tuple
    draw: Callable
    ranks: Callable
    place: Callable = lambda rng, state: state  # noqa: E731


def assert_ranks(ranks):
    """Ranks are uniform and independent: 4 standard errors of their moments, 1e-4 points of their largest distances."""
    ranks = np.asarray(ranks, np.float64)
    size = len(ranks)
    for k, column in enumerate(ranks.T):
        mean = (column.mean() - 0.5) * np.sqrt(12.0 * size)
        variance = (np.mean((column - 0.5) ** 2) - 1.0 / 12.0) * np.sqrt(180.0 * size)
        distance = np.abs(np.sort(column) - (np.arange(size) + 0.5) / size).max() * np.sqrt(size)
        assert abs(mean) < 4.0 and abs(variance) < 4.0, f"rank {k}: {mean}, {variance} errors off in mean and variance"
        assert distance < 2.23, f"rank {k}: a Kolmogorov-Smirnov distance of {distance} / sqrt({size})"
    off = np.corrcoef(ranks.T) - np.eye(ranks.shape[1]) if ranks.shape[1] > 1 else np.zeros(1)
    assert np.abs(off).max() < 4.0 / np.sqrt(size), f"ranks are correlated: {off}"


def normal_data(prior, noise=None, y=Y, shape=None, noise_space=False):
    """Of `known_noise` (`noise` = 1), `unknown_noise` and `in_plate` (a table of data).

    In noise space, the prior that the flow of a standard normal pushes forward is N(0, c^2), c being the flow of 1.
    """
    y = np.asarray(y, np.float64)
    scale = float(prior_scale(prior)) if noise_space else 1.0
    grid = np.linspace(-3.0, 3.0, 6001)
    total = scale**2 + np.exp(2.0 * grid)
    log_weight = -2.0 * grid**2 - 0.5 * (np.square(y).sum() / total + y.size * np.log(total))
    cumulative = np.cumsum(np.exp(log_weight - log_weight.max()))
    cumulative /= cumulative[-1]

    def given(s2):
        s2 = s2.reshape(-1, *[1] * y.ndim)
        return y * scale**2 / (scale**2 + s2), scale * np.sqrt(s2 / (scale**2 + s2))

    def draw(rng, size):
        log_noise = np.full(size, np.log(noise or 1.0))
        if noise is None:
            log_noise = np.interp(rng.uniform(size=size), cumulative, grid)
        mean, deviation = given(np.exp(2.0 * log_noise))
        u = mean + deviation * rng.normal(size=(size, *y.shape))
        if noise_space:
            values = {"x_noise": u / scale}
        elif prior.transform is None:
            values = {"x": u}
        else:
            values = {"x": dist.biject_to(prior.support).inv(prior.transform(jnp.asarray(u, jnp.float32)))}
        return values if noise is not None else {**values, "noise": log_noise}

    def ranks(values):
        log_noise = np.full(len(values["x"]), 0.0) if noise is not None else np.log(np.asarray(values["noise"], float))
        u = np.asarray(own_space(prior, values["x"]), np.float64)
        mean, deviation = given(np.exp(2.0 * log_noise) if noise is None else np.full(len(u), noise**2))
        given_noise = ndtr((u - mean) / deviation).reshape(len(u), -1)
        return given_noise if noise is not None else np.c_[np.interp(log_noise, grid, cumulative), given_noise]

    model = in_plate if y.ndim == 2 else known_noise if noise is not None else unknown_noise
    return Law(model, (jnp.asarray(y, jnp.float32), prior), draw, ranks)


def prior_scale(prior):
    """What the flow makes of one, in the denoiser's own space."""
    return own_space(prior, prior.flow(jnp.ones(prior.noise_shape)))[0]


def mixture_posterior(prior, y=1.0):
    """Of `on_mixture`: a mixture again, ranked in the sum of the entries and in their difference given it."""
    turn = np.array([[1.0, 1.0], [1.0, -1.0]])
    gain = 0.5 * np.ones(2) / 1.49
    covariance = 0.5 * np.eye(2) - np.outer(gain, 0.5 * np.ones(2))
    log_weights = np.log(WEIGHTS) - 0.5 * (y - MEANS.sum(1)) ** 2 / 1.49
    weights = np.exp(log_weights - np.logaddexp(*log_weights))
    means = MEANS + np.outer(y - MEANS.sum(1), gain)
    (a, b), (_, c) = turn @ covariance @ turn.T

    def draw(rng, size):
        centre = means[rng.choice(2, size, p=weights)]
        return {"x": centre + rng.normal(size=(size, 2)) @ np.linalg.cholesky(covariance).T}

    def ranks(values):
        first, second = turn @ np.asarray(values["x"], np.float64).T
        off = first[:, None] - means @ turn[0]
        log_given = np.log(weights) - 0.5 * off**2 / a
        given = np.exp(log_given - np.logaddexp.reduce(log_given, 1, keepdims=True))
        rest = second[:, None] - means @ turn[1] - b / a * off
        return np.c_[ndtr(off / np.sqrt(a)) @ weights, (given * ndtr(rest / np.sqrt(c - b**2 / a))).sum(1)]

    return Law(on_mixture, (y, prior), draw, ranks)


def pair_posterior():
    """Of `pair` at y = 3."""
    deviation = np.sqrt(2.0 / 3.0)

    def draw(rng, size):
        x = 2.0 + deviation * rng.normal(size=size)
        return {"x": x, "s": 0.5 * x + np.sqrt(0.5) * rng.normal(size=size)}

    def ranks(values):
        x, s = (np.asarray(values[name], np.float64) for name in "xs")
        return np.c_[ndtr((x - 2.0) / deviation), ndtr((s - 0.5 * x) / np.sqrt(0.5))]

    return Law(pair, (3.0,), draw, ranks)


def count_posterior():
    """Of `count` at y = 3: Gamma(5, 2)."""
    draw = lambda rng, size: {"x": np.log(rng.gamma(5.0, size=size) / 2.0)}  # noqa: E731
    return Law(count, (3,), draw, lambda values: gammainc(5.0, 2.0 * np.asarray(values["x"], np.float64))[:, None])


def on_a_grid(model, args, grid, log_density, pick=lambda x: x, put=lambda x: x):
    """A posterior of one number by quadrature."""
    density = np.exp(log_density - log_density.max())
    cumulative = np.cumsum(density) / density.sum()
    draw = lambda rng, size: {"x": put(np.interp(rng.uniform(size=size), cumulative, grid))}  # noqa: E731
    ranks = lambda values: np.interp(np.asarray(pick(values["x"]), np.float64), grid, cumulative)[:, None]  # noqa: E731
    return Law(model, args, draw, ranks)


def two_modes_posterior(prior=None, y=-4.0):
    """Of `two_modes`, or of `two_learned_modes` under a prior of that kind with unit deviations."""
    grid = np.linspace(-14.0, 14.0, 56_001)
    second = 0.5 if prior is None else 1.0
    modes = np.logaddexp(
        np.log(0.3) - 0.5 * (grid + 6.0) ** 2, np.log(0.7 / second) - 0.5 * ((grid - 6.0) / second) ** 2
    )
    log_density = modes - 0.5 * ((grid - y) / 8.0) ** 2
    if prior is None:
        return on_a_grid(two_modes, (y,), grid, log_density)
    return on_a_grid(two_learned_modes, (y, prior), grid, log_density, lambda x: x[:, 0], lambda x: x[:, None])


def plain_posterior(y=3.0):
    """Of `plain`."""
    grid = np.linspace(-4.0, 7.0, 40_001)
    log_density = -0.5 * (grid**2 + (y - grid) ** 2)
    return on_a_grid(plain, (y,), grid, log_density, lambda x: x[:, 0], lambda x: x[:, None])


def tempered_posterior():
    """Of `plain` at y = 3, with points at all temperatures: N(3 b, 1) / (1 + b) in mean and variance."""
    law = plain_posterior()

    def place(rng, state):
        b = np.asarray(state.ladder.temperatures, np.float64)[..., None]
        drawn = 3.0 * b / (1.0 + b) + rng.normal(size=b.shape) / np.sqrt(1.0 + b)
        drawn[:, -1] = np.asarray(state.z["x"])
        return state._replace(points={"x": jnp.asarray(drawn, jnp.float32)})

    return replace(law, place=place)


def half_line_posterior(nan_below, prior=None):
    """Of `half_line`, or of `half_space` of one dimension under a standard normal prior."""
    grid = np.linspace(0.50001, 8.0, 40_001)  # its ends are inside
    if prior is None:
        return on_a_grid(half_line, (nan_below,), grid, -0.5 * grid**2)
    return on_a_grid(half_space, (nan_below, prior), grid, -0.5 * grid**2, lambda x: x[:, 0], lambda x: x[:, None])


def quadrature(y=Y):
    """Posterior mean and variance of x, and of the noise, of `unknown_noise`."""
    log_noise = np.linspace(-4.0, 4.0, 4001)
    s2 = np.exp(2.0 * log_noise)
    y = np.asarray(y)[:, None]
    log_weight = -0.5 * (log_noise / 0.5) ** 2 - 0.5 * (y**2 / (1 + s2) + np.log(1 + s2)).sum(0)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean, variance = y / (1 + s2), s2 / (1 + s2)
    x_mean = (weight * mean).sum(1)
    x_variance = (weight * (variance + mean**2)).sum(1) - x_mean**2
    noise_mean = (weight * np.exp(log_noise)).sum()
    return x_mean, x_variance, noise_mean, (weight * s2).sum() - noise_mean**2


TABLE = jnp.array([[3.0, -1.0], [0.0, 2.0]])
"""Data of two points in a plate."""


# Conditional priors


@jax.tree_util.register_static
class AroundCondition:
    """The exact conditional denoiser of N(c, 1), known to stand at 0 with scale 1 when nothing is said of c."""

    schedule, event_shape, location, scale = VE(0.01, 40.0), (1,), 0.0, 1.0

    def __call__(self, x_t, t, cond=None):
        return Gaussian(jnp.zeros(1) + cond, 1.0, self.schedule)(x_t, t)


def around(centres, **options):
    return DiffusionPrior(AroundCondition(), cond=centres, cond_batch_dims=1, **options)
