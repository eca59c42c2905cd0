"""Energies: a network with a density. Against its own score, against exact laws, and learned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_unet import awake

from numpyro_diffusion import checkpoint
from numpyro_diffusion.denoise import GaussianMixture, NetworkDenoiser, reschedule
from numpyro_diffusion.nn import MLP, Condition, UNet
from numpyro_diffusion.noise import VE, VP, Rectified

SIZES = {"features": 8, "num_blocks": 1, "embed_features": 8}
SMALL = {"features": 4, "multipliers": (1,), "num_blocks": 1, "embed_features": 8}
NETWORKS = {
    "free head": lambda **o: MLP((3,), **SIZES, scalar=True, **o),
    "vector": lambda **o: MLP((3,), **SIZES, **o),
    "U-Net, free head": lambda **o: UNet((4, 2), spatial=1, **SMALL, scalar=True, **o),
}
HEADS = pytest.mark.parametrize("scalar", [True, False], ids=["free head", "vector"])


def energy(make, cond_shape=None, **options):
    backbone = awake(make(rngs=nnx.Rngs(0), cond_shape=cond_shape))
    return NetworkDenoiser(backbone, target="energy", location=0.5, scale=2.0, **options)


@jax.jit
def score_and_gradient(denoiser, x_t, t, cond=None):
    return denoiser(x_t, t, cond).score, jax.grad(denoiser.log_density)(x_t, t, cond)


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_score_is_the_gradient_of_the_density(make, x64):
    """At every time, with a condition that counts and may be absent; the network runs in single precision."""
    denoiser = energy(make, cond_shape=(2,), schedule=Rectified())
    x_t, cond = jax.random.normal(jax.random.key(0), denoiser.event_shape), jnp.array([0.3, -1.0])
    conditions = [(cond, True), (2 * cond, True), (cond, False)]
    for t in (0.1, 0.6, 0.9):
        scores = []
        for value, present in conditions:
            score, gradient = score_and_gradient(denoiser, x_t, t, Condition(value, jnp.asarray(present)))
            np.testing.assert_allclose(gradient, score, rtol=2e-5, atol=1e-6 * np.abs(score).max())
            scores.append(score)
        for other in scores[1:]:
            assert np.abs(other / scores[0] - 1).max() > 1e-3


def test_both_modes_and_batches():
    """Forward and reverse mode and finite differences agree, over a batch and at one of its points."""
    denoiser = energy(NETWORKS["free head"])
    x_t, step = jax.random.normal(jax.random.key(0), (4, 3)), jnp.array([0.02, 0.0, 0.0])
    density = partial(denoiser.log_density, t=0.6)

    @jax.jit
    def everything(x_t):
        shifted = jax.vmap(jax.vmap(density))(jnp.stack([x_t - step, x_t + step]))
        slopes = (jax.vmap(mode(density))(x_t) for mode in (jax.jacfwd, jax.jacrev))
        return *slopes, (shifted[1] - shifted[0]) / 0.04, jax.vmap(density)(x_t)[2], density(x_t[2])

    forward, reverse, slope, in_batch, alone = everything(x_t)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slope, reverse[:, 0], rtol=2e-2, atol=2e-3)
    np.testing.assert_allclose(in_batch, alone, rtol=1e-5)


def test_frozen_weights_have_no_gradient():
    denoiser = energy(NETWORKS["free head"])
    gradient_of = jax.jit(jax.grad(lambda denoiser: denoiser.log_density(jnp.ones(3), 0.6)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient_of(denoiser)))
    awoken = jax.tree.leaves(gradient_of(denoiser.unfreeze()))
    assert sum(bool((leaf != 0).any()) for leaf in awoken) > 8


class Exact(nnx.Module):
    """The scalar of which the exact energy is made, for a law in standardised units."""

    scalar = True

    def __init__(self, law):
        self.event_shape, self.law = law.event_shape, nnx.data(law)

    def __call__(self, x, c_noise, cond=None):
        schedule = self.law.schedule
        t = schedule.inverse_log_snr(-8.0 * c_noise)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma / alpha * (self.law.log_density(jnp.hypot(alpha, sigma) * x, t) + 0.5 * jnp.sum(x**2))


@pytest.mark.parametrize("d", [2, 32])
@pytest.mark.parametrize("schedule", [VE(0.05, 20.0), VP()], ids=["VE", "VP"])
def test_the_exact_energy_has_the_exact_density(d, schedule, x64):
    """Differences of log-densities and posterior means are the mixture's, in the data's units; rescheduled too."""
    means, variances = np.random.default_rng(d).normal(size=(3, d)), np.array([0.1, 0.4, 0.8])
    weights, location, scale = [0.2, 0.3, 0.5], 0.5, 2.0
    law = GaussianMixture(weights, means, variances, schedule)
    denoiser = NetworkDenoiser(Exact(law), schedule=schedule, target="energy", location=location, scale=scale)
    truth = GaussianMixture(weights, location + scale * means, scale**2 * variances, denoiser.schedule)
    other = reschedule(denoiser, Rectified(t_min=0.1, t_max=0.9))
    truth_other = GaussianMixture(weights, location + scale * means, scale**2 * variances, other.schedule)
    x_t = jax.random.normal(jax.random.key(0), (5, d))
    both = jax.jit(jax.vmap(lambda law, x, t: (law.log_density(x, t), law(x, t).x0), (None, 0, None)))
    for got, expected in ((denoiser, truth), (other, truth_other)):
        for t in (0.3, 0.7):
            (density, x0), (true_density, true_x0) = both(got, x_t, t), both(expected, x_t, t)
            np.testing.assert_allclose(density - density[0], true_density - true_density[0], rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(x0, true_x0, rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@HEADS
def test_a_head_that_starts_at_zero_has_a_gradient(scalar):
    """The loss pulls at the zero output layer about as hard as at that of the edm target, and it does not stay zero."""

    def loss(params, denoiser, key):
        x, noise = jax.random.normal(key, (2, 256, 3)) * jnp.array([[[0.3]], [[1.0]]])
        predict = lambda x, eps: denoiser.with_params(params)(x + eps, 0.5).x0  # noqa: E731
        return jnp.mean((jax.vmap(predict)(x, noise) - x) ** 2)

    schedule, norms = VE(0.05, 20.0), {}  # at t = 0.5 the noise level is one
    for target, head in (("energy", scalar), ("edm", False)):
        backbone = MLP((3,), **SIZES, scalar=head, rngs=nnx.Rngs(0))
        denoiser = NetworkDenoiser(backbone, schedule=schedule, target=target).unfreeze()
        gradient = jax.jit(jax.grad(loss))(denoiser.params, denoiser, jax.random.key(0))
        norms[target] = np.linalg.norm(gradient["output_layer"]["kernel"][...])
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, denoiser.params, gradient)
        gradient = jax.jit(jax.grad(loss))(moved, denoiser, jax.random.key(0))
        assert all((np.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient["blocks"]))
    assert 0.1 < norms["energy"] / norms["edm"] < 10, norms


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_keeps_the_density(name, tmp_path):
    denoiser = energy(NETWORKS[name])
    checkpoint.save(tmp_path / "energy", denoiser)
    again = checkpoint.load(tmp_path / "energy")
    assert again.target == "energy" and again.backbone.scalar == ("free" in name)
    assert jax.tree.structure(again) == jax.tree.structure(denoiser)  # one program: the same density
    jax.tree.map(np.testing.assert_array_equal, again, denoiser)


def test_a_checkpoint_of_a_network_from_before_scalar_heads(tmp_path, monkeypatch):
    """A description without the keys is one of a network with values of the event's shape, and without waves."""
    config, path, newer = MLP.config.fget, tmp_path / "older", ("scalar", "input_frequencies", "embed_frequency")
    older = property(lambda self: {k: v for k, v in config(self).items() if k not in newer})
    with monkeypatch.context() as patch:
        patch.setattr(MLP, "config", older)
        checkpoint.save(path, NetworkDenoiser(awake(MLP((3,), **SIZES, rngs=nnx.Rngs(0)))))
    assert b"cond_shape" in path.read_bytes() and not any(key.encode() in path.read_bytes() for key in newer)
    loaded = checkpoint.load(path).backbone
    assert loaded.scalar is False and loaded.input_frequencies == ()


def test_an_energy_asked_from_a_score_network():
    for target in ("edm", "score"):
        denoiser = NetworkDenoiser(MLP((3,), **SIZES, rngs=nnx.Rngs(0)), target=target)
        message = f"log_density needs target=\"energy\"; a network with target='{target}' has a score but no density"
        with pytest.raises(TypeError, match=message):
            denoiser.log_density(jnp.ones(3), 0.5)
        with pytest.raises(TypeError, match="log_density needs target"):
            reschedule(denoiser, Rectified()).log_density(jnp.ones(3), 0.5)


def test_mistakes_are_named():
    free = MLP((3,), **SIZES, scalar=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="target must be \"energy\" for a backbone that returns a scalar; got 'edm'"):
        NetworkDenoiser(free)
    two = Exact(GaussianMixture([1.0], [[0.0, 0.0, 0.0]]))
    two.scalar = False
    with pytest.raises(ValueError, match=r"backbone must return shape \(3,\); got \(\)"):
        NetworkDenoiser(two, target="energy")(jnp.ones(3), 0.5)
    with pytest.raises(ValueError, match=r"x_t must be one point of shape \(3,\); got \(2, 3\). Use jax.vmap"):
        energy(NETWORKS["vector"]).log_density(jnp.ones((2, 3)), 0.5)
