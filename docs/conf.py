"""Sphinx configuration: `pip install -e ".[docs]" && sphinx-build -W -b html docs docs/_build`."""

import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from numpyro_diffusion import __version__ as release  # noqa: E402

project = "numpyro_diffusion"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "reference",  # these two are in _ext
    "docstrings",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"numpyro_diffusion {release}"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
napoleon_use_rtype = False
add_module_names = False


def within_reach(address: str) -> bool:
    """Whether an inventory can be had; without it names of that library are no links, and nothing else changes."""
    try:
        with urllib.request.urlopen(f"{address}objects.inv", timeout=3):
            return True
    except OSError:
        return False


libraries = {
    "python": "https://docs.python.org/3/",
    "numpyro": "https://num.pyro.ai/en/stable/",
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/stable/",
    "arviz": "https://python.arviz.org/en/stable/",
}
intersphinx_mapping = {name: (address, None) for name, address in libraries.items() if within_reach(address)}
