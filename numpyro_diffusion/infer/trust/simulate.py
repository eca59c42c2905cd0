r"""Simulation-based calibration of any sampler on any model that can be simulated.

For $i = 1, \dots, n$: draw $\theta_i$ from the prior and data $y_i$ given it, sample the posterior of $y_i$, and rank
$f(\theta_i, y_i)$ among $f(\theta, y_i)$ of the draws, for every entry of every site and for test quantities $f$. The
ranks are uniform if the sampler is exact for the model.

Kernels of `MCMC` are run on a batch of simulations at once: one compiled program, `jax.vmap` over simulations of the
prior's draw, the data, and `MCMC.run` with the data as arguments of the model. Other samplers, which have a `run` of
their own, run one simulation after the other.

`ranking` has the ranks, `diagnostics.calibration` what they say.

References:
    Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018,
    https://arxiv.org/abs/1804.06788.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Unit
from numpyro.handlers import block, seed, substitute, trace, uncondition
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import log_density

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.diagnostics.calibration import LOG_JOINT, Calibration
from numpyro_diffusion.infer.trust.ranking import Batch, rank

LOG_LIKELIHOOD = "log_likelihood"
_MOST_NUMBERS = 2**23
"""Draws of a batch of simulations, in numbers."""

Model = Callable[..., Any]
Quantity = Callable[[dict[str, jax.Array], dict[str, jax.Array]], jax.Array]


class SBC:
    """Simulation-based calibration.

    Args:
        sampler: makes a kernel of `MCMC`, or a sampler with `run` and `get_samples`, from a model: `MALA`,
            `partial(TemperedSMC, num_particles=1000)`.
        model: NumPyro model that is sampled. Its data are arguments.
        num_simulations: number of truths.
        num_warmup: warm-up steps of each chain, as in `MCMC`.
        num_samples: draws of each chain.
        num_chains: chains in each simulation.
        chain_method: as in `MCMC`; `jax.vmap` for kernels of single chains, which refuse "vectorized".
        quantities: test quantities beside the log-likelihood, functions of (values of the sites at a draw, data by
            site) that return an array.
        log_joint: whether to rank the log-density of everything too, which coverage of regions of highest density
            needs. Every site must have a `log_prob`; that of a learned prior costs a solve for each draw.
        data: names of the model's arguments by observed site, where they differ.
        simulator: the model that truths and data come from; None for `model`. It has the same sites and arguments.
        batch_size: how many simulations to run at once; None for as many as have 8 million
            numbers among their draws.

    Raises:
        TypeError: if `sampler`, `model`, `simulator` or a quantity is not callable.
        ValueError: for a number out of its range; when run, if the model has an observed site whose data no argument
            brings, a factor, or no latent or no observed site, or if the sampler fails in every simulation.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer import SBC
        >>> from numpyro.infer import NUTS
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> result = SBC(NUTS, model, num_simulations=200).run(jax.random.key(0), None)
        >>> result.calibrated
        True
    """

    def __init__(
        self,
        sampler: Callable[[Model], Any],
        model: Model,
        *,
        num_simulations: int = 1000,
        num_warmup: int = 250,
        num_samples: int = 250,
        num_chains: int = 2,
        chain_method: Any = "vectorized",
        quantities: Mapping[str, Quantity] | None = None,
        log_joint: bool = False,
        data: Mapping[str, str] | None = None,
        simulator: Model | None = None,
        batch_size: int | None = None,
    ) -> None:
        quantities = {} if quantities is None else dict(quantities)
        simulator = model if simulator is None else simulator
        if isinstance(sampler, MCMCKernel):
            name = type(sampler).__name__
            raise TypeError(f"sampler must make a kernel from a model, such as {name} itself; got one that is made")
        for name, value in {"sampler": sampler, "model": model, "simulator": simulator, **quantities}.items():
            if not callable(value):
                raise TypeError(f"{name} must be callable; got {value!r}")
        _checks.at_least(2, num_simulations=num_simulations)
        _checks.at_least(0, num_warmup=num_warmup)
        _checks.at_least(4, num_samples=num_samples)
        _checks.at_least(1, num_chains=num_chains, **({} if batch_size is None else {"batch_size": batch_size}))
        self._sampler, self._model, self._simulator = sampler, model, simulator
        self._num_simulations, self._batch_size = num_simulations, batch_size
        self._options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
        self._options |= {"chain_method": chain_method, "progress_bar": False}
        self._quantities, self._log_joint, self._data = quantities, log_joint, data
        self._program: tuple[list, Any] | None = None

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Calibration:
        """Simulates, samples and ranks; a second run with the same arguments compiles nothing.

        Args:
            rng_key: random key.
            *args: the model's arguments. Those that bring data may be None, or examples of them, whose values are not
                used.
            **kwargs: its keyword arguments.

        Returns:
            A `Calibration`.
        """
        arguments = _Arguments(self._simulator, args, kwargs, self._data)
        key_run, key_ranks = jax.random.split(rng_key)
        keys = jax.random.split(key_run, self._num_simulations)
        failures: dict[str, list[int]] = {}
        said: dict[str, list[int]] = {}
        if isinstance(self._sampler(self._model), MCMCKernel):
            batches = self._batches(keys, arguments)
        else:
            batches = self._one_by_one(keys, arguments, failures, said)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key_ranks)).astype(np.uint32))
        return rank(rng, batches, arguments.latent, self._num_simulations, failures, said)

    def _simulate(self, key: jax.Array, arguments: "_Arguments") -> tuple[dict, dict]:
        with _precision.highest():
            sites = trace(seed(uncondition(self._simulator), key)).get_trace(*arguments.args, **arguments.kwargs)
        values = {name: sites[name]["value"] for name in (*arguments.latent, *arguments.observed)}
        return {n: values[n] for n in arguments.latent}, {n: values[n] for n in arguments.observed}

    def _with_quantities(self, values: dict, observed: dict, arguments: "_Arguments") -> dict:
        """Values of the sites at one draw, with those of the test quantities."""
        args, kwargs = arguments.with_data(observed)
        with _precision.highest():
            inner = substitute(seed(self._model, 0), data=values)
            shown = block(inner, hide_fn=lambda site: site["name"] not in arguments.observed)
            found = {LOG_LIKELIHOOD: log_density(shown, args, kwargs, {})[0]}
            if self._log_joint:
                found[LOG_JOINT] = log_density(seed(self._model, 0), args, kwargs, values)[0]
            found |= {name: jnp.asarray(f(values, observed)) for name, f in self._quantities.items()}
        return {**values, **found}

    def _batches(self, keys: jax.Array, arguments: "_Arguments") -> Iterator[Batch]:
        """Simulations of a kernel of MCMC, many in one program."""

        def one(key: jax.Array) -> tuple[dict, dict]:
            key_data, key_run = jax.random.split(key)
            truth, observed = self._simulate(key_data, arguments)
            args, kwargs = arguments.with_data(observed)
            mcmc = MCMC(self._sampler(self._model), **self._options)
            mcmc.run(key_run, *args, **kwargs)
            draws = arguments.pick(mcmc.get_samples(group_by_chain=True))
            every = jax.vmap(jax.vmap(lambda values: self._with_quantities(values, observed, arguments)))
            return self._with_quantities(truth, observed, arguments), every(draws)

        if self._program is None or not arguments.same_as(self._program[0]):
            self._program = arguments.leaves, jax.jit(jax.vmap(one))
        size = min(self._batch_size or self._fitting(one, keys[0]), len(keys))
        for first in range(0, len(keys), size):
            wanted = np.arange(first, min(first + size, len(keys)))
            filled = np.resize(wanted, size)  # one shape, one program
            both = self._program[1](keys[filled])
            truths, draws = jax.tree.map(lambda leaf, indices=wanted: np.asarray(leaf)[: len(indices)], both)
            yield Batch(truths, draws, wanted)

    def _fitting(self, one: Callable, key: jax.Array) -> int:
        """How many simulations a batch may have."""
        numbers = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(jax.eval_shape(one, key)[1]))
        return max(1, min(self._num_simulations, _MOST_NUMBERS // max(numbers, 1)))

    def _one_by_one(
        self, keys: jax.Array, arguments: "_Arguments", failures: dict[str, list[int]], said: dict[str, list[int]]
    ) -> Iterator[Batch]:
        """Simulations of a sampler that has a run of its own, all in one batch."""
        sampler = self._sampler(self._model)
        simulate = jax.jit(lambda key: self._simulate(key, arguments))
        draw_quantities = jax.jit(
            jax.vmap(lambda values, observed: self._with_quantities(values, observed, arguments), in_axes=(0, None))
        )
        truths, draws, indices, error = [], [], [], None
        for i, key in enumerate(keys):
            key_data, key_run = jax.random.split(key)
            truth, observed = simulate(key_data)
            args, kwargs = arguments.with_data(observed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they are in `problems`
                    sampler.run(key_run, *args, **kwargs)
            except (ValueError, RuntimeError, FloatingPointError) as raised:
                error = raised
                failures.setdefault(f"{type(raised).__name__}: {str(raised).splitlines()[0][:80]}", []).append(i)
                continue
            for problem in getattr(sampler, "problems", ()):
                said.setdefault(_without_numbers(problem), []).append(i)
            values = arguments.pick(sampler.get_samples())
            here = draw_quantities(jax.tree.map(jnp.asarray, values), observed)
            draws.append(jax.tree.map(lambda leaf: np.asarray(leaf)[None], here))  # one chain
            there = draw_quantities(jax.tree.map(lambda leaf: leaf[None], truth), observed)
            truths.append(jax.tree.map(lambda leaf: np.asarray(leaf)[0], there))
            indices.append(i)
        if not indices:
            raise ValueError(f"the sampler failed in all {len(keys)} simulations; the last error is above") from error
        all_truths, all_draws = (jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (truths, draws))
        yield Batch(all_truths, all_draws, np.asarray(indices))


class _Arguments:
    """A model's arguments, and which of them bring the data of which site."""

    def __init__(self, model: Model, args: tuple, kwargs: dict[str, Any], data: Mapping[str, str] | None) -> None:
        self.args, self.kwargs = args, kwargs
        self.leaves = jax.tree.leaves((args, kwargs))
        self._bound, data = inspect.signature(model).bind(*args, **kwargs), {} if data is None else dict(data)
        defaults = {name: parameter.default for name, parameter in self._bound.signature.parameters.items()}
        given = defaults | self._bound.arguments
        sites = trace(seed(model, 0)).get_trace(*args, **kwargs)
        self.latent, self.observed = [], {}
        for name, site in sites.items():
            if site["type"] != "sample":
                continue
            argument = data.get(name, name)
            if site["is_observed"] and isinstance(site["fn"], Unit):
                raise ValueError(f"site {name!r} is a factor, which cannot be simulated: write it as a distribution")
            if site["is_observed"] and argument not in given:
                raise ValueError(
                    f"site {name!r} is observed, and no argument of the model has its name: say which one brings its "
                    f"data, data={{{name!r}: ...}}, of {', '.join(given)}"
                )
            if site["is_observed"] or (argument in given and given[argument] is None):
                self.observed[name] = argument
            else:
                self.latent.append(name)
        if not self.latent or not self.observed:
            raise ValueError(f"the model has no {'observed' if self.latent else 'latent'} site: nothing to calibrate")

    def with_data(self, observed: Mapping[str, jax.Array]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with data in their places."""
        bound = inspect.BoundArguments(self._bound.signature, dict(self._bound.arguments))
        bound.arguments |= {argument: observed[name] for name, argument in self.observed.items()}
        return bound.args, bound.kwargs

    def pick(self, samples: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The latent sites among a sampler's draws."""
        missing = [name for name in self.latent if name not in samples]
        if missing:
            raise ValueError(f"the sampler draws {list(samples)}, and not the latent sites {missing} of the model")
        return {name: samples[name] for name in self.latent}

    def same_as(self, leaves: list) -> bool:
        """Whether these are the very arrays of an earlier run."""
        return len(leaves) == len(self.leaves) and all(a is b for a, b in zip(leaves, self.leaves, strict=True))


def _without_numbers(text: str) -> str:
    """A message without its figures, so that those of many runs are counted together."""
    return re.sub(r"[-\d.]*\d[-\d.e]*", "..", text.split(". ")[0])
