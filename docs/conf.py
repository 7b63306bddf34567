"""Sphinx settings of the site; `make site` (fx.site) puts the sources together in runs/site-source and builds there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docstrings

project = "FineXtract notebooks"
author = "The FineXtract notebooks authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx-mathjax-offline",
]  # the last one serves MathJax from the site itself
suppress_warnings = ["mystnb.unknown_mime_type"]

nb_execution_mode = "off"  # what is shown are the committed outputs
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as they are written: a path of this machine is nobody else's

html_theme = "sphinx_book_theme"
html_title = "FineXtract notebooks"
html_static_path = ["_static"]
html_css_files = ["play.css", "narrow.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navigation_with_keys": True,
    "navbar_persistent": [],
}


def setup(app) -> None:
    """Docstrings are plain prose with the paper's equations below."""
    app.connect("autodoc-process-docstring", docstrings.process)
