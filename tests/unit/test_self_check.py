"""The check that an engine generates what its model chooses, after an export and at each start."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

import deploy.archive.verify
import handler.engine.transformers_engine as transformers_engine
from deploy.archive.build import prepare
from deploy.archive.verify import verify
from handler.config import engine_config
from handler.engine import create_engine
from handler.engine.batch import Batch
from handler.engine.openvino_engine import OpenVINOEngine
from handler.engine.self_check import (
    MEAN_TOLERANCES,
    RECORD,
    TOKENS,
    TOLERANCE,
    Completion,
    DamagedModelError,
    Record,
    SelfCheckError,
    compare,
    prompts,
)
from tests.families.models import write_family

pytestmark = pytest.mark.slow


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.mark.parametrize(
    ("config", "context", "parameters", "length", "note"),
    [
        ({}, 2048, 10**6, 128, ""),
        ({"sliding_window": 300}, 2048, 10**6, 332, ""),
        ({"sliding_window": None}, 2048, 10**6, 128, ""),
        ({"sliding_window": 4096}, 2048, 10**6, 128, ""),
        ({"text_config": {"sliding_window": 200}}, 2048, 10**6, 232, ""),
        ({"attention_chunk_size": 64}, 2048, 10**6, 96, ""),
        ({"window_size": 16, "sliding_window": 8}, 2048, 10**6, 48, ""),
        ({"sliding_window": 1500}, 8192, 10**6, 1024, "1500"),
        ({"sliding_window": 300}, 2048, 10**9, 50, "300"),
        ({}, 2048, 10**11, 24, ""),
        ({}, 40, 10**6, 23, ""),
        ({}, 18, 10**6, 1, ""),
    ],
)
def test_long_prompt_exceeds_the_window_if_affordable(
    config: dict, context: int, parameters: int, length: int, note: str
):
    (short, long), uncovered = prompts(characters, config, context, parameters)
    assert len(short) <= max(1, context - max(TOKENS) - 1)
    assert length <= len(long) <= min(length + 15, max(1, context - max(TOKENS) - 1))
    assert (note in uncovered) if note else uncovered == ""


def test_error_names_the_place_and_both_limits():
    completion = Completion("Once", [1, 2], [3, 4], "alone")
    compare(completion, [0.0, TOLERANCE], "float32", str)
    place = rf"'Once' \(2 tokens, alone\), token 2 is .* 2.0 .* {TOLERANCE} are"
    with pytest.raises(SelfCheckError, match=place):
        compare(completion, [0.0, 2.0], "float32", str)
    for precision, most in MEAN_TOLERANCES.items():
        compare(completion, [0.0, 2 * most], precision, str)
        with pytest.raises(SelfCheckError, match=rf"weights in {precision} .* {most} are allowed"):
            compare(completion, [0.1, 2 * most], precision, str)
    with pytest.raises(DamagedModelError, match="not numbers"):
        compare(completion, [float("nan"), 0.0], "int8", str)


def test_right_engine_passes_at_its_start(tiny_llama: Path):
    engine = create_engine(tiny_llama, engine_config(name="transformers"))
    assert "self-check passed in" in engine.description
    assert engine.unfinished == 0


def test_check_can_be_switched_off(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transformers_engine, "score", None)
    engine = create_engine(tiny_llama, engine_config(name="transformers", self_check=False))
    assert "self-check" not in engine.description


def test_engine_that_is_wrong_only_in_a_batch_serves_one_sequence_at_a_time(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(self: Batch, other: Batch) -> None:
        join(self, other)
        if len(self) > 1:
            for layer in self.cache.layers:  # each sequence gets the cache of another
                layer.keys, layer.values = layer.keys.flip(0), layer.values.flip(0)

    join = Batch.join
    monkeypatch.setattr(Batch, "join", broken)
    config = engine_config(name="transformers", transformers={"max_prefill_tokens": 64})
    engine = create_engine(tiny_llama, config)
    assert "with one sequence at a time" in engine.description


def test_engine_that_is_wrong_alone_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    def shifted(self, ids, mask, cache):
        return forward(self, ids, mask, cache).roll(1, -1)

    forward = transformers_engine.TransformersEngine._forward
    monkeypatch.setattr(transformers_engine.TransformersEngine, "_forward", shifted)
    with pytest.raises(SelfCheckError, match="generates different text than the model"):
        create_engine(tiny_llama, engine_config(name="transformers"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an archive for the openvino engine, with the record of its check."""
    weights = write_family(tmp_path_factory.mktemp("weights") / "checked-llama", "llama")
    target = tmp_path_factory.mktemp("archive") / "prepared"
    return prepare("checked", weights, target, engine={"name": "openvino"}) / "weights"


def start(weights: Path) -> OpenVINOEngine:
    return OpenVINOEngine(weights, engine_config(name="openvino"))


def test_archive_has_the_record_of_the_check(checked: Path):
    record = Record.read(checked / RECORD)
    assert record.engine.startswith("openvino") and record.precision == "int8"
    assert record.reference.startswith("transformers") and record.reference.endswith("float32")
    assert record.largest_gap <= TOLERANCE
    assert [c.beside for c in record.completions] == ["in a batch"] * 2 + ["alone"] * 2
    assert [len(c.generated) for c in record.completions] == [*TOKENS, *TOKENS]


def test_start_repeats_the_recorded_check(checked: Path):
    assert "self-check passed in" in start(checked).description


def test_start_with_damaged_weights_is_refused(checked: Path, tmp_path: Path):
    """If a shape of the graph is damaged, OpenVINO itself reports it."""
    damaged = shutil.copytree(checked, tmp_path / "weights")
    path = damaged / "openvino_model.bin"
    content = path.read_bytes()
    found = 0
    for begin, end in [(0.3, 0.5), (0.4, 0.6), (0.5, 0.7)]:
        first, last = int(begin * len(content)), int(end * len(content))
        path.unlink()
        path.write_bytes(content[:first] + bytes(last - first) + content[last:])
        with pytest.raises((SelfCheckError, RuntimeError)) as error:
            start(damaged)
        found += "different tokens than when the archive was made" in str(error.value)
    assert found


def test_start_with_another_tokenizer_is_refused(checked: Path, tmp_path: Path):
    changed = shutil.copytree(checked, tmp_path / "weights")
    path = changed / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Lowercase()
    path.unlink()
    tokenizer.save(str(path))
    with pytest.raises(SelfCheckError, match="the tokens of the prompt 'Once upon a time' are"):
        start(changed)


def test_archive_without_a_record_says_so_in_the_log(checked: Path, tmp_path: Path):
    copied = shutil.copytree(checked, tmp_path / "weights")
    (copied / RECORD).unlink()
    assert "no self-check" in start(copied).description


def test_wrong_export_is_found(checked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The export of one model stands in for a wrong export of another."""
    exported = shutil.copytree(checked, tmp_path / "exported")
    monkeypatch.setattr(deploy.archive.verify, "trace", lambda _: exported)
    other = write_family(tmp_path / "other", "qwen2")
    with pytest.raises(SelfCheckError, match="generates different text than the model"):
        verify(other, exported, engine_config(name="openvino"), exported)


def test_text_does_not_grow_for_ever_where_letters_are_unknown():
    """Some tokenizers make one token of any text in letters that they do not know."""
    (short, long), _ = prompts(lambda text: [0] * bool(text), {}, 2048, 10**6)
    assert short and long


def test_prompts_have_no_word_whose_token_has_no_embedding():
    def words(text: str) -> list[int]:
        return [7 if word == "time" else 1 for word in text.split()]

    (short, _), _ = prompts(words, {}, 2048, 10**6, 7)
    assert short == "Once upon a"


def test_smallest_context_passes_the_check(tiny_llama: Path):
    engine = create_engine(tiny_llama, engine_config(name="transformers", max_context=2))
    assert "self-check passed" in engine.description
