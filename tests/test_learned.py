"""A posterior as a prior: the map from noise to named sites, its density, models, files, and what is refused."""

import inspect
import pickle

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from moments import assert_moments
from numpyro.distributions import constraints
from numpyro.handlers import seed
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density

from numpyro_diffusion import DiffusionPrior, load, prior_from_idata, prior_from_samples, save
from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser
from numpyro_diffusion.infer import MALA, DiffusionPCN, NoiseSpace, PopulationHMC
from numpyro_diffusion.learned import LearnedPrior
from numpyro_diffusion.learned.layout import _SUPPORTS, Layout, Site
from numpyro_diffusion.learned.units import Units, measure
from numpyro_diffusion.nn import MLP

RNG = np.random.default_rng(0)
COUNT = 400
DRAWS = {
    "share": RNG.beta(2.0, 1.0, COUNT).astype(np.float32),
    "parts": RNG.dirichlet([1.0, 2.0, 3.0], COUNT).astype(np.float32),
    "rate": RNG.gamma(3.0, 1.0, (COUNT, 1)).astype(np.float32),
    "x": RNG.normal(5.0, 2.0, (COUNT, 2)).astype(np.float32),
}
SUPPORTS = {"share": dist.Beta(1.0, 1.0), "parts": constraints.simplex, "rate": constraints.positive}
MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.5, 0.3], [0.3, 0.4]])


def normal():
    """A law that is known: (log rate, x) are normal."""
    sites = Site("rate", (), constraints.positive), Site("x", (1,), constraints.real)
    units = Units(jnp.asarray(MEAN), jnp.asarray(np.linalg.cholesky(COVARIANCE)))
    return LearnedPrior(DiffusionPrior(Gaussian(np.zeros(2))), Layout(sites), units)


def learn(draws=DRAWS, supports=SUPPORTS, **options):
    return prior_from_samples(draws, supports, **{"num_steps": 20, "report": False, **options})


def network(sites=None):
    """A prior with a network that is random, as if it had been trained."""
    sites = Layout(tuple(Site(n, v.shape[1:], constraints.real) for n, v in DRAWS.items())) if sites is None else sites
    backbone = MLP((sites.size,), 8, 1, embed_features=6, rngs=nnx.Rngs(0))
    units = Units(jnp.arange(sites.size, dtype=float), jnp.eye(sites.size) * 2.0)
    return LearnedPrior(DiffusionPrior(NetworkDenoiser(backbone)), sites, units)


# Sites as vectors


VALUES = {
    "Real": np.array(0.3),
    "RealVector": np.array([1.0, -2.0]),
    "RealMatrix": np.ones((2, 3)),
    "LowerCholesky": np.array([[2.0, 0.0], [0.3, 1.0]]),
    "ScaledUnitLowerCholesky": np.array([[2.0, 0.0], [0.3, 1.0]]),
    "SoftplusLowerCholesky": np.array([[2.0, 0.0], [0.3, 1.0]]),
    "PositiveDefinite": np.array([[2.0, 0.3], [0.3, 1.0]]),
    "CorrMatrix": np.array([[1.0, 0.3], [0.3, 1.0]]),
    "CorrCholesky": np.array([[1.0, 0.0], [0.6, 0.8]]),
    "Simplex": np.array([0.2, 0.3, 0.5]),
    "OrderedVector": np.array([-1.0, 0.0, 2.0]),
    "PositiveOrderedVector": np.array([0.5, 1.0, 2.0]),
    "L1Ball": np.array([0.1, -0.2, 0.3]),
    "LessThan": np.array(-2.0),
    "LessThanEq": np.array(-2.0),
}
BOUNDS = {"lower_bound": -1.0, "upper_bound": np.array([0.5, 2.0], np.float32)}


@pytest.mark.parametrize("kind", _SUPPORTS)
def test_supports_are_mapped_and_described(kind):
    """Each known support: values come back, and so does the site from its JSON."""
    cls, value = _SUPPORTS[kind], VALUES.get(kind, np.array(0.4))
    if kind in ("Interval", "OpenInterval"):
        support, value = cls(**BOUNDS), np.array([0.4, 0.4])
    elif kind.startswith(("Greater", "Less")):
        support = cls(0.25 if kind.startswith("Greater") else 0.75)
    else:
        support = cls()
    draws = np.stack([value, value]).astype(np.float32)
    layout = Layout((Site("a", value.shape, support),))
    u = layout.rows({"a": draws})
    np.testing.assert_allclose(layout.constrain(jnp.asarray(u))["a"], draws, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layout.unconstrain({"a": draws}), u, rtol=1e-4, atol=1e-5)
    again = Site.read(layout.sites[0].describe())
    assert again == layout.sites[0] and hash(again) == hash(layout.sites[0])
    np.testing.assert_allclose(Layout((again,)).constrain(jnp.asarray(u))["a"], draws, rtol=1e-4, atol=1e-5)
    assert layout.log_det(jnp.asarray(u)).shape == (2,) and len(layout.entries) == layout.size


def test_units_are_those_of_weighted_draws():
    """Mean and covariance of draws with weights are those of draws that are repeated; entries stay near themselves."""
    u = np.random.default_rng(1).normal(size=(50, 3)) @ np.array([[1.0, 0.9, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 20.0]])
    times = np.random.default_rng(2).integers(1, 5, 50)
    repeated = np.repeat(u, times, 0)
    location, factor = measure(u, times / times.sum(), ["a", "b", "c"])
    np.testing.assert_allclose(location, repeated.mean(0))
    np.testing.assert_allclose(factor @ factor.T, np.cov(repeated.T, ddof=0))
    whitened = np.linalg.solve(factor, (repeated - location).T)
    assert (np.diag(np.corrcoef(whitened, repeated.T)[:3, 3:]) > 0.8).all()


# The law


def test_log_prob_is_that_of_the_constrained_values():
    """Against log-normal and normal densities: the Jacobians of the support and of the units are in it once."""
    prior = normal()
    values = prior.sample(jax.random.key(0), (5,))
    log_rate, x = np.log(values["rate"]), np.asarray(values["x"][:, 0])
    truth = dist.MultivariateNormal(MEAN, COVARIANCE).log_prob(np.stack([log_rate, x], 1)) - log_rate
    np.testing.assert_allclose(prior.log_prob(values), truth, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(prior.constrain(prior.unconstrain(values))["rate"], values["rate"], rtol=1e-5)


def model(prior):
    theta = prior()
    numpyro.sample("y", dist.Normal(jnp.log(theta["rate"]) + theta["x"][0], 0.5), obs=2.0)


def earlier(y=2.0, shape=(1,)):
    rate = numpyro.sample("speed", dist.LogNormal(50.0, 1.0))
    x = numpyro.sample("x", dist.Cauchy(0.0, 1.0).expand(shape).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.log(rate) + x[0], 0.5), obs=y)


def test_a_model_sees_the_pushforward():
    """The density of a model is that of the vector and of the data; the sites' Jacobian is nowhere."""
    prior, w = normal(), jnp.array([0.3, -0.7])
    found, trace = log_density(model, (prior,), {}, {"learned": w})
    theta = prior.constrain(w)
    likelihood = dist.Normal(jnp.log(theta["rate"]) + theta["x"][0], 0.5).log_prob(2.0)
    np.testing.assert_allclose(found, dist.Normal(0.0, 1.0).log_prob(w).sum() + likelihood, rtol=1e-4)
    assert {n for n, s in trace.items() if s["type"] == "deterministic"} == {"rate", "x"}


def test_in_place_of_priors_says_the_same():
    """The priors that a model has of its own do not count, under other names either, and it pickles."""
    prior, w = normal(), jnp.array([0.3, -0.7])
    sequel = pickle.loads(pickle.dumps(normal().in_place_of_priors(earlier, rename={"rate": "speed"})))
    found, trace = log_density(sequel, (), {}, {"learned": w})
    np.testing.assert_allclose(found, log_density(model, (prior,), {}, {"learned": w})[0], rtol=1e-5)
    assert trace["speed"]["type"] == "deterministic"


def posterior():
    """Mean and variance of log rate and x."""
    a = np.ones(2)
    gain = COVARIANCE @ a / (a @ COVARIANCE @ a + 0.25)
    return MEAN + gain * (2.0 - a @ MEAN), np.diag(COVARIANCE - np.outer(gain, a @ COVARIANCE))


def check(samples):
    assert_moments(np.concatenate([np.log(samples["rate"])[..., None], samples["x"]], -1), *posterior())


@pytest.mark.parametrize(
    "kernel", [NoiseSpace, *(pytest.param(k, marks=pytest.mark.slow) for k in (NUTS, MALA, DiffusionPCN))]
)
def test_kernels(kernel):
    """By default through noise space, the density of the vector, and its reverse process: the posterior is known."""
    chains = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel(model), num_warmup=300, num_samples=500, **chains)
    mcmc.run(jax.random.key(1), normal())
    check(mcmc.get_samples(group_by_chain=True))


@pytest.mark.slow
def test_population():
    population = PopulationHMC(model, 64, 4, max_gradients=100_000, progress_bar=False)
    population.run(jax.random.key(1), normal())
    check(population.get_samples(group_by_chain=True))


def test_two_in_one_model():
    """Other names and another site for the second."""

    def both():
        return normal()(), normal()(rename={"rate": "rate_2", "x": "x_2"}, site="second")

    drawn = Predictive(both, num_samples=3)(jax.random.key(0))
    assert set(drawn) == {"learned", "second", "rate", "x", "rate_2", "x_2"}


def test_other_solvers():
    prior = normal().using(density="none")
    with pytest.raises(NotImplementedError, match="no log_prob"):
        prior.log_prob(prior.flow(jnp.zeros(2)))


# Files


@pytest.mark.slow
def test_saved_loaded_and_pickled(tmp_path):
    """The same law bit for bit, with its report; new weights are arguments and compile nothing."""
    prior = learn(report=False)
    save(tmp_path / "prior.safetensors", prior)
    for again in load(tmp_path / "prior.safetensors"), pickle.loads(pickle.dumps(prior)):
        assert jax.tree.structure(again) == jax.tree.structure(prior) and repr(again) == repr(prior)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(prior), strict=True):
            np.testing.assert_array_equal(one, other)
    drawn = prior.sample(jax.random.key(0), (2000,))
    for name, support in SUPPORTS.items():
        support = support.support if isinstance(support, dist.Distribution) else support
        assert np.isfinite(drawn[name]).all() and support(drawn[name]).all(), name
    assert max(leaf.size for leaf in jax.tree.leaves(prior)) < 64 * 200  # of weights: no draws are in it
    assert not any(COUNT in leaf.shape for leaf in jax.tree.leaves(prior))


def test_a_file_of_another_law_is_refused(tmp_path):
    """Sites and network must agree."""
    prior = network()
    fewer = LearnedPrior(prior.prior, Layout(prior.layout.sites[1:]), prior.units)
    save(tmp_path / "prior.safetensors", fewer)
    with pytest.raises(ValueError, match="sites have 6 entries; its network has shape"):
        load(tmp_path / "prior.safetensors")


# What is refused


def altered(name, value):
    return {**DRAWS, name: value}


def at(name, index, value):
    values = DRAWS[name].copy()
    values[index] = value
    return altered(name, values)


REFUSED = {
    "constant": ({"draws": altered("x", np.ones((COUNT, 2), np.float32))}, ValueError, r"x\[0\], x\[1\] are constant"),
    "one constant": ({"draws": at("x", np.s_[:, 1], 3.0)}, ValueError, r"those of x\[1\] are constant"),
    "few": ({"draws": {n: v[:99] for n, v in DRAWS.items()}}, ValueError, "at least 100 draws; got 99"),
    "nan": ({"draws": at("x", (7, 1), np.nan)}, ValueError, r"samples\['x'\] must be finite; got 1 .* \(7, 1\)"),
    "negative": ({"draws": at("rate", 3, -1.0)}, ValueError, "'rate' must lie inside .* the first is draw 3"),
    "above one": ({"draws": at("share", 3, 1.5)}, ValueError, "'share' must lie inside"),
    "on the boundary": ({"draws": at("share", 3, 1.0)}, ValueError, "or drop those on its boundary"),
    "no simplex": ({"draws": altered("parts", 2.0 * DRAWS["parts"])}, ValueError, "'parts' .* 400 of 400"),
    "integers": ({"draws": altered("x", np.arange(COUNT))}, TypeError, "leave discrete ones out"),
    "counts differ": ({"draws": altered("x", DRAWS["x"][1:])}, ValueError, "all sites must have as many draws"),
    "no draws": ({"draws": {}}, ValueError, "samples must have draws by site"),
    "tied": ({"draws": {**DRAWS, "z": DRAWS["x"] * 2.0}}, ValueError, "determine each other"),
    "supports": ({"supports": {"speed": constraints.positive}}, ValueError, r"got \['speed'\]"),
    "support": ({"supports": {"rate": "positive"}}, TypeError, "must be a constraint"),
    "discrete": ({"supports": {"rate": constraints.positive_integer}}, TypeError, "discrete"),
    "no bijection": ({"supports": {"rate": constraints.circular}}, TypeError, "is none of Real, "),
    "too deep": ({"supports": {"share": constraints.simplex}}, ValueError, "of 1 dimensions; draws have"),
    "weights' shape": ({"weights": np.ones(COUNT - 1)}, ValueError, r"shape \(400,\); got \(399,\)"),
    "weights' sign": ({"weights": np.linspace(-1.0, 1.0, COUNT)}, ValueError, "must not be negative; got -1"),
    "weights' nan": ({"weights": np.full(COUNT, np.nan)}, ValueError, "weights must be finite"),
    "weights vanish": ({"weights": np.zeros(COUNT)}, ValueError, "weights must not all vanish"),
    "few effective": ({"weights": np.arange(COUNT) < 50}, ValueError, "at least 100 draws; got 50.0 of 400"),
    "fraction": ({"held_out_fraction": 1.0}, ValueError, "held_out_fraction must lie in"),
    "option": ({"held_out": np.ones((9, 6))}, TypeError, "must not be held_out"),
    "leading dimensions": ({"batch_ndims": 2}, ValueError, "'share' must have 2 leading dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        learn(**options)


def test_training_that_diverges():
    with pytest.raises(FloatingPointError, match="learning rate|not finite"):
        learn(optimizer=optax.sgd(1e30))


def test_names_are_checked():
    prior = normal()
    with pytest.raises(ValueError, match=r"rename must have names of learned sites, \['rate', 'x'\]; got \['speed'\]"):
        prior(rename={"speed": "rate"})
    with pytest.raises(ValueError, match="a name of its own"):
        prior(rename={"rate": "x"})
    with pytest.raises(ValueError, match=r"\['x'\] are missing"):
        prior.log_prob({"rate": 1.0})
    with pytest.raises(ValueError, match=r"values\['x'\] must end with shape \(1,\)"):
        prior.log_prob({"rate": 1.0, "x": jnp.zeros(2)})


@pytest.mark.parametrize(
    "options, args, match",
    [
        ({}, {}, r"\['rate'\] are missing. Rename sites by rename="),
        ({"rename": {"rate": "speed"}}, {"shape": (2,)}, r"'x' must have the shape of its draws, \(1,\); got \(2,\)"),
        ({"rename": {"rate": "speed", "x": "y"}}, {}, "'y' is observed"),
    ],
)
def test_models_without_the_sites(options, args, match):
    sequel = seed(normal().in_place_of_priors(earlier, **options), 0)
    with pytest.raises(ValueError, match=match):
        log_density(sequel, (), args, {"learned": jnp.zeros(2)})


# ArviZ


def test_idata():
    """By chain, some variables, with weights by chain; a wrong name says what there is."""
    groups = {"posterior": {n: v.reshape(4, -1, *v.shape[1:]) for n, v in DRAWS.items()}}
    old = "posterior" in inspect.signature(az.from_dict).parameters  # ArviZ 0.23; 1.x takes one dictionary
    idata = az.from_dict(**groups) if old else az.from_dict(groups)
    found = prior_from_idata(idata, ["x", "rate"], {"rate": constraints.positive}, num_steps=20, report=False)
    assert repr(found) == "LearnedPrior(x[2], rate[1])"
    np.testing.assert_allclose(found.units.location[:2], DRAWS["x"].mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"var_names must be variables of the posterior, \['share'.*got \['speed'\]"):
        prior_from_idata(idata, ["speed"])
    with pytest.raises(ValueError, match=r"the group 'prior'; got \['posterior'\]"):
        prior_from_idata(idata, group="prior")
    with pytest.raises(ValueError, match=r"weights must .* shape \(4, 100\)"):
        prior_from_idata(idata, "x", weights=np.ones(400))
