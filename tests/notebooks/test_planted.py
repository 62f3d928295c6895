"""The checks of the chapters find planted faults."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from deploy.common.paths import ROOT
from tests.notebooks import test_policy as policy

CHAPTER = ROOT / "notebooks" / "04_serve_with_torchserve.ipynb"
QUICK = ROOT / "notebooks" / "02_solutions.ipynb"


@pytest.fixture
def planted():
    """Write a changed copy of a notebook beside the real ones, and remove it afterwards."""
    path = ROOT / "notebooks" / "planted.ipynb"

    def plant(source: Path, change) -> Path:
        notebook = nbformat.read(source, as_version=4)
        change([cell for cell in notebook.cells if cell.cell_type == "code"])
        nbformat.write(notebook, path)
        return path

    yield plant
    path.unlink(missing_ok=True)


def nbval(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--nbval", path, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_accepts_an_unchanged_chapter(planted):
    run = nbval(planted(QUICK, lambda cells: None))
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_skips_chapters_that_need_docker_without_it(monkeypatch):
    """Also when their files are named, as `python -m tests notebooks/05` does."""
    monkeypatch.setenv("DOCKER", "/nonexistent")
    monkeypatch.delenv("REQUIRE_DOCKER", raising=False)
    run = nbval(ROOT / "notebooks" / "05_solutions.ipynb")
    assert run.returncode == 0 and "no container runtime: /nonexistent cannot" in run.stdout
    assert re.search(r"= \d+ skipped in", run.stdout), run.stdout
    monkeypatch.setenv("REQUIRE_DOCKER", "1")
    assert nbval(ROOT / "notebooks" / "05_solutions.ipynb").returncode != 0


@pytest.mark.slow
def test_finds_a_changed_output(planted):
    def change(cells):
        output = next(o for c in cells for o in c.outputs if "429" in o.get("text", ""))
        output["text"] = output["text"].replace("429", "428")

    run = nbval(planted(QUICK, change))
    assert run.returncode == 1 and "Cell outputs differ" in run.stdout, run.stdout


@pytest.mark.slow
def test_finds_a_missing_series_in_a_figure(planted):
    """The content of a figure is compared as text; its pixels are not."""
    path = planted(QUICK, lambda cells: None)
    notebook = nbformat.v4.new_notebook()
    draw = "from benchmarks.report import plots\nfrom course.helpers import result, show\n"
    draw += "show(plots.serving(result('serving')), 'All systems.')"
    notebook.cells = [nbformat.v4.new_code_cell(draw)]
    NotebookClient(notebook, resources={"metadata": {"path": path.parent}}).execute()
    nbformat.write(notebook, path)
    run = nbval(path)
    assert run.returncode == 0, run.stdout
    data = notebook.cells[0].outputs[0].data
    data["text/plain"] = data["text/plain"].replace("'vLLM, bfloat16', ", "")
    nbformat.write(notebook, path)
    run = nbval(path)
    assert run.returncode == 1 and "vLLM, bfloat16" in run.stdout, run.stdout


def test_finds_a_cell_that_was_not_run(planted):
    def change(cells):
        cells[2].execution_count, cells[2].outputs = None, []

    with pytest.raises(AssertionError):
        policy.test_outputs_come_from_one_linear_run(planted(QUICK, change))


@pytest.mark.parametrize(
    ("which", "instead"),
    [
        ("server", "print('bye')"),
        ("server", "# stop(server)"),
        ("server", "if False: stop(server)"),
        ("second", "print('bye')"),
    ],
)
def test_finds_a_server_that_is_left_running(planted, which, instead):
    def change(cells):
        for cell in cells:
            cell.source = re.sub(rf"\bstop\({which}\)", instead, cell.source)

    with pytest.raises(AssertionError):
        policy.test_every_server_is_stopped(planted(CHAPTER, change))
    policy.test_every_server_is_stopped(CHAPTER)


@pytest.mark.parametrize("instead", ["# assert enough", "# NBVAL_IGNORE_OUTPUT"])
def test_finds_a_missing_assertion(planted, instead):
    def change(cells):
        cell = next(c for c in cells if policy.IGNORED in c.metadata.get("tags", []))
        cell.source = re.sub(r"^assert .*", instead, cell.source, flags=re.MULTILINE)

    path = planted(CHAPTER, change)
    with pytest.raises(AssertionError):
        policy.test_cells_without_compared_output_assert(path)
        policy.test_nbval_is_controlled_by_tags_only(path)


def test_finds_a_measured_number_in_prose(planted):
    path = planted(CHAPTER, lambda cells: None)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].source = "It answers after 34 ms."
    nbformat.write(notebook, path)
    with pytest.raises(AssertionError):
        policy.test_chapters_print_what_they_measure(path)
