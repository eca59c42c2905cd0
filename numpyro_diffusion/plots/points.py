"""Points of a diffusion model: posteriors of images and signals, paths from noise to data, scores in the plane."""

from typing import Any

import jax
import numpy as np

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.denoise.prediction import density_kind
from numpyro_diffusion.plots.calibration import _axes
from numpyro_diffusion.solve import Solver
from numpyro_diffusion.solve.base import terminal_point


def plot_posterior(draws: Any, *, truth: Any = None, num_draws: int = 2, ax: Any = None) -> Any:
    """Panels of the posterior of an image or a signal: truth, mean, draws, standard deviation, z-score of the truth.

    Args:
        draws: shape (draws, pixels), or (draws, rows, columns).
        truth: of the shape of a draw, if known. Its z-score is (truth - mean) / sd.
        num_draws: number of draws to show.
        ax: an array of as many axes as there are panels, 2 + `num_draws` and two more with a truth; None makes a
            figure. For a signal, one for the values and, with a truth, one for its z-score.

    Returns:
        The axes, an array.

    Raises:
        ValueError: if draws are not of one or two dimensions, or `truth` has another shape.
    """
    draws = np.asarray(draws, np.float64)
    if draws.ndim not in (2, 3) or len(draws) < 2:
        raise ValueError(
            f"draws must have shape (draws, pixels) or (draws, rows, columns), two or more; got {draws.shape}"
        )
    if truth is not None and np.shape(truth) != draws.shape[1:]:
        raise ValueError(f"truth must have the shape {draws.shape[1:]} of a draw; got {np.shape(truth)}")
    mean, deviation = draws.mean(0), draws.std(0, ddof=1)
    score = None if truth is None else (np.asarray(truth) - mean) / np.maximum(deviation, 1e-30)
    shown = draws[np.linspace(0, len(draws) - 1, num_draws).astype(int)]
    if draws.ndim == 2:
        return _signal(mean, deviation, shown, truth, score, ax)
    panels = [] if truth is None else [("truth", np.asarray(truth))]
    panels += [("mean", mean), *((f"draw {k + 1}", draw) for k, draw in enumerate(shown)), ("sd", deviation)]
    panels += [] if score is None else [("z-score of the truth", score)]
    axes = np.ravel(_row(len(panels)) if ax is None else ax)
    values = np.stack([image for title, image in panels if title != "sd" and "z-score" not in title])
    low, high = values.min(), values.max()
    for axis, (title, image) in zip(axes, panels, strict=True):
        if title == "sd":
            drawn = axis.imshow(image, cmap="viridis", vmin=0.0)
        elif "z-score" in title:
            drawn = axis.imshow(image, cmap="RdBu_r", vmin=-3.0, vmax=3.0)
        else:
            drawn = axis.imshow(image, cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize="small")
        axis.set(xticks=[], yticks=[])
        if title in ("mean", "sd") or "z-score" in title:
            axis.figure.colorbar(drawn, ax=axis, shrink=0.75)
    return axes


def _row(number: int) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(1, number, figsize=(1.9 * number, 1.9), layout="constrained")[1]


def _signal(mean: Any, deviation: Any, shown: Any, truth: Any, score: Any, ax: Any) -> Any:
    """Mean with two standard deviations, draws and truth; the z-score below."""
    if ax is None:
        import matplotlib.pyplot as plt

        heights, high = ([1.0], 2.6) if score is None else ([2.2, 1.0], 3.8)
        options: dict[str, Any] = {"sharex": True, "layout": "constrained", "height_ratios": heights}
        ax = plt.subplots(len(heights), 1, figsize=(5.6, high), **options)[1]
    axes, grid = np.ravel(ax), np.arange(len(mean))
    axes[0].fill_between(grid, mean - 2 * deviation, mean + 2 * deviation, color="C0", alpha=0.2, label="2 sd")
    for draw in shown:
        axes[0].plot(grid, draw, color="C0", linewidth=0.6, alpha=0.6)
    axes[0].plot(grid, mean, color="C0", label="mean")
    if score is not None:
        axes[0].plot(grid, truth, "k.", markersize=3, label="truth")
        axes[1].axhspan(-2.0, 2.0, color="0.88")
        axes[1].plot(grid, score, "k.", markersize=3)
        axes[1].set(ylabel="z-score", xlabel="entry")
    axes[0].legend(frameon=False, fontsize="small", ncols=3)
    return axes


def plot_paths(
    solver: Solver, denoiser: Denoiser, key: jax.Array, *, num_paths: int = 20, entry: Any = 0, ax: Any = None
) -> Any:
    r"""Paths from noise to data, $x_t / \alpha_t$ over the noise level, or in the plane.

    Args:
        solver: walks them.
        denoiser: the model.
        key: random key.
        num_paths: how many.
        entry: of the flattened point, or a pair of entries for a picture in their plane.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes.
    """
    axes, pair = _axes(ax), np.ndim(entry) > 0
    times = solver.times(denoiser)

    def path(key: jax.Array) -> jax.Array:
        key_noise, key_steps = jax.random.split(key)
        x_t = terminal_point(denoiser, jax.random.normal(key_noise, denoiser.event_shape))

        def step(carry: tuple, k: jax.Array) -> tuple[tuple, jax.Array]:
            x_t, memory = carry
            step_key = jax.random.fold_in(key_steps, k) if solver.stochastic else None
            x_s, memory = solver.step(denoiser, x_t, memory, times[k], times[k + 1], step_key)
            return (x_s, memory), x_s / denoiser.schedule.alpha(times[k + 1])

        indices = jax.numpy.arange(len(times) - 1)
        _, points = jax.lax.scan(step, (x_t, solver.init(denoiser, x_t)), indices)
        first = x_t / denoiser.schedule.alpha(times[0])
        return jax.numpy.concatenate([first[None], points])

    paths = np.asarray(jax.jit(jax.vmap(path))(jax.random.split(key, num_paths))).reshape(num_paths, len(times), -1)
    levels = np.asarray(denoiser.schedule.noise_level(times))
    for points in paths:
        if pair:
            axes.plot(points[:, entry[0]], points[:, entry[1]], color="C0", linewidth=0.6, alpha=0.5)
            axes.plot(*points[-1, list(entry)], "k.", markersize=4)
        else:
            axes.plot(levels, points[:, entry], color="C0", linewidth=0.7, alpha=0.6)
    if pair:
        axes.set(xlabel=f"$x_{{{entry[0]}}}$", ylabel=f"$x_{{{entry[1]}}}$")
        axes.set(xscale="symlog", yscale="symlog")
    else:
        axes.set(xscale="log", xlabel=r"noise level $\sigma_t / \alpha_t$", ylabel=rf"$x_t / \alpha_t$, entry {entry}")
        axes.set_yscale("symlog")
        axes.invert_xaxis()
    return axes


def plot_score(
    denoiser: Denoiser,
    noise_level: float | None = None,
    *,
    extent: tuple[float, float, float, float] = (-3.0, 3.0, -3.0, 3.0),
    num_arrows: int = 17,
    ax: Any = None,
) -> Any:
    r"""The score of a model in the plane, as arrows, over its energy $-\log p_t$ if it has one.

    Args:
        denoiser: the model, of `event_shape` (2,).
        noise_level: $\sigma_t / \alpha_t$; None for the smallest of the schedule.
        extent: left, right, bottom and top, in the units of the data.
        num_arrows: arrows on a side.
        ax: axes to draw on; None makes a figure.

    Returns:
        The axes. Arrows have the direction of the score; their length is that of the root of its norm.

    Raises:
        ValueError: if the model is not one of the plane.
    """
    if tuple(denoiser.event_shape) != (2,):
        raise ValueError(f"denoiser must have event_shape (2,), the plane; got {tuple(denoiser.event_shape)}")
    schedule, axes = denoiser.schedule, _axes(ax)
    t = schedule.t_min if noise_level is None else schedule.inverse_noise_level(noise_level)
    alpha = schedule.alpha(t)
    if density_kind(denoiser) is not None:
        grid = _grid(extent, 120)
        values = jax.jit(jax.vmap(lambda x: denoiser.log_density(alpha * x, t)))(grid.reshape(-1, 2))  # type: ignore[attr-defined]
        energy = -np.asarray(values).reshape(grid.shape[:2])
        energy -= energy.min()
        top = np.quantile(energy, 0.9)
        drawn = axes.contourf(*np.moveaxis(grid, -1, 0), np.minimum(energy, top), 16, cmap="Blues_r")
        axes.figure.colorbar(drawn, ax=axes, label="energy above the lowest, in nats")
    points = _grid(extent, num_arrows).reshape(-1, 2)
    scores = alpha * np.asarray(jax.jit(jax.vmap(lambda x: denoiser(alpha * x, t).score))(points))
    norm = np.linalg.norm(scores, axis=-1, keepdims=True)
    spacing = (extent[1] - extent[0]) / (num_arrows - 1)
    arrows = spacing * scores / np.sqrt(np.maximum(norm * np.max(norm), 1e-30))  # the longest reaches its neighbour
    axes.quiver(*points.T, *arrows.T, color="C3", width=0.004, angles="xy", scale_units="xy", scale=1.0)
    level = float(schedule.noise_level(t))
    axes.set(
        xlabel="$x_0$", ylabel="$x_1$", title=f"score at noise level {level:.2g}", xlim=extent[:2], ylim=extent[2:]
    )
    axes.set_aspect("equal")
    return axes


def _grid(extent: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Points of the plane, shape (size, size, 2)."""
    x, y = np.linspace(*extent[:2], size), np.linspace(*extent[2:], size)
    return np.stack(np.meshgrid(x, y), -1)
