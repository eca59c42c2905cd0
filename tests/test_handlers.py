"""NumPyro's handlers around a model: what kernels read is what NumPyro computes, or the model is refused by name.

The table of docs/handlers.md has a row for each case.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import (
    block,
    condition,
    do,
    infer_config,
    lift,
    mask,
    reparam,
    scale,
    scope,
    seed,
    substitute,
    uncondition,
)
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import potential_energy

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import MALA, DiffusionGibbs, Independence, NoiseSpace, SplitGibbs, drop_prior
from numpyro_diffusion.infer.model import Record

Y, PRIOR, LAW = jnp.array([1.0, 2.0]), DiffusionPrior(Gaussian([0.0, 0.0])), dist.LogNormal(0.0, 0.5)
LEVEL = {"s": jnp.array(0.7)}


def observe(x, s, y):
    numpyro.sample("y", dist.Normal(x, s).to_event(1), obs=y)


def plain(y):
    observe(numpyro.sample("x", PRIOR), numpyro.sample("s", LAW), y)


def under_mask(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    with mask(mask=jnp.array([True, False])):
        numpyro.sample("y", dist.Normal(x, s), obs=y.at[1].set(jnp.nan))


def under_scale(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    with scale(scale=0.5):
        observe(x, s, y)


def under_block(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    with block():
        observe(x, s, y)


def under_scope(y):
    with scope(prefix="first", divider="_"):
        x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    observe(x, s, y)


def in_plate(y):
    with numpyro.plate("images", 2):
        x = numpyro.sample("x", PRIOR)
    numpyro.sample("y", dist.Normal(x, numpyro.sample("s", LAW)).to_event(2), obs=jnp.stack([y, y]))


def with_factor(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    numpyro.factor("small", -((numpyro.deterministic("total", x.sum())) ** 2))
    observe(x, s, y)


def with_scan(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)

    def step(drift, y):
        drift = numpyro.sample("drift", dist.Normal(0.9 * drift, 1.0))
        numpyro.sample("y", dist.Normal(x[0] + drift, s), obs=y)
        return drift, None

    scan(step, 0.0, y)


def with_param(y):
    observe(numpyro.sample("x", PRIOR), numpyro.param("s", 1.5, constraint=dist.constraints.positive), y)


def with_loc_scale(y):
    x = numpyro.sample("x", PRIOR)
    with reparam(config={"s": LocScaleReparam(0.0)}):
        s = numpyro.sample("s", dist.Normal(1.0, 0.5))
    observe(x, jnp.exp(s), y)


READ = {
    "mask": under_mask,
    "scale": under_scale,
    "block": under_block,
    "scope": under_scope,
    "plate": in_plate,
    "factor, deterministic": with_factor,
    "scan": with_scan,
    "param": with_param,
    "lift": lift(with_param, {"s": LAW}),
    "condition": condition(plain, LEVEL),
    "substitute": substitute(plain, LEVEL),
    "do": do(plain, LEVEL),
    "seed": seed(plain, 0),
    "uncondition": uncondition(plain),
    "infer_config": infer_config(plain, lambda site: {"event_dims": ["pixel"]} if site["name"] == "x" else {}),
    "reparam of another site": with_loc_scale,
}


@pytest.mark.parametrize("model", READ.values(), ids=READ)
def test_what_is_read_is_what_numpyro_computes(model):
    """The log-density of everything but the prior, with the Jacobians of NumPyro's unconstrained coordinates."""
    reading = Record(model).at((Y,), {})
    z = {name: 0.3 + jnp.zeros(site.unconstrained_shape) for name, site in reading.structure.latent.items()}
    expected = -potential_energy(drop_prior(model), (Y,), {}, z)
    assert np.isfinite(expected)
    parts = reading.evaluate(z)
    np.testing.assert_allclose(parts.log_rest + sum(parts.log_jacobian.values()), expected, rtol=1e-5)


def masked_prior(y):
    with mask(mask=False):
        x = numpyro.sample("x", PRIOR)
    observe(x, numpyro.sample("s", LAW), y)


def scaled_prior(y):
    with scale(scale=2.0):
        x = numpyro.sample("x", PRIOR)
    observe(x, numpyro.sample("s", LAW), y)


def enumerated(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    observe(x + numpyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"}), s, y)


def subsampled(y):
    x, s = numpyro.sample("x", PRIOR), numpyro.sample("s", LAW)
    with numpyro.plate("pixels", 2, subsample_size=1) as i:
        numpyro.sample("y", dist.Normal(x[i], s), obs=y[i])


def prior_in_scan(y):
    def step(total, y):
        total = total + numpyro.sample("x", PRIOR)
        observe(total, 1.0, y)
        return total, None

    scan(step, jnp.zeros(2), jnp.stack([y, y]))


REFUSED = {
    "mask of the prior": (masked_prior, "must carry their DiffusionPrior unmasked and unscaled"),
    "scale of the prior": (scaled_prior, "must carry their DiffusionPrior unmasked and unscaled"),
    "enumeration": (enumerated, r"sites \['k'\] are discrete"),
    "subsampling": (subsampled, r"the plates \['pixels'\] show a random part"),
    "the prior in scan": (prior_in_scan, "inside numpyro's scan"),
}
KERNELS = {
    "MALA": MALA,
    "NoiseSpace": NoiseSpace,
    "DiffusionGibbs": DiffusionGibbs,
    "SplitGibbs": lambda model: SplitGibbs(model, rho=0.5),
    "Independence": Independence,
}


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused(make, model, message):
    with pytest.raises(ValueError, match=message):
        make(model)._check_model(Record(model).at((Y,), {}))
