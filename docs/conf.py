"""Sphinx's configuration, after Megatron's own docs: MyST Markdown, autodoc2.

The root of the sources is the repository's, so that links between pages and to files are the same here and where the
repository is browsed.

    python -m sphinx -W --keep-going -c docs . build/docs
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

project = "megatron-sbld"
extensions = ["myst_parser", "autodoc2"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "examples/README.md",
    "examples/megatron_lm/README.md",
    "patches/README.md",
    "scripts/README.md",
]
exclude_patterns = ["build", ".*", "runs", "**/__pycache__"]

myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 4
# A page may begin below the first level where a table of contents or a program wrote it.
suppress_warnings = ["myst.header"]
highlight_language = "none"

# The package is read, not imported. Docstrings are written in Google's style (docs/docstrings.py).
autodoc2_packages = [{"path": "megatron_sbld", "auto_mode": False}]
autodoc2_render_plugin = "myst"
autodoc2_docstring_parser_regexes = [(r".*", "docstrings")]
autodoc2_skip_module_regexes = [r".*\.cli\..*"]
autodoc2_hidden_objects = ["private", "dunder", "inherited"]
autodoc2_class_docstring = "merge"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_sidebars = {"**": ["globaltoc.html"]}
html_theme_options = {"navbar_center": [], "secondary_sidebar_items": ["page-toc"], "navigation_with_keys": False}
