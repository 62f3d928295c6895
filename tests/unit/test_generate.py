"""docs.generate: marked parts of documents, and what it rejects."""

import pytest

from benchmarks.record import read
from benchmarks.report.values import VALUES, value
from deploy.common.paths import UserError
from docs.generate import BLOCKS, SETTINGS, declared, documents, generate

VALUE = "serving.to_vllm_32"


def test_documents_are_up_to_date():
    for path in documents():
        assert generate(path.read_text()) == path.read_text(), "run python -m docs.generate"


def test_fills_blocks_and_values():
    text = f"A\n\n<!-- table http -->\n<!-- end -->\n\nIt is <!-- value {VALUE} -->0<!-- end -->.\n"
    filled = generate(text)
    assert f"<!-- table http -->\n{BLOCKS['http']()}\n<!-- end -->" in filled
    assert f"It is <!-- value {VALUE} -->{value(VALUE)}<!-- end -->." in filled
    assert generate(filled) == filled


@pytest.mark.parametrize(
    "code", [f"`<!-- value {VALUE} -->0<!-- end -->`", "```\n<!-- table http -->\n```"]
)
def test_leaves_code_alone(code):
    assert generate(f"A\n{code}\n") == f"A\n{code}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A <!-- value x -->1", "has no <!-- end -->"),
        (f"A <!-- value x -->1 <!-- value {VALUE} -->1<!-- end -->", "has no <!-- end -->"),
        ("A <!-- value http.speed -->1<!-- end -->", "no value 'http.speed'"),
        ("A <!-- value experiments.speed -->1<!-- end -->", "no value 'experiments.speed'"),
        ("<!-- table speeds -->\n<!-- end -->", "no block 'speeds'"),
        (f"A\n<!-- value {VALUE} -->1<!-- end -->", "begins a line"),
        (f"- <!-- value {VALUE} -->1<!-- end -->", "begins a line"),
    ],
)
def test_rejects(text, message):
    with pytest.raises(UserError, match=message):
        generate(text)


def test_every_value_is_a_number_that_a_document_has():
    text = "".join(path.read_text() for path in documents())
    for name, write in (VALUES | SETTINGS).items():
        assert float(write()) != 0
        assert f"<!-- value {name} -->" in text, f"{name}: no document has it"


def test_reads_settings_where_they_are_declared():
    text = "Over the limit by <!-- value limits.over_body_kib -->0<!-- end --> KiB."
    size = declared("deploy/torchserve/launch.py", "OVER_LIMIT")
    assert f"-->{size // 1024}<!--" in generate(text)
    with pytest.raises(UserError, match="does not set max_size"):
        declared("docker/config.properties", "max_size")


def test_every_experiment_says_what_it_is():
    text = "".join(path.read_text() for path in documents())
    for name, experiment in read("experiments")["measurements"].items():
        assert {"value", "unit", "what", "date"} <= experiment.keys()
        assert f"experiments.{name} -->" in text or name.startswith("torchserve_")
