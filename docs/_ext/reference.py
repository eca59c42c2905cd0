"""The API reference, written at the start of every build: a page for each room of the package, from its `__all__`.

A page has the theory of each module, which is its docstring, followed by the public names that the module defines. So a
new name is in the reference as soon as its room hands it out. `bibliography` collects what docstrings cite.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpyro_diffusion

PACKAGE = numpyro_diffusion.__name__
INTRODUCTION = """# Reference

Every public name, room by room. The theory of a module stands before the names that it defines.

```{toctree}
:maxdepth: 1

%s
bibliography
```

At the top of the package, for the first lines of a script:

%s
"""


def public(module: ModuleType) -> list[str]:
    """The names that a module hands out: its `__all__`, or what it defines without an underscore."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def rooms() -> Iterator[ModuleType]:
    """The package, its rooms, the rooms of `infer`, and modules that a room hands out, such as `train.losses`."""
    yield numpyro_diffusion
    for found in pkgutil.walk_packages(numpyro_diffusion.__path__, f"{PACKAGE}."):
        parts = found.name.split(".")[1:]
        if any(part.startswith("_") for part in parts):
            continue
        parent = importlib.import_module(".".join([PACKAGE, *parts[:-1]]))
        module = importlib.import_module(found.name)
        handed_on = parts[-1] in getattr(parent, "__all__", ()) and getattr(parent, parts[-1]) is module
        if found.ispkg or len(parts) == 1 or handed_on:
            yield module


def names() -> dict[str, str]:
    """The public names by the shortest path below the package, each with the innermost room that has it."""
    found: dict[int, str] = {}
    where: dict[str, str] = {}
    for module in sorted(rooms(), key=lambda module: module.__name__.count(".")):
        for name in public(module):
            value = getattr(module, name)
            if module is not numpyro_diffusion and not inspect.ismodule(value):
                path = found.setdefault(id(value), f"{module.__name__}.{name}")
                where[path] = module.__name__
    return where


def defined_in(path: str) -> str:
    """The module in which a public name is defined."""
    room, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(room), name)
    return value.__module__ if inspect.isclass(value) or inspect.isfunction(value) else room


def theory(docstring: str) -> tuple[str, str]:
    """Title and text of a module's docstring, in Markdown, with its references as a list."""
    title, _, text = inspect.cleandoc(docstring).partition("\n\n")
    text, _, cited = text.partition("References:\n")
    listed = "\n".join(f"* {entry}" for entry in entries(cited))
    return " ".join(title.split()).rstrip("."), text.strip() + (f"\n\n**References**\n\n{listed}" if listed else "")


def entries(cited: str) -> list[str]:
    """The entries of a section of references, each of which ends with its link."""
    return [" ".join(entry.split()) for entry in re.findall(r"\S.*?https?://\S+\.(?=\s|$)", cited, re.DOTALL)]


def sections(docstring: str) -> dict[str, str]:
    """The sections of a docstring by title, such as `Args`; its opening words under an empty title."""
    parts = re.split(r"^([A-Z][a-z]+):\n(?=    )", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], map(textwrap.dedent, parts[2::2]), strict=True))}


def page(room: ModuleType) -> str:
    """The page of a room, in MyST Markdown."""
    where = names()
    here = {path: defined_in(path) for path, home in where.items() if home == room.__name__}
    title, text = theory(room.__doc__)
    short = room.__name__.removeprefix(f"{PACKAGE}.")
    title = re.sub(rf"^{short[:4]}\w*: ", "", title, flags=re.IGNORECASE)  # no "`solve`: solvers: from noise to data"
    parts = [f"# `{short}`: {title[0].lower() + title[1:]}", text, contents(here)]
    for name in dict.fromkeys(here.values()):
        module = importlib.import_module(name)
        if module is not room:
            title, text = theory(module.__doc__)
            parts += [f"## {title}", text]
        parts += [entry(path) for path, home in here.items() if home == name]
    return "\n\n".join(part for part in parts if part) + "\n"


def contents(paths: Iterable[str]) -> str:
    """A table of names with the first line of each docstring."""
    rows = [f"| {link(path)} | {summary(path)} |" for path in paths]
    return "\n".join(["| name | |", "|---|---|", *rows]) if rows else ""


def link(path: str) -> str:
    """A link to the entry of a public name."""
    return f"{{py:obj}}`{path.rpartition('.')[2]} <{path}>`"


def look_up(path: str) -> Any:
    """The object of a public name."""
    room, _, name = path.rpartition(".")
    return getattr(importlib.import_module(room), name)


def summary(path: str) -> str:
    """The first line of the docstring of a public name; of a constant, its value."""
    value = look_up(path)
    documented = inspect.isclass(value) or inspect.isfunction(value)
    return inspect.getdoc(value).partition("\n")[0] if documented else f"`{value}`"


def entry(path: str) -> str:
    """What autodoc is to write about a public name."""
    value = look_up(path)
    kind = "class" if inspect.isclass(value) else "function" if inspect.isfunction(value) else "data"
    options = f"\n   :members: {', '.join(members(value))}" if kind == "class" and members(value) else ""
    return f"```{{eval-rst}}\n.. auto{kind}:: {path}{options}\n```"


def members(value: type) -> list[str]:
    """Methods and properties with a docstring, those of bases that have no entry of their own among them."""
    shown, found = {id(look_up(path)) for path in names()}, {}
    for each in value.__mro__:
        if each is not value and (id(each) in shown or not each.__module__.startswith(PACKAGE)):
            break
        for name, member in vars(each).items():
            documented = not isinstance(member, type) and inspect.getdoc(member) and name not in fields(value)
            if not name.startswith("_") and name != "get_diagnostics_str" and documented and hasattr(member, "__get__"):
                found.setdefault(name)
    return list(found)


def bibliography() -> str:
    """All that docstrings cite, by author, once for each link, with the modules that cite it."""
    cited: dict[str, tuple[str, set[str]]] = {}
    for found in pkgutil.walk_packages(numpyro_diffusion.__path__, f"{PACKAGE}."):
        module = importlib.import_module(found.name)
        texts = [module.__doc__, *(value.__doc__ for value in vars(module).values() if _is_own(value, module))]
        for text in texts:
            for each in entries(sections(text or "").get("References", "")):
                address = re.search(r"https?://\S+", each)[0].rstrip(".")
                longest, modules = cited.get(address, ("", set()))
                cited[address] = (max(longest, each, key=len), modules | {found.name.removeprefix(f"{PACKAGE}.")})
    lines = [f"* {text} ({', '.join(f'`{m}`' for m in sorted(where))})" for text, where in sorted(cited.values())]
    return "# References\n\nWhat the docstrings cite, and where.\n\n" + "\n".join(lines) + "\n"


def write_examples(folder: Path) -> None:
    """Writes a page for each example, and an index: its docstring, and the picture, output and code that it has.

    Picture and output are those of a full run, kept in `docs/pictures` by `python -m benchmarks --keep`.
    """
    scripts = sorted((folder.parents[1] / "examples").glob("*.py"))
    scripts.sort(key=lambda path: path.stem != "quickstart")
    pages, kept = {}, folder.parent / "pictures"
    index = ["# Examples", "Scripts that run as they are, with real data where a package ships some."]
    for script in scripts:
        tree = ast.parse(script.read_text())
        title, _, text = ast.get_docstring(tree).partition("\n")
        title = title.rstrip(".")
        text = re.sub(
            r"(?m)^(?: {4}.*\n?)+", lambda block: f"```text\n{textwrap.dedent(block[0]).rstrip()}\n```\n", text
        )
        shown = f"![{title}](../pictures/{script.stem}.png)" if (kept / f"{script.stem}.png").exists() else ""
        included = f"```{{literalinclude}} ../../examples/{script.name}"
        code = f"{included}\n:language: python\n:lines: {tree.body[0].end_lineno + 2}-\n```"
        parts = [f"# {title}", text.strip(), shown, output(script.stem, kept), f"## `{script.name}`", code]
        pages[script.stem] = "\n\n".join(part for part in parts if part)
        index += [f"## [{title}]({script.stem}.md)", shown]
    listed = "\n".join(script.stem for script in scripts)
    pages["index"] = "\n\n".join([*index, f"```{{toctree}}\n:hidden:\n\n{listed}\n```"])
    write_pages(folder, pages)


def output(name: str, kept: Path) -> str:
    """What an example has printed, and the command that kept it."""
    if not (kept / f"{name}.txt").exists():
        return ""
    text = (kept / f"{name}.txt").read_text().rstrip()
    command = f"`python -m benchmarks --keep examples/{name}.py`"
    return f"## Output\n\n```text\n{text}\n```\n\nOutput and picture are those of a full run, kept by {command}."


def write_pages(folder: Path, pages: dict[str, str]) -> None:
    """Makes `folder` hold these pages and no other; those that have not changed stay, so that Sphinx skips them."""
    folder.mkdir(exist_ok=True)
    for stale in {path.stem for path in folder.glob("*.md")} - set(pages):
        (folder / f"{stale}.md").unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def build(app: Any) -> None:
    """All that is written before a build."""
    write(Path(app.srcdir) / "reference")
    write_examples(Path(app.srcdir) / "examples")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fields(value: type) -> dict[str, str]:
    """What the comments of a `NamedTuple` say of its fields, by name."""
    if not hasattr(value, "_fields") or not value.__module__.startswith(PACKAGE):
        return {}
    said = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(value), re.MULTILINE))
    return {name: said.get(name, "") for name in value._fields}


def _is_own(value: Any, module: ModuleType) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__


def write(folder: Path) -> None:
    """Writes all pages into `folder`."""
    paths = names()
    found = [room for room in rooms() if room is not numpyro_diffusion and room.__name__ in paths.values()]
    pages = {room.__name__.removeprefix(f"{PACKAGE}."): page(room) for room in found}
    first = [path for name in public(numpyro_diffusion) for path in paths if path.endswith(f".{name}")]
    pages["index"] = INTRODUCTION % ("\n".join(sorted(pages)), contents(first))
    pages["bibliography"] = bibliography()
    write_pages(folder, pages)
