"""README.md, CONTRIBUTING.md and the pages: links, pictures, names of files, size."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeGuard

import nbformat
import pytest
import yaml
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


def test_committed_pictures_match_the_program():
    committed = {path.name: path.read_text() for path in PICTURES.iterdir()}
    assert committed == drawn(), "run python -m docs.pictures"


def test_contributing_lists_every_folder():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    folders = {line.split("/")[0] for line in run.stdout.splitlines() if "/" in line}
    listed = re.findall(r"^\| .+ \| `([\w.]+)/` \|$", CONTRIBUTING, re.MULTILINE)
    assert set(listed) == folders


PLACEHOLDER = re.compile(r"NAME|0N")


def code_spans(text: str) -> list[str]:
    """What stands in backticks, without blocks of code and without placeholders."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [span for span in re.findall(r"`([^`\n]+)`", text) if not PLACEHOLDER.search(span)]


def is_path(span: str) -> bool:
    return " " not in span and ("/" in span or (ROOT / span).exists())


def python_names(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Everything that a module defines or imports, with the classes it is in: `Metrics.record`."""
    for statement in body:
        match statement:
            case ast.ClassDef(name=name):
                yield prefix + name
                yield from python_names(statement.body, f"{prefix}{name}.")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield prefix + name
            case ast.Assign(targets=targets):
                yield from (prefix + n.id for t in targets for n in ast.walk(t) if is_name(n))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name
            case ast.ImportFrom(names=names):
                yield from (prefix + (alias.asname or alias.name) for alias in names)


def is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def yaml_names(value: object, prefix: str = "") -> Iterator[str]:
    """The keys of a YAML file, with those they are under: `app.limits`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from yaml_names(inner, f"{prefix}{key}.")


def defines(path: Path, name: str) -> bool:
    text = path.read_text()
    if path.suffix == ".py" and re.fullmatch(r"[\w.]+", name):
        return name in python_names(ast.parse(text).body)
    if path.suffix == ".yaml":
        return name in yaml_names(yaml.safe_load(text))
    return bool(re.search(rf"^\W*{re.escape(name)}", text, re.MULTILINE))


def test_contributing_names_paths_and_commands_that_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for span in code_spans(CONTRIBUTING):
        if span.startswith("make "):
            assert span.split()[1] in targets, span
        elif command := re.fullmatch(r"(?:\.venv/bin/)?python -m ([\w.]+)(.*)", span):
            assert importlib.util.find_spec(command[1]), span
            assert all((ROOT / word).exists() for word in command[2].split() if "/" in word), span
        elif is_path(span):
            assert any(ROOT.glob(span)), span


def test_contributing_names_what_the_files_define():
    """`Parameters.top_p` in `handler/request.py`: a file in the same cell defines that name."""
    section = CONTRIBUTING.split("## Where to change what")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in section.splitlines() if row.count(" | ") == 2][1:]
    assert len(rows) >= 10
    for _, change, then in rows:
        for cell in (change, then):
            spans = [span for span in code_spans(cell) if not re.match(r"make |.*python -m", span)]
            files = [path for span in spans if is_path(span) and (path := ROOT / span).is_file()]
            for name in spans:
                if not is_path(name):
                    assert any(defines(file, name) for file in files), f"{name} in {cell}"


@pytest.mark.parametrize(
    ("file", "name", "found"),
    [
        ("handler/request.py", "Decoding.top_p", True),
        ("handler/request.py", "Message.top_p", False),
        ("handler/request.py", "top_p", False),
        ("handler/apps/defaults.yaml", "app.limits.max_body_bytes", True),
        ("handler/apps/defaults.yaml", "app.engine.max_body_bytes", False),
        ("docker/config.properties", "max_request_size", True),
        ("docker/config.properties", "request_size", False),
    ],
)
def test_finds_only_whole_names(file, name, found):
    assert defines(ROOT / file, name) == found
