"""README.md, CONTRIBUTING.md and the pages: links, pictures, names of files, size."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

from deploy.common.paths import ROOT
from docs import stage
from docs.pictures import PICTURES, drawn

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
GITHUB = sorted((ROOT / ".github").rglob("*.md"))
DOCUMENTS = [*stage.documents(), *GITHUB, ROOT / "standin" / "README.md"]
LARGEST_README = 8192
"""Bytes: one screen and a half."""

markdown = MarkdownIt("commonmark").enable("table")
every_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def rendered(path: Path) -> BeautifulSoup:
    text = re.sub(r"\A---\n.*?^---\n", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return BeautifulSoup(markdown.render(text), "html.parser")


def anchors(path: Path) -> set[str]:
    """The ids that GitHub gives to headings."""
    headings = rendered(path).find_all(re.compile("h[1-6]"))
    words = [re.sub(r"[^\w\- ]", "", heading.get_text().lower()) for heading in headings]
    return {text.replace(" ", "-") for text in words}


def targets(path: Path) -> Iterator[str]:
    page = rendered(path)
    for tag in page.find_all(["a", "img", "source"]):
        yield from (tag[name] for name in ("href", "src", "srcset") if tag.get(name))


@every_document
def test_links_and_anchors_exist(path):
    for target in targets(path):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), target


@every_document
def test_pictures_have_alt_texts(path):
    for picture in rendered(path).find_all("img"):
        assert picture.get("alt", "").strip(), picture


def test_readme_is_short():
    assert len(README.encode()) <= LARGEST_README


def test_readme_lists_every_chapter_with_its_title():
    rows = stage.chapter_rows(README)
    assert [ROOT / row["link"] for row in rows] == stage.chapters()
    for row in rows:
        first = nbformat.read(ROOT / row["link"], as_version=4).cells[0].source.splitlines()[0]
        assert first == f"# {row['number']} {row['title']}"


def test_pictures_are_those_that_the_program_draws():
    committed = {path.name: path.read_text() for path in PICTURES.iterdir()}
    assert committed == drawn(), "run python -m docs.pictures"


def test_contributing_lists_every_room():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in run.stdout.splitlines() if "/" in line}
    rooms = set(re.findall(r"^\| .+ \| `(\w+)/` \|$", CONTRIBUTING, re.MULTILINE))
    assert rooms == {folder for folder in folders if not folder.startswith(".")}


def test_contributing_names_files_and_names_that_exist():
    """`top_p` in `handler/request.py`: the file exists and holds the name."""
    rows = CONTRIBUTING.split("## Where to change what")[1].split("\n## ")[0].splitlines()
    places = [row.split(" | ")[1] for row in rows if row.count(" | ") == 2][1:]
    assert len(places) >= 10
    for place in places:
        code = re.findall(r"`([^`]+)`", place)
        files = [ROOT / name for name in code if "/" in name and "NAME" not in name]
        names = [name for name in code if "/" not in name and not (ROOT / name).exists()]
        files += [ROOT / name for name in code if "/" not in name and (ROOT / name).exists()]
        assert files or "NAME" in place, place
        assert all(file.exists() for file in files), place
        texts = "".join(file.read_text() for file in files if file.is_file())
        for name in names:
            assert name.split(".")[-1] in texts, f"{name} is not in {files}"
