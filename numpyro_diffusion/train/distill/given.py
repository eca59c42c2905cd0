r"""Distilling the draw of a clean point given a noisy one: a `solve.GivenMap` of two evaluations.

A draw of $p(x \mid x_t)$ is random, and a network trained by regression on pairs $(x_t, x)$ of noised points learns
its mean: no noise that is handed to it beside $x_t$ tells it anything about $x$. The pairs have to be a *coupling* of
$x$ with the noise. The flow of $x$ given $x_t$ is one (`solve.flow_given`): a deterministic map $x = F(x_t, z)$ that
takes $z \sim N(0, I)$ to $p(x \mid x_t)$. So noise, level, point and image are made by the teacher,

$$x_0 \sim p, \quad L \sim q, \quad u = x_0 + L \varepsilon, \quad z \sim N(0, I), \quad x = F(u, z),$$

and the map is regressed on the images, at all levels at once, in units of the scale that $x$ given $x_t$ has.

**What is exact.** Nothing: the law of $G_\theta(x_t, z)$ is not quite $p(x \mid x_t)$, and a noise-denoise move by it
does not quite keep the prior. `GivenQuality` measures by how much, at several levels, on fresh points. An error of one
move is not that of the law that many moves tend to. `infer.DiffusionPCN(screen=)` restores the law of the teacher.

References:
    Holderrieth et al., Diamond maps: efficient reward alignment via stochastic flow maps, 2026 (the flow given a noisy
    point, distilled into one step), https://arxiv.org/abs/2602.05993.
    Potaptchik et al., Meta flow maps enable scalable reward alignment, 2026, https://arxiv.org/abs/2601.14430.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, NetworkDenoiser, require_denoiser
from numpyro_diffusion.diagnostics import sliced_wasserstein
from numpyro_diffusion.nn import MLP
from numpyro_diffusion.solve import Adams, GivenMap, Solver, flow_given
from numpyro_diffusion.solve.flow import FlowMap, check_flow
from numpyro_diffusion.solve.given import joined_shape
from numpyro_diffusion.train.distill.flow import pairs
from numpyro_diffusion.train.distill.regression import BLOCK, check_numbers, regress
from numpyro_diffusion.train.run import Plan

_LOOKS = 4
"""Noisy points for each clean one."""
_HARDEST, _WIDTH = 0.5, 1.0
"""Centre, in units of the data's scale, and spread in logarithms of every other level of training."""
_NUM_LEVELS = 8
"""Levels at which a map is measured, besides the two ends."""
_FAR = 3.0
"""Sliced distance over its floor, at the worst level, from which the map is said to be far from its teacher."""


class GivenQuality(NamedTuple):
    """How far a map is from the law of x given x_t, at several noise levels: arrays of one entry for each, (levels,).

    Differences from the denoiser's mean E[x | x_t], of independent noisy points, in units of the standard deviation
    that the teacher's draws have about it at this level.
    """

    levels: np.ndarray  # noise levels, in units of the data's scale
    rms: np.ndarray  # of the difference between the images of the same noise
    variance: np.ndarray  # of the map's draws about the mean, over that of the teacher's
    sliced_w1: np.ndarray  # sliced Wasserstein distance between the joint laws of noisy point and draw
    sliced_w1_floor: np.ndarray  # the same between draws of the teacher

    def __str__(self) -> str:
        worst = [int(np.argmax(v)) for v in (self.rms, np.abs(self.variance - 1.0), self.over_floor)]
        rms, variance, w1 = (f"at level {self.levels[i]:.2g}" for i in worst)
        return (
            f"at worst: rms {self.rms[worst[0]]:.3f} of the deviation given the noisy point ({rms}), variance "
            f"{self.variance[worst[1]]:.3f} of the teacher's ({variance}), sliced W1 {self.over_floor[worst[2]]:.2f} "
            f"of its floor ({w1})"
        )

    @property
    def over_floor(self) -> np.ndarray:
        """The sliced distance over its floor."""
        return self.sliced_w1 / self.sliced_w1_floor


class GivenResult(NamedTuple):
    """The result of distilling the draw of a clean point given a noisy one."""

    given_map: GivenMap  # the averaged weights, frozen
    quality: GivenQuality  # its distance to the teacher
    losses: np.ndarray  # of every step, (num_steps,)
    interrupted: bool  # whether Ctrl-C ended it


def distill_given(
    key: jax.Array,
    denoiser: Denoiser,
    solver: Solver = Adams(30),  # noqa: B008
    *,
    student: nnx.Module | None = None,
    num_pairs: int = 50_000,
    num_steps: int = 6000,
    batch_size: int = 256,
    optimizer: optax.GradientTransformation | None = None,
    ema_decay: float = 0.999,
    num_test_draws: int = 2000,
    steps_per_call: int = 100,
    progress_bar: bool = True,
) -> GivenResult:
    """Distils draws of the clean point given a noisy one into a map of two evaluations.

    Args:
        key: random key of the pairs and the minibatches.
        denoiser: the teacher: any denoiser of one law, learned or exact.
        solver: of law "flow", which draws from the prior and follows the flow of x given x_t.
        student: the network to train, copied: a backbone of `nn` for points three times as long along their last axis
            (noise, noisy point and mean side by side), such as `MLP((6,))` for a teacher of `event_shape` (2,). None
            takes an `MLP` of its own default size.
        num_pairs: noisy points, each with one noise and its image, at levels of the teacher's schedule: half of them
            log-uniform, half about the scale of the data.
        num_steps: number of gradient steps.
        batch_size: pairs in a minibatch, drawn with replacement.
        optimizer: any optax optimiser; by default Adam, its rate warmed up to 4e-3 and decayed to zero along a cosine.
        ema_decay: decay of the weights' moving average, in [0, 1).
        num_test_draws: fresh draws at each level to measure the map on.
        steps_per_call: steps of one compiled call, after which the bar moves and Ctrl-C takes effect.
        progress_bar: whether to show the running loss.

    Returns:
        A `GivenResult`. After Ctrl-C it holds what was trained so far.

    Warns:
        UserWarning: if at some level the map's draws are more than three times as far from the teacher's as these from
            one another.

    Raises:
        TypeError: if the teacher is not a denoiser, its solver draws noise, or the student is not a network.
        ValueError: if a number is out of range, the teacher's flow is not finite, or the student does not fit.
        FloatingPointError: if training diverges.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.nn import MLP
        >>> from numpyro_diffusion.train import distill_given
        >>> options = {"num_pairs": 500, "num_steps": 100, "num_test_draws": 200, "progress_bar": False}
        >>> student = MLP((6,), features=16, rngs=nnx.Rngs(0))
        >>> result = distill_given(jax.random.key(0), Gaussian([1.0, 5.0]), student=student, **options)
        >>> result.given_map.evaluations(), bool(result.quality.rms.max() < 0.1)
        (2, True)
    """
    require_denoiser(denoiser)
    _check_teacher(solver)
    check_numbers(num_pairs, batch_size, ema_decay)
    plan = Plan(num_steps, steps_per_call, progress_bar=progress_bar)
    shape = tuple(denoiser.event_shape)
    backbone = MLP(joined_shape(shape), rngs=nnx.Rngs(0)) if student is None else student
    given_map = GivenMap(NetworkDenoiser(backbone, target="x0").unfreeze(), shape)
    key_points, key_images, key_steps, key_test = jax.random.split(key, 4)
    _, x = pairs(key_points, denoiser, solver, -(-num_pairs // _LOOKS))
    key_levels, key_images = jax.random.split(key_images)
    levels = _draw_levels(key_levels, denoiser, num_pairs)
    x = jnp.tile(x, (_LOOKS, *(1 for _ in shape)))[:num_pairs]
    made = _images(solver, denoiser, x, levels, key_images)
    _checks.finite("the image of noise given a noisy point under solver", made[-1], "Is the teacher's training done?")
    *inputs, z, image = made
    learn = functools.partial(regress, optimizer=optimizer, batch_size=batch_size, ema_decay=ema_decay)
    best, losses, interrupted = learn(key_steps, given_map, (*inputs, z), image - z, plan)
    given_map = given_map.with_network(given_map.network.with_params(best).freeze())
    quality = given_quality(key_test, given_map, denoiser, solver, num_test_draws)
    if np.max(quality.over_floor) > _FAR:
        warnings.warn(
            f"the map is far from its teacher, {quality}. A noise-denoise move by it keeps another law than the prior. "
            "Take a wider student, more pairs and steps",
            stacklevel=2,
        )
    return GivenResult(given_map, quality, losses, interrupted)


def given_quality(
    key: jax.Array, given_map: GivenMap | Solver, denoiser: Denoiser, solver: Solver, num_draws: int = 2000
) -> GivenQuality:
    """Measures how far a map is from the law of x given x_t, on fresh points.

    Args:
        key: random key.
        given_map: the map; or a solver of law "flow", such as one of fewer steps.
        denoiser: the teacher.
        solver: the teacher's solver.
        num_draws: noisy points at each level, with one draw each.

    Returns:
        A `GivenQuality`.

    Raises:
        ValueError: if there are fewer than two draws, or one is not finite.
    """
    _checks.at_least(2, num_draws=num_draws)
    _check_teacher(solver)
    lowest, highest = np.asarray(_ends(denoiser), np.float64)
    levels = np.geomspace(lowest, highest, _NUM_LEVELS + 2)
    rows = []
    for k, level in enumerate(levels):
        key_points, key_first, key_second, key_slices = jax.random.split(jax.random.fold_in(key, k), 4)
        x = [pairs(each, denoiser, solver, num_draws)[1] for each in jax.random.split(key_points)]
        many = jnp.full(num_draws, level, x[0].dtype)
        seen, pull, _, z, truth = _images(solver, denoiser, x[0], many, key_first)
        *_, learned = _images(given_map, denoiser, x[0], many, key_first)
        seen_too, pull_too, _, _, other = _images(solver, denoiser, x[1], many, key_second)
        _checks.finite("a draw given a noisy point", learned)
        spread = jnp.sqrt(jnp.mean(truth**2))
        joint = [jnp.stack([a, b / spread], 1) for a, b in ((seen, learned), (seen, truth), (seen_too, other))]
        w1, floor = (sliced_wasserstein(each, joint[2], key_slices, 200) for each in joint[:2])
        gap = jnp.sqrt(jnp.mean((learned - truth) ** 2)) / spread
        rows.append([level / denoiser.scale, gap, jnp.mean(learned**2) / spread**2, w1, floor])
    return GivenQuality(*np.asarray(rows, np.float64).T)


def _check_teacher(solver: Solver) -> None:
    if isinstance(solver, FlowMap | GivenMap):
        raise TypeError("solver must be the teacher's solver, not a map that was distilled already")
    check_flow(solver, name="solver")


def _ends(denoiser: Denoiser) -> jax.Array:
    """The lowest and the highest noise level."""
    schedule = denoiser.schedule
    return jnp.stack([jnp.asarray(schedule.noise_level(t)) for t in (schedule.t_min, schedule.t_max)])


def _draw_levels(key: jax.Array, denoiser: Denoiser, count: int) -> jax.Array:
    """Noise levels: log-uniform over all, and every other one about the scale of the data, where the map is hardest."""
    low, high = jnp.log(_ends(denoiser))
    key_all, key_near = jax.random.split(key)
    over_all = jax.random.uniform(key_all, (count,), minval=low, maxval=high)
    near = jnp.log(_HARDEST * denoiser.scale) + _WIDTH * jax.random.normal(key_near, (count,))
    return jnp.exp(jnp.where(jnp.arange(count) % 2, jnp.clip(near, low, high), over_all))


@jax.jit
def _images(
    solver: Solver | GivenMap, denoiser: Denoiser, x: jax.Array, levels: jax.Array, key: jax.Array
) -> tuple[jax.Array, ...]:
    """Noises points to their levels: what the network sees, noise, and its image as a deviation from the mean."""

    def one(x: jax.Array, level: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        schedule = denoiser.schedule
        eps, z = jax.random.normal(key, (2, *x.shape), x.dtype)
        t = jnp.clip(schedule.inverse_noise_level(level), schedule.t_min, schedule.t_max)
        x_t = (schedule.alpha(t) * x + schedule.sigma(t) * eps).astype(x.dtype)
        *about, mean, scale = GivenMap.about(denoiser, x_t, t)
        return *about, z, (flow_given(solver, denoiser, x_t, t, z) - mean) / scale

    block = functools.partial(jax.lax.map, batch_size=min(BLOCK, len(x)))
    return block(lambda row: one(*row), (x, levels, jax.random.split(key, len(x))))
