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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import logsumexp
from numpyro.infer import init_to_sample
from tqdm.auto import tqdm

from numpyro_diffusion import _checks
from numpyro_diffusion.infer.combine import Cycle
from numpyro_diffusion.infer.gradient import MALA
from numpyro_diffusion.infer.kernel.inner import KernelLike, build
from numpyro_diffusion.infer.kernel.start import Strategy
from numpyro_diffusion.infer.model.checks import check_continuous, check_fixed
from numpyro_diffusion.infer.model.density import LogPrior, Source, Status, log_prior_of
from numpyro_diffusion.infer.model.handlers import Model
from numpyro_diffusion.infer.model.record import Reading, Record
from numpyro_diffusion.infer.particles.evidence import Draws, Outcome, ParticleSampler, evidence_of
from numpyro_diffusion.infer.particles.learned.chains import Chains, Programs
from numpyro_diffusion.infer.particles.learned.chains import Record as Moved
from numpyro_diffusion.infer.particles.learned.fitted import Fitted, NothingToLearn
from numpyro_diffusion.infer.particles.learned.law import Law
from numpyro_diffusion.infer.particles.learned.network import corrected

_ENOUGH = 0.5
"""Acceptance of global moves from which on a network could add little."""
_HARDLY = 0.01
_AT_START = 2
"""Evaluations of a chain before it moves: of its start, and of the local kernel there."""


class Stage(NamedTuple):
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
        num_draws: draws of each chain after the freeze that are kept, at least 2.
        thinning: of so many draws after the freeze one is kept.
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
        thinning: int = 1,
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
        _checks.at_least(1, num_steps=num_steps, thinning=thinning)
        super().__init__(model, num_chains * num_draws, num_chains, 1.0, progress_bar)
        if not (network is None or network == "auto" or isinstance(network, nnx.Module)):
            raise TypeError(f'network must be "auto", None or a flax.nnx.Module; got {network!r}')
        self._density = log_prior_of(density)
        if not self._density.has_density:
            raise ValueError(f'LearnedMCMC tests its moves by a density; {density} has none. Use density="auto"')
        self._local = Cycle([build("local_kernel", local_kernel, model)])
        self._num_warmup, self._num_refits, self._refit_steps = num_warmup, num_refits, refit_steps
        self._num_proposals, self._network = num_proposals, network
        self._num_levels, self._num_steps, self._thinning = num_levels, num_steps, thinning
        most = max(num_warmup, num_draws * thinning, refit_steps)
        self._programs = Chains(model, self._local, self._density, init_strategy, num_chains, num_proposals, most)
        self._stages: list[Stage] = []
        self._law: Law | None = None
        self._fields: dict[str, np.ndarray] = {}
        self._moves: GlobalMoves | None = None

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
    def stages(self) -> list[Stage]:
        """The parts of the last run."""
        return self._ran.history

    @property
    def num_target_evals(self) -> int:
        """Evaluations of the model in the last run, with its gradient or without, warm-up included."""
        return sum(each.num_target_evals for each in self.stages)

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
        reading = Record(self._model).at(args, kwargs)
        if not reading.structure.latent:
            raise ValueError("LearnedMCMC needs a latent site; the model has none")
        check_fixed("LearnedMCMC", reading.structure)
        check_continuous("LearnedMCMC", reading.structure)
        programs, (chains, draws) = self._programs.bind(args, kwargs), self._shape
        self._stages, self._law, self._moves = [], None, None
        key_start, key_chains, key_learn, key_draw = jax.random.split(rng_key, 4)
        with self._bar(self._num_refits + 3, "learned MCMC") as bar:
            begun = time.monotonic()
            z, keys = programs.start(jax.random.split(key_start, chains)), jax.random.split(key_chains, chains)
            state = self._local.init(keys, self._num_warmup, z, model_args=args, model_kwargs=kwargs)
            state, record = programs.local(self._num_warmup, state)
            self._note("local", begun, record, extra=_AT_START * chains)
            bar.update(1)
            problems: tuple[str, ...] = ()
            try:
                state, law = self._learn(key_learn, state, record, programs, reading, bar)
            except (NothingToLearn, FloatingPointError, np.linalg.LinAlgError) as error:
                law, problems = None, (f"all moves were local, since nothing could be learned: {error}",)
            begun = time.monotonic()
            steps = draws * self._thinning
            state, record = programs.local(steps, state) if law is None else programs.both(key_draw, steps, state, law)
            self._law = law
            self._note("frozen", begun, record, law)
            bar.update(bar.total - bar.n)
        return self._outcome_of(record, programs, law, problems)

    def _learn(
        self, key: jax.Array, state: Any, record: Moved[np.ndarray], programs: Programs, reading: Reading, bar: tqdm
    ) -> tuple[Any, Law]:
        """The chains after all fits, and the law.

        Raises:
            NothingToLearn: if it cannot be learned.
            FloatingPointError: if the training of a network diverges.
        """
        rng = np.random.default_rng(int(jax.random.bits(key, dtype=jnp.uint32)))
        fitted = Fitted(record.q[self._num_warmup // 2 :], _entries(reading), rng)
        law = fitted.law()
        for index in range(self._num_refits):
            begun = time.monotonic()
            state, record = programs.both(jax.random.fold_in(key, index), self._refit_steps, state, law)
            self._note("refit", begun, record, law)
            fitted.again(record.q)
            law = fitted.law()
            bar.update(1)
        rows, wanted = fitted.rows, self._network is not None
        if wanted and (self._network != "auto" or not self._stages[-1].accept_prob > _ENOUGH) and len(rows):
            begun, backbone = time.monotonic(), None if self._network == "auto" else self._network
            key_train = jax.random.fold_in(key, self._num_refits)
            law = corrected(key_train, law, rows, backbone, self._num_levels, num_steps=self._num_steps)
            self._note("network", begun, None, law)
        return state, law

    def _note(
        self, name: str, begun: float, record: Moved[np.ndarray] | None, law: Law | None = None, extra: int = 0
    ) -> None:
        """Keeps what a part of the run has to say."""
        evaluations = extra + (0 if record is None else int(record.num_target_evals.sum(dtype=np.int64)))
        count, network = (0, False) if law is None else (law.num_modes, law.denoiser is not None)
        accepted = np.nan if record is None else float(record.accept_prob.mean())
        self._stages.append(Stage(name, accepted, count, network, evaluations, time.monotonic() - begun))

    def _outcome_of(
        self, record: Moved[np.ndarray], programs: Programs, law: Law | None, problems: tuple[str, ...]
    ) -> Outcome:
        by_chain = Moved(*(leaf.swapaxes(0, 1) for leaf in record))
        (chains, draws), kept = self._shape, slice(self._thinning - 1, None, self._thinning)
        sites = programs.report(by_chain.q[:, kept].reshape(chains * draws, -1))
        values = {name: np.asarray(value) for name, value in sites.items()}
        names = ("accept_prob", "local_accept_prob", "diverging", "num_target_evals")
        self._fields = {name: getattr(by_chain, name)[:, kept] for name in names}
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
            islands = logsumexp(by_chain.log_mean_weight, axis=1) - np.log(by_chain.accept_prob.shape[1])
        indices = np.arange(chains * draws)
        return Outcome(
            Draws(values, indices, indices.reshape(chains, draws)),
            evidence_of(jnp.asarray(islands)),
            self._stages,
            problems,
        )


def _entries(reading: Any) -> list[str]:
    """A name for each entry of an unconstrained vector."""
    origin = reading.origin()
    return [f"{name}{list(i) or ''}" for name in sorted(origin) for i in np.ndindex(origin[name].shape)]
