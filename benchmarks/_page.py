"""The page of benchmarks, docs/benchmarks.md, from the results that are kept: `python -m benchmarks --page`."""

import ast
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._kept import RESULTS, ROOT, has_results, took, where

PAGE = ROOT / "docs" / "benchmarks.md"
MOST_ROWS = 20
OPENING = """# Benchmarks

What each benchmark found when it last ran at full size. `python -m benchmarks --keep benchmarks/NAME.py` runs one,
keeps its results in `benchmarks/results/NAME.json` and writes this page anew; `--page` only writes the page. The pages
under "Trust, and reasons" say what the figures mean, and give some of other sizes and seeds.

**How to read it.** The machine is shared with other work, so seconds are noisy, up to a factor of two, and they include
compilation unless the benchmark says otherwise. Compare ratios, which are measured side by side within one run, and
evaluations, which are counted. Errors and distances are of one run, with its Monte Carlo error. Figures are rounded to
three digits; the files have all of them.

%s
"""


def page() -> str:
    """The page, in MyST Markdown."""
    scripts = [path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")) if has_results(path)]
    kept = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    places = Counter(where(kept[path.stem]) for path in scripts if path.stem in kept)
    usual = places.most_common(1)[0][0] if places else ""
    parts = [OPENING % (f"Runs are {usual}, unless their sections say otherwise." if usual else "")]
    for path in scripts:
        if path.stem in kept:
            parts += section(path, kept[path.stem], usual)
    missing = [f"| `{keeps(path)}` | {described(path)[0]} |" for path in scripts if path.stem not in kept]
    if missing:
        parts += [
            "## Missing",
            "No full run of these is kept; some take hours. Pages of concepts have their figures.",
        ]
        parts.append("\n".join(["| command | what it asks |", "|---|---|", *missing]))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def keeps(path: Path) -> str:
    """The command that runs a benchmark at full size and keeps its results."""
    return f"python -m benchmarks --keep {path.relative_to(ROOT)}"


def described(path: Path) -> tuple[str, str]:
    """The first line of a script's docstring, and the rest without commands, as Markdown."""
    first, _, rest = ast.get_docstring(ast.parse(path.read_text())).partition("\n")

    def block(found: re.Match) -> str:
        text = textwrap.dedent(found[0]).strip("\n")
        return "" if text.startswith("python ") else f"\n```text\n{text}\n```\n"

    return first, re.sub(r"(?m)^(?: {4}.*\n?|\n(?= {4}))+", block, rest).strip()


def section(path: Path, kept: dict, usual: str) -> Iterator[str]:
    """What is said of one benchmark; where it ran only if that is not the `usual` place."""
    if kept["fast"]:
        raise ValueError(f"{path.stem}: the page is made of full runs, not of --fast ones")
    first, body = described(path)
    yield f"## `{path.stem}`"
    yield f"**{first}**"
    yield body
    yield f"`{keeps(path)}`: {took(kept)}" + (f" {where(kept)}." if where(kept) != usual else ".")
    for title, rows in tables(kept["results"]):
        yield f"*{title}*" if title else ""
        yield table(rows)
        if len(rows) > MOST_ROWS:
            yield f"The first {MOST_ROWS} of {len(rows)} rows; all are in `benchmarks/results/{path.stem}.json`."


def tables(results: Any, title: str = "") -> Iterator[tuple[str, list[dict]]]:
    """All that a file holds, as tables: lists of rows with the same columns, and figures by name."""
    if isinstance(results, list):
        groups: dict[tuple, list[dict]] = {}
        for row in results:
            groups.setdefault(tuple(row), []).append(row)
        yield from ((title, rows) for rows in groups.values())
        return
    inner = {key: value for key, value in results.items() if is_table(value)}
    figures = [{"figure": key, "value": value} for key, value in results.items() if key not in inner]
    if figures:
        yield title, figures
    for key, value in inner.items():
        if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
            value = [{"": name, **each} for name, each in value.items()]
        yield from tables(value, f"{title}.{key}" if title else key)


def is_table(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)))


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if is_number(rows[0][column]) else "---" for column in columns) + "|")
    lines += ["| " + " | ".join(written(row[column]) for column in columns) + " |" for row in rows[:MOST_ROWS]]
    return "\n".join(lines)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def written(value: Any) -> str:
    """A cell: numbers with three digits, but counts whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(written(each) for each in value)
    if value is None:
        return ""
    if not is_number(value):
        return str(value).replace("|", "\\|")
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def write() -> Path:
    """Writes the page."""
    PAGE.write_text(page())
    return PAGE
