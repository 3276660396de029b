"""The site: Sphinx reads the pages as GitHub shows them, runs the tutorials and reads the docstrings.

    make docs

Navigation follows from the pages: below the README of a folder stand the pages that it links, in its order.
Any fault ends the build: a broken link or anchor, a page that nothing leads to, a page that would fetch
something from another server.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DECISIONS = ROOT / "docs" / "decisions"
sys.path.insert(0, str(HERE))  # for tutorials.py

project = html_title = "SafetyNet"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# What is read: the folder above docs is the source, so that links to README.md and CONTRIBUTING.md hold.
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "docs/tutorials/*.py"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]
myst_heading_anchors = 4
nb_custom_formats = {".py": ["tutorials.executed", {}, False]}
suppress_warnings = ["myst.header"]  # a page may go from its title to headings of the third level
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say of themselves; a cell that fails ends the build
nb_execution_mode = "off"  # `tutorials.executed` has run them

# Docstrings are Markdown of a simple kind: `name` is a link where it names something, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__, model_config"}

html_theme = "pydata_sphinx_theme"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False
html_sidebars: dict[str, list[str]] = {root_doc: []}
html_theme_options = {
    "logo": {"text": project},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}

SECTIONS = {
    "docs/tutorials/README": "Tutorials",
    "docs/README": "How-to",
    "docs/results/README": "Results",
    "docs/reference/README": "Reference",
    "CONTRIBUTING": "Contributing",
}
"""The site's header, from left to right: pages and what they are called there."""
LINK = re.compile(r"\]\(([\w./-]+)\.(?:md|py)(?:#[\w-]*)?\)")
REMOTE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


def below(page: str, text: str) -> list[str]:
    """Pages below a page in the navigation; all without suffix, from the repository's root.

    Args:
        page: whose entries are asked for.
        text: of the page.
    """
    if page == root_doc:
        return list(SECTIONS)
    if page == "CONTRIBUTING":
        return ["CHANGELOG", *(f"docs/decisions/{path.stem}" for path in sorted(DECISIONS.glob("*.md")))]
    if page not in SECTIONS:
        return []
    folder = (ROOT / page).parent
    linked = [(folder / link).resolve() for link in LINK.findall(text)]
    pages = [path.relative_to(ROOT).as_posix() for path in linked if path.parent == folder]
    return [name for name in dict.fromkeys(pages) if name != page]


def navigate(_: "Sphinx", page: str, source: list[str]) -> None:
    """Add the navigation to a page that is read, and the recipe's fields to theirs."""
    if page == "docs/reference/recipe":
        from fields import tables

        source[0] += tables()
    entries = [
        f"{SECTIONS[name]} </{name}>" if name in SECTIONS else f"/{name}" for name in below(page, source[0])
    ]
    if entries:
        source[0] += "\n\n".join(["", "```{toctree}\n:hidden:", "\n".join(entries) + "\n```\n"])


def check_offline(app: "Sphinx", failure: Exception | None) -> None:
    """The site opens at its first page, and works without a network.

    Raises:
        ExtensionError: if a page would fetch something from another server.
    """
    from sphinx.errors import ExtensionError

    if failure is not None:
        return
    site = Path(app.outdir)
    for page in sorted(site.rglob("*.html")):
        if fetched := REMOTE.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page}: it fetches {fetched[0]}")
    (site / "index.html").write_bytes((site / f"{root_doc}.html").read_bytes())


def setup(app: "Sphinx") -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("source-read", navigate)
    app.connect("build-finished", check_offline)
    return {"parallel_read_safe": False}  # the tutorials share one Python
