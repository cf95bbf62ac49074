"""Sphinx settings."""

from batchnorm import __version__

project = "batchnorm"
author = "The batchnorm developers"
copyright = "2026, the batchnorm developers"
version = release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
myst_heading_anchors = 2
