"""`DiffusionPrior` among NumPyro's distributions, with the closed form of its law as truth."""

import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.distributions import constraints, transforms
from numpyro.infer import Predictive
from numpyro.infer.util import log_density

from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser, Product
from numpyro_diffusion.density import log_prob
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VP
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, Heun, StochasticHeun

MEAN, DEVIATION = np.array([0.5, -1.0], np.float32), 0.8
SAMPLER = Ancestral(129)
EXACT = dist.Normal(MEAN, DEVIATION).to_event(1)


def prior(mean=MEAN, **options):
    """An isotropic Gaussian, whose flow three Heun steps solve exactly, and its density too where it is the flow's."""
    return DiffusionPrior(
        Gaussian(mean, DEVIATION**2),
        sampler=SAMPLER,
        flow_solver=Heun(3),
        density_solver=Heun(3),
        **options,
    )


def close(got, expected, atol=1e-3):
    np.testing.assert_allclose(got, expected, atol=atol)


def points(*shape):
    return MEAN + np.random.default_rng(5).normal(size=(*shape, 2)).astype(np.float32)


def shape_of(draw, *shape):
    """The shape that a sampler would return, without running it."""
    return jax.eval_shape(lambda key: draw(key, shape), jax.random.key(0)).shape


def test_sample_has_the_law():
    """Mean and variance of 4,000 draws, within 4.5 standard errors and the sampler's 6 % of the variance."""
    x = prior().sample(jax.random.key(0), (4, 1000)).reshape(-1, 2)
    assert (abs(x.mean(0) - MEAN) < 4.5 * DEVIATION / 4000**0.5).all()
    assert (abs(x.var(0) / DEVIATION**2 - 1) < 4.5 * (2 / 4000) ** 0.5 + 0.06).all()


def test_flow_is_the_quantile_map():
    """An isotropic Gaussian's flow is mean + deviation z, up to the smallest noise level."""
    z = points(3)
    close(prior().flow(z), MEAN + DEVIATION * z)
    close(jax.jit(jax.jacrev(prior().flow))(z[0]), DEVIATION * np.eye(2))
    assert jax.eval_shape(prior().flow, jnp.zeros((2, 3, 2))).shape == (2, 3, 2)


@pytest.mark.parametrize("density", ["auto", "flow"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_shapes_and_values_of_log_prob(shape, density):
    """In closed form and by the flow; the smallest noise level is 0.002, which makes 1e-5 nats."""
    x, p = points(*shape), prior(density=density)
    assert p.log_prob(x).shape == shape
    close(p.log_prob(x), EXACT.log_prob(x))
    assert shape_of(p.sample, *shape) == (*shape, 2)


def network(**options):
    """An untrained network, or energy, of a linear guess and a little more."""
    backbone = MLP((2,), features=8, num_blocks=1, rngs=nnx.Rngs(0))
    backbone.output_layer.kernel[...] = 0.3 * jax.random.normal(jax.random.key(1), (8, 2), jnp.float32)
    return NetworkDenoiser(backbone, **options)


SOURCES = {
    "exact": (lambda: Gaussian(MEAN), {"auto": "denoiser", "denoiser": "denoiser", "flow": "flow", "none": None}),
    "network": (network, {"auto": "flow", "flow": "flow", "none": None}),
    "energy": (lambda: network(target="energy"), {"auto": "flow", "denoiser": "denoiser", "flow": "flow"}),
    "product": (lambda: Product([Gaussian(MEAN)] * 2), {"auto": None, "denoiser": "denoiser", "none": None}),
}


@pytest.mark.parametrize("make, sources", SOURCES.values(), ids=SOURCES)
def test_where_the_density_comes_from(make, sources):
    """The first that is normalised, unless the user says."""
    denoiser = make()
    for density, source in sources.items():
        assert DiffusionPrior(denoiser, density=density).density_source == source


@jax.jit
def values_and_gradients(p, x):
    return jax.vmap(jax.value_and_grad(p.log_prob))(x)


@pytest.mark.slow
def test_the_density_of_a_network_is_normalised_unless_its_energy_is_asked_for():
    """The flow's, and the energy's own at the smallest level with its Jacobian; the score is the gradient of both."""
    denoiser, x = network(target="energy", schedule=VP(t_min=0.01)), points(4)
    auto, own = (DiffusionPrior(denoiser, density=d, density_solver=Heun(4)) for d in ("auto", "denoiser"))
    (flow, score), (energy, slope) = (values_and_gradients(p, x) for p in (auto, own))
    t = denoiser.schedule.t_min
    alpha = denoiser.schedule.alpha(t)
    assert alpha < 0.9999
    close(energy, jax.vmap(lambda x: denoiser.log_density(alpha * x, t))(x) + 2 * jnp.log(alpha), atol=1e-4)
    assert np.ptp(flow - energy) > 1e-3  # another density, if with four steps
    np.testing.assert_allclose(score, slope, rtol=1e-3, atol=1e-2)


def test_a_product_has_a_density_up_to_a_constant_or_none():
    product = Product([Gaussian(MEAN)] * 2)
    with pytest.raises(NotImplementedError, match='a Product has no probability flow.*density="denoiser"'):
        DiffusionPrior(product).log_prob(MEAN)
    one, other = DiffusionPrior(product, density="denoiser").log_prob(points(2))
    exact = 2 * dist.Normal(MEAN, 1.0).to_event(1).log_prob(points(2))
    close(one - other, exact[0] - exact[1], atol=5e-3)


def test_probes_of_the_density():
    """Those of one fixed key, so that the density is a function; its gradient is the score all the same."""
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]], np.float32)
    law, x, solver = Gaussian(MEAN, covariance), points(3), Heun(4)
    p = DiffusionPrior(law, density="flow", density_solver=solver, density_probes=1)
    value, score = values_and_gradients(p, x)
    one = lambda x: log_prob(law, x, solver, num_probes=1, key=jax.random.key(0)).value  # noqa: E731
    close(value, jax.jit(jax.vmap(one))(x), atol=1e-5)
    close(score, -(x - MEAN) @ np.linalg.inv(covariance), atol=0.05)  # in single precision, at noise level 0.002


@pytest.mark.parametrize(
    "derivative, transform", [(jax.grad, None), (jax.jacfwd, transforms.ExpTransform())], ids=["plain", "exp"]
)
@pytest.mark.parametrize("density", ["auto", "flow"])
def test_gradient_of_log_prob(derivative, transform, density, x64):
    """The score of the exact law; with a transform, of its Jacobian too. Reverse and forward mode."""
    x = np.exp(points(3).astype(np.float64))
    exact = EXACT if transform is None else dist.TransformedDistribution(EXACT, transform)
    p = prior(transform=transform, density=density)
    gradient, expected = (jax.jit(derivative(lambda x, d=d: d.log_prob(x).sum()))(x) for d in (p, exact))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_defaults():
    """Karras' stochastic sampler, Heun's flow, and a density good to 1e-2 nats (`test_density`)."""
    p = DiffusionPrior(Gaussian(MEAN))
    assert (p.sampler, p.flow_solver, p.density_solver) == (DPMSolverPP(64, eta=1.0), Heun(18), Heun(64))
    assert (p.density, p.density_source, p.density_probes) == ("auto", "denoiser", None) and p.transform is None
    assert p.event_shape == p.noise_shape == (2,) and p.batch_shape == () and p.support.event_dim == 1


def test_is_a_pytree_of_the_denoisers_arrays():
    p = prior()
    leaves, structure = jax.tree.flatten(p)
    expected = jax.tree.leaves(p.denoiser)
    assert len(leaves) == len(expected) > 0
    assert all(a is b for a, b in zip(leaves, expected, strict=True))
    again = jax.tree.unflatten(structure, leaves)
    assert again.event_shape == (2,) and again.batch_shape == ()
    assert (again.sampler, again.flow_solver, again.density_solver) == (SAMPLER, Heun(3), Heun(3))
    close(again.log_prob(MEAN), EXACT.log_prob(MEAN))
    moved = jax.tree.map(lambda leaf: leaf, prior(MEAN + 1.0))
    assert jax.tree.structure(moved) == structure


def test_new_weights_are_not_traced_again():
    """As an argument of a jitted function and of the eager methods; another solver is another program."""
    traces = []

    @jax.tree_util.register_pytree_node_class
    class Traced(Gaussian):
        def __call__(self, x_t, t):
            traces.append(t)
            return super().__call__(x_t, t)

    def with_mean(mean, num_times=4):
        solvers = {"sampler": Ancestral(num_times), "flow_solver": Heun(3), "density_solver": Heun(3)}
        return DiffusionPrior(Traced(MEAN + mean, DEVIATION**2), **solvers, density="flow")

    jitted = jax.jit(lambda p, x: (p.log_prob(x), p.flow(x)))
    for mean in (0.0, 1.0, 2.0):
        density, _ = jitted(with_mean(mean), MEAN)
        close(density, EXACT.log_prob(MEAN - mean), atol=5e-3)
        with_mean(mean).sample(jax.random.key(0), (2,))
        with_mean(mean).log_prob(MEAN)
        if mean == 0.0:
            seen = len(traces)
    assert len(traces) == seen > 0
    with_mean(0.0, num_times=5).sample(jax.random.key(0), (2,))
    assert len(traces) > seen


def test_a_batch_of_priors_by_vmap():
    """Stacked arrays are many priors, one for each point."""
    means = MEAN + np.arange(3, dtype=np.float32)[:, None]
    x = points(3)
    stacked = jax.vmap(prior)(means)
    got, flowed = jax.jit(jax.vmap(lambda p, x: (p.log_prob(x), p.flow(jnp.zeros(2)))))(stacked, x)
    close(got, dist.Normal(means, DEVIATION).to_event(1).log_prob(x))
    close(flowed, means)


WRAPPED = {
    "expand": (lambda p: p.expand((3,)), (3,), (2,)),
    "expand twice": (lambda p: p.expand((3,)).expand((2, 3)), (2, 3), (2,)),
    "to_event": (lambda p: p.expand((3,)).to_event(1), (), (3, 2)),
    "mask": (lambda p: p.expand((3,)).mask(np.array([True, False, True])), (3,), (2,)),
    "mask off": (lambda p: p.mask(False), (), (2,)),
}


@pytest.mark.parametrize("wrap, batch_shape, event_shape", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_as_any_distribution(wrap, batch_shape, event_shape):
    """Whatever NumPyro wraps around it does what it does to a normal law."""
    wrapped, exact = wrap(prior()), wrap(EXACT)
    assert (wrapped.batch_shape, wrapped.event_shape) == (batch_shape, event_shape)
    assert shape_of(wrapped.sample, 5) == (5, *batch_shape, *event_shape)
    x = points(*batch_shape, *event_shape[:-1])
    assert wrapped.log_prob(x).shape == batch_shape
    close(wrapped.log_prob(x), exact.log_prob(x), atol=4e-3)


def test_draws_of_an_expanded_prior_are_independent():
    x = prior().expand((4, 1000)).sample(jax.random.key(0))
    assert len(np.unique(x[..., 0])) > 3990  # two floats of 4,000 may meet


def model(prior, y=None):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x.sum(-1), 0.5).to_event(1), obs=y)


def test_in_a_plate_of_a_model_as_an_argument():
    """The joint density is the exact law's, under jit with the prior as the model's argument."""
    x, y = points(3), jnp.array([0.0, 1.0, -1.0])
    joint = jax.jit(lambda p, x: log_density(model, (p, y), {}, {"x": x})[0])
    expected = EXACT.log_prob(x).sum() + dist.Normal(x.sum(-1), 0.5).log_prob(y).sum()
    close(joint(prior(), x), expected, atol=5e-3)
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        model(prior(), y)
    assert trace["x"]["value"].shape == (3, 2) and trace["x"]["fn"].batch_shape == (3,)


def test_predictive():
    """From the prior, and from posterior draws."""
    drawn = Predictive(model, num_samples=500)(jax.random.key(0), prior())
    assert drawn["x"].shape == (500, 3, 2) and drawn["y"].shape == (500, 3)
    x, y = drawn["x"].reshape(-1, 2), drawn["y"].reshape(-1)
    assert (abs(x.mean(0) - MEAN) < 4.5 * DEVIATION / 1500**0.5).all()
    assert abs((y - x.sum(-1)).std() / 0.5 - 1) < 4.5 * (0.5 / 1500) ** 0.5
    given = Predictive(model, {"x": jnp.full((500, 3, 2), 2.0)})(jax.random.key(1), prior())
    assert abs(given["y"].mean() - 4.0) < 4.5 * 0.5 / 1500**0.5


def test_render_model():
    graph = numpyro.render_model(model, (prior(), jnp.zeros(3)), render_distributions=True)
    assert "x ~ DiffusionPrior" in graph.source and "x -> y" in graph.source and "rows" in graph.source


def test_pickle_and_copy():
    p = prior(transform=transforms.ExpTransform())
    again = pickle.loads(pickle.dumps(p))
    assert jax.tree.structure(again) == jax.tree.structure(p)
    close(again.log_prob(np.ones(2, np.float32)), p.log_prob(np.ones(2, np.float32)), atol=0)
    assert again.support == p.support


def test_leaf_order_is_the_same_in_every_process(tmp_path):
    """Another process, with other hashes of strings, flattens a pickled prior to the same leaves in the same order."""
    assert len(DiffusionPrior.gather_pytree_data_fields()) == 1  # NumPyro puts several in the order of a set
    loc = np.array([1.0, 2.0])
    law = GaussianMixture([0.2, 0.3, 0.5], np.arange(6.0).reshape(3, 2), np.arange(1.0, 7.0).reshape(3, 2), VP())
    p = DiffusionPrior(law, transform=transforms.AffineTransform(loc, 3.0))
    (tmp_path / "prior.pickle").write_bytes(pickle.dumps(p))
    code = (
        "import pickle, sys, jax; p = pickle.load(open(sys.argv[1], 'rb'));"
        "print([leaf.tolist() if hasattr(leaf, 'tolist') else leaf for leaf in jax.tree.leaves(p)])"
    )
    expected = str([leaf.tolist() if hasattr(leaf, "tolist") else leaf for leaf in jax.tree.leaves(p)])
    command = [sys.executable, "-c", code, str(tmp_path / "prior.pickle")]
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == expected


TRANSFORMS = {
    "exp": (transforms.ExpTransform(), constraints.positive),
    "softplus": (transforms.SoftplusTransform(), constraints.softplus_positive),
    "sigmoid": (transforms.SigmoidTransform(), constraints.unit_interval),
    "affine": (transforms.AffineTransform(1.0, np.array([2.0, 3.0])), constraints.real),
    "composed": (
        transforms.ComposeTransform([transforms.ExpTransform(), transforms.AffineTransform(0.0, 5.0)]),
        constraints.positive,
    ),
    "stick breaking": (transforms.StickBreakingTransform(), constraints.simplex),
    "ordered": (transforms.OrderedTransform(), constraints.ordered_vector),
}


@pytest.mark.parametrize("transform, support", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(transform, support):
    """Support, draws within it, and the density of NumPyro's own transformed normal law."""
    p, exact = prior(transform=transform), dist.TransformedDistribution(EXACT, transform)
    assert p.event_shape == exact.event_shape and p.event_dim == 1
    x = p.sample(jax.random.key(0), (4, 1000))
    assert x.shape == (4, 1000, *p.event_shape)
    assert p.support(x).all() and support(x).all()
    u = 0.5 * points(3)
    value = transform(u)
    close(p.log_prob(value), jax.jit(exact.log_prob)(value), atol=5e-3)
    np.testing.assert_allclose(p.flow((u - MEAN) / DEVIATION), value, rtol=2e-3, atol=2e-3)


CODOMAINS = {
    "exp": (transforms.ExpTransform(), lambda r: r / (1 - r), lambda r: 1 / (1 - r) ** 2, lambda v: v[:, None]),
    "sigmoid": (transforms.SigmoidTransform(), lambda r: r, lambda r: 1 + 0 * r, lambda v: v[:, None]),
    "stick breaking": (
        transforms.StickBreakingTransform(),
        lambda r: r,
        lambda r: 1 + 0 * r,
        lambda v: np.stack([v, 1 - v], 1),
    ),
}


@pytest.mark.parametrize("transform, value, jacobian, point", CODOMAINS.values(), ids=CODOMAINS)
def test_transformed_density_integrates_to_one(transform, value, jacobian, point, x64):
    """Over the support of one unconstrained dimension, by the midpoint rule in r in (0, 1)."""
    r = (np.arange(2000) + 0.5) / 2000
    p = prior(np.array([0.3]), transform=transform)
    density = np.exp(p.log_prob(point(value(r)))) * jacobian(r)
    np.testing.assert_allclose(density.mean(), 1.0, atol=1e-3)


@pytest.mark.slow
def test_a_transform_to_matrices():
    """The event shape is the transform's: three unconstrained dimensions, a 2 x 2 Cholesky factor."""
    p = prior(np.zeros(3, np.float32), transform=transforms.LowerCholeskyTransform())
    assert p.event_shape == (2, 2) and p.noise_shape == (3,)
    assert shape_of(p.sample, 4) == (4, 2, 2)
    x = p.transform(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
    assert x.shape == (4, 2, 2) and p.support(x).all() and constraints.lower_cholesky(x).all()
    assert jax.eval_shape(p.flow, jnp.zeros((4, 3))).shape == (4, 2, 2)
    exact = dist.TransformedDistribution(dist.Normal(np.zeros(3), DEVIATION).to_event(1), p.transform)
    close(p.log_prob(x), exact.log_prob(x), atol=5e-3)
    assert shape_of(p.expand((3,)).sample) == (3, 2, 2)


def test_no_density():
    """A score-only prior samples and flows, and says which kernels to use where a density is asked for."""
    p = prior(density="none")
    assert shape_of(p.sample) == (2,)
    assert p.flow(np.zeros(2)).shape == (2,)
    message = r'density="none".*infer.NoiseSpace.*infer.DiffusionPCN.*infer.DiffusionGibbs.*density="auto"'
    with pytest.raises(NotImplementedError, match=message):
        p.log_prob(MEAN)
    with pytest.raises(NotImplementedError, match=message):
        log_density(model, (p, jnp.zeros(3)), {}, {"x": points(3)})


def test_validate_args():
    """Values outside the support are reported as NumPyro reports them, and have density zero."""
    p = prior(transform=transforms.ExpTransform(), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support values"):
        p.log_prob(np.array([1.0, -1.0]))
    exact = dist.TransformedDistribution(EXACT, transforms.ExpTransform())
    close(p.log_prob(np.array([1.0, 2.0])), exact.log_prob(np.array([1.0, 2.0])))
    with pytest.warns(UserWarning, match="Out-of-support values"):
        prior(validate_args=True).log_prob(np.array([np.nan, 0.0]))


DENOISER = Gaussian([0.0, 0.0])
BAD = {
    "no denoiser": (lambda: DiffusionPrior(lambda x, t: x), TypeError, "denoiser must be a Denoiser .*; got function"),
    "transform": (
        lambda: DiffusionPrior(DENOISER, transform=jnp.exp),
        TypeError,
        "transform must be a NumPyro Transform",
    ),
    "sampler": (lambda: DiffusionPrior(DENOISER, sampler=Heun()), TypeError, "sampler must be a stochastic solver"),
    "sampler DDIM": (
        lambda: DiffusionPrior(DENOISER, sampler=Ancestral(eta=0.0)),
        TypeError,
        "sampler must be a stoch",
    ),
    "flow solver": (
        lambda: DiffusionPrior(DENOISER, flow_solver=StochasticHeun()),
        TypeError,
        "flow_solver must be a deterministic solver",
    ),
    "density": (lambda: DiffusionPrior(DENOISER, density="elbo"), ValueError, "must be one of 'auto', 'denoiser',"),
    "no density of its own": (
        lambda: DiffusionPrior(network(), density="denoiser"),
        ValueError,
        "needs a denoiser with a log_density.*NetworkDenoiser has a score only",
    ),
    "no flow": (
        lambda: DiffusionPrior(Product([DENOISER]), density="flow"),
        ValueError,
        "that of a Product is not the flow of its law",
    ),
    "probes": (lambda: prior(density_probes=0), ValueError, "density_probes must be at least 1; got 0"),
    "gradient": (lambda: prior(density_gradient="value"), ValueError, "density_gradient must be one of"),
    "density solver": (
        lambda: DiffusionPrior(DENOISER, density_solver=Ancestral(eta=0.0)),
        TypeError,
        "density_solver must be solve.Heun",
    ),
    "density solver noise": (
        lambda: DiffusionPrior(DENOISER, density_solver=StochasticHeun()),
        TypeError,
        "density_solver must be solve.Heun",
    ),
    "value short": (lambda: prior().log_prob(np.zeros(1)), ValueError, r"value must end with shape \(2,\); got \(1,\)"),
    "value long": (lambda: prior().log_prob(np.zeros((2, 3))), ValueError, r"value must end with shape \(2,\)"),
    "noise": (lambda: prior().flow(np.zeros(3)), ValueError, r"z must end with shape \(2,\); got \(3,\)"),
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
