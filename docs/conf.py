"""Sphinx configuration: `pip install -e ".[docs]" && sphinx-build -W docs docs/_build`."""

project = "numpyro_diffusion"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build"]
