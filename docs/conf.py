"""Sphinx configuration; ``tox -e docs`` builds with every warning an error."""

import sys
from pathlib import Path
from typing import Any

# The source tree, so that the documentation is that of the code beside it.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "backends")]

from geotucker import __version__  # noqa: E402

project = "geotucker"
author = "The geotucker developers"
copyright = "2026, The geotucker developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
# A reference to a public name of ours must resolve; resolving others would need the network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!geotucker(_torch|_cupy|_sklearn)?\.[A-Za-z]).*")]
default_role = "code"  # `name` in a docstring is code

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
# Types in docstrings are for people: "array, shape (n, r)" is no list of links.
napoleon_use_param = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"geotucker {release}"


def _skip_fields(
    app: Any, what: str, name: str, item: object, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of named tuples: their class's docstring lists them already."""
    return True if type(item).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Register the hooks."""
    app.connect("autodoc-skip-member", _skip_fields)
