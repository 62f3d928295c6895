"""What every chapter promises its readers, read off the committed files; nbval runs the cells."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from deploy.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if "solutions" not in path.name]
IGNORED = "nbval-ignore-output"

MEASURED = re.compile(
    r"\d[\d.,]*\s*(×|x\b|%|ms\b|s\b|seconds|minutes|tokens (?:per|a) second|tokens/s|[KMG]i?B\b)"
)
"""A number with the unit of something measured. Chapters print those; prose would rot."""

SAID = {
    "5.6 GB": "dolly's parameters times two bytes",
    "5.7 GB": "the download's size, from the app's YAML",
    "1 GiB": "a setting",
    "3 GiB": "a setting",
    "15 seconds": "Vertex AI's autoscaler: how often it looks, from its documentation",
    "60 %": "Vertex AI's autoscaler: its target without a setting, likewise",
}
"""Numbers that prose may name, and why they are not measured."""


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def name(path: Path) -> str:
    return path.stem


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=name)


@every_notebook
def test_its_outputs_come_from_one_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_of(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_it_holds_no_accidents(path):
    for cell in code_of(path):
        meant = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            assert output.get("name") != "stderr", output
            assert (output.output_type != "error") or meant, output
        assert not meant or any(o.output_type == "error" for o in cell.outputs), cell.source


@every_notebook
def test_its_outputs_are_small_and_know_no_machine(path):
    outputs = json.dumps([cell.outputs for cell in code_of(path)])
    assert len(outputs) < 100_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", outputs)
    found = re.findall(r"(?:/home|/root|/Users|/work|/tmp)/[\w./-]*", without_pictures)
    assert not found


@every_notebook
def test_its_cells_are_short(path):
    lines = [len(cell.source.splitlines()) for cell in code_of(path)]
    assert max(lines) <= 25 and statistics.median(lines) <= 10
    assert sum(n > 15 for n in lines) <= max(2, len(lines) // 6), sorted(lines)


@every_chapter
def test_code_is_explained(path):
    cells = read(path).cells
    prose = sum(cell.cell_type == "markdown" for cell in cells)
    assert 2 * prose >= len(cells) - 1
    assert 30 <= len(cells) <= 60


@every_notebook
def test_what_is_not_compared_is_checked(path):
    """A cell whose output depends on the machine asserts what matters; few do."""
    cells = code_of(path)
    ignored = [cell for cell in cells if IGNORED in cell.metadata.get("tags", [])]
    for cell in ignored:
        assert "assert" in cell.source or "--fail" in cell.source, cell.source
    assert len(ignored) < len(cells) / 4


@every_notebook
def test_every_server_is_stopped(path):
    cells = code_of(path)
    if any(re.search(r"\bstart\(|\.start\b", cell.source) for cell in cells):
        last = [cell.source for cell in cells if re.search(r"\bstop\(", cell.source)]
        assert last and last[-1] in [cell.source for cell in cells[-2:]]


@every_chapter
def test_the_first_screen_lets_a_reader_decide(path):
    first = read(path).cells[0].source
    assert first.startswith(f"# {int(path.name[:2])} ")
    for promise in ("At the end of this chapter", "You need", "It takes"):
        assert promise in first


@every_chapter
def test_it_ends_with_a_recap_exercises_and_solutions(path):
    last = read(path).cells[-1].source
    assert "## What you have now" in last and "### Try it out" in last
    solutions = re.search(r"\[Solutions\]\((\w+\.ipynb)\)", last).group(1)
    titles = re.findall(r"^(\d)\. ", last, re.MULTILINE)
    answers = [cell.source for cell in read(path.with_name(solutions)).cells]
    assert all(any(a.startswith(f"## {title} ") for a in answers) for title in titles)


@every_notebook
def test_no_measured_number_is_typed_into_prose(path):
    for cell in read(path).cells[1:]:
        if cell.cell_type == "markdown":
            text = re.sub(r"`[^`]*`", "", cell.source)
            found = [m.group(0) for m in MEASURED.finditer(text) if m.group(0) not in SAID]
            assert not found, cell.source


@every_notebook
def test_its_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\((?!http)([^)#]+)", cell.source):
                assert (path.parent / link).exists(), link
