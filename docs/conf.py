"""Builds the documentation: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gallery  # noqa: E402

project = "pyroflows"
author = copyright = "the pyroflows developers"
html_title = project

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "gallery/README.md"]

html_theme = "furo"
html_copy_source = False
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# What these classes ask of their children is described once, with them.
autodoc_default_options = {
    "members": True,
    "inherited-members": "FlowTransform, ScalarBijection, AutoFlow",
    "show-inheritance": True,
}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "Draws")}  # not what they stand for
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"


def skip_foreign_members(app, what, name, obj, skip, options):
    """Leave out what other packages define: their own pages describe it."""
    function = getattr(obj, "fget", None) or getattr(obj, "func", None) or obj
    return skip or not getattr(function, "__module__", "").startswith("pyroflows")


def list_references(app, what, name, obj, options, lines):
    """Turn the numbered references of a docstring into a list, before napoleon reads it."""
    text = "\n".join(lines)
    head, rule, references = text.partition("References\n----------\n")
    if not rule:
        return
    references, examples, tail = references.partition("Examples\n--------\n")
    references = re.sub(r"\n +", " ", references)
    references = re.sub(r"^\[(\d+)\]", r"* [\1]", references, flags=re.MULTILINE)
    lines[:] = (head + rule + references + examples + tail).split("\n")


def name_aliases(app, what, name, obj, options, signature, annotation):
    """Undo what Sphinx makes of an alias within another type."""
    if signature is None:
        return None
    alias = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    return alias.sub(r"\1", signature), annotation and alias.sub(r"\1", annotation)


def fill_gallery(app, docname, source):
    """Write the case studies into their page."""
    if docname == "gallery":
        source[0] += gallery.markdown()


def setup(app):
    app.connect("autodoc-skip-member", skip_foreign_members)
    app.connect("autodoc-process-docstring", list_references, priority=100)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("source-read", fill_gallery)
    app.connect("env-get-outdated", lambda *_: ["gallery"])  # pictures and scripts may be new
