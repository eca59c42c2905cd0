"""Moves that keep N(0, I), in noise space: a cost that does not grow with the dimension, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from laws import known_noise, run
from moments import assert_moments
from numpyro.infer import NUTS

from numpyro_diffusion.denoise import Gaussian
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import CrankNicolson, Cycle, EllipticalSlice, NoiseSpace
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP

SLOW = pytest.mark.slow
SEEN = jnp.array([1.0, -0.5, 0.3, 2.0])


def field(y, prior):
    """A field of which four entries are seen with noise .5: posterior means .8 y and variances .2."""
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x[: len(y)], 0.5).to_event(1), obs=y)


INNER = {
    "elliptical_slice": EllipticalSlice,
    "crank_nicolson": partial(CrankNicolson, step_size=0.25, target_accept_prob=None),
    "without_gradient": partial(CrankNicolson, gradient=False, step_size=0.2, target_accept_prob=None),
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW) for name in INNER])
def fields(request):
    """Runs on fields of 8 and of 4096 entries, with nothing adapting."""

    def sampled(size):
        prior = DiffusionPrior(Gaussian(jnp.zeros(size), 1.0, VE(0.01, 40.0)), flow_solver=DPMSolverPP(6))
        options = {"num_warmup": 50, "num_samples": 300, "chains": 8}
        return run(NoiseSpace(field, INNER[request.param]), SEEN, prior, **options)

    return {size: sampled(size) for size in (8, 4096)}


def test_acceptance_does_not_fall_with_the_dimension(fields):
    """Nor do points tried in a step grow, nor steps become shorter in the entries that are seen."""

    def figures(mcmc):
        x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])[..., :4]
        steps = np.mean(np.square(np.diff(x, axis=1)))
        fields = mcmc.get_extra_fields()
        return float(np.mean(fields["accept_prob"])), float(np.mean(fields["num_steps"])), steps

    (accepted, tried, steps), (accepted_too, tried_too, steps_too) = (figures(fields[size]) for size in (8, 4096))
    assert 0.2 < accepted < 0.9 and 1.0 <= tried < 6.0
    assert accepted_too == pytest.approx(accepted, rel=0.1) and tried_too == pytest.approx(tried, rel=0.1)
    assert steps_too == pytest.approx(steps, rel=0.15)


def test_law_of_a_field(fields):
    draws = fields[4096].get_samples(group_by_chain=True)["x"][..., :8]
    variance = np.r_[np.full(4, 0.2), np.ones(4)]
    assert_moments(draws, np.r_[0.8 * np.asarray(SEEN), np.zeros(4)], variance)


TARGETS = [
    pytest.param(SEEN, True, 0.574, id="gradient"),
    pytest.param(SEEN, False, 0.234, id="without_gradient", marks=SLOW),
    pytest.param(SEEN[:0], True, 1.0, id="no_data", marks=SLOW),
]


@pytest.mark.parametrize(("y", "gradient", "target"), TARGETS)
def test_step_size_adapts_to_the_best_acceptance(y, gradient, target):
    """Without data to the step that forgets the point; no larger one is taken."""
    prior = dist.Normal(jnp.zeros(8), 1.0).to_event(1)
    mcmc = run(CrankNicolson(field, gradient=gradient), y, prior, num_warmup=300, num_samples=100)
    fields = mcmc.get_extra_fields()
    assert np.mean(fields["accept_prob"]) == pytest.approx(target, abs=0.1)
    assert (np.asarray(fields["step_size"]) == 2.0).all() == (len(y) == 0)


def test_in_turn_with_a_kernel_that_adapts():
    """Other sites on a scale far from one: the cycle has both."""

    def model(y):
        far = numpyro.sample("far", dist.Normal(50.0, 0.1))
        numpyro.sample("y", dist.Normal(far, 0.1), obs=y)

    mcmc = run(Cycle([EllipticalSlice, NUTS], model=model), 50.2, num_warmup=200, num_samples=300)
    assert_moments(mcmc.get_samples(group_by_chain=True)["far"], 50.1, 0.005)


def discrete():
    numpyro.sample("k", dist.Bernoulli(0.3))


REFUSED = {
    "diffusion": (known_noise, (SEEN[:2],), r"Use NoiseSpace\(model, {name}\)"),
    "discrete": (discrete, (), "discrete"),
    "empty": (lambda: numpyro.factor("y", 0.0), (), "{name} needs a latent site"),
}


@pytest.mark.parametrize("kernel", [EllipticalSlice, CrankNicolson])
@pytest.mark.parametrize(("model", "args", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(kernel, model, args, message):
    with pytest.raises(ValueError, match=message.format(name=kernel.__name__)):
        kernel(model).init(jax.random.key(0), 0, None, args, {})


BAD = {
    "step_size": ({"step_size": 2.5}, r"step_size must lie in \(0, 2\], where 2 forgets the point; got 2.5"),
    "target": ({"target_accept_prob": 1.0}, r"target_accept_prob must lie in \(0, 1\); got 1.0"),
    "word": ({"target_accept_prob": "best"}, "must be a number, None or \"auto\"; got 'best'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CrankNicolson(field, **options)
