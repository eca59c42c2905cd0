"""Docstrings as this package writes them, for Sphinx: `$x$` is mathematics, `name` is code, and both are links.

Code that is a public name becomes a link to its entry in the reference, on all pages.
"""

import inspect
import re
from typing import Any

from docutils import nodes
from reference import entries, fields, names, sections
from sphinx.addnodes import pending_xref

PLAIN = {
    "log_prob",
    "sample",
    "solve",
    "fit",
    "save",
    "load",
    "linear",
    "mass",
    "compare",
    "covariance",
    "inside",
    "both",
}
"""Public names that are words or names of methods too: links only together with their room, as in `train.fit`."""


def to_rst(text: str) -> str:
    """Inline mathematics and code of Markdown in reStructuredText."""
    pieces = re.split(r"(^ *>>>.*?(?=\n *\n|\Z))", text, flags=re.DOTALL | re.MULTILINE)  # examples stay as they are
    return "".join(piece if i % 2 else _inline(piece) for i, piece in enumerate(pieces))


def _inline(text: str) -> str:
    text = re.sub(r"(?<![\\*\w])\*(?=\w+[),])", r"\\*", text)  # `(rows, *event_shape)` is no emphasis
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", text)
    return re.sub(r"(?<!\$)\$([^$]+)\$(?!\$)", lambda found: f":math:`{found[1].strip()}`", text)


def write_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Translates a docstring in place, before napoleon sees it."""
    text = "\n".join(lines)
    if what == "class" and fields(thing) and "Args" not in sections(text):
        said = "\n".join(f"    {name}: {comment}.".replace("|", r"\|") for name, comment in fields(thing).items())
        text += f"\n\nArgs:\n{said}\n"
    text = to_rst(text)
    cited = sections(text).get("References")
    if cited:
        listed = "".join(f"    * {entry}\n" for entry in entries(cited))
        text = re.sub(r"^References:\n(?:    .*\n?)+", lambda _: f"References:\n{listed}\n", text, flags=re.MULTILINE)
    lines[:] = text.splitlines()


def write_signature(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returns: str) -> Any:
    """Names and defaults: types are in words, in `Args`."""
    if what not in ("class", "function", "method"):
        return None
    try:
        found = inspect.signature(thing.__init__ if isinstance(thing, type) and type(thing) is not type else thing)
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    shown = [
        each.replace(annotation=empty, default=each.default if each.default is empty else _Default(each.default))
        for each in found.parameters.values()
        if each.name not in ("self", "cls") or what == "function"
    ]
    return str(inspect.Signature(shown)), None


class _Default:
    """A default value that is printed as one would write it."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        text = getattr(self.value, "__name__", None) or repr(self.value)
        return "..." if text.startswith("<") else text


def link_names(app: Any, doctree: nodes.document) -> None:
    """Makes links of code that is a public name, or a call of one."""
    known = {}
    for path in names():
        parts = path.split(".")
        known.update({".".join(parts[-n:]): path for n in range(1, len(parts) + 1)})
    for node in list(doctree.findall(nodes.literal)):
        name = node.astext().partition("(")[0]
        within = isinstance(node.parent, (nodes.reference, pending_xref, nodes.title))
        if name in known and name not in PLAIN and not within:
            target = pending_xref("", reftype="obj", refdomain="py", reftarget=known[name], refexplicit=True)
            target["refdoc"] = app.env.docname
            node.replace_self(target)
            target += node


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", write_docstring, priority=400)
    app.connect("autodoc-process-signature", write_signature)
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
