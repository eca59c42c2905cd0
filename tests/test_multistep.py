"""Solvers with a memory, a corrector or a mind of their own, against flows and laws known in closed form."""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solve import (
    HIGHEST,
    LADDER,
    LOWEST,
    MEAN,
    VARIANCES,
    flow_of_mixture,
    gaussian,
    mixture,
    on_ladder,
    run,
)

from numpyro_diffusion.denoise import Around, Gaussian
from numpyro_diffusion.noise import VE, VP, Rectified
from numpyro_diffusion.solve import (
    AdaptiveFlow,
    Ancestral,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialEuler,
    Heun,
    PredictorCorrector,
    StochasticHeun,
    sample,
    solve,
)
from numpyro_diffusion.solve.base import total_evaluations
from numpyro_diffusion.solve.langevin import langevin_step, snr_step_size

draw = partial(jax.jit, static_argnums=3)(sample)
STARTS = HIGHEST * np.array([[-1.6, 1.6], [-0.8, 0.4], [-0.2, 0.8], [0.3, -0.3], [0.9, -1.0], [1.5, -1.5]])


def test_exponential_euler_is_ddim_and_the_ancestral_step(x64):
    """At the two ends of eta, digit for digit; and the first step of DPM-Solver++ has nothing to remember."""
    key, x = jax.random.key(0), STARTS
    np.testing.assert_allclose(run(ExponentialEuler(9), gaussian(), x), run(Ancestral(9, eta=0.0), gaussian(), x))
    ours, ddpm = (run(solver, gaussian(), x, key) for solver in (ExponentialEuler(9, eta=1.0), Ancestral(9)))
    np.testing.assert_allclose(ours, ddpm, rtol=1e-12)
    two = DPMSolverPP(2), ExponentialEuler(2)
    np.testing.assert_allclose(*(run(solver, gaussian(), x) for solver in two), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, schedule",
    [
        (DPMSolverPP(9), VP()),
        (DPMSolverPP(9, eta=1.0), Rectified()),
        (PredictorCorrector(Ancestral(9), 2), VP()),
        (AdaptiveFlow(), Rectified()),
    ],
    ids=["DPM", "SDE-DPM", "corrector", "adaptive"],
)
def test_all_schedules_are_one_process(solver, schedule, x64):
    schedule, key = on_ladder(schedule), jax.random.key(2) if solver.stochastic else None
    got = run(solver, gaussian(schedule), schedule.alpha(schedule.t_max) * STARTS, key)
    np.testing.assert_allclose(got, run(solver, gaussian(), STARTS, key), rtol=1e-6)


def test_a_walk_with_a_memory_can_start_anywhere(x64):
    """From a traced index the memory is empty: the first step is of order one, the rest of order two."""
    solver, k = DPMSolverPP(9), 4
    x, law = jnp.array([3.0, -1.0]), gaussian()
    got = jax.jit(lambda x, k: solve(solver, law, x, start=k))(x, k)
    times, memory, step = solver.times(law), solver.init(law, x), jax.jit(solver.step)
    for i in range(k, 8):
        x, memory = step(law, x, memory, times[i], times[i + 1])
    np.testing.assert_allclose(got, law(x, times[-1]).x0, rtol=1e-9)


def test_the_corrector_mends_what_the_predictor_broke():
    """DDPM in 17 steps is too narrow; corrections at each level take most of that away. 4,000 draws, 4.5 s.e."""
    n, law = 4_000, gaussian()
    ratios = []
    for solver in (Ancestral(17), PredictorCorrector(Ancestral(17), num_corrections=8, snr=0.4)):
        x = draw(solver, law, jax.random.key(1), (n,))
        assert (abs(x.mean(0) - MEAN) < 4.5 * np.sqrt(VARIANCES / n)).all()
        ratios.append(np.asarray(x.var(0) / VARIANCES))
    noise = 4.5 * np.sqrt(2 / n)
    assert ratios[0].min() < 1 - 2 * noise  # the predictor alone is seen to fail
    assert (abs(ratios[1] - 1) < 0.5 * abs(ratios[0] - 1).max() + noise).all(), ratios


def test_langevin_step_has_its_closed_form_variance(x64):
    """On N(0, 1) the stationary variance is 1 / (1 - h / 2): kept by a step within 4.5 standard errors."""
    n, h = 200_000, 0.4
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (n,)) / np.sqrt(1 - h / 2)
    stepped = langevin_step(keys[1], x, -x, h)
    assert abs(stepped.var() * (1 - h / 2) - 1) < 4.5 * np.sqrt(2 / n)
    noise = langevin_step(keys[1], jnp.zeros(n), jnp.zeros(n), h)
    assert abs(noise.var() / (2 * h) - 1) < 4.5 * np.sqrt(2 / n)


def test_signal_to_noise_rule(x64):
    """At a level where noise is all there is, the rule is the published one; elsewhere it is more careful."""
    x, snr = jax.random.normal(jax.random.key(0), (20_000, 2)), 0.16
    law = gaussian(VE(LOWEST, 1000.0))
    scores = jax.jit(jax.vmap(lambda x_t, t: law(x_t, t).score, (0, None)))
    for level, tolerance in ((500.0, 0.03), (1.0, np.inf)):
        x_t = MEAN + np.sqrt(VARIANCES + level**2) * x
        score = scores(x_t, law.schedule.inverse_noise_level(level))
        published = 2 * snr**2 * 2 / (score**2).sum(1).mean()
        ours = snr_step_size(level, snr)
        assert ours <= published * 1.03 and abs(ours / published - 1) < tolerance


@pytest.mark.slow
def test_adaptive_flow_meets_its_tolerance(x64):
    """Against the closed form of the flow, and back up again; tighter tolerances cost more evaluations."""
    x, law = STARTS[:, :1], mixture()

    @jax.jit
    def there_and_back(solver, x):
        down, num_down = solver.integrate(law, x, 1.0, 0.0)
        return law(down, 0.0).x0, solver.integrate(law, down, 0.0, 1.0)[0], num_down

    counts = []
    for tol, allowed in ((1e-4, 2e-2), (1e-8, 1e-6)):
        clean, back, count = jax.vmap(there_and_back, (None, 0))(AdaptiveFlow(tol, tol), x)
        assert np.abs(clean - flow_of_mixture(x)).max() < allowed
        np.testing.assert_allclose(back, x, rtol=100 * tol, atol=100 * tol)
        counts.append(np.asarray(count))
    assert (20 < counts[0]).all() and (counts[0] < counts[1]).all()


@pytest.mark.slow
def test_adaptive_flow_that_runs_out_of_steps_says_so():
    assert jnp.isnan(run(AdaptiveFlow(max_steps=2), mixture(), STARTS[:, :1])).all()


def test_adaptive_flow_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"AdaptiveFlow needs diffrax: pip install 'numpyro-diffusion\[adaptive\]'"):
        AdaptiveFlow().step(gaussian(), jnp.zeros(2), (), 1.0, 0.0)


MEMORIES = {
    "DPM": DPMSolverPP(9),
    "corrector": PredictorCorrector(DPMSolverPP(9, eta=1.0), 2),
}


@pytest.mark.parametrize("solver", MEMORIES.values(), ids=MEMORIES)
def test_evaluations_are_counted_right(solver):
    calls = []
    law = gaussian()

    class Counting(type(law)):
        def __call__(self, x_t, t):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(x_t, t)

    denoiser = Counting(MEAN, VARIANCES, LADDER)
    jax.block_until_ready(solve(solver, denoiser, jnp.zeros(2), jax.random.key(0)))
    jax.effects_barrier()
    assert len(calls) == solver.evaluations() == 8 * solver.evaluations_per_step + 1
    twin = dataclasses.replace(solver)
    assert jax.tree.leaves(solver) == [] and twin == solver and hash(twin) == hash(solver)


def test_what_an_adaptive_flow_costs_is_not_known_before():
    for solver in (AdaptiveFlow(), PredictorCorrector(AdaptiveFlow())):
        assert solver.evaluations_per_step is None and solver.evaluations() is solver.evaluations(1) is None
        assert total_evaluations([7, solver.evaluations()]) == 0 and total_evaluations([7, 3]) == 10


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Answers(Around):
    """A denoiser that answers in a precision of its own, whatever it is asked in."""

    base: Gaussian
    dtype: jnp.dtype = field(metadata={"static": True})

    def __call__(self, x_t, t):
        prediction = self.base(x_t, t)
        return dataclasses.replace(prediction, x0=prediction.x0.astype(self.dtype))


PRECISE = {
    "Ancestral": Ancestral(9),
    "DDIM": Ancestral(9, eta=0.0),
    "EulerMaruyama": EulerMaruyama(9),
    "DPM": DPMSolverPP(9),
    "SDE-DPM": DPMSolverPP(9, eta=1.0),
    "Heun": Heun(9),
    "StochasticHeun": StochasticHeun(9),
    "corrector": PredictorCorrector(DPMSolverPP(9, eta=1.0)),
    "adaptive": AdaptiveFlow(1e-2, 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("solver", PRECISE.values(), ids=PRECISE)
def test_a_denoiser_may_answer_in_another_precision(solver, x64):
    """The walk stays in the precision of its point, from a static and from a traced start; nothing is run."""
    key, laws = jax.random.key(0), [gaussian(), *(Answers(gaussian(), d) for d in (jnp.float16, jnp.float32))]
    for law in laws:  # the first answers in double precision
        for dtype in (jnp.float32, jnp.float64):
            for start in (0, jnp.asarray(3)):
                walk = lambda x, start=start, law=law: solve(solver, law, x, key, start)  # noqa: E731
                assert jax.eval_shape(walk, jnp.zeros(2, dtype)).dtype == dtype


def test_what_a_rougher_answer_costs():
    """Half precision rounds the posterior mean to 1e-3 of itself, and the draw with it."""
    walk = jax.jit(lambda law, x: solve(DPMSolverPP(9, eta=1.0), law, x, jax.random.key(0)))
    exact, rounded = (walk(law, 10.0 * jnp.ones(2)) for law in (gaussian(), Answers(gaussian(), jnp.float16)))
    np.testing.assert_allclose(rounded, exact, atol=0.02)


BAD = {
    "eta": (lambda: ExponentialEuler(eta=1.5), ValueError, "eta must lie in"),
    "steps": (lambda: DPMSolverPP(1), ValueError, "num_times must be at least 2; got 1"),
    "corrections": (lambda: PredictorCorrector(num_corrections=0), ValueError, "num_corrections must be at least 1"),
    "snr": (lambda: PredictorCorrector(snr=0.0), ValueError, "snr must be positive"),
    "predictor": (lambda: PredictorCorrector("DDPM"), TypeError, "predictor must be a Solver"),
    "rtol": (lambda: AdaptiveFlow(rtol=0.0), ValueError, "rtol must be positive"),
    "max_steps": (lambda: AdaptiveFlow(max_steps=0), ValueError, "max_steps must be at least 1"),
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("level", [0.1, 0.5, 2.0])
def test_the_reverse_process_has_the_law_of_the_clean_point_given_the_noisy_one(level):
    """What moves that noise and denoise rely on: moments of N(0, 1) given x_t = 1, within 4 s.e. and 2 %."""
    law, solver, count = Gaussian([0.0], 1.0, VE(0.01, 40.0)), DPMSolverPP(64, eta=1.0), 40_000
    levels = law.schedule.noise_level(solver.times(law))
    start = int(jnp.argmin(jnp.abs(jnp.log(levels / level))))
    level, point = float(levels[start]), jnp.ones(1)
    walk = jax.jit(lambda keys, start: jax.vmap(lambda key: solve(solver, law, point, key, start)[0])(keys))
    x = np.asarray(walk(jax.random.split(jax.random.key(0), count), start), np.float64)
    variance = level**2 / (1.0 + level**2)
    assert abs(x.mean() - 1.0 / (1.0 + level**2)) < 4.0 * np.sqrt(variance / count) + 0.02 * np.sqrt(variance)
    assert abs(x.var() / variance - 1.0) < 4.0 * np.sqrt(2.0 / count) + 0.02
