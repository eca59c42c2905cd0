"""Pictures hold the numbers that they should; what they look like was looked at."""

import jax
import matplotlib
import numpy as np
import pytest

from numpyro_diffusion import plots
from numpyro_diffusion.denoise import Gaussian, GaussianMixture
from numpyro_diffusion.diagnostics import ecdf_bands
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import DPMSolverPP, Heun
from numpyro_diffusion.train.weighting import EDM, Likelihood

matplotlib.use("Agg")
SCHEDULE = VE(0.01, 40.0)
MIXTURE = GaussianMixture([0.4, 0.6], [[-1.5, 0.5], [1.5, -1.0]], 0.15, SCHEDULE)
RNG = np.random.default_rng(0)
UNIFORM, LOW = RNG.uniform(size=400), RNG.uniform(size=400) ** 2


@pytest.fixture
def axes():
    import matplotlib.pyplot as plt

    yield plt.subplots()[1]
    plt.close("all")


def curve(axes, index):
    return np.asarray(axes.lines[index].get_xdata()), np.asarray(axes.lines[index].get_ydata())


def test_ecdf_difference_and_coverage(axes):
    """Values are the distribution functions themselves; only the curve that leaves the bands is red."""
    assert plots.plot_ecdf_difference(np.c_[UNIFORM, LOW], ax=axes, label="x") is axes
    for index, levels in enumerate((UNIFORM, LOW)):
        points, values = curve(axes, index)
        np.testing.assert_allclose(values, (levels[:, None] <= points).mean(0) - points, atol=1e-12)
    assert [line.get_color() for line in axes.lines[:2]] == ["C0", "C3"]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), np.max(ecdf_bands(400).upper - ecdf_bands(400).points))
    axes.clear()
    plots.plot_coverage(np.c_[UNIFORM, 0.5 + 0.5 * (UNIFORM - 0.5)], ax=axes)
    points, values = curve(axes, 2)
    assert np.isclose(values[np.isclose(points, 0.5)], 1.0)  # intervals that are twice as wide as they say
    assert [line.get_color() for line in axes.lines[1:3]] == ["C0", "C3"]


def test_rank_histogram(axes):
    plots.plot_rank_histogram(LOW, num_bins=10, ax=axes)
    np.testing.assert_array_equal(axes.patches[-1].get_data().values, np.histogram(LOW, 10, (0.0, 1.0))[0])


def test_acceptance_by_level(axes):
    """Levels that are few have a bin each; NaN does not count; many are binned."""
    levels, accepted = np.array([[10.0, 1.0, 0.1]] * 4), np.array([[0.2, 0.5, 0.9]] * 3 + [[np.nan, 0.5, 0.9]])
    plots.plot_acceptance(levels, accepted, ax=axes)
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(), [0.9, 0.5, 0.2])
    axes.clear()
    many = np.exp(RNG.uniform(-3.0, 3.0, 5000))
    plots.plot_acceptance(many, 1.0 / (1.0 + many), ax=axes)
    line = axes.containers[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), 1.0 / (1.0 + line.get_xdata()), atol=0.02)


def test_levels_weightings_and_evidence(axes):
    times = DPMSolverPP(12, eta=1.0).times(MIXTURE)
    plots.plot_levels(SCHEDULE, times, label="grid", ax=axes)
    np.testing.assert_allclose(curve(axes, 0)[1][[0, -1]], [40.0, 0.01], rtol=1e-3)
    axes.clear()
    plots.plot_weightings({"EDM": EDM(), "Likelihood": Likelihood()}, ax=axes)
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-"] and np.allclose(curve(axes, 1)[1], 1.0)
    axes.clear()
    plots.plot_evidence((-3.5, 0.1, np.array([-3.6, -3.4])), truth=-3.52, label="one", ax=axes)
    plots.plot_evidence((-4.0, np.nan, np.array([-4.0])), label="two", ax=axes)
    np.testing.assert_allclose(curve(axes, 0)[1], [-3.6, -3.4])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["one", "two"]


def test_posterior_panels():
    draws, truth = RNG.normal(2.0, 3.0, (400, 4, 5)), np.full((4, 5), 5.0)
    axes = plots.plot_posterior(draws, truth=truth)
    images = {axis.get_title(): np.asarray(axis.images[0].get_array()) for axis in axes}
    assert list(images) == ["truth", "mean", "draw 1", "draw 2", "sd", "z-score of the truth"]
    np.testing.assert_allclose(images["z-score of the truth"], (5.0 - draws.mean(0)) / draws.std(0, ddof=1))
    signal = plots.plot_posterior(draws[:, 0], truth=truth[0])
    np.testing.assert_allclose(signal[1].lines[0].get_ydata(), images["z-score of the truth"][0])
    assert len(plots.plot_posterior(draws[:, 0])) == 1
    matplotlib.pyplot.close("all")


def test_paths_end_where_the_solver_does(axes):
    """The flow of one Gaussian is known: x at the end is mean + sd z, to the order of the solver."""
    gaussian, key = Gaussian([3.0, 0.0], 0.25, SCHEDULE), jax.random.key(0)
    plots.plot_paths(Heun(48), gaussian, key, num_paths=3, ax=axes)
    noise = [jax.random.normal(jax.random.split(k)[0], (2,)) for k in jax.random.split(key, 3)]
    ends = [curve(axes, index)[1][-1] for index in range(3)]
    np.testing.assert_allclose(ends, [3.0 + 0.5 * float(z[0]) for z in noise], atol=0.02)
    axes.clear()
    plots.plot_paths(DPMSolverPP(12, eta=1.0), MIXTURE, key, num_paths=2, entry=(0, 1), ax=axes)
    assert len(axes.lines) == 4


def test_score_of_a_gaussian(axes):
    """Arrows point to the mean, by the root of the distance."""
    plots.plot_score(Gaussian([1.0, 0.0], 1.0, SCHEDULE), 0.5, num_arrows=7, ax=axes)
    arrows = axes.collections[-1]
    to_mean = np.array([1.0, 0.0]) - np.c_[arrows.X, arrows.Y]
    distance = np.linalg.norm(to_mean, axis=1)
    expected = to_mean / np.sqrt(np.maximum(distance, 1e-9))[:, None] / np.sqrt(distance.max())
    np.testing.assert_allclose(np.c_[arrows.U, arrows.V], expected, atol=1e-5)


BAD = [
    (lambda: plots.plot_coverage(np.array([0.5, np.nan])), "levels must be two or more numbers"),
    (lambda: plots.plot_acceptance(np.ones(3), np.full(3, np.nan)), "must have finite entries"),
    (lambda: plots.plot_posterior(np.zeros(3)), "draws must have shape"),
    (lambda: plots.plot_posterior(np.zeros((3, 4)), truth=np.zeros(5)), r"truth must have the shape \(4,\)"),
    (lambda: plots.plot_score(Gaussian([0.0])), r"event_shape \(2,\), the plane; got \(1,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
