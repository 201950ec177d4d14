"""Sphinx settings. `make docs` builds with warnings as errors and every reference resolved."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]

import cnnlib  # noqa: E402

_package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "Parallel CNN"
author = "The parallel CNN authors"
copyright = f"{author}, {_package['license']} licence"
version = release = cnnlib.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    # local, in _extensions/
    "config_reference",
    "exercises",
    "machines",
    "published",
    "plain_docstrings",
    "shared_memory",
    "served",
]
exclude_patterns = ["_build", "_extensions"]
source_suffix = {".md": "markdown"}
nitpicky = True
# What other projects document. Names of cnnlib have to exist; see plain_docstrings.
nitpick_ignore_regex = [("py:.*", r"(?!cnnlib\b).*")]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4

autodoc_type_aliases = {name: name for name in ("ArrayLike", "Labelled")}
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    # what pydantic adds to every model
    "exclude-members": "model_config,model_fields,model_computed_fields,model_post_init",
}

html_theme = "furo"
html_title = "Parallel CNN"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
