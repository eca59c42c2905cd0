r"""Distilling a flow: a network that maps noise to data in one to a few evaluations.

The teacher is a denoiser with a deterministic solver, $x = F(z)$, of tens of evaluations. The student is a `FlowMap`
$G_\theta$ of $K$ evaluations, trained on pairs of the teacher's by

$$\hat\theta = \arg\min_\theta \frac1n \sum_i \frac{\| G_\theta(z_i) - F(z_i) \|^2}{d\, c^2}, \qquad z_i \sim N(0, I),$$

with $d$ coordinates and the data's scale $c$. It is plain regression: no adversary, no loss that looks at itself. Pairs
are made once, and a network that knows the denoising starts from the teacher's weights.

**What is exact.** $G_\theta$ pushes $N(0, I)$ forward to a law of its own, and a model whose prior has
`flow_solver=flow_map` is sampled in noise space exactly for that prior, whatever the training. What is not exact is
that prior against the teacher's, and `MapQuality` measures it on fresh noise: the distance between the images of the
same noise, and distances between laws, next to their floors between the teacher's own draws. Regression errs to the
middle where the flow is steep, between modes. How far a *posterior* moves depends on the data: an error of the map that
is small beside the prior may be large beside precise data. `infer.DelayedAcceptance` takes the map for the moves and
restores the law of the teacher by a test.

References:
    Luhman and Luhman, Knowledge distillation in iterative generative models for improved sampling speed, 2021,
    https://arxiv.org/abs/2101.02388.
    Salimans and Ho, Progressive distillation for fast sampling of diffusion models, 2022,
    https://arxiv.org/abs/2202.00512.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from numpyro_diffusion import _checks
from numpyro_diffusion.denoise import Denoiser, NetworkDenoiser, require_denoiser
from numpyro_diffusion.diagnostics import energy_distance, sliced_wasserstein
from numpyro_diffusion.solve import DPMSolverPP, FlowMap, Solver, push_forward
from numpyro_diffusion.solve.flow import check_flow
from numpyro_diffusion.train.distill.regression import BLOCK, check_numbers, regress
from numpyro_diffusion.train.run import Plan

_HIGHEST, _LOWEST = 8.0, 0.5
"""Between these levels, in units of the data's scale, lie the evaluations after the first."""
_FAR = 3.0
"""Sliced distance over its floor from which the map is said to be far from its teacher."""


class MapQuality(NamedTuple):
    """How far a flow map is from its teacher; the distances between laws in units of the data."""

    rms: float  # of the images of the same noise, in units of the data's standard deviation
    worst_rms: float  # the same of the worst coordinate, in units of that coordinate's standard deviation
    sliced_w1: float  # sliced Wasserstein distance of the map's draws to the teacher's
    sliced_w1_floor: float  # the same between draws of the teacher
    energy: float  # energy distance of the map's draws to the teacher's
    energy_floor: float  # its standard deviation between draws of the teacher, where its mean is zero

    def __str__(self) -> str:
        return (
            f"rms {self.rms:.3f} of the data's standard deviation (worst coordinate {self.worst_rms:.3f} of its own), "
            f"sliced W1 {self.sliced_w1:.3g} (floor {self.sliced_w1_floor:.3g}), "
            f"energy distance {self.energy:.3g} (floor {self.energy_floor:.2g})"
        )


class DistillResult(NamedTuple):
    """The result of a distillation."""

    flow_map: FlowMap  # the averaged weights, frozen, in the units of the data
    quality: MapQuality  # its distance to the teacher
    losses: np.ndarray  # of every step, (num_steps,)
    interrupted: bool  # whether Ctrl-C ended it


def distill(
    key: jax.Array,
    denoiser: Denoiser,
    flow_solver: Solver = DPMSolverPP(18),  # noqa: B008
    *,
    num_evaluations: int = 1,
    student: nnx.Module | NetworkDenoiser | None = None,
    num_pairs: int = 50_000,
    num_steps: int = 6000,
    batch_size: int = 256,
    optimizer: optax.GradientTransformation | None = None,
    ema_decay: float = 0.999,
    num_test_draws: int = 2000,
    steps_per_call: int = 100,
    progress_bar: bool = True,
) -> DistillResult:
    r"""Distils the flow of a denoiser into a map of one to a few evaluations.

    Args:
        key: random key of the noise and the minibatches.
        denoiser: the teacher: any denoiser of one law, learned or exact.
        flow_solver: the teacher's solver, of law "flow"; that of the prior whose place the map is to take.
        num_evaluations: evaluations $K$ of the map, 1 to 8.
        student: the network to train: a backbone of `nn` for the teacher's `event_shape`, or a `NetworkDenoiser`, both
            copied. None copies the teacher, which must be a `NetworkDenoiser` of target "edm" or "x0": others are
            ill-conditioned where a map begins, at the highest noise.
        num_pairs: pairs of noise and image, each of one run of the teacher's solver.
        num_steps: number of gradient steps.
        batch_size: pairs in a minibatch, drawn with replacement.
        optimizer: any optax optimiser; by default Adam, its rate warmed up to 4e-3 and decayed to zero along a cosine.
        ema_decay: decay of the weights' moving average, in [0, 1).
        num_test_draws: fresh draws to measure the map on.
        steps_per_call: steps of one compiled call, after which the bar moves and Ctrl-C takes effect.
        progress_bar: whether to show the running loss.

    Returns:
        A `DistillResult`. After Ctrl-C it holds what was trained so far.

    Warns:
        UserWarning: if the map's draws are more than three times as far from the teacher's as these from one another.

    Raises:
        TypeError: if the teacher is not a denoiser, its solver draws noise, or the student is not a network.
        ValueError: if a number is out of range, the teacher's flow is not finite, or the student does not fit.
        FloatingPointError: if training diverges.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.nn import MLP
        >>> from numpyro_diffusion.train import distill
        >>> options = {"num_pairs": 500, "num_steps": 300, "num_test_draws": 200, "progress_bar": False}
        >>> student = MLP((2,), features=16, rngs=nnx.Rngs(0))
        >>> result = distill(jax.random.key(0), Gaussian([1.0, 5.0]), student=student, **options)
        >>> result.flow_map.evaluations(), result.quality.rms < 0.2
        (1, True)
    """
    require_denoiser(denoiser)
    if isinstance(flow_solver, FlowMap):
        raise TypeError("flow_solver must be the teacher's solver, not a map that was distilled already")
    check_flow(flow_solver)
    _checks.at_least(1, num_evaluations=num_evaluations)
    check_numbers(num_pairs, batch_size, ema_decay)
    if num_evaluations > 8:
        raise ValueError(f"num_evaluations must be at most 8; got {num_evaluations}. A solver does as well in so many")
    plan = Plan(num_steps, steps_per_call, progress_bar=progress_bar)
    network = _student(student, denoiser)
    flow_map = FlowMap(network.with_units(0.0, 1.0).unfreeze(), levels_between(num_evaluations))
    key_pairs, key_steps, key_test = jax.random.split(key, 3)
    z, x = pairs(key_pairs, denoiser, flow_solver, num_pairs)
    u = (x - denoiser.location) / denoiser.scale
    learn = functools.partial(regress, optimizer=optimizer, batch_size=batch_size, ema_decay=ema_decay)
    best, losses, interrupted = learn(key_steps, flow_map, (z,), u.astype(z.dtype), plan)
    trained = network.with_params(best).with_units(denoiser.location, denoiser.scale).freeze()
    flow_map = flow_map.with_network(trained)
    quality = map_quality(key_test, flow_map, denoiser, flow_solver, num_test_draws)
    if quality.sliced_w1 > _FAR * quality.sliced_w1_floor:
        warnings.warn(
            f"the map is far from its teacher: {quality}. Inference in noise space is exact for the map's own law, "
            "which is then another prior. Take more evaluations, a wider student, more pairs and steps",
            stacklevel=2,
        )
    return DistillResult(flow_map, quality, losses, interrupted)


def map_quality(
    key: jax.Array, flow_map: FlowMap, denoiser: Denoiser, flow_solver: Solver, num_draws: int = 2000
) -> MapQuality:
    """Measures how far a flow map is from its teacher, on fresh noise.

    Args:
        key: random key.
        flow_map: the map.
        denoiser: the teacher.
        flow_solver: the teacher's solver.
        num_draws: draws of the map, and of the teacher.

    Returns:
        A `MapQuality`.

    Raises:
        ValueError: if there are fewer than two draws, or one is not finite.
    """
    _checks.at_least(2, num_draws=num_draws)
    key_same, key_map, key_slices, *keys = jax.random.split(key, 6)
    z, x = pairs(key_same, denoiser, flow_solver, num_draws)
    error = np.asarray(over_all(flow_map, denoiser, z) - x, np.float64)
    _checks.finite("the image of noise under flow_map", error)
    deviations = np.asarray(x, np.float64).std(0)
    rms = np.sqrt(np.mean(error**2, axis=0))
    mine = over_all(flow_map, denoiser, jax.random.normal(key_map, z.shape, z.dtype))
    theirs = [x, *(pairs(each, denoiser, flow_solver, num_draws)[1] for each in keys)]
    others = [(a, b) for i, a in enumerate(theirs) for b in theirs[:i]]
    sliced = functools.partial(sliced_wasserstein, key=key_slices, num_projections=200)
    energies = [energy_distance(a, b) for a, b in others]
    return MapQuality(
        rms=float(np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(deviations**2))),
        worst_rms=float(np.max(rms / np.maximum(deviations, np.finfo(np.float32).tiny))),
        sliced_w1=float(np.mean([sliced(mine, each) for each in theirs])),
        sliced_w1_floor=float(np.mean([sliced(*pair) for pair in others])),
        energy=float(np.mean([energy_distance(mine, each) for each in theirs])),
        energy_floor=float(np.sqrt(np.mean(np.square(energies)))),
    )


def levels_between(num_evaluations: int) -> tuple[float, ...]:
    """The levels of the evaluations after the first: the middles of equal steps in the logarithm."""
    count = num_evaluations - 1
    return tuple(_HIGHEST * (_LOWEST / _HIGHEST) ** ((i + 0.5) / count) for i in range(count))


def pairs(key: jax.Array, denoiser: Denoiser, flow_solver: Solver, count: int) -> tuple[jax.Array, jax.Array]:
    """Noise and its images under the teacher's flow, shapes (count, *event_shape).

    Raises:
        ValueError: if an image is not finite.
    """
    z = jax.random.normal(key, (count, *denoiser.event_shape))
    x = over_all(flow_solver, denoiser, z)
    _checks.finite("the image of noise under flow_solver", x, "Is the teacher's training done, its schedule right?")
    return z, x


@jax.jit
def over_all(flow_solver: Solver | FlowMap, denoiser: Denoiser, z: jax.Array) -> jax.Array:
    """The images of many noises, a block at a time."""
    one = functools.partial(push_forward, flow_solver, denoiser)
    return jax.lax.map(one, z, batch_size=min(BLOCK, len(z)))


def _student(student: nnx.Module | NetworkDenoiser | None, denoiser: Denoiser) -> NetworkDenoiser:
    """The network to train, at the weights that it starts from."""
    if student is None:
        if not isinstance(denoiser, NetworkDenoiser) or denoiser.target not in ("edm", "x0"):
            raise ValueError(
                'student must be given unless the teacher is a NetworkDenoiser of target "edm" or "x0"; give a '
                f"backbone such as nn.MLP({tuple(denoiser.event_shape)}, rngs=nnx.Rngs(0))"
            )
        student = denoiser
    network = student if isinstance(student, NetworkDenoiser) else NetworkDenoiser(student)
    if network.event_shape != tuple(denoiser.event_shape):
        raise ValueError(
            f"student must map points of shape {tuple(denoiser.event_shape)}; got one for {network.event_shape}"
        )
    if getattr(network.backbone, "cond_shape", None) is not None:
        raise ValueError(
            "student must be unconditional: a FlowMap is the flow of one law. For a teacher that is "
            "denoise.Conditioned give a backbone without cond_shape"
        )
    return network
