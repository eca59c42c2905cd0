"""The law of draws: standardised, fitted as a mixture of normal laws (`modes`), and fitted again to new draws."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from numpyro_diffusion.infer.particles.learned import modes
from numpyro_diffusion.infer.particles.learned.law import Law, Modes
from numpyro_diffusion.learned.units import Units

_STEPS = 8


class NothingToLearn(ValueError):
    """Draws that no law can be learned from."""


class Fitted:
    """A mixture of normal laws, of draws of all chains.

    Args:
        draws: unconstrained vectors, (n, chains, d).
        entries: a name for each of the d entries.
        rng: random numbers.

    Raises:
        NothingToLearn: if there are too few draws, or a single chain, or an entry does not vary.
    """

    def __init__(self, draws: np.ndarray, entries: list[str], rng: np.random.Generator) -> None:
        self._rng = rng
        length, chains, d = draws.shape
        if chains < 2:
            raise NothingToLearn("a single chain has no others to learn from. Raise num_chains")
        if length * chains < modes.FEWEST:
            raise NothingToLearn(
                f"{length} draws of {chains} chains are fewer than {modes.FEWEST}. Raise num_chains or num_warmup"
            )
        draws = draws.astype(np.float64)
        self._location, self._deviation = draws.mean((0, 1)), draws.std((0, 1))
        pairs = zip(entries, self._location, self._deviation, strict=True)
        constant = [entry for entry, mean, deviation in pairs if not deviation > 1e-7 * abs(mean)]
        if constant:
            raise NothingToLearn(
                f"draws of {', '.join(constant[:5])} do not vary: no chain has moved. See why the local kernel rejects"
            )
        self._parts = modes.find(self._standard(draws).swapaxes(0, 1), rng)
        self._rows = np.zeros((0, d))

    @property
    def num_modes(self) -> int:
        """Normal laws in the mixture."""
        return len(self._parts[0])

    @property
    def rows(self) -> np.ndarray:
        """Standardised draws of the last fits, in random order, (n, d)."""
        return modes.thinned(self._rows, self._rng)

    def again(self, draws: np.ndarray) -> None:
        """Fits the same modes to new draws (n, chains, d), and those of the last time."""
        new = self._standard(draws.astype(np.float64)).reshape(-1, draws.shape[-1])
        self._rows = np.concatenate([self._rows[-len(new) :], new])
        self._parts = modes.refine(self.rows, self._parts, _STEPS)

    def law(self) -> Law:
        """The mixture as a law, with a part that is wider than all."""
        weights, means, covariances = modes.defended(self._parts)
        values, vectors = np.linalg.eigh(covariances)
        array = partial(jnp.asarray, dtype=jnp.result_type(float))
        mixture = Modes(*map(array, (np.log(weights), means, np.maximum(values, 1e-10), vectors)))
        units = Units(array(self._location), array(np.diag(self._deviation)))
        return Law(mixture, units, None, jnp.zeros(0, mixture.means.dtype))

    def _standard(self, draws: np.ndarray) -> np.ndarray:
        return (draws - self._location) / self._deviation
