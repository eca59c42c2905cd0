"""The house keeps its floors: what imports what, how long files are, what an import brings, and that examples run."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "numpyro_diffusion"
FLOORS = {
    **dict.fromkeys(["_checks", "_files", "_precision", "_version"], -1),  # the ground, which every floor stands on
    **dict.fromkeys(["noise", "nn"], 0),
    **dict.fromkeys(["denoise", "data"], 1),
    **dict.fromkeys(["solve", "diagnostics"], 2),
    **dict.fromkeys(["checkpoint", "density", "guidance", "train", "plots"], 3),
    "distributions": 4,
    **dict.fromkeys(["reparam", "learned"], 5),
    "infer": 6,
    "__main__": 7,
}
INFER = {  # the rooms of `infer/`: each imports lower ones, never its own neighbours
    "model": 0,
    "kernel": 1,
    **dict.fromkeys(["reverse", "gradient", "anneal", "noise"], 2),
    "combine": 3,
    "particles": 4,
    "trust": 5,
}
MAX_LINES = 350
FEWEST, MOST = 3, 9  # files of a folder, besides its `__init__`


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("name", MODULES)


def room(name):
    """`numpyro_diffusion.solve.flow` is in `solve`."""
    return name.split(".")[1] if "." in name else None


def imports(path):
    """The modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                found.add(member if member in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == PACKAGE.name}


def test_imports_are_seen():
    """The parser behind these tests finds what is known to be there."""
    assert f"{PACKAGE.name}.solve.flow" in imports(MODULES[f"{PACKAGE.name}.solve.stochastic"])
    below = {"_precision", "density", "distributions", "solve"}
    assert imports(MODULES[f"{PACKAGE.name}.reparam"]) == {f"{PACKAGE.name}.{name}" for name in below}


@each_module
def test_imports_go_down(name):
    """Lower floors and the module's own folder only. The package itself has no floor, but may not close a circle."""
    if room(name) is None:
        return
    assert room(name) in FLOORS, f"{name} has no floor: give it one here and in the design"
    for other in imports(MODULES[name]) - {PACKAGE.name}:
        higher = room(other) != room(name) and FLOORS[room(other)] >= FLOORS[room(name)]
        assert not higher, f"{name} (floor {FLOORS[room(name)]}) imports {other} (floor {FLOORS[room(other)]})"


def infer_room(name):
    """`numpyro_diffusion.infer.kernel.choose` is in `kernel`; None for `infer` itself and all that is elsewhere."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "infer" else None


def imports_across():
    """The imports between rooms of `infer/` that do not go down, as pairs of module names within the package."""
    found = set()
    for name, path in MODULES.items():
        for other in imports(path):
            here, there = infer_room(name), infer_room(other)
            if here and there and here != there and INFER[there] >= INFER[here]:
                found.add((name.removeprefix(f"{PACKAGE.name}."), other.removeprefix(f"{PACKAGE.name}.")))
    return found


def test_rooms_of_infer_import_lower_ones():
    unknown = {infer_room(name) for name in MODULES} - {None, *INFER}
    assert not unknown, f"{unknown} have no place in infer/: give them one here and in the design"
    assert imports_across() == set()


def test_folders_have_three_to_nine_files():
    folders = {}
    for path in MODULES.values():
        folder = module_name(path.parent / "__init__.py")
        folders[folder] = folders.get(folder, 0) + (path.name != "__init__.py")
    for folder, count in folders.items():
        if folder != PACKAGE.name and folder != f"{PACKAGE.name}.infer":  # these hand on what their rooms hold
            assert FEWEST <= count <= MOST, f"{folder} has {count} files"


def test_every_room_says_what_it_hands_out():
    """`__all__` names what is there, in every `__init__`; and type checkers may look, see `py.typed`."""
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            module = importlib.import_module(name)
            assert sorted(set(module.__all__)) == sorted(module.__all__), f"{name}.__all__ names something twice"
            missing = [each for each in module.__all__ if not hasattr(module, each)]
            assert not missing, f"{name}.__all__ names {missing}, which it does not have"
    assert (PACKAGE / "py.typed").exists()


def test_imports_have_no_circles():
    graph, done = {name: imports(path) for name, path in MODULES.items()}, set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@each_module
def test_file_is_short_and_says_what_it_is(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= MAX_LINES, f"{MODULES[name]} has {len(text.splitlines())} lines"
    assert ast.get_docstring(ast.parse(text)), f"{MODULES[name]} has no docstring"


def test_the_import_is_light():
    """Neither the package nor a room of it brings ArviZ, matplotlib or scikit-learn along."""
    heavy = ("arviz", "matplotlib", "sklearn", "pandas", "xarray")
    names = [name for name in MODULES if name != f"{PACKAGE.name}.plots"]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


DEAR = (
    "infer.particles",
    "infer.trust",
    "infer.combine",
    "infer.reverse",
    "infer.gradient",
    "nn.unet",
    "train.fit",
    "learned",
    "train.distill",
    "infer.noise.delayed_acceptance",
    "diagnostics",
)
"""Modules whose examples take seconds to compile."""
EXAMPLES = [
    pytest.param(name, marks=[pytest.mark.slow] * name.startswith(tuple(f"{PACKAGE.name}.{part}" for part in DEAR)))
    for name, path in MODULES.items()
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted > 0 and failed == 0


def test_readme():
    """Its code runs as written, and it keeps to its length."""
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 120
    failed, _ = doctest.testfile(str(readme), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0
