r"""Chains that learn where to jump: a local kernel, and global moves by a law that is learned from its draws.

A local kernel is fast within a mode and lost between modes. `LearnedMCMC` lets it run on many chains, from starts that
are draws of the prior, and learns a law from where they are: a mixture of normal laws, with a network for what that
lacks (`law`). Then each draw is a global move, a proposal of that law which a Metropolis test takes or leaves, and a
local one. Chains find modes, in wrong proportions; global moves mend the proportions. In warm-up the law is refitted to
the mended draws a few times. Then everything is frozen: local kernel, law and network change no more, and the chains
are exact for the model's own law, however good or bad the learned one is.

What it cannot do is to find a mode in which no chain has ever been. The evidence comes with it: the mean weight of the
proposals after the freeze is an unbiased estimate of it, from all chains.

The target is evaluated once in each local move of `MALA`, once a step in Hamiltonian ones, once for each proposal, and
twice a draw where one kind of move has to look anew where the other has left the chain. All are counted, warm-up too.
A network's evaluations are no evaluations of the target.

References:
    Gabrié, Rotskoff, Vanden-Eijnden, Adaptive Monte Carlo augmented with normalizing flows, 2022,
    https://arxiv.org/abs/2105.12603.
    Wong, Gabrié, Foreman-Mackey, flowMC: normalizing flow enhanced sampling package for probabilistic inference in JAX,
    2023, https://arxiv.org/abs/2211.06397.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_sample

from numpyro_diffusion import _checks, _precision
from numpyro_diffusion.infer.combine import Cycle
from numpyro_diffusion.infer.gradient import MALA
from numpyro_diffusion.infer.gradient.target import Target
from numpyro_diffusion.infer.kernel.compiled import Compiled
from numpyro_diffusion.infer.kernel.inner import KernelLike, build
from numpyro_diffusion.infer.kernel.start import Strategy, start
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed
from numpyro_diffusion.infer.model.density import LogPrior, Source, Status, log_prior_of
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Record as ModelRecord
from numpyro_diffusion.infer.particles.evidence import Draws, Outcome, ParticleSampler, evidence_of
from numpyro_diffusion.infer.particles.learned import modes
from numpyro_diffusion.infer.particles.learned.law import Law, Modes
from numpyro_diffusion.infer.particles.learned.moves import Record, jump, local_cost, squared_length
from numpyro_diffusion.infer.particles.learned.network import corrected, told_of
from numpyro_diffusion.learned.units import Units

_ENOUGH = 0.7
"""Acceptance of global moves from which on a network could add little."""
_HARDLY = 0.01


class Round(NamedTuple):
    """A part of a run."""

    name: str  # "local", "refit", "network" or "frozen"
    accept_prob: float  # of global moves; NaN if there are none
    num_modes: int  # normal laws in the mixture, without the wide one
    has_network: bool
    num_target_evals: int
    seconds: float


class GlobalMoves(NamedTuple):
    """Whether global moves pay; printed, it is a line. Lengths are squared, in units of independent draws."""

    accept_prob: float
    length: float  # of a global move, rejected ones included
    cost: float  # evaluations of the target
    local_length: float
    local_cost: float

    @property
    def pay(self) -> bool:
        """Whether an evaluation brings a chain further by a global move than by a local one."""
        return self.length / self.cost > self.local_length / self.local_cost

    def __str__(self) -> str:
        return (
            f"global moves: {self.accept_prob:.1%} accepted, squared length {self.length:.3g} at {self.cost:.3g} "
            f"evaluations; local ones {self.local_length:.3g} at {self.local_cost:.3g}: global moves "
            + ("pay" if self.pay else "do not pay")
        )


class LearnedMCMC(ParticleSampler):
    """Samples a posterior with several modes by a local kernel and global moves that are learned from its draws.

    Args:
        model: NumPyro model whose latent sites are continuous.
        local_kernel: kernel class, factory or kernel: `MALA`, `HMC`, or another that can be handed a point.
        num_chains: chains, at least 2 for anything to be learned; each mode must be found by some.
        num_warmup: local moves of each chain before the first fit; half of them are learned from.
        num_draws: draws of each chain after the freeze, at least 2.
        num_refits: how often the law is fitted again, to draws with global moves.
        refit_steps: draws of each chain between fits.
        num_proposals: of a global move, in one batch.
        network: "auto" for a network where the mixture's acceptance leaves room for one, None for none; or a backbone
            for vectors of as many entries as there are unconstrained numbers, whose output is zero before training.
        num_levels: noise levels of a walk with the network, each an evaluation of it.
        num_steps: steps of its training.
        density: what stands for the log-densities of diffusion priors, as in `Density`.
        init_strategy: where chains start, as in NumPyro; by default at draws of the prior, which must not all be near
            one mode.
        progress_bar: whether to show the progress.

    Raises:
        TypeError: if `model` is not callable, or `local_kernel` makes no kernel.
        ValueError: for a number out of its range, or a local kernel that cannot be handed a point; when run, for a
            model without latent sites or with discrete ones, or as the local kernel does.

    Warns:
        UserWarning: if nothing could be learned, and all moves are local.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_diffusion.infer import LearnedMCMC
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 5.0))
        ...     numpyro.factor("modes", jnp.logaddexp(-2.0 * (x - 4.0) ** 2, -2.0 * (x + 4.0) ** 2))
        >>> sampler = LearnedMCMC(model, num_chains=50, num_warmup=100, progress_bar=False).run(jax.random.key(0))
        >>> bool(abs(jnp.mean(sampler.get_samples()["x"] > 0.0) - 0.5) < 0.05), sampler.global_moves.pay
        (True, True)
    """

    cure = "raise num_warmup or num_chains, so that chains find all modes and settle there"
    """What `verdict` advises about chains that are too short."""
    _members = "num_chains * num_draws"

    def __init__(
        self,
        model: Model,
        local_kernel: KernelLike = MALA,
        num_chains: int = 100,
        num_warmup: int = 300,
        num_draws: int = 100,
        *,
        num_refits: int = 3,
        refit_steps: int = 25,
        num_proposals: int = 1,
        network: nnx.Module | Literal["auto"] | None = "auto",
        num_levels: int = 16,
        num_steps: int = 1500,
        density: LogPrior | Source = "auto",
        init_strategy: Strategy = init_to_sample,
        progress_bar: bool = True,
    ) -> None:
        _checks.at_least(1, num_chains=num_chains, refit_steps=refit_steps, num_proposals=num_proposals)
        _checks.at_least(2, num_warmup=num_warmup, num_draws=num_draws, num_levels=num_levels)
        _checks.at_least(0, num_refits=num_refits)
        _checks.at_least(1, num_steps=num_steps)
        super().__init__(model, num_chains * num_draws, num_chains, 1.0, progress_bar)
        if not (network is None or network == "auto" or isinstance(network, nnx.Module)):
            raise TypeError(f'network must be "auto", None or a flax.nnx.Module; got {network!r}')
        self._density = log_prior_of(density)
        if not self._density.has_density:
            raise ValueError(f'LearnedMCMC tests its moves by a density; {density} has none. Use density="auto"')
        self._local = Cycle([build("local_kernel", local_kernel, model)])
        self._num_warmup, self._num_refits, self._num_proposals = num_warmup, num_refits, num_proposals
        self._network, self._training = network, (num_levels, num_steps)
        self._init_strategy = init_strategy
        self._compiled = Compiled(
            model,
            self._starts,
            partial(self._walk, num_warmup),
            partial(self._walk, num_draws),
            partial(self._mix, refit_steps),
            partial(self._mix, num_draws),
            self._report,
        )
        self._rounds: list[Round] = []
        self._law, self._fields, self._moves = None, {}, None

    @property
    def status(self) -> Status:
        """What the chains are exact for, after the freeze."""
        local = self._local.status
        statement = "leaves the model's own law invariant after warm-up, whatever was learned; local kernel: "
        return Status(local.needs, local.exact, statement + local.statement)

    @property
    def local_kernel(self) -> Any:
        """The local kernel."""
        return self._local.kernels[0]

    @property
    def law(self) -> Law | None:
        """The learned law that the last run was frozen with; None if all moves were local."""
        _ = self._ran
        return self._law

    @property
    def rounds(self) -> list[Round]:
        """The parts of the last run."""
        _ = self._ran
        return self._rounds

    @property
    def num_target_evals(self) -> int:
        """Evaluations of the model in the last run, with its gradient or without, warm-up included."""
        return sum(each.num_target_evals for each in self.rounds)

    @property
    def global_moves(self) -> GlobalMoves | None:
        """Whether global moves pay, after the freeze; None if all moves were local."""
        _ = self._ran
        return self._moves

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """Statistics of each draw.

        Args:
            group_by_chain: whether to keep the chains separate.

        Returns:
            Arrays (num_chains * num_draws,) or (num_chains, num_draws): `accept_prob` of the global move,
            `local_accept_prob`, `diverging` and `num_target_evals`.
        """
        _ = self._ran
        return {name: v if group_by_chain else v.reshape(-1) for name, v in self._fields.items()}

    def print_summary(self, prob: float = 0.9) -> None:
        super().print_summary(prob)
        print(self.global_moves or "all moves were local")
        print(f"{self.num_target_evals} evaluations of the target")

    def _sample(self, rng_key: jax.Array, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        reading = ModelRecord(self._model).at(args, kwargs)
        if not reading.structure.latent:
            raise ValueError("LearnedMCMC needs a latent site; the model has none")
        check_fixed("LearnedMCMC", reading.structure)
        check_continuous("LearnedMCMC", reading.structure)
        programs = self._compiled.bind(args, kwargs)
        starts, warm, local_draws, refit, draw, report = programs
        self._rounds, self._law, self._moves, key = [], None, None, rng_key
        keys = jax.random.split(jax.random.fold_in(key, 0), 4)
        chains = self._shape[0]
        with self._bar(self._num_refits + 3, "learned MCMC") as bar:
            begun = time.monotonic()
            z = starts(jax.random.split(keys[0], chains))
            chain_keys = jax.random.split(keys[1], chains)
            state = self._local.init(chain_keys, self._num_warmup, z, model_args=args, model_kwargs=kwargs)
            state, record = warm(state)
            self._note("local", record, begun, extra=2 * chains)
            bar.update(1)
            problems = ()
            try:
                state, law = self._learn(keys[2], state, record, refit, reading, bar)
            except (ValueError, FloatingPointError, np.linalg.LinAlgError) as error:
                law, problems = None, (f"all moves were local, since nothing could be learned: {error}",)
            begun = time.monotonic()
            state, record = local_draws(state) if law is None else draw(keys[3], state, law)
            self._law = law
            self._note("frozen", record, begun)
            bar.update(bar.total - bar.n)
        return self._outcome_of(record, report, law, problems)

    def _learn(
        self, key: jax.Array, state: Any, record: Record, refit: Callable, reading: Any, bar: Any
    ) -> tuple[Any, Law]:
        """The law after all fits, and the chains then.

        Raises:
            ValueError: if it cannot be learned.
        """
        chains, rng = self._shape[0], np.random.default_rng(int(jax.random.bits(key, dtype=jnp.uint32)))
        if chains < 2:
            raise ValueError("a single chain has no others to learn from; raise num_chains")
        q = np.asarray(record.q[self._num_warmup // 2 :], np.float64)
        if q.shape[0] * chains < modes.FEWEST:
            raise ValueError(
                f"{q.shape[0]} draws of {chains} chains are fewer than {modes.FEWEST}; raise num_chains or num_warmup"
            )
        if not np.isfinite(q).all():
            raise ValueError("draws of the local kernel are not finite")
        units = _measured(q.reshape(-1, q.shape[-1]), _entries(reading))
        whiten = partial(_whitened, units)
        parts = modes.find(whiten(q).swapaxes(0, 1), rng)
        law = _law_of(parts, units)
        rows = np.zeros((0, q.shape[-1]))
        for index in range(self._num_refits):
            begun = time.monotonic()
            state, record = refit(jax.random.fold_in(key, index), state, law)
            self._note("refit", record, begun, law)
            new = whiten(np.asarray(record.q, np.float64)).reshape(-1, rows.shape[1])
            rows = np.concatenate([rows[-len(new) :], new])  # of two rounds
            parts = modes.refine(modes.thinned(rows, rng), parts, 8)
            law = _law_of(parts, units)
            bar.update(1)
        wanted = self._network is not None and self._num_refits > 0
        if wanted and (self._network != "auto" or self._rounds[-1].accept_prob < _ENOUGH):
            begun, (num_levels, num_steps) = time.monotonic(), self._training
            backbone = None if self._network == "auto" else self._network
            try:
                law = corrected(
                    key, law, modes.thinned(rows, rng), backbone, num_levels, num_steps=num_steps
                )
            except FloatingPointError as error:
                told_of(error)
            self._rounds.append(
                Round("network", np.nan, len(parts[0]), law.denoiser is not None, 0, time.monotonic() - begun)
            )
        return state, law

    def _note(self, name: str, record: Record, begun: float, law: Law | None = None, extra: int = 0) -> None:
        """Keeps what a part of the run has to say."""
        law = self._law if law is None else law
        evaluations = int(np.asarray(record.num_target_evals).sum(dtype=np.int64)) + extra
        count, network = (0, False) if law is None else (len(law.modes.log_weights) - 1, law.denoiser is not None)
        accepted = float(np.mean(np.asarray(record.accept_prob)))
        self._rounds.append(Round(name, accepted, count, network, evaluations, time.monotonic() - begun))

    def _outcome_of(self, record: Record, report: Callable, law: Law | None, problems: tuple[str, ...]) -> Outcome:
        by_chain = Record(*(np.asarray(leaf).swapaxes(0, 1) for leaf in record))
        chains, draws = by_chain.accept_prob.shape
        values = {name: np.asarray(v) for name, v in report(by_chain.q.reshape(chains * draws, -1)).items()}
        names = ("accept_prob", "local_accept_prob", "diverging", "num_target_evals")
        self._fields = {name: getattr(by_chain, name) for name in names}
        if law is not None:
            cost = self._num_proposals + 1.0
            self._moves = GlobalMoves(
                float(by_chain.accept_prob.mean()),
                float(by_chain.global_squared.mean()),
                cost,
                float(by_chain.local_squared.mean()),
                float(by_chain.local_evals.mean()) + 1.0,
            )
            if self._moves.accept_prob < _HARDLY:
                problems += (
                    f"global moves are hardly ever accepted ({self._moves.accept_prob:.2%}): modes keep the "
                    "proportions in which chains have found them. Take ParallelTempering(model, kernel)",
                )
        islands = np.full(chains, np.nan)
        if law is not None:
            islands = jax.nn.logsumexp(by_chain.log_mean_weight, axis=1) - np.log(draws)
        indices = np.arange(chains * draws)
        return Outcome(
            Draws(values, indices, indices.reshape(chains, draws)),
            evidence_of(jnp.asarray(islands)),
            self._rounds,
            problems,
        )

    def _starts(self, keys: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        """Where chains start, unconstrained."""
        reading = ModelRecord(self._model).at(args, kwargs)

        def valid(z: dict[str, jax.Array]) -> jax.Array:
            target = Target(reading, self._density, z)
            return jnp.isfinite(target.log_target(target.flat))

        return jax.vmap(lambda key: start(key, reading, None, self._init_strategy, valid))(keys)

    def _local_move(self, state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple]:
        state = self._local.sample(state, args, kwargs)
        evaluations = local_cost(state, self.local_kernel)
        return state, (_flat(state.z), state.accept_prob[:, 0], state.diverging, evaluations)

    def _walk(self, length: int, state: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Record]:
        """Local moves alone."""

        def step(state: Any, _: None) -> tuple[Any, Record]:
            state, (q, accept_prob, diverging, evaluations) = self._local_move(state, args, kwargs)
            nothing = jnp.full_like(accept_prob, jnp.nan)
            return state, Record(
                q, nothing, accept_prob, diverging, nothing, nothing, nothing, evaluations, evaluations
            )

        return jax.lax.scan(step, state, None, length)

    def _mix(
        self, length: int, key: jax.Array, state: Any, law: Law, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, Record]:
        """A global move and a local one, in every draw."""
        reading = ModelRecord(self._model).at(args, kwargs)
        target = Target(reading, self._density, jax.tree.map(lambda leaf: leaf[0], state.z))

        def step(state: Any, key: jax.Array) -> tuple[Any, Record]:
            move = partial(jump, law=law, log_target=target.log_target, num_proposals=self._num_proposals)
            with _precision.highest():
                jumps = jax.vmap(move)(jax.random.split(key, self._shape[0]), _flat(state.z))
            state = self._local.refresh(state._replace(z=jax.vmap(target.unflatten)(jumps.q)), args, kwargs)
            state, (q, accept_prob, diverging, evaluations) = self._local_move(state, args, kwargs)
            return state, Record(
                q,
                jumps.accept_prob,
                accept_prob,
                diverging | jumps.diverging,
                jumps.log_mean_weight,
                jumps.squared,
                squared_length(law, jumps.q, q),
                evaluations,
                evaluations + self._num_proposals + 2,
            )

        return jax.lax.scan(step, state, jax.random.split(key, length))

    def _report(self, q: jax.Array, args: tuple, kwargs: dict[str, Any]) -> dict[str, jax.Array]:
        """Values by site, constrained."""
        reading = ModelRecord(self._model).at(args, kwargs)
        unflatten = ravel_pytree(reading.origin())[1]
        return jax.vmap(lambda q: reading.constrain(unflatten(q), deterministic=True))(q)


def _flat(z: dict[str, jax.Array]) -> jax.Array:
    return jax.vmap(lambda z: ravel_pytree(z)[0])(z)


def _entries(reading: Any) -> list[str]:
    """A name for each entry of an unconstrained vector."""
    origin = reading.origin()
    return [f"{name}{list(i) or ''}" for name in sorted(origin) for i in np.ndindex(origin[name].shape)]


def _measured(q: np.ndarray, entries: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Location and factor by which draws are standardised, entry by entry."""
    location, deviation = q.mean(0), q.std(0)
    constant = [entry for entry, d, m in zip(entries, deviation, location, strict=True) if not d > 1e-7 * abs(m)]
    if constant:
        raise ValueError(f"draws of {', '.join(constant[:5])} do not vary: no chain has moved")
    return location, np.diag(deviation)


def _whitened(units: tuple[np.ndarray, np.ndarray], q: np.ndarray) -> np.ndarray:
    location, factor = units
    return np.linalg.solve(factor, (q - location).reshape(-1, len(location)).T).T.reshape(q.shape)


def _law_of(parts: modes.Parts, units: tuple[np.ndarray, np.ndarray]) -> Law:
    """The mixture as a law, in single precision."""
    weights, means, covariances = modes.defended(parts)
    values, vectors = np.linalg.eigh(covariances)
    arrays = np.log(weights), means, np.maximum(values, 1e-10), vectors
    as_arrays = partial(jnp.asarray, dtype=jnp.result_type(float))
    mixture = Modes(*map(as_arrays, arrays))
    return Law(mixture, Units(*map(as_arrays, units)), None, jnp.zeros(0, as_arrays(0.0).dtype))
