"""The website: built once from the committed notebooks, then read page by page as files.

What only a browser can tell (contrast, widths, requests) is `make site-check`.
"""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

from deploy.paths import ROOT, UserError
from docs import stage
from docs.build import build

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if "solutions" not in path.name]
README = (ROOT / "README.md").read_text()
COMMONMARK = MarkdownIt("commonmark").enable("table")
FORMULA = r"\n|\$\$?[^$]+\$\$?"
LIMIT = 2_000_000
"""Bytes that a chapter may weigh, uncompressed, with everything that it loads."""

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of the themes
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """A warning of Sphinx would be an error here."""
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
    """Addresses of what a browser fetches with a page."""
    for tag in page.find_all(["script", "img", "iframe", "source", "embed", "video", "audio"]):
        yield from (tag[name] for name in ("src", "srcset") if tag.get(name))
    for tag in page.find_all("link"):
        if {"stylesheet", "preload", "icon", "modulepreload"} & set(tag["rel"]):
            yield tag["href"]


def files_of(path: Path, page: BeautifulSoup) -> set[Path]:
    """The files of a page: itself, what it loads, and what its style sheets load."""
    found, todo = {path}, [path.parent / local(address) for address in loaded(page)]
    while todo:
        file = todo.pop().resolve()
        if file not in found:
            found.add(file)
            if file.suffix == ".css":
                links = re.findall(r"url\(['\"]?([^'\")]+)", file.read_text())
                todo += [file.parent / local(link) for link in links if link[:5] != "data:"]
    return found


def local(address: str) -> str:
    assert not re.match(r"([a-z]+:)?//", address), f"from another host: {address}"
    return unquote(re.split("[?#]", address)[0])


def test_a_page_loads_nothing_from_elsewhere_and_nothing_that_is_missing(pages):
    for path, page in pages.items():
        for file in files_of(path, page):
            assert file.is_file(), f"{path.name}: {file}"


def test_scripts_load_nothing_from_elsewhere(site, pages):
    """MathJax, require.js, widgets: a script that fetches another one by its address."""
    scripts = [file.read_text() for file in site.rglob("*.js")]
    scripts += [tag.get_text() for page in pages.values() for tag in page.find_all("script")]
    for script in scripts:
        assert not re.search(r"cdnjs|jsdelivr|unpkg|googleapis|gstatic|googletagmanager", script)


def test_every_link_and_anchor_leads_somewhere(site, pages):
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


@every_notebook
def test_a_chapter_is_light(site, pages, path):
    page = site / "notebooks" / f"{path.stem}.html"
    weights = {file.name: file.stat().st_size for file in files_of(page, pages[page])}
    assert sum(weights.values()) < LIMIT, sorted(weights.items(), key=lambda item: item[1])


@every_notebook
def test_all_cells_are_there_in_their_order(site, pages, path):
    """Code to the letter; prose as another reader of Markdown understands it, word for word."""
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
def test_all_outputs_are_there(site, pages, path):
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


def test_the_front_page_tells_the_story_once(site, pages):
    """What it is, the command, the reply: the README's words; a card with a figure a chapter."""
    article = pages[site / "index.html"].find("article")
    first, _ = README.split("| | chapter |\n")
    html = COMMONMARK.render(first)
    for link in article.find_all("a", class_="headerlink"):
        link.decompose()
    assert words(html) in words(article)
    cards = article.select(".chapter")
    assert [card.a["href"] for card in cards] == [f"notebooks/{p.stem}.html" for p in CHAPTERS]
    for card in cards:
        assert card.img["alt"] and (site / card.img["src"]).stat().st_size > 1000


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_readme_shows_a_figure_of_each_chapter(path):
    """The first one, as the notebook stores it (`make notebooks` takes it from there)."""
    row = next(row for row in stage.ROW.finditer(README) if row["link"] == f"notebooks/{path.name}")
    picture, alt = stage.first_figure(path)
    assert (stage.FIGURES / f"{row['number']}.png").read_bytes() == picture
    assert unescape(row["alt"]) == alt


def test_search_knows_the_chapters(site):
    index = (site / "searchindex.js").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.stem}" in index
    assert "prefil" in index  # the stem of prefill


PLANTED = r"""
[nowhere](nowhere.md), $\nothing$, but [results](benchmarks/results) and $W = L / \lambda$ at $3
"""


def test_a_warning_is_an_error(tmp_path, monkeypatch, capsys):
    """Plant a link that leads nowhere and a formula that is none, beside good ones."""
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


def test_a_figure_without_alt_text_is_refused():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.metadata = {}
    with pytest.raises(UserError, match="a figure without alt text"):
        list(stage.figures(notebook))


def test_a_chapter_that_the_readme_does_not_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"08_new.ipynb is not in the table of chapters"):
        stage._cards("", [Path("08_new.ipynb")], tmp_path)
