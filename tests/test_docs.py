"""The site: every public name is in the reference and is described, and the code of its pages runs."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import pytest

import numpyro_diffusion

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "_ext" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
NAMES = reference.names()
sys.path.insert(0, str(ROOT))
_page = importlib.import_module("benchmarks._page")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_the_reference_has_every_public_name():
    """Whatever the `__all__` of a room has is on a page, under one of its paths."""
    pages = "".join(reference.page(room) for room in reference.rooms() if room is not numpyro_diffusion)
    entries = {id(reference.look_up(path)) for path in re.findall(r"\.\. auto\w+:: (\S+)", pages)}
    for found in pkgutil.walk_packages(numpyro_diffusion.__path__, "numpyro_diffusion."):
        room = importlib.import_module(found.name)
        for name in getattr(room, "__all__", ()):
            value = getattr(room, name)
            assert inspect.ismodule(value) or id(value) in entries, f"{found.name}.{name} is not in the reference"


def own(value):
    """The functions that a caller of `value` runs: it, or what makes an object of a class."""
    if inspect.isfunction(value) or getattr(value, "_is_protocol", False):
        return [value] * inspect.isfunction(value)
    return [vars(value)[name] for name in ("__init__", "__post_init__", "__new__") if name in vars(value)]


def arguments(value):
    """What a caller gives; nothing for protocols, and for classes that another class has the `__init__` of."""
    if inspect.isfunction(value):
        parameters = list(inspect.signature(value).parameters)
        return parameters if len(parameters) > 1 else []  # the first line tells of a single one
    if hasattr(value, "_fields"):
        return list(value._fields)
    if getattr(value, "_is_protocol", False) or inspect.isabstract(value) or value.__init__ is object.__init__:
        return []
    parameters = list(inspect.signature(value.__init__).parameters)[1:]
    return [] if parameters == ["args", "kwargs"] else parameters


def raised(value):
    """The errors that a function raises itself, by `raise` or by one of `_checks`."""
    found = set()
    for function in own(value):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError):  # written by `dataclass`
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                found.add(node.exc.func.id)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_checks."):
                found.add("ValueError")
    return found & {"ValueError", "TypeError"}


def described(text):
    """The names that a section of arguments describes."""
    return re.findall(r"^\*{0,2}(\w+):", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", NAMES)
def test_docstrings_say_what_a_caller_must_know(path):
    """One line; every argument by its name and no other; what comes back; what is raised."""
    value = reference.look_up(path)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return
    assert value.__doc__, f"{path} has no docstring"
    sections = reference.sections(value.__doc__)
    first, _, rest = sections[""].partition("\n")
    assert first.endswith((".", "?")), f"{path} does not begin with one line: {first}"
    assert not rest.strip() or rest.startswith("\n"), f"{path} has no empty line below the first"
    takes = arguments(value)
    if takes:
        names = described(sections.get("Args", "")) or [name for name, said in reference.fields(value).items() if said]
        assert sorted(names) == sorted(takes), f"{path} takes {takes} and describes {names}"
    if inspect.isfunction(value):
        returns = inspect.signature(value).return_annotation
        told = "Returns" in sections or returns is None or len(takes) < 2
        assert told, f"{path} does not say what it returns"
    for error in raised(value):
        assert re.search(rf"^{error}:", sections.get("Raises", ""), re.MULTILINE), f"{path} raises {error} unsaid"


METHODS = ("infer.", "solve", "density", "guidance", "diagnostics", "train", "noise", "denoise")
OWN = {"infer.bias_report", "infer.BiasReport", "infer.Vectorize", "infer.joint_scores", "noise.schedule_for"}
OWN |= {"noise.check_decreasing"}
OWN |= {"solve.Solver", "solve.sample", "solve.solve", "solve.terminal_moments", "solve.terminal_point"}
OWN |= {
    "diagnostics.by_level",
    "diagnostics.to_arviz",
    "guidance.linear",
    "guidance.Likelihood",
    "guidance.Observation",
}
"""What has no source: it is this library's, or not a method."""


def test_methods_have_a_source():
    """In their own docstring or in that of their module."""
    without = set()
    for path, room in NAMES.items():
        value, name = reference.look_up(path), path.removeprefix("numpyro_diffusion.")
        is_method = inspect.isfunction(value) or (inspect.isclass(value) and not hasattr(value, "_fields"))
        if is_method and name.startswith(METHODS) and not room.endswith((".kernel", ".model")):
            texts = [value.__doc__, importlib.import_module(value.__module__).__doc__]
            if not any(reference.entries(reference.sections(text).get("References", "")) for text in texts):
                without.add(name)
    assert without == OWN, f"{sorted(without - OWN)} have no References, {sorted(OWN - without)} have"


QUICK = {"errors", "handlers", "exact"}
"""Pages whose code compiles next to nothing."""
PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem not in QUICK))
    for page in sorted((ROOT / "docs").glob("*.md"))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page):
    """All blocks of a page are one script; those with prompts print what they say."""
    known = {"__name__": page.stem}
    for found in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        code, line = found[1], page.read_text()[: found.start(1)].count("\n")
        if ">>>" in code:
            example = doctest.DocTestParser().get_doctest(code, known, f"{page.name}, line {line}", str(page), line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(example, clear_globs=False)
            assert runner.failures == 0
            known = example.globs
        else:
            exec(compile("\n" * line + code, page, "exec"), known)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_a_picture_and_an_output(path):
    """Those of a full run, by the command that the page names, and nothing in them that a reader does not want."""
    kept, command = ROOT / "docs" / "pictures" / path.stem, f"python -m benchmarks --keep examples/{path.name}"
    assert kept.with_suffix(".png").exists() and kept.with_suffix(".txt").exists(), f"run {command}"
    text = kept.with_suffix(".txt").read_text()
    assert text.startswith(f"$ python examples/{path.name}\n") and f"wrote examples/output/{path.stem}.png" in text
    assert not re.search(r"\r|%\||Warning|Traceback|[( ]/\w+/", text), "progress bars, warnings or absolute paths"
    shown = reference.output(path.stem, kept.parent)
    assert shown.startswith("## Output") and text.strip() in shown and command in shown


def test_pages_of_examples_that_are_gone_are_removed(tmp_path):
    folder = tmp_path / "docs" / "examples"
    (tmp_path / "examples").mkdir()
    folder.mkdir(parents=True)
    for name in ("first", "second"):
        (tmp_path / "examples" / f"{name}.py").write_text(f'"""Title of the {name}."""\n\nprint(1)\n')
    reference.write_examples(folder)
    assert {path.stem for path in folder.iterdir()} == {"index", "first", "second"}
    written = (folder / "first.md").stat().st_mtime_ns
    (tmp_path / "examples" / "second.py").unlink()
    reference.write_examples(folder)
    assert {path.stem for path in folder.iterdir()} == {"index", "first"}
    assert "second" not in (folder / "index.md").read_text()
    assert (folder / "first.md").stat().st_mtime_ns == written  # Sphinx skips it


def test_the_page_of_benchmarks_is_up_to_date():
    assert _page.PAGE.read_text() == _page.page(), "run python -m benchmarks --page"


def test_the_page_of_benchmarks_is_made_of_full_runs(tmp_path, monkeypatch):
    """Benchmarks without results are listed with their commands; long tables say how many rows are left out."""
    monkeypatch.setattr(_page, "RESULTS", tmp_path)
    rows = [{"solver": "Heun", "evaluations": 10_000 + i, "w1_over_floor": 1.23456, "kept": True} for i in range(25)]
    kept = {"command": "python benchmarks/solvers.py", "date": "2026-01-02", "machine": "CPU", "cores": 1}
    kept |= {
        "versions": {"Python": "3.11.7"},
        "seconds": 3,
        "cpu_seconds": 2,
        "fast": False,
        "results": {"each": rows, "ratio": 2},
    }
    (tmp_path / "solvers.json").write_text(json.dumps(kept))
    page, command = _page.page(), "python -m benchmarks --keep benchmarks"
    assert "Runs are on 1 core of CPU, 2026-01-02; Python 3.11.7, unless" in page
    assert f"`{command}/solvers.py`: 3 s (2 CPU s)." in page
    assert "| Heun | 10,019 | 1.23 | yes |" in page and "10,020" not in page and "first 20 of 25 rows" in page
    assert "| ratio | 2 |" in page and f"| `{command}/bound.py` |" in page and f"| `{command}/solvers.py` |" not in page
    (tmp_path / "solvers.json").write_text(json.dumps(kept | {"fast": True}))
    with pytest.raises(ValueError, match="solvers: the page is made of full runs"):
        _page.page()


def test_links_of_the_readme_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", readme)}
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert len(targets) > 10 and not missing


def test_the_command_checks_itself(capsys):
    """`python -m numpyro_diffusion` says what there is, and that a posterior in closed form is met."""
    assert importlib.import_module("numpyro_diffusion.__main__").main() == 0
    printed = capsys.readouterr().out
    for name in ("numpyro_diffusion", "numpyro", "jax", "devices", "matmul precision", "self-check"):
        assert re.search(rf"^{name}\b", printed, re.MULTILINE), f"{name} is not in\n{printed}"
