"""Runs benchmarks and examples, two at a time, and prints what each has to say as it ends.

    python -m benchmarks --fast                                   all of them in their fast form, some five minutes
    python -m benchmarks benchmarks/smc.py benchmarks/mog40.py    these two at full size
    python -m benchmarks --keep examples/quickstart.py            at full size, and what it gives is kept for the site
    python -m benchmarks --page                                   writes docs/benchmarks.md from what is kept

`--keep` stores what examples print and draw in docs/pictures and the results of benchmarks in benchmarks/results, and
writes docs/benchmarks.md. Scripts then run one after the other, so that their seconds mean something.

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
from benchmarks import _kept, _page

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
TRAINS = ("learned", "noise_levels", "weightings")
"""Even in their fast form these run for longer than they compile, so the compiler may optimise."""


class Script(NamedTuple):
    """One that runs."""

    name: str
    output: IO[str]
    started: float


def run(path: Path, arguments: list[str], output: IO[str], warnings: IO[str]) -> int:
    """Runs a script as `python path arguments` does, in this process; returns its exit status."""
    os.dup2(output.fileno(), 1)
    os.dup2(warnings.fileno(), 2)
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    fast = "--fast" in arguments
    jax.config.update("jax_disable_most_optimizations", fast and not any(word in path.stem for word in TRAINS))
    status = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except BaseException:
        traceback.print_exc(file=sys.stdout)  # where it is read
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run_and_keep(path: Path, output: IO[str]) -> int:
    """Runs a script at full size and keeps what it prints, on the standard output alone, draws and finds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as warnings:
        results = Path(folder) / "results.json"
        arguments = ["--json", str(results)] if _kept.has_results(path) else []
        if status := run(path, arguments, output, warnings):
            return status
        seconds = {"seconds": round(time.perf_counter() - started), "cpu_seconds": round(time.process_time())}
        output.seek(0)
        try:
            if arguments:
                _kept.keep_results(path, results, seconds)
            elif path.parent.name == "examples":
                _kept.keep_example(path, output.read(), seconds)
            else:
                print("has no results to keep")
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", type=Path, help="which; all examples and benchmarks unless said")
    parser.add_argument("--fast", action="store_true", help="their fast form, compiled without optimisation")
    parser.add_argument("--keep", action="store_true", help="keep what they give for the site, one after the other")
    parser.add_argument("--page", action="store_true", help="run nothing, write docs/benchmarks.md from what is kept")
    options = parser.parse_args()
    if options.fast and options.keep:
        parser.error("--keep is for full runs: leave out --fast")
    if options.page:
        return print(f"wrote {_page.write()}")
    every = [path for room in ("examples", "benchmarks") for path in sorted((ROOT / room).glob("[!_]*.py"))]
    waiting, running, took, failed = [path.resolve() for path in options.scripts] or every, {}, [], []
    at_once = 1 if options.keep else AT_ONCE
    while waiting or running:
        while waiting and len(running) < at_once:
            path, output = waiting.pop(0), tempfile.TemporaryFile("w+")
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                arguments = ["--fast"] * options.fast
                os._exit(run_and_keep(path, output) if options.keep else run(path, arguments, output, output))
            running[child] = Script(str(path.relative_to(ROOT)), output, time.perf_counter())
        child, status, used = os.wait3(0)
        script = running.pop(child)
        script.output.seek(0)
        print(f"== {script.name}\n{script.output.read()}", flush=True)
        took.append((used.ru_utime + used.ru_stime, time.perf_counter() - script.started, script.name))
        failed += [script.name] * bool(status)
    for cpu_seconds, seconds, name in sorted(took, reverse=True):
        print(f"{name:34}{seconds:8.1f} s {cpu_seconds:8.1f} CPU s")
    if options.keep:
        print(f"wrote {_page.write()}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
