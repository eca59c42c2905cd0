"""Independent proposals against conjugate posteriors: from the priors, from distributions, one or many at a time."""

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from laws import pair, plain, run
from moments import assert_moments

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import DiffusionGibbs, Independence
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import StochasticHeun

SLOW = pytest.mark.slow
SAMPLER = StochasticHeun(24)  # proposals are weighted by their density: what counts is the law of the draws
STANDARD = Gaussian([0.0], 1.0, VE(0.01, 40.0))
SCORE_ONLY = DiffusionPrior(STANDARD, sampler=SAMPLER, density="none")


def shifted(y):
    """As `pair`, with x = s + u and u a diffusion site."""
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    u = numpyro.sample("u", DiffusionPrior(STANDARD, sampler=SAMPLER))
    numpyro.sample("y", dist.Normal(s + u[0], 1.0), obs=y)


@SLOW
@pytest.mark.parametrize("proposal", [None, {"u": dist.Normal(1.0, 1.5).expand([1]).to_event(1)}])
def test_in_diffusion_gibbs(proposal):
    """Where the prior is dropped from the model, it cancels; against a proposal it is restored."""
    x_kernel = partial(Independence, proposal=proposal, num_proposals=4)
    samples = run(DiffusionGibbs(shifted, x_kernel=x_kernel), 3.0, num_warmup=200, num_samples=2000).get_samples(True)
    assert_moments(samples["u"][..., 0], 1.0, 2.0 / 3.0)
    assert_moments(samples["s"], 1.0, 2.0 / 3.0)


NORMAL = dist.Normal(0.0, 1.0)
BAD_ARGUMENTS = {
    "model": (lambda: Independence(3), TypeError, "must be a NumPyro model"),
    "number": (lambda: Independence(pair, num_proposals=0), ValueError, "num_proposals must be at least 1"),
    "proposal": (lambda: Independence(pair, 3.0), TypeError, "must be a NumPyro distribution or one for each site"),
    "site": (lambda: Independence(pair, {"x": 3.0}), TypeError, "proposal of site 'x' must be a NumPyro distribution"),
    "density": (lambda: Independence(plain, SCORE_ONLY), ValueError, 'has density="none". Give it density="auto"'),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def masked(y):
    with numpyro.handlers.mask(mask=False):
        numpyro.sample("x", NORMAL)


def scaled(y):
    with numpyro.handlers.scale(scale=0.5):
        numpyro.sample("x", NORMAL)


def discrete(y):
    numpyro.sample("k", dist.Bernoulli(0.5))


def subsampled(y):
    x = numpyro.sample("x", NORMAL)
    with numpyro.plate("data", 3, subsample_size=2) as i:
        numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.zeros(3)[i])


def improper(y):
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))


def observed(y):
    numpyro.sample("y", NORMAL, obs=y)


def impossible(y):
    numpyro.factor("never", jnp.where(numpyro.sample("x", NORMAL) > 0.0, -jnp.inf, jnp.nan))


REFUSED = {
    "masked": (Independence(masked), "site 'x' is masked or scaled"),
    "scaled": (Independence(scaled), "site 'x' is masked or scaled, .*; give it a proposal"),
    "discrete": (Independence(discrete), r"\['k'\] are discrete"),
    "subsampled": (Independence(subsampled), "needs all data at every step"),
    "improper": (Independence(improper), "one cannot be drawn"),
    "observed": (Independence(observed), "needs a latent site; got none"),
    "two_sites": (Independence(pair, NORMAL), r"one proposal: give a dict of them; got \['s', 'x'\]"),
    "unknown": (Independence(pair, {"z": NORMAL}), r"proposals of \['z'\]; the sites are \['s', 'x'\]"),
    "shape": (Independence(pair, {"x": NORMAL.expand([2])}), r"'x' must have its shape \(\); got \(2,\)"),
    "impossible": (Independence(impossible), "no weight is finite among 100 draws .* in 2 of 2 chains"),
}


@pytest.mark.parametrize(("kernel", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_models(kernel, message):
    with pytest.raises(ValueError, match=message):
        run(kernel, 3.0, num_warmup=1, num_samples=1, chains=2)
