"""What is kept of a full run: what an example prints and its picture, the results of a benchmark, and where they ran.

An example's output is `docs/pictures/NAME.txt`, with its command above and the machine below, beside `NAME.png`; its
page shows both. The results of a benchmark are `benchmarks/results/NAME.json`, from which `_page` writes its page.
"""

import datetime
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import jax

from numpyro_diffusion import __version__

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("JAX", "NumPyro", "ArviZ")


def has_results(path: Path) -> bool:
    """Whether a script is a benchmark that writes what it has found."""
    return path.parent.name == "benchmarks" and '"--json"' in path.read_text()


def command(path: Path) -> str:
    """What runs a script."""
    return f"python {path.relative_to(ROOT)}"


def machine() -> dict:
    """Where and when, and with which libraries."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    libraries = {name: version(name.lower()) for name in LIBRARIES}
    devices = {device.device_kind for device in jax.devices() if device.platform != "cpu"}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": ", ".join([models[0] if models else platform.machine(), *sorted(devices)]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"Python": platform.python_version(), "numpyro_diffusion": __version__, **libraries},
    }


def took(run: dict) -> str:
    """What a run took, in words."""
    return f"{run['seconds']} s ({run['cpu_seconds']} CPU s)"


def where(run: dict) -> str:
    """`machine`, in words."""
    cores = f"{run['cores']} core{'s' * (run['cores'] != 1)}"
    libraries = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return f"on {cores} of {run['machine']}, {run['date']}; {libraries}"


def keep_example(path: Path, printed: str, seconds: dict[str, int]) -> None:
    """Stores what a full run of an example has printed, and the picture that it has written."""
    text = printed.replace(f"{ROOT}/", "").strip()
    lines = [f"$ {command(path)}", text, "", f"{took(seconds)} {where(machine())}"]
    (PICTURES / f"{path.stem}.txt").write_text("\n".join(lines) + "\n")
    shutil.copy(ROOT / "examples" / "output" / f"{path.stem}.png", PICTURES)


def keep_results(path: Path, results: Path, seconds: dict[str, int]) -> None:
    """Stores what a full run of a benchmark has found."""
    RESULTS.mkdir(exist_ok=True)
    found = {"command": command(path), **machine(), **seconds, "fast": False}
    found["results"] = json.loads(results.read_text())
    (RESULTS / f"{path.stem}.json").write_text(json.dumps(found, indent=1) + "\n")
