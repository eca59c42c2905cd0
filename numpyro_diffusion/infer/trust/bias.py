r"""By how much an unadjusted or guided run is off: a short exact correction of its draws.

Draws $x$ of a run with the law $q$ are starts of many short chains of a kernel that is exact for the posterior $\pi$.
Each ends at an $x'$ whose law is nearer to $\pi$, and $\pi$ itself once the start is forgotten. In every entry,

$$\delta = \frac{E x - E x'}{\mathrm{sd}\, x'}, \qquad \gamma = \log \mathrm{sd}\, x - \log \mathrm{sd}\, x'$$

are the shift of the mean in posterior standard deviations and that of the log standard deviation. Moments of $x$ are
those of the whole run; moments of $x'$ are corrected, by regression, for the difference between the starts and the
run. Errors are those of the run, by its effective sample size, and of the chains, by the bootstrap. As long as $x$ and
$x'$ are correlated, both are lower bounds of the bias, and the report says so. A run is called biased where an error
is unlikely, at 1 % over all entries, to be that of exact draws.

What the chains cannot reach in a few steps they cannot correct: a mode that the run has missed is missed here too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from scipy.stats import norm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.gradient.langevin import MALA
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.noise.noise_space import NoiseSpace

_Values = dict[str, np.ndarray]

LEVEL = 0.01
_LARGEST_CORRELATION = 0.2
_FEWEST = 40
_RESAMPLES = 200


@dataclass(frozen=True)
class BiasReport:
    """What `bias_report` finds; printed, it is a few lines of text.

    Args:
        mean_shift: of the run's means from those of corrected draws, in posterior standard deviations, by site.
        mean_error: standard errors of these.
        log_sd_shift: of the logarithms of the run's standard deviations.
        log_sd_error: standard errors of these.
        correlation: of starts and ends of the correcting chains, the largest of all entries.
        num_chains: number of chains.
        kernel: name of the exact kernel.
        problems: what is not to be trusted, each with its cure.
    """

    mean_shift: _Values
    mean_error: _Values
    log_sd_shift: _Values
    log_sd_error: _Values
    correlation: float
    num_chains: int
    kernel: str
    problems: tuple[str, ...]

    @property
    def biased(self) -> bool:
        """Whether a mean or a standard deviation is off by more than chance would have it."""
        size = 2 * sum(value.size for value in self.mean_shift.values())
        worst = max(abs(number / error) for _, number, error in (self._worst(0), self._worst(1)))
        return bool(worst > norm.isf(0.5 * LEVEL / size))

    def _worst(self, which: int) -> tuple[str, float, float]:
        """Name, shift and error of the entry whose mean (0) or log standard deviation (1) is surest to be off."""
        shifts, errors = ((self.mean_shift, self.mean_error), (self.log_sd_shift, self.log_sd_error))[which]
        found = []
        for name, shift in shifts.items():
            index = np.unravel_index(np.argmax(np.abs(shift) / errors[name]), shift.shape)
            label = name + (str([int(i) for i in index]) if index else "")
            found.append((label, float(shift[index]), float(errors[name][index])))
        return max(found, key=lambda each: abs(each[1] / each[2]))

    def __str__(self) -> str:
        (mean, shift, error), (spread, growth, growth_error) = self._worst(0), self._worst(1)
        lines = [
            f"{'BIASED' if self.biased else 'no bias seen'}, by {self.num_chains} chains of {self.kernel}: mean of "
            f"{mean} {shift:+.2f} +- {error:.2f} posterior standard deviations, log sd of {spread} {growth:+.2f} +- "
            f"{growth_error:.2f}; correlation with the starts {self.correlation:.2f}"
        ]
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])


def bias_report(
    rng_key: jax.Array,
    run: MCMC | Any,
    kernel: Callable[[Model], MCMCKernel] | None = None,
    *,
    num_chains: int = 256,
    num_steps: int = 100,
) -> BiasReport:
    """Measures the bias of a run by a short exact correction of its draws.

    Args:
        rng_key: random key.
        run: a finished run of `MCMC`, or a particle sampler that has run.
        kernel: makes a kernel that is exact for the model. None takes `MALA` where every diffusion prior has its
            denoiser's own density, and `NoiseSpace` elsewhere, which is exact for the law of the flow.
        num_chains: correcting chains, each from a draw of the run; at most as many as it has draws.
        num_steps: steps of each chain to adapt in, and as many again, of which the second half counts.

    Returns:
        A `BiasReport`.

    Raises:
        TypeError: if `kernel` is not callable.
        ValueError: if the run has not finished or has draws that are not finite, its model has discrete sites, or
            `num_chains` or `num_steps` is below four.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import MCMC
        >>> from numpyro_diffusion.infer import ULA, bias_report
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> mcmc = MCMC(ULA(model, step_size=0.9), num_warmup=100, num_samples=1000, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 3.0)
        >>> bias_report(jax.random.key(1), mcmc).biased
        True
    """
    _checks.at_least(4, num_chains=num_chains, num_steps=num_steps)
    if not (kernel is None or callable(kernel)):
        raise TypeError(f"kernel must make a kernel from a model, such as MALA; got {kernel!r}")
    model, args, kwargs = _model_of(run)
    reading = Record(model).at(args, kwargs)
    if reading.structure.discrete:
        raise ValueError(f"sites {reading.structure.discrete} are discrete, and have no mean to correct")
    draws = run.get_samples(group_by_chain=isinstance(run, MCMC))
    draws = {name: np.asarray(draws[name]) for name in reading.structure.latent}
    for name, value in draws.items():
        _checks.finite(f"draws of {name!r}", value, "They cannot be corrected")
    if not isinstance(run, MCMC):
        draws = {name: value[None] for name, value in draws.items()}
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
    size = len(next(iter(flat.values())))
    count = min(num_chains, size)
    starts = {name: value[(np.arange(count) * size + size // 2) // count] for name, value in flat.items()}
    make = _exact_for(reading) if kernel is None else kernel
    options = {"num_warmup": num_steps, "num_samples": num_steps, "num_chains": count, "progress_bar": False}
    chains = MCMC(make(model), **options, chain_method="vectorized")
    z = jax.vmap(reading.unconstrain)({name: jnp.asarray(value) for name, value in starts.items()})
    chains.run(rng_key, *args, init_params=z, **kwargs)
    ends = chains.get_samples(group_by_chain=True)
    ends = {name: np.asarray(ends[name])[:, num_steps // 2 :] for name in starts}
    return _report(draws, starts, ends, type(chains.sampler).__name__)


def _model_of(run: Any) -> tuple[Model, tuple, dict[str, Any]]:
    """The model of a run, with its arguments."""
    if hasattr(run, "arguments"):
        return run.model, *run.arguments
    if getattr(run, "last_state", None) is None:
        raise ValueError("the run has no draws: mcmc.run(...) must come first")
    return run.sampler.model, run._args, run._kwargs


def _exact_for(reading: Reading) -> Callable[[Model], MCMCKernel]:
    """A kernel that is exact for the model and not dear."""
    sites = reading.sites_in_the_abstract()
    return MALA if all(site.prior.density_source == "denoiser" for site in sites.values()) else NoiseSpace


def _report(draws: _Values, starts: _Values, ends: _Values, kernel: str) -> BiasReport:
    """The run (chains, draws, ...), starts (chains, ...) and ends (chains, draws, ...) of the correction."""
    count = len(next(iter(starts.values())))
    chosen = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    found: list[_Values] = [{}, {}, {}, {}]
    correlation = 0.0
    for name, start in starts.items():
        centre = draws[name].mean((0, 1), dtype=np.float64)
        run, start, end = draws[name] - centre, start - centre, ends[name] - centre
        own = _own_errors(run)
        before = run.mean((0, 1)), np.square(run).mean((0, 1))
        after = [_adjusted(start**k, (end**k).mean(1), before[k - 1]) for k in (1, 2)]
        shift, growth = _shifts(*before, *(part.mean(0) for part in after))
        resampled = zip(*(_shifts(*before, *(part[rows].mean(0) for part in after)) for rows in chosen), strict=True)
        errors = [np.hypot(np.std(values, axis=0), error) for values, error in zip(resampled, own, strict=True)]
        for table, value in zip(found, (shift, errors[0], growth, errors[1]), strict=True):
            table[name] = value
        correlation = max(correlation, _correlation(start, end[:, -1]))
    problems = []
    if correlation > _LARGEST_CORRELATION + 3.0 / np.sqrt(count):
        problems.append(
            f"the chains have not forgotten where they started (correlation {correlation:.2f}): shifts are lower "
            "bounds. Raise num_steps, or give a kernel that mixes faster"
        )
    if count < _FEWEST:
        problems.append(f"only {count} chains, of at least {_FEWEST}: errors are rough")
    means, mean_errors, spreads, spread_errors = found
    return BiasReport(means, mean_errors, spreads, spread_errors, correlation, count, kernel, tuple(problems))


def _own_errors(run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the run's mean, in standard deviations, and of its log standard deviation."""
    squares, number = np.square(run), run.shape[0] * run.shape[1]
    sizes = (np.clip(effective_sample_size(values), 1.0, number) for values in (run, squares))
    relative = squares.std((0, 1)) / np.maximum(squares.mean((0, 1)), 1e-30)
    return tuple(scale / np.sqrt(size) for scale, size in zip((1.0, 0.5 * relative), sizes, strict=True))


def _adjusted(start: np.ndarray, end: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Ends as they would be if the starts had the run's mean, by regression."""
    centred = start - start.mean(0)
    slope = (centred * (end - end.mean(0))).sum(0) / np.maximum(np.square(centred).sum(0), 1e-30)
    return end - slope * (start - mean)


def _shifts(start: np.ndarray, start_square: np.ndarray, end: np.ndarray, end_square: np.ndarray) -> tuple:
    """Of mean and log standard deviation, from moments."""
    before, after = (np.maximum(square - mean**2, 1e-30) for square, mean in ((start_square, start), (end_square, end)))
    return (start - end) / np.sqrt(after), 0.5 * np.log(before / after)


def _correlation(start: np.ndarray, end: np.ndarray) -> float:
    """The largest over entries."""
    a, b = (value.reshape(len(value), -1) - value.reshape(len(value), -1).mean(0) for value in (start, end))
    scale = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    return float(np.max((a * b).sum(0) / np.maximum(scale, 1e-30)))
