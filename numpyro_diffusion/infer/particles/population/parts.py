r"""Islands in parts, one for each core of a processor.

A program of small matrix products keeps one core busy: XLA does not find them worth several threads. The islands of a
population share a metric and a step size and nothing else, so that they can be moved apart from each other: the same
program runs in as many threads as there are cores, each on some of the islands. On other devices there is one part.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

_KEPT = 12
"""Number of programs that are kept."""


class Parts:
    """The islands of a population in parts.

    Args:
        num_islands: number of islands; the number of parts divides it.
    """

    def __init__(self, num_islands: int) -> None:
        most = min(_num_cores(), num_islands) if jax.default_backend() == "cpu" else 1
        self.number = max(n for n in range(1, most + 1) if num_islands % n == 0)
        self._executables: dict[Any, Any] = {}

    def run(self, program: partial[Any], by_island: Any, *shared: Any) -> Any:
        """Runs a program on all parts.

        It is compiled before: a thread does not know what holds in the one that starts it, such as double precision.

        Args:
            program: a jitted function with its first arguments given; the others are the part and what is shared.
            by_island: arrays with a leading axis of islands, or of all their members in turn.
            *shared: arrays.

        Returns:
            Arrays as `by_island` has them.
        """
        if self.number == 1:
            return program(by_island, *shared)
        parts = (self._part(by_island, i) for i in range(self.number))
        operands = [jax.device_put((*program.args, part, *shared)) for part in parts]
        jitted: Any = program.func
        if jitted not in self._executables:
            self._executables = dict(list(self._executables.items())[1 - _KEPT :])
            self._executables[jitted] = jitted.lower(*operands[0]).compile()
        executable = self._executables[jitted]
        with ThreadPoolExecutor(self.number) as pool:
            done = list(pool.map(lambda some: jax.block_until_ready(executable(*some)), operands))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)

    def _part(self, by_island: Any, index: int) -> Any:
        return jax.tree.map(lambda leaf: np.split(np.asarray(leaf), self.number)[index], by_island)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_executables": {}}


def _num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
