"""Every kernel on laws that are known: from exact draws of the posterior, a few steps lead to exact draws again.

Thousands of chains start at independent exact draws, each makes a few steps, and the ranks of where they end must be
uniform: a wrong ratio, proposal density, Jacobian or scale of the noise shows after one step, and no warm-up, no
mixing and no effective sample size is needed to see it. That chains leave where they are is asked for too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from laws import EXP, SAMPLER, SQUARED, TABLE, assert_ranks, mixture_posterior, mixture_prior, normal_data, standard
from numpyro.infer import HMC, NUTS, Gibbs

from numpyro_diffusion.denoise import Gaussian, GaussianMixture, NetworkDenoiser
from numpyro_diffusion.distributions import DiffusionPrior
from numpyro_diffusion.infer import (
    MALA,
    CrankNicolson,
    Cycle,
    DelayedAcceptance,
    DiffusionGibbs,
    DiffusionPCN,
    DiffusiveGibbs,
    EllipticalSlice,
    GuidedPCN,
    Independence,
    LineIntegral,
    Mixture,
    NoiseSpace,
    ParallelTempering,
    ParticleGibbs,
    ScoreHMC,
    Tweedie,
    Vectorize,
    with_density,
)
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, GivenMap, Heun, StochasticHeun

SLOW = pytest.mark.slow
LINE = LineIntegral(5, circulation=False)
LEAP = partial(HMC, num_steps=2, trajectory_length=None, step_size=0.7, adapt_step_size=False, adapt_mass_matrix=False)
TREE = partial(NUTS, max_tree_depth=2, step_size=0.7, adapt_step_size=False, adapt_mass_matrix=False)
WALK = partial(MALA, step_size=0.3, adapt_mass_matrix=False)
SWING = partial(ScoreHMC, step_size=0.5, num_steps=2, adapt_mass_matrix=False)
JUMP = partial(DiffusionPCN, global_fraction=1.0)
MANY = {"noise_levels": (4.0, 1.0), "num_steps": 2, "step_size": 0.7, "target_accept_prob": None}
STOCHASTIC = StochasticHeun(24)
UNTRAINED = GivenMap(NetworkDenoiser(MLP((6,), features=8, num_blocks=1, rngs=nnx.Rngs(0)), target="x0"), (2,))
"""A draw of x given x_t that is right for N(m, s^2 I), and wrong for a mixture."""

SCORE_ONLY, ROUGH = standard(density="none", sampler=DPMSolverPP(96, eta=1.0)), standard(flow_solver=Heun(12))
POSITIVE = standard(transform=SQUARED, sampler=DPMSolverPP(96, eta=1.0), flow_solver=Heun(12))
EXACT, LEARNED = mixture_prior(), mixture_prior(density="none")
FAR = DiffusionPrior(
    GaussianMixture([0.3, 0.7], [[-6.0], [6.0]], 1.0, VE(0.01, 80.0)), sampler=DPMSolverPP(128, eta=1.0)
)
LINED = DiffusionPrior(Gaussian([0.0], 1.0, laws.SCHEDULE), sampler=DPMSolverPP(96, eta=1.0))


def nuts_and_jump(model):
    return Mixture([WALK, JUMP], [0.5, 0.5], model=model)


def blocks(kernel, model):
    return Vectorize(Gibbs([(kernel(model), ["x"]), (LEAP(model), ["s"])]))


def cycle(model):
    return Cycle([LEAP, WALK], model=model)


def beside(model):
    return Gibbs([(CrankNicolson(model), ["x_noise"]), (TREE(model), ["noise"])])


def mixture(model):
    return Mixture([LEAP, WALK], [0.3, 0.7], model=model)


def off_pair(y, scale=1.0):
    """A surrogate of `laws.pair` with another prior, a shift of the data and too much noise."""
    s = numpyro.sample("s", dist.Normal(0.4, 1.2))
    x = numpyro.sample("x", dist.Normal(0.8 * s, 1.1))
    numpyro.sample("y", dist.Normal(x + 0.5, 1.4 * scale), obs=y)


def without_wall(nan_below):
    """A surrogate of `laws.half_line` that knows of no wall."""
    numpyro.sample("x", dist.Normal(0.3, 1.2))


WIDE = dist.StudentT(5.0, 2.0, 1.5)
PAIR, COUNT = laws.pair_posterior(), laws.count_posterior()
ON_MIXTURE, ON_LEARNED, ROUGHLY = (mixture_posterior(p) for p in (EXACT, LEARNED, mixture_prior(sampler=SAMPLER)))
JOINT, TEMPERED = normal_data(standard()), laws.tempered_posterior()
QUICK = {
    "pcn": (JUMP, ON_MIXTURE),
    "pcn_positive": (DiffusionPCN, normal_data(POSITIVE, noise=1.0)),
    "elliptical_slice": (EllipticalSlice, PAIR),
    "crank_nicolson": (CrankNicolson, PAIR),
    "mala": (WALK, JOINT),
    "hmc_partial": (partial(SWING, momentum_refresh=0.3), ON_LEARNED),
    "independence_priors": (Independence, PAIR),
    "delayed_acceptance": (partial(DelayedAcceptance, surrogate=off_pair, inner=LEAP, num_moves=2), PAIR),
    "parallel_tempering": (partial(ParallelTempering, kernel=LEAP, temperatures=(0.0, 0.1, 0.4, 1.0)), TEMPERED),
    "diffusive_gibbs_in_one_mode": (partial(DiffusiveGibbs, **{**MANY, "noise_levels": (1.0,), "num_steps": 1}), PAIR),
}
LONGER = {
    "pcn_screened": (partial(JUMP, screen=UNTRAINED, num_proposals=2), ON_MIXTURE),
    "gibbs_pcn_by_a_map_plate": (
        partial(
            DiffusionGibbs, x_kernel=partial(DiffusionPCN, solver=UNTRAINED), rest_kernel=partial(LEAP, step_size=0.3)
        ),
        normal_data(SCORE_ONLY, y=TABLE),
    ),
    "gibbs_pcn_screened_plate": (
        partial(
            DiffusionGibbs, x_kernel=partial(DiffusionPCN, screen=UNTRAINED), rest_kernel=partial(LEAP, step_size=0.3)
        ),
        normal_data(SCORE_ONLY, y=TABLE),
    ),
    "particle_gibbs": (partial(ParticleGibbs, num_particles=4), ROUGHLY),
    "noise_space_plate": (
        partial(NoiseSpace, inner=partial(LEAP, step_size=0.3)),
        normal_data(POSITIVE, y=TABLE, noise_space=True),
    ),
    "pcn_3_proposals": (partial(JUMP, num_proposals=3), ON_MIXTURE),
    "pcn_local_far_modes": (partial(JUMP, global_fraction=0.5), laws.two_modes_posterior(FAR)),
    "guided_pcn_3_proposals": (partial(GuidedPCN, global_fraction=1.0, num_proposals=3), ROUGHLY),
    "gibbs_pcn_plate": (
        partial(DiffusionGibbs, rest_kernel=partial(LEAP, step_size=0.3)),
        normal_data(SCORE_ONLY, y=TABLE),
    ),
    "mala_tweedie": (partial(MALA, step_size=0.5, preconditioner=Tweedie(0.5)), ON_LEARNED),
    "mala_line": (partial(WALK, density=LINE), ON_LEARNED),
    "mala_squared": (partial(WALK, step_size=0.1), normal_data(standard(transform=SQUARED), noise=1.0)),
    "independence_3_proposals": (
        lambda model: Independence(model, dist.LogNormal(0.0, 0.7), num_proposals=3),
        COUNT,
    ),
    "independence_learned_proposal": (
        lambda model: Independence(model, LINED, num_proposals=2),
        laws.plain_posterior(),
    ),
    "diffusive_gibbs": (partial(DiffusiveGibbs, **MANY), laws.two_modes_posterior()),
    "parallel_tempering_above_0": (partial(ParallelTempering, kernel=WALK, temperatures=(0.05, 0.3, 1.0)), TEMPERED),
    "cycle": (cycle, PAIR),
    "pcn_only_adapted": (partial(DiffusionPCN, global_fraction=0.0), normal_data(SCORE_ONLY, noise=1.0)),
    "pcn_exp": (DiffusionPCN, normal_data(standard(transform=EXP, sampler=SCORE_ONLY.sampler), noise=1.0)),
    "guided_pcn": (partial(GuidedPCN, global_fraction=1.0), ROUGHLY),
    "particle_gibbs_2": (partial(ParticleGibbs, num_particles=2), ROUGHLY),
    "noise_space_elliptical_slice": (
        partial(NoiseSpace, inner=EllipticalSlice),
        normal_data(ROUGH, noise_space=True),
    ),
    "crank_nicolson_without_gradient": (partial(CrankNicolson, gradient=False, step_size=0.2), PAIR),
    "noise_space_crank_nicolson": (partial(NoiseSpace, inner=CrankNicolson), normal_data(ROUGH, noise_space=True)),
    "noise_space_crank_nicolson_beside_nuts": (partial(NoiseSpace, inner=beside), normal_data(ROUGH, noise_space=True)),
    "delayed_acceptance_nuts_coarse_flow": (
        partial(DelayedAcceptance, surrogate=Ancestral(3, eta=0.0), inner=TREE, num_moves=2),
        normal_data(ROUGH, noise_space=True),
    ),
    "delayed_acceptance_crank_nicolson": (
        partial(DelayedAcceptance, surrogate=off_pair, inner=partial(CrankNicolson, step_size=0.3)),
        PAIR,
    ),
    "delayed_acceptance_elliptical_slice": (
        partial(DelayedAcceptance, surrogate=off_pair, inner=EllipticalSlice, num_moves=3),
        PAIR,
    ),
    "delayed_acceptance_in_gibbs": (
        partial(blocks, partial(DelayedAcceptance, surrogate=off_pair, inner=LEAP)),
        PAIR,
    ),
    "delayed_acceptance_mixture": (partial(DelayedAcceptance, surrogate=off_pair, inner=mixture), PAIR),
    "noise_space_nuts": (partial(NoiseSpace, inner=TREE), normal_data(ROUGH, noise_space=True)),
    "noise_space_mala": (partial(NoiseSpace, inner=cycle), normal_data(ROUGH, noise_space=True)),
    "gibbs_positive": (DiffusionGibbs, normal_data(POSITIVE)),
    "gibbs_mixture": (partial(DiffusionGibbs, x_kernel=nuts_and_jump, rest_kernel=TREE), normal_data(standard())),
    "mala_flow": (partial(WALK, density="flow"), normal_data(standard(density_solver=Heun(24)), noise=1.0)),
    "mala_gauss_legendre": (
        partial(WALK, density=LineIntegral(2, "gauss-legendre", circulation=False)),
        normal_data(SCORE_ONLY, noise=1.0),
    ),
    "mala_exp": (partial(WALK, step_size=0.1), normal_data(standard(transform=EXP), noise=1.0)),
    "mala_line_squared": (
        partial(WALK, step_size=0.1, density=LINE),
        normal_data(standard(transform=SQUARED), noise=1.0),
    ),
    "hmc": (SWING, JOINT),
    "hmc_line_partial": (partial(SWING, momentum_refresh=0.3, density=LINE), normal_data(SCORE_ONLY, noise=1.0)),
    "nuts_on_the_flow_density": (TREE, normal_data(standard(density_solver=Heun(24)), noise=1.0)),
    "nuts_on_the_denoisers_density": (lambda model: TREE(with_density(model)), ON_LEARNED),
    "independence": (lambda model: Independence(model, dist.LogNormal(0.0, 0.7)), COUNT),
    "cycle_in_gibbs": (partial(blocks, cycle), PAIR),
    "gradient_kernel_in_gibbs": (partial(blocks, WALK), PAIR),
    "nested": (lambda model: Cycle([mixture, WALK], model=model), PAIR),
    "independence_in_gibbs": (partial(blocks, partial(Independence, num_proposals=2)), PAIR),
    "independence_one_proposal": (lambda model: Independence(model, {"x": WIDE}, num_proposals=4), PAIR),
    "independence_proposals": (
        lambda model: Independence(model, {"x": WIDE, "s": dist.Normal(1.0, 2.0)}, num_proposals=4),
        PAIR,
    ),
    "independence_outside": (lambda model: Independence(model, dist.Normal(1.0, 4.0), num_proposals=4), COUNT),
    "independence_learned": (
        partial(Independence, num_proposals=8),
        normal_data(standard(sampler=STOCHASTIC, density="none"), noise=1.0),
    ),
    "independence_half_line_and_local": (
        lambda model: Mixture([Independence(model, {"x": dist.Uniform(-2.0, 9.0)}), WALK(model)], [0.5, 0.5]),
        PAIR,
    ),
}
ROWS = [pytest.param(*row, id=name) for name, row in QUICK.items()]
MARKS = {name: [SLOW, pytest.mark.optimised] for name in ("independence_learned", "independence_learned_proposal")}
ROWS += [pytest.param(*row, id=name, marks=MARKS.get(name, SLOW)) for name, row in LONGER.items()]
CHAINS, STEPS = 40_000, 10
DEAR = {  # chains and steps of the kernels that walk or flow
    DiffusionPCN: (20_000, 3),
    GuidedPCN: (5_000, 3),
    ParticleGibbs: (2_500, 3),
    NoiseSpace: (5_000, 3),
    DelayedAcceptance: (10_000, 3),
    DiffusionGibbs: (5_000, 3),
}


def moved(kernel, law, chains, walk):
    """The chains' values on their supports before and after, and whether they have diverged."""
    keys, start = jax.random.split(jax.random.key(0), chains), law.draw(np.random.default_rng(1), chains)
    start = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = law.place(np.random.default_rng(2), kernel.init(keys, 0, start, law.args, {}))
    return walk(state, law.args)


def walker(kernel, steps):
    """Steps of many chains, compiled."""
    constrain_fn = getattr(kernel, "get_constrain_fn", kernel.postprocess_fn)

    @jax.jit
    def walk(state, args):
        def step(_, carry):
            last, diverging = carry
            last = kernel.sample(last, args, {})
            return last, diverging | getattr(last, "diverging", False)

        last, diverging = jax.lax.fori_loop(0, steps, step, (state, jnp.zeros(len(state.rng_key), bool)))
        constrain = jax.vmap(constrain_fn(args, {}))
        return constrain(getattr(state, kernel.sample_field)), constrain(getattr(last, kernel.sample_field)), diverging

    return walk


@pytest.mark.parametrize(("make", "law"), ROWS)
def test_steps_leave_the_law_in_place(make, law):
    kernel = make(law.model)
    chains, steps = DEAR.get(type(kernel), (CHAINS, STEPS))
    before, after, diverging = moved(kernel, law, chains, walker(kernel, steps))
    assert_ranks(law.ranks(before))  # the start is what it should be
    for name in before:
        assert float(jnp.mean(jnp.any((after[name] != before[name]).reshape(chains, -1), axis=1))) > 0.4
    assert_ranks(law.ranks(after))
    if not isinstance(kernel, NoiseSpace | DiffusionGibbs):  # NumPyro's HMC calls a large error of the energy so
        assert float(diverging.mean()) < 1e-3


WALLS = {
    "pcn": (DiffusionPCN, LINED),
    "independence": (partial(Independence, num_proposals=2), None),
    "diffusive_gibbs": (partial(DiffusiveGibbs, noise_levels=(1.0,), step_size=1.0, target_accept_prob=None), None),
    "elliptical_slice": (EllipticalSlice, None),
    "crank_nicolson": (CrankNicolson, None),
    "mala": (partial(MALA, step_size=0.2, adapt_mass_matrix=False), None),
    "delayed_acceptance": (partial(DelayedAcceptance, surrogate=without_wall, inner=LEAP), None),
    "parallel_tempering": (partial(ParallelTempering, kernel=WALK, temperatures=(0.0, 0.5, 1.0)), None),
}


@pytest.mark.parametrize(("make", "prior"), WALLS.values(), ids=WALLS)
def test_hard_constraint_and_nan(make, prior):
    """Minus infinity is a wall and no divergence; NaN is rejected too, and counted."""
    law = laws.half_line_posterior(-jnp.inf, prior)
    kernel = make(law.model)
    walk = walker(kernel, 3)
    for nan_below in (-jnp.inf, 0.0):
        _, after, diverging = moved(kernel, laws.half_line_posterior(jnp.float32(nan_below), prior), 20_000, walk)
        assert_ranks(law.ranks(after))
        assert bool(diverging.any()) == (nan_below == 0.0)
