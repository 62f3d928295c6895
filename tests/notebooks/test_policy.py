"""What every notebook promises its readers, checked in the files; nbval runs the cells."""

import ast
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from deploy.common.paths import ROOT
from docs.generate import documents

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if "solutions" not in path.name]
IGNORED = "nbval-ignore-output"

UNIT = (
    r"×|x\b|times\b|fold\b|%|per ?cent\b|[mµun]?s\b|(?:milli|micro)?seconds?\b|minutes?\b|h\b"
    r"|hours?\b|(?:token|request|completion|step)s? (?:per|a) second|tok(?:ens)?/s|[KMGT]i?B\b"
    r"|(?:kilo|mega|giga)bytes?\b"
)
MEASURED = re.compile(
    rf"(?<![\w.])\d[\d.,]*[\s-]*(?:{UNIT})|(?<![\w.])(?<!TorchServe )0\.\d+(?![\d.]*\d)"
    r"|\b[Pp]erplexity (?:(?:is|of|to|rises|falls|at) )*\d[\d.]*"
)
"""A number with the unit of something measured, a bare ratio below 1, or a perplexity."""

NOT_MEASURED = {
    ("01_load_models", "5.6 GB"): "dolly-v2-3b's parameters times two bytes",
    ("01_load_models", "5.7 GB"): "the size of a download: handler/apps/dolly-v2-3b.yaml",
    ("models", "5.7 GB"): "the size of a download: handler/apps/dolly-v2-3b.yaml",
    ("models", "0.5 GB"): "the size of a download: handler/apps/gpt2.yaml",
    ("01_load_models", "1 GiB"): "a setting: BUDGETS in benchmarks/report/values.py",
    ("LOG", "1 GiB"): "a setting: BUDGETS in benchmarks/report/values.py",
    ("07_measure_and_scale", "1 GiB"): "a setting: handler/apps/defaults.yaml",
    ("01_load_models", "3 GiB"): "a setting of an exercise",
    ("LOG", "50 ms"): "a former setting",
    ("LOG", "100 ms"): "a constant: TICK_SECONDS in handler/llm_handler.py",
    ("LOG", "200 ms"): "a constant: TICK_DOUBLES_AT in handler/llm_handler.py",
    ("06_deploy_to_vertex_ai", "15 seconds"): "Vertex AI's autoscaler, from its documentation",
    ("06_deploy_to_vertex_ai", "60 %"): "Vertex AI's autoscaler, from its documentation",
    ("01_solutions", "64 times"): "a claim that its cell asserts",
    ("CHANGELOG", "30 seconds"): "a limit: make fast",
    ("CONTRIBUTING", "30 seconds"): "a limit: make fast",
    ("README", "30 seconds"): "a limit: make fast",
    ("setup", "30 seconds"): "a limit: make fast",
    ("vertex", "10 MB"): "Vertex AI's limit, from its documentation",
    ("vertex", "1.5 MB"): "Vertex AI's limit, from its documentation",
    ("vertex", "60 s"): "Vertex AI's limit, from its documentation",
    ("vertex", "24 GB"): "NVIDIA's L4, from Google's documentation",
    ("vertex", "40 minutes"): "a setting of the example in deploy/vertex.yaml",
    ("setup", "20 GB"): "asked of readers, with room to spare",
    ("setup", "5 GB of disk"): "asked of readers, with room to spare",
    ("setup", "4 GB of memory"): "asked of readers, with room to spare",
    ("setup", "8 GB of memory"): "asked of readers, with room to spare: make check",
}
"""A document and a phrase that people may type into its prose -> where the number comes from."""


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
def test_outputs_come_from_one_linear_run(path):
    counts = [cell.execution_count for cell in code_of(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_contains_no_unintended_errors(path):
    for cell in code_of(path):
        meant = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            assert output.get("name") != "stderr", output
            assert (output.output_type != "error") or meant, output
        assert not meant or any(o.output_type == "error" for o in cell.outputs), cell.source


@every_notebook
def test_outputs_are_small_and_contain_no_paths(path):
    outputs = json.dumps([cell.outputs for cell in code_of(path)])
    assert len(outputs) < 100_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", outputs)
    found = re.findall(r"(?:/home|/root|/Users|/work|/tmp)/[\w./-]*", without_pictures)
    assert not found


@every_notebook
def test_cells_are_short(path):
    """Imports do not count."""
    lines = [
        sum(not line.startswith(("import ", "from ")) for line in cell.source.splitlines())
        for cell in code_of(path)
    ]
    assert max(lines) <= 25 and statistics.median(lines) <= 9
    assert sum(n > 15 for n in lines) <= max(2, len(lines) // 6), sorted(lines)


@every_chapter
def test_code_is_explained(path):
    cells = read(path).cells
    prose = sum(cell.cell_type == "markdown" for cell in cells)
    assert 2 * prose >= len(cells) - 1
    assert 30 <= len(cells) <= 60


@every_notebook
def test_cells_without_compared_output_assert(path):
    """A cell whose output depends on the machine asserts what matters. There are few of them."""
    cells = code_of(path)
    ignored = [cell for cell in cells if IGNORED in cell.metadata.get("tags", [])]
    for cell in ignored:
        if cell.source.startswith("%%bash"):
            assert "--fail" in cell.source, cell.source
        else:
            assert any(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(cell.source)))
    assert len(ignored) < len(cells) / 4


@every_notebook
def test_nbval_is_controlled_by_tags_only(path):
    """nbval obeys comments too, but only tags are counted."""
    for cell in code_of(path):
        assert "NBVAL" not in cell.source.upper(), cell.source
        assert set(cell.metadata.get("tags", [])) <= {IGNORED, "raises-exception"}


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run: not in functions, not under a constant condition."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.With) or (
            isinstance(statement, ast.If) and not isinstance(statement.test, ast.Constant)
        ):
            yield from statements(statement.body)


def starts_a_server(value: ast.expr) -> bool:
    names = {
        n.func.id for n in ast.walk(value) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    }
    return bool(names & {"start", "Server", "Standin"})


@every_notebook
def test_every_server_is_stopped(path):
    started, stopped, last = Counter(), Counter(), -1
    cells = [c.source for c in code_of(path) if not c.source.startswith("%%")]
    for number, text in enumerate(cells):
        for statement in statements(ast.parse(text).body):
            if isinstance(statement, ast.Assign) and starts_a_server(statement.value):
                started.update(n.id for n in ast.walk(statement.targets[0]) if hasattr(n, "id"))
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                called = ast.unparse(statement.value)
                if name := re.fullmatch(r"stop\((\w+)\)|(\w+)\.stop\(\)", called):
                    stopped[name[1] or name[2]] += 1
                    last = number
    assert started == stopped
    assert not started or last >= len(cells) - 2


@every_chapter
def test_first_cell_states_results_needs_and_duration(path):
    first = read(path).cells[0].source
    assert first.startswith(f"# {int(path.name[:2])} ")
    for promise in ("At the end of this chapter", "You need", "It takes"):
        assert promise in first


@every_chapter
def test_ends_with_a_recap_exercises_and_solutions(path):
    last = read(path).cells[-1].source
    assert "## What you have now" in last and "### Try it out" in last
    solutions = re.search(r"\[Solutions\]\((\w+\.ipynb)\)", last).group(1)
    titles = re.findall(r"^(\d)\. ", last, re.MULTILINE)
    answers = [cell.source for cell in read(path.with_name(solutions)).cells]
    assert all(any(a.startswith(f"## {title} ") for a in answers) for title in titles)


def typed(text: str, document: str = "") -> list[str]:
    """The measured numbers that a person typed: not generated, not code, no link, not permitted."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- (table|value) \S+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", "", text)
    for phrase in (phrase for name, phrase in NOT_MEASURED if name == document):
        words = r"\s+".join(map(re.escape, phrase.split()))
        text = re.sub(rf"(?<![\w.]){words}(?!\w)", "", text)
    return [match[0] for match in MEASURED.finditer(text)]


@every_notebook
def test_chapters_print_what_they_measure(path):
    """The first cell states the memory and disk that a reader needs."""
    first, *cells = read(path).cells
    needs = re.compile(r"\d+ GB of (?:free )?(?:memory|disk)")
    assert not typed(needs.sub("", first.source), path.stem), first.source
    for cell in cells:
        if cell.cell_type == "markdown":
            assert not typed(cell.source, path.stem), cell.source


# standin/README.md describes Google's limits, which nobody measured.
@pytest.mark.parametrize("path", [p for p in documents() if p.parent.name != "standin"], ids=name)
def test_documents_generate_measured_numbers(path):
    assert not typed(path.read_text(), path.stem), "generate it, or name its source in NOT_MEASURED"


@pytest.mark.parametrize(
    "sentence",
    [
        "The server answers in 5 s.",
        "It generates 4,711 tokens/s.",
        "The first token comes after 33-44 ms.",
        "It is 20 times as fast.",
        "It reaches 0.93 of it.",
        "It completes 17 requests a second.",
        "It uses 812 megabytes, 23 percent of them for the cache.",
        "A 27-fold throughput.",
        "Perplexity rises to 17.3.",
        "| vLLM | 51 s |",
    ],
)
def test_finds_a_typed_number(sentence):
    assert typed(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes <!-- value startup.openvino_seconds -->4<!-- end --> s.",
        "Run `sleep 5 s` with TorchServe 0.12.0, Python 3.11, on 127.0.0.1, 400 tokens.",
        "See [the page](https://example.org/5s).",
    ],
)
def test_permits_generated_numbers_code_versions_and_links(sentence):
    assert not typed(sentence)


@every_notebook
def test_links_lead_to_files(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\((?!http)([^)#]+)", cell.source):
                assert (path.parent / link).exists(), link
