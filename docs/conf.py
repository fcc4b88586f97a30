"""The documentation site: `make docs` builds it, and fails where a page or a docstring leads nowhere."""

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx

import qs_jax

project = "qs_jax"
author = copyright = "qs_jax contributors"
release = qs_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # the anchors that GitHub gives

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_custom_sections = [("Attributes", "params_style")]  # types stand in the signature
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"qs_jax {release}"
html_copy_source = False


def outside_links(app: Sphinx, document: nodes.document) -> None:
    """Links to files of the repository that are no pages of the site become downloads, links to folders plain text.

    What does not exist is left to MyST, which warns.
    """
    for link in list(document.findall(pending_xref)):
        if link.get("reftype") != "myst":
            continue
        suffix = ".md" if link.get("refdomain") == "doc" else ""
        page, name = Path(app.env.doc2path(app.env.docname)), f"{link['reftarget']}{suffix}"
        # the first page includes the beginning of README, which lies one folder up
        path = page.parent / name if page.stem != "index" or (page.parent / name).exists() else page.parents[1] / name
        if path.is_dir():
            link.replace_self(link.children)
        elif path.is_file() and not path.resolve().is_relative_to(app.srcdir):
            target = f"/{os.path.relpath(path, app.srcdir)}"
            link.replace_self(download_reference("", "", *link.children, reftarget=target, refdoc=app.env.docname))


def plain_signature(app: Sphinx, *event: Any) -> tuple[str | None, ...]:
    """Names as they are imported; a dataclass's `<factory>` is no Python, which Sphinx needs to lay a signature out."""
    *_, signature, returns = event
    return tuple(text and text.replace("jaxlib._jax.", "").replace("<factory>", "...") for text in (signature, returns))


def plain_property(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in the first line of a property's docstring for its type."""
    if what == "property":
        lines.insert(0, "")


def is_noise(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """A named tuple's fields stand in its signature."""
    return True if str(thing.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    for name in qs_jax.__all__:  # loaded when asked for, and only then seen as members
        getattr(qs_jax, name)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("autodoc-skip-member", is_noise)
    app.connect("autodoc-process-docstring", plain_property, priority=400)  # before Napoleon
    # before the files to copy are collected
    app.connect("doctree-read", outside_links, priority=400)
