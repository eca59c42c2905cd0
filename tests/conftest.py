"""Test session: two host devices for parallel chains, programs that are quick to compile and kept between runs."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpyro
import pytest

QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""The compiler's older way to fuse, and one piece at a time: compiling takes some 40 % less; programs run as before."""


def understands(flags: str) -> bool:
    """Whether this version of XLA knows the flags; it ends the process otherwise."""
    command, environment = [sys.executable, "-c", "import jax; jax.devices()"], {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


if "XLA_FLAGS" not in os.environ:  # workers have those of the process that started them
    os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE if understands(QUICK_TO_COMPILE) else ""
numpyro.set_host_device_count(2)
if jax.config.jax_compilation_cache_dir is None:  # the environment's JAX_COMPILATION_CACHE_DIR goes first
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

TWO_DEVICES = pytest.mark.skipif(jax.device_count() < 2, reason="asks for two devices, as the CPU has")


jax.config.update("jax_disable_most_optimizations", True)
gc.freeze()  # tracing makes many small objects, and few of them are garbage: look for it less often
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Tests in double precision come last in their module, and tests that ask for two devices need them."""
    modules = {}
    for item in items:
        if item.get_closest_marker("two_devices"):
            item.add_marker(TWO_DEVICES)
        modules.setdefault(item.path, len(modules))
    items.sort(key=lambda item: (modules[item.path], _is_double(item)))


def _is_double(item):
    return "x64" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Most of the time is the compiler's, so it does not optimise, but for tests that say `optimised`."""
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimised") is None)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Lets programs go between modules: they take memory, and many thousands end in a crash of XLA."""
    yield
    if len(COMPILED) > 1000:
        forget()


def forget():
    """Lets all programs go."""
    jax.clear_caches()
    COMPILED.clear()


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
)


@pytest.fixture
def compiling():
    """A context that lists what its block compiles."""

    @contextmanager
    def count():
        programs, before = [], len(COMPILED)
        yield programs
        programs += COMPILED[before:]

    return count


@pytest.fixture
def x64():
    """Double precision for one test: arrays must be made inside it."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # the latter in older jax
    with enable(True):
        yield
