"""The precision of matrix products in lowered programs: full around the network, the user's own inside it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro.distributions import transforms

from numpyro_diffusion import _precision
from numpyro_diffusion.denoise import FromFunction, Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.guidance import Guided, linear
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.solve import DPMSolverPP, Heun, solve
from numpyro_diffusion.train import Objective
from numpyro_diffusion.train.losses import StableTargetField

ROTATE = transforms.LowerCholeskyAffine(jnp.zeros(2), jnp.array([[1.0, 0.0], [0.5, 2.0]]))
CORRELATED = np.array([[[1.0, 0.5], [0.5, 2.0]]] * 2)
SOLVERS = {"sampler": DPMSolverPP(3, eta=1.0), "flow_solver": Heun(3), "density_solver": Heun(3)}


def network(**options):
    return NetworkDenoiser(MLP((2,), features=48, num_blocks=1, embed_features=48, rngs=nnx.Rngs(0)), **options)


def exact():
    return GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], CORRELATED)


USES = {
    "log_prob": lambda p: p.log_prob(jnp.ones((3, 2))).sum(),
    "gradient of log_prob": lambda p: jax.grad(lambda x: p.log_prob(x).sum())(jnp.ones((3, 2))),
    "flow": lambda p: p.flow(jnp.ones((3, 2))),
    "gradient of flow": lambda p: jax.grad(lambda z: p.flow(z).sum())(jnp.ones((3, 2))),
    "sample": lambda p: p.sample(jax.random.key(0), (3,)),
}
each_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


def precisions(use, prior):
    """Of the matrix products of a program: the network's, which know its 48 features, and the others."""
    text = jax.jit(use).lower(prior).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    found = [(re.search(r"precision = \[(\w+), \w+\]", line), "48" in line.rsplit(":", 1)[1]) for line in products]
    named = [(match.group(1) if match else "DEFAULT", is_network) for match, is_network in found]
    return {name for name, is_network in named if is_network}, {name for name, is_network in named if not is_network}


@each_use
@pytest.mark.parametrize("density", ["auto", "flow"])
def test_exact_laws_are_computed_in_full_precision(use, density):
    """The rotations and mixtures of a law in closed form."""
    inside, outside = precisions(use, DiffusionPrior(exact(), density=density, transform=ROTATE, **SOLVERS))
    assert (inside, outside) == (set(), {"HIGHEST"})


@each_use
def test_networks_keep_a_precision_of_their_own(use):
    """JAX's default, what the user has set around the call, or what the network was given."""
    own = {None: "DEFAULT", "high": "HIGH", "highest": "HIGHEST"}
    for precision, expected in own.items():
        prior = DiffusionPrior(network(precision=precision), transform=ROTATE, **SOLVERS)
        inside, outside = precisions(use, prior)
        assert inside == {expected} and outside <= {"HIGHEST"}, (inside, outside)
    with jax.default_matmul_precision("high"):
        assert precisions(use, DiffusionPrior(network(), transform=ROTATE, **SOLVERS))[0] == {"HIGH"}


OWN = {
    "samplers": lambda x: Compiled(lambda: None, lambda x, args, kwargs: x @ x).bind((), {})[0](x),
    "guided denoisers": lambda x: Guided(Gaussian(x[0]), linear(x, x[1], 0.5))(x[0], 0.5).x0,
    "walks of solvers": lambda x: solve(Heun(3), FromFunction(lambda x, t, a: a @ x, (2,), "eps", parameters=x), x[0]),
    "losses": lambda x: Objective(StableTargetField(x))(Gaussian(x[0]), jax.random.key(0), x, None, ())[0],
}


@pytest.mark.parametrize("use", OWN.values(), ids=OWN)
def test_the_library_computes_in_full_precision(use):
    """Its own products, wherever they are not a network's."""
    inside, outside = precisions(use, jnp.eye(2))
    assert (inside, outside) == (set(), {"HIGHEST"})


def test_what_was_set_outside_comes_back():
    """However deep the nesting, and after it."""
    setting = lambda: jax.config.jax_default_matmul_precision  # noqa: E731
    with jax.default_matmul_precision("high"):
        with _precision.highest(), _precision.highest():
            assert setting() == "highest"
            with _precision.network():
                assert setting() == "high"
            with _precision.network("bfloat16"):
                assert setting() == "bfloat16"
        assert setting() == "high"
        with _precision.network():
            assert setting() == "high"
    with pytest.raises(ValueError, match="precision must be one of None, 'default', 'high', 'highest'"):
        network(precision="half")
