"""Runs benchmarks and examples, two at a time, and prints what each has to say as it ends.

    python -m benchmarks --fast                                   all of them in their fast form, some ten minutes
    python -m benchmarks benchmarks/smc.py benchmarks/mog40.py    these two at full size

Each script has a process of its own, forked from one that has imported the libraries and has not started JAX, which
saves it the three seconds that importing takes.
"""

import argparse
import os
import runpy
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, NamedTuple

import arviz  # noqa: F401
import jax
import matplotlib.pyplot  # noqa: F401

import numpyro_diffusion.infer  # noqa: F401
import numpyro_diffusion.train  # noqa: F401

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
TRAINS = ("learned", "noise_levels", "weightings")
"""Even in their fast form these run for longer than they compile, so the compiler may optimise."""


class Script(NamedTuple):
    """One that runs."""

    name: str
    output: IO[str]
    started: float


def run(path: Path, fast: bool, output: IO[str]) -> int:
    """Runs a script as `python path [--fast]` does, in this process; returns its exit status."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.argv, sys.path[0] = [str(path), *["--fast"] * fast], str(path.parent)
    jax.config.update("jax_disable_most_optimizations", fast and not any(word in path.stem for word in TRAINS))
    status = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", type=Path, help="which; all examples and benchmarks unless said")
    parser.add_argument("--fast", action="store_true", help="their fast form, compiled without optimisation")
    options = parser.parse_args()
    every = [path for room in ("examples", "benchmarks") for path in sorted((ROOT / room).glob("[!_]*.py"))]
    waiting, running, took, failed = [path.resolve() for path in options.scripts] or every, {}, [], []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            path, output = waiting.pop(0), tempfile.TemporaryFile("w+")
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                os._exit(run(path, options.fast, output))
            running[child] = Script(str(path.relative_to(ROOT)), output, time.perf_counter())
        child, status, used = os.wait3(0)
        script = running.pop(child)
        script.output.seek(0)
        print(f"== {script.name}\n{script.output.read()}", flush=True)
        took.append((used.ru_utime + used.ru_stime, time.perf_counter() - script.started, script.name))
        failed += [script.name] * bool(status)
    for cpu_seconds, seconds, name in sorted(took, reverse=True):
        print(f"{name:34}{seconds:8.1f} s {cpu_seconds:8.1f} CPU s")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
