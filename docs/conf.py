"""Sphinx configuration. Warnings are errors: `make docs`."""

from typing import Any

from magi_attention import __version__

project = "MagiAttention"
author = "The MagiAttention authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

# Every reference must lead somewhere, but for other projects' types: their documentation is not here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(numpy|torch|os|collections|enum|typing)\..*")]

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"MagiAttention {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]


def keep_returns_as_prose(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Types come from annotations. What stands under "Returns:" is prose, in which a colon does not end a type."""
    headings = {"Returns:": ":returns:", "Yields:": ":yields:"}
    lines[:] = [headings.get(line, line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", keep_returns_as_prose, priority=400)  # before napoleon
