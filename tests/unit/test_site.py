"""The website: built once from the committed notebooks, then checked page by page as files.

`make site-check` checks what needs a browser: contrast, widths, requests.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

from deploy.common.paths import ROOT, UserError
from docs import stage
from docs.build import build

NOTEBOOKS, CHAPTERS = stage.notebooks(), stage.chapters()
README = (ROOT / "README.md").read_text()
COMMONMARK = MarkdownIt("commonmark").enable("table")
FORMULA = r"\n|\$\$?[^$]+\$\$?"
LIMIT = 2_000_000
"""Bytes of a page, uncompressed, with everything that it loads."""
ADDRESS = re.compile(r"""https?://[^\s"'`()<>\\]+|(?<=["'`(])//[\w-]+\.[^\s"'`()<>\\]+""")
NAMESPACES = {f"http://www.w3.org/{name}" for name in ("1998/Math/MathML", "2000/svg")}
COMMENTED = {
    "clipboard.min.js": "https://clipboardjs.com/",
    "copybutton.css": "https://codepen.io/mildrenben/pen/rVBrpK",
    "english-stemmer.js": "https://snowballstem.org/",
    "mystnb.css": "https://github.com/jupyter/notebook/blob/52581f8eda9b319eb0390ac77fe5903c38f81e3e/"
    "notebook/static/notebook/less/ansicolors.less#L14-L21 "
    "https://m2.material.io/design/color/the-color-system.html#tools-for-picking-colors "
    "https://nbsphinx.readthedocs.io/en/latest/code-cells.html#ANSI-Colors "
    "https://github.com/executablebooks/sphinx-book-theme/blob/"
    "eb1b6baf098b27605e8f2b7b2979b17ebf1b9540/src/sphinx_book_theme/assets/styles/extensions/"
    "_myst-nb.scss",
    "pydata-sphinx-theme.css": "https://getbootstrap.com/ https://fontawesome.com "
    "https://fontawesome.com/license/free https://github.com/twbs/bootstrap/blob/main/LICENSE",
    "pydata-sphinx-theme.js": "https://pydata-sphinx-theme.readthedocs.io/en/stable/user_guide/"
    "version-dropdown.html",
    "searchtools.js": "https://developer.mozilla.org/en-US/docs/Web/JavaScript/Guide/"
    "Regular_Expressions#escaping",
    "sphinx-book-theme.css": "https://sass-guidelin.es/#architecture",
}
"""Addresses that the theme's files name in comments and messages, and do not load."""

pytestmark = [
    pytest.mark.slow,  # builds the site
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),  # of the themes
    pytest.mark.filterwarnings("ignore::bs4.XMLParsedAsHTMLWarning"),  # SVG
]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Build the site once. A warning of Sphinx is an error."""
    folder = tmp_path_factory.mktemp("site") / "site"
    build(folder)
    return folder


@pytest.fixture(scope="session")
def pages(site) -> dict[Path, BeautifulSoup]:
    return {path: read(path) for path in site.rglob("*.html")}


def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def words(html: str | BeautifulSoup) -> str:
    soup = BeautifulSoup(html, "html.parser") if isinstance(html, str) else html
    return " ".join(soup.get_text().split())


def chapter(pages: dict, site: Path, notebook: Path) -> BeautifulSoup:
    return pages[site / "notebooks" / f"{notebook.stem}.html"].find("article")


def loaded(page: BeautifulSoup) -> Iterator[str]:
    """Yield the addresses that a browser loads with a page."""
    for tag in page.find_all(True):
        names = ["src", "srcset", "data", "poster", *["xlink:href", "href"] * (tag.name == "image")]
        yield from (tag[name] for name in names if tag.get(name))
        yield from in_css(tag.get("style", ""))
        if tag.name == "style":
            yield from in_css(tag.get_text())
        if tag.name == "link" and {"stylesheet", "preload", "icon", "modulepreload"} & {
            *tag["rel"]
        }:
            yield tag["href"]


def in_css(text: str) -> list[str]:
    links = re.findall(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""", text)
    return [one or other for one, other in links if (one or other)[:5] != "data:"]


def files_of(path: Path, page: BeautifulSoup) -> set[Path]:
    """Return the page itself, the files it loads, and those that its style sheets load."""
    found = {path}
    todo = [path.parent / local(a) for a in loaded(page) if not a.startswith(("data:", "#"))]
    while todo:
        file = todo.pop().resolve()
        if file not in found:
            found.add(file)
            if file.suffix == ".css":
                todo += [file.parent / local(link) for link in in_css(file.read_text())]
    return found


def elsewhere(name: str, text: str) -> set[str]:
    """Return the addresses of other hosts in a file, except in links and text."""
    known = NAMESPACES | {*COMMENTED.get(re.sub(r"\.[0-9a-f]{64}", "", name), "").split()}
    if name.endswith((".html", ".svg")):
        page = BeautifulSoup(text, "html.parser")
        parts = [
            f'"{" ".join(value) if isinstance(value, list) else value}"'
            for tag in page.find_all(True)
            for key, value in tag.attrs.items()
            if (tag.name, key) != ("a", "href") and not key.startswith(("xmlns", "rdf:"))
        ]
        parts += [tag.get_text() for tag in page.find_all(["script", "style"])]
        text = "\n".join(parts)
    return {match[0] for match in ADDRESS.finditer(text)} - known


def without_alt(page: BeautifulSoup) -> list[str]:
    return [str(tag) for tag in page.find_all(["img", "image"]) if not tag.get("alt", "").strip()]


def local(address: str) -> str:
    assert not re.match(r"([a-z]+:)?//", address), f"from another host: {address}"
    return unquote(re.split("[?#]", address)[0])


def test_page_loads_only_files_of_the_site(pages):
    for path, page in pages.items():
        for file in files_of(path, page):
            assert file.is_file(), f"{path.name}: {file}"


def test_files_mention_no_other_host(site):
    """Scripts, style sheets, pictures and attributes name none. Links and text may."""
    for path in site.rglob("*"):
        if path.suffix in {".html", ".js", ".css", ".svg"}:
            found = elsewhere(path.name, path.read_text())
            assert not found, f"{path.relative_to(site)} names another host: {found}"


@pytest.mark.parametrize(
    "planted",
    [
        '<p style="background: url(https://example.org/a.png)">',
        '<style>@import "//example.org/a.css";</style>',
        '<object data="https://example.org/a.svg"></object>',
        '<video poster="https://example.org/a.png"></video>',
        '<svg><image href="https://example.org/a.png"/></svg>',
        '<input type="image" src="//example.org/a.png">',
        '<script>import("https://example.org/a.js")</script>',
        "<script>fetch('//example.org/a.json')</script>",
        '<link rel="prefetch" href="https://example.org/a.js">',
    ],
)
def test_finds_another_host(planted):
    assert elsewhere("index.html", f"<html><body>{planted}</body></html>")


def test_finds_another_host_in_files_but_not_in_links():
    assert elsewhere("site.css", '@import url("https://example.org/a.css");')
    assert elsewhere("pydata-sphinx-theme.js", 'fetch("https://example.org/a.json")')
    assert not elsewhere("index.html", '<a href="https://example.org">https://example.org</a>')


def test_pictures_have_alt_texts(site, pages):
    for path, page in pages.items():
        lost = without_alt(page)
        assert not lost, f"{path.relative_to(site)}: pictures without alt text: {lost}"
    assert without_alt(BeautifulSoup(COMMONMARK.render("![](a.png) ![b](b.png)"), "html.parser"))


def test_links_and_anchors_exist(site, pages):
    anchors = {
        path.resolve(): {tag["id"] for tag in page.find_all(id=True)}
        for path, page in pages.items()
    }
    for path, page in pages.items():
        for tag in page.find_all("a", href=True):
            if not re.match(r"[a-z]+:", tag["href"]):
                target, anchor = urldefrag(tag["href"])
                file = (path.parent / unquote(target)).resolve() if target else path.resolve()
                assert file.is_file(), f"{path.name}: {tag}"
                assert not anchor or unquote(anchor) in anchors[file], f"{path.name}: {tag}"


def test_page_is_smaller_than_the_limit(site, pages):
    for path, page in pages.items():
        weights = {file.name: file.stat().st_size for file in files_of(path, page)}
        heavy = sorted(weights.items(), key=lambda item: -item[1])[:3]
        assert sum(weights.values()) < LIMIT, f"{path.relative_to(site)} is heavy: {heavy}"


@every_notebook
def test_page_shows_every_cell_in_order(site, pages, path):
    """Code is equal; prose has the words that another Markdown parser reads."""
    cells = nbformat.read(path, as_version=4).cells
    article = chapter(pages, site, path)
    shown = [tag.get_text().rstrip("\n") for tag in article.select("div.cell_input pre")]
    assert shown == [cell.source.rstrip("\n") for cell in cells if cell.cell_type == "code"]
    for link in article.find_all("a", class_="headerlink"):
        link.decompose()
    text, place = words(article), 0
    for cell in cells:
        if cell.cell_type == "markdown":
            for block in re.split(FORMULA, COMMONMARK.render(cell.source)):
                place = text.index(words(block), place)


@every_notebook
def test_page_shows_every_output(site, pages, path):
    article = chapter(pages, site, path)
    text = words(article)
    outputs = [
        output
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            assert " ".join(output.text.split()) in text
        elif output.output_type == "error":
            assert output.ename in text
        elif "text/html" in data:
            assert words(data["text/html"]) in text
        elif "text/markdown" in data:
            assert words(COMMONMARK.render(data["text/markdown"])) in text
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    alts = [alt for _, alt in stage.figures(nbformat.read(path, as_version=4))]
    assert [tag["alt"] for tag in article.select("div.cell_output img")] == alts
    assert len(alts) == len(pictures)


def test_front_page_is_the_readme_with_a_card_for_each_chapter(site, pages):
    article = pages[site / "index.html"].find("article")
    for link in article.find_all("a", class_="headerlink"):
        link.decompose()
    table = stage.CHAPTERS.search(README)[0]
    for part in README.split(table):
        assert words(COMMONMARK.render(part)) in words(article)
    cards = article.select(".chapter")
    assert [card.a["href"] for card in cards] == [f"notebooks/{p.stem}.html" for p in CHAPTERS]
    for card, path in zip(cards, CHAPTERS, strict=True):
        picture, alt = stage.first_figure(path)
        assert card.img["alt"] == alt and (site / card.img["src"]).read_bytes() == picture


def test_front_page_shows_pictures_for_light_and_dark(site, pages):
    article = pages[site / "index.html"].find("article")
    for theme in ("light", "dark"):
        shown = article.select(f"img.only-{theme}")
        assert [tag["src"].split("-")[-1] for tag in shown] == [f"{theme}.svg"] * 4


def test_every_document_is_a_page_of_the_menu(site, pages):
    menu = {tag["href"] for tag in pages[site / "index.html"].select("nav.bd-links a")}
    for path in stage.documents():
        page = path.relative_to(ROOT).with_suffix(".html").as_posix()
        assert page in menu or page == "README.html"


def test_rejects_a_readme_without_a_table_of_chapters(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# A course")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"README.md: should have a table .* Chapter"):
        stage._front_page(tmp_path)


def test_card_keeps_any_alt_text(tmp_path, monkeypatch):
    alt = "a | \"b\" 'c' [d] <e> & *f* \\1 $x$"
    monkeypatch.setattr(stage, "first_figure", lambda path: (b"", alt))
    card = stage._cards(stage.chapter_rows(README)[:1], tmp_path).splitlines()[2]
    assert BeautifulSoup(COMMONMARK.render(card), "html.parser").img["alt"] == alt


def test_last_chapter_links_to_the_front_page(site, pages):
    links = chapter(pages, site, CHAPTERS[-1]).find_all("a", href="../index.html")
    assert [words(link) for link in links] == ["README"]


def test_search_index_has_the_chapters(site):
    index = (site / "searchindex.js").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.stem}" in index
    assert "prefil" in index  # the stem of prefill
    assert "text_sha256" not in index, "results are data, not pages to read"


PLANTED = r"""
[nowhere](nowhere.md), $\nothing$, but [results](benchmarks/results) and $W = L / \lambda$ at $3
"""


def test_rejects_a_sphinx_warning(tmp_path, monkeypatch, capsys):
    """Plant a broken link and a broken formula beside good ones."""
    planted = tmp_path / "docs"
    planted.mkdir()
    (planted / "index.md").write_text((stage.DOCS / "index.md").read_text() + PLANTED)
    monkeypatch.setattr(stage, "DOCS", planted)
    with pytest.raises(UserError, match="the site was not built"):
        build(tmp_path / "site")
    complaints = capsys.readouterr().err
    assert complaints.count("WARNING") == 2
    assert "nowhere.md" in complaints and "nothing" in complaints
    paragraph = read(tmp_path / "site" / "index.html").find("article").find_all("p")[-1]
    assert "λ" in paragraph.math.get_text() and paragraph.get_text().endswith(" at $3")
    results = read(tmp_path / "site" / "benchmarks" / "results.html")
    assert "serving.json" in words(results.find("article"))


def test_rejects_a_figure_without_alt_text():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.metadata = {}
    with pytest.raises(UserError, match="a figure without alt text"):
        list(stage.figures(notebook))


@pytest.mark.parametrize("planted", ["![a plot](plot.png)", "image/svg+xml"])
def test_rejects_another_kind_of_picture_in_a_chapter(tmp_path, planted):
    """A picture in Markdown or SVG has no alt text that `show` stored."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    if planted.startswith("!"):
        notebook.cells[0].source += f"\n\n{planted}"
    else:
        output = nbformat.v4.new_output("display_data", {planted: "<svg/>"})
        next(cell for cell in notebook.cells if cell.cell_type == "code").outputs.append(output)
    path = tmp_path / NOTEBOOKS[0].name
    nbformat.write(notebook, path)
    with pytest.raises(UserError, match=re.escape(f"{path.name}: a picture that `show` did not")):
        stage._write_notebook(path, tmp_path)
