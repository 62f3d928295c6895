"""Build the site into build/site: gather its pages, run Sphinx, drop unused files of the theme.

A warning is an error. No page loads anything from another host, and every page can be read without
JavaScript.
"""

import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from deploy.common.paths import BUILD, UserError, shown
from docs.stage import DOCS, stage

SITE = BUILD / "site"
SURPLUS = {
    "fontawesome.js": r'\s*<script defer src="[^"]*/fontawesome\.js[^"]*"></script>',
    "the label of search": r'(?<=search-button-field search-button__button pst-js-only")'
    r' title="Search" aria-label="Search"',
}
"""Parts cut out of every page: 1.5 MB of icons that the theme loads as a font too, and a label that
differs from the visible text, which breaks voice control."""


def build(site: Path = SITE) -> None:
    """Build the site from scratch.

    Raises:
        UserError: Sphinx printed a warning or an error.
    """
    pages = site.with_name(f"{site.name}-pages")
    stage(pages)
    shutil.rmtree(site, ignore_errors=True)
    options = ["-W", "--keep-going", "--quiet", "-b", "html", "-c", str(DOCS)]
    trees = site.with_name(f"{site.name}-doctrees")
    if sphinx([*options, "--fresh-env", "-d", str(trees), str(pages), str(site)]) != 0:
        raise UserError("the site was not built: see Sphinx's messages above")
    lighten(site)


def lighten(site: Path) -> None:
    """Remove the files of the theme that no page needs."""
    static = site / "_static"
    for path in (*static.rglob("*.map"), *static.rglob("*.LICENSE.txt"), *static.glob("*.html")):
        path.unlink()
    shutil.rmtree(static / "locales")
    (static / "scripts" / "fontawesome.js").unlink()
    for page in site.rglob("*.html"):
        text = page.read_text()
        for name, pattern in SURPLUS.items():
            text, found = re.subn(pattern, "", text)
            if not found:
                raise UserError(f"{page.name}: {name} is not where the theme had it before")
        page.write_text(text)


if __name__ == "__main__":
    try:
        build()
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"the site is {shown(SITE)}/index.html")
