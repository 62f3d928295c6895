"""Sphinx's settings for the pages that stage.py gathers. `make site` uses them."""

import tomllib
from hashlib import sha256
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx

from deploy.common.paths import ROOT
from docs.stage import figures

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository", "")
"""The repository's address from `[project.urls]` in pyproject.toml, if there is one."""

project = PROJECT["description"].split(":")[0]
html_title = project
version = release = PROJECT["version"]
copyright = ""
language = "en"
smartquotes = False  # outputs hold code, where quotation marks must stay as they are

highlight_language = "none"  # a block that names no language is text
extensions = ["myst_nb", "sphinx_copybutton", "docs.mathml"]
html_math_renderer = "mathml"
myst_enable_extensions = ["colon_fence", "dollarmath", "html_image"]
myst_dmath_allow_digits = myst_dmath_allow_space = False  # "$3" is a price
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
# Widgets would load scripts from other hosts. Notebooks store a text for each of them.
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

html_theme = "sphinx_book_theme"
html_baseurl = ""
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
templates_path = ["templates"]
html_sidebars = {"**": ["home.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_last_updated_fmt = None
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "navbar_persistent": [],
    "footer_content_items": [],
    "show_prev_next": False,  # chapters end with their own links
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if REPOSITORY:
    html_theme_options |= {"repository_url": REPOSITORY, "use_repository_button": True}
# No links to Colab and Binder: a chapter needs the whole repository, Python 3.11 and the lock,
# installed without following dependencies. Neither service can be told all three.

copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_selector = "div.highlight:not(.output *) pre"


def alt_texts(app: Sphinx, page: nodes.document) -> None:
    """Give pictures in outputs their alt texts, which MyST-NB does not read from there."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix == ".ipynb":
        notebook = nbformat.read(path, as_version=4)
        alts = {sha256(picture).hexdigest(): alt for picture, alt in figures(notebook)}
        for image in page.findall(nodes.image):  # MyST-NB names files by their hash
            image["alt"] = alts[Path(image["uri"]).stem]


def scrolling_figures(app: Sphinx, page: nodes.document) -> None:
    """Put each figure into a box. On a phone the figure keeps its size and the box scrolls.

    The theme's script makes boxes of that class reachable with the Tab key.
    """
    for image in list(page.findall(nodes.image)):
        if {"only-light", "only-dark"} & set(image["classes"]):
            continue  # README.md's pictures fit a phone
        alone = isinstance(image.parent, nodes.paragraph) and len(image.parent) == 1
        shown = image.parent if alone else image
        if "chapter" not in shown.parent.get("classes", []):  # a card of the front page
            box = nodes.container(classes=["figure-box", "pst-scrollable-table-container"])
            shown.replace_self(box)
            box += image


def setup(app: Sphinx) -> None:
    """Register the hooks; Sphinx calls this function."""
    app.connect("doctree-read", alt_texts)
    app.connect("doctree-read", scrolling_figures)
