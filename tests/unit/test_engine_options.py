"""Penalties, log-probabilities, JSON schemas and load of all engines, without a server."""

import functools
import json
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from handler.engine import Engine, ParameterError, Progress, Sampling
from handler.engine.folder import ModelFolder
from tests.engines import ENGINES, load_engine, need, tiny_weights

pytestmark = pytest.mark.slow

EXACT = {"dynamic_quantization": 0}
PROMPT = "The quick brown fox"


def load(kind: str, weights: Path, cache: Path | None = None) -> Engine:
    return load_engine(kind, weights, cache, openvino=EXACT, self_check=False)


def run(engine: Engine, jobs: list[tuple[str, Sampling]], stream: bool = False) -> list[Progress]:
    """Submit all at once; return for each what all its reports say together."""
    for i, (prompt, sampling) in enumerate(jobs):
        engine.submit(i, prompt, sampling, stream=stream)
    whole = [Progress(i, "", 0) for i in range(len(jobs))]
    while engine.unfinished:
        for progress in engine.advance(0.1):
            one = whole[progress.key]
            one.text += progress.text
            one.token_ids += progress.token_ids
            one.logprobs += progress.logprobs
            one.finish_reason = progress.finish_reason
            one.first_token_at = one.first_token_at or progress.first_token_at
    return whole


@pytest.fixture(scope="module")
def make_weights(tmp_path_factory):
    """Tiny weights that an engine can serve."""
    return functools.cache(
        lambda kind: tiny_weights(kind, "LLAMA", tmp_path_factory.mktemp("m") / "LLAMA")
    )


@pytest.fixture(scope="module")
def make_engine(make_weights, tmp_path_factory):
    cache = tmp_path_factory.mktemp("export")
    return functools.cache(lambda kind: load(kind, make_weights(kind), cache))


@pytest.fixture(scope="module")
def make_smollm2(smollm2):
    return functools.cache(lambda kind: load(kind, smollm2))


@pytest.fixture(params=ENGINES)
def engine(request, make_engine) -> Engine:
    return make_engine(request.param)


@pytest.fixture(params=ENGINES)
def smollm2_engine(request, make_smollm2) -> Engine:
    return make_smollm2(request.param)


def penalized(weights: Path, ids: list[int], tokens: int, sampling: Sampling) -> list[int]:
    """OpenAI's definition, written out: subtract from the logits of what was generated."""
    from transformers import AutoModelForCausalLM

    model, made = AutoModelForCausalLM.from_pretrained(weights), []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids + made])).logits[0, -1]
        counts = torch.zeros_like(logits)
        for token in made:
            counts[token] += 1
        logits -= sampling.presence_penalty * (counts > 0) + sampling.frequency_penalty * counts
        made.append(int(logits.argmax()))
    return made


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0), (0, 0.3), (-0.4, 0.2), (0, -2)])
@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_penalties_follow_openais_definition(make_engine, make_weights, kind, presence, frequency):
    engine, weights = make_engine(kind), make_weights(kind)
    sampling = Sampling(30, presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True)
    expected = penalized(weights, engine.folder.encode(PROMPT), 30, sampling)
    assert run(engine, [(PROMPT, sampling), ("x", Sampling(5))])[0].token_ids == expected


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_openvino_rejects_penalties_that_genai_computes_wrongly(make_engine, name):
    engine = make_engine("openvino")
    with pytest.raises(ParameterError, match="ENGINE=transformers") as error:
        engine.submit(0, PROMPT, Sampling(**{name: 0.5}), stream=False)
    assert error.value.parameter == name
    assert not engine.unfinished


def test_genai_still_raises_negative_logits_with_a_penalty(make_engine, make_weights):
    """When this fails, GenAI is fixed, and the openvino engine can have the penalties."""
    genai = need("openvino")
    import openvino

    weights = make_weights("openvino")
    engine = make_engine("openvino")
    ids = engine.folder.encode(PROMPT)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.presence_penalty, config.ignore_eos = 30, 0.5, True
    config.eos_token_id, config.stop_token_ids = 0, {0}
    handle = engine._pipeline.add_request(
        10**6, openvino.Tensor(np.array([ids], dtype=np.int64)), config
    )
    made = []
    while handle.get_status() == genai.GenerationStatus.RUNNING:
        engine._pipeline.step()
        while handle.can_read():
            for output in handle.read().values():
                made += output.generated_ids
    assert made != penalized(weights, ids, 30, Sampling(presence_penalty=0.5))


CAPITAL = "The capital of France is"


def test_logprobs_are_those_of_the_model_before_temperature(smollm2_engine, make_smollm2):
    engine = smollm2_engine
    samplings = [
        Sampling(8, logprobs=0),
        Sampling(8, logprobs=0, temperature=0.7, top_p=0.8, seed=4, repetition_penalty=1.2),
    ]
    model = make_smollm2("transformers").model
    for one in run(engine, [(CAPITAL, s) for s in samplings]):
        assert [entry.token_id for entry in one.logprobs] == one.token_ids
        prompt = engine.folder.encode(CAPITAL)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + one.token_ids])).logits[0].log_softmax(-1)
        for i, entry in enumerate(one.logprobs):
            expected = float(logits[len(prompt) - 1 + i, entry.token_id])
            assert entry.logprob == pytest.approx(expected, abs=0.05)
            assert entry.top == ()
        assert b"".join(entry.bytes for entry in one.logprobs).decode() == one.text


def test_bytes_of_a_part_of_a_character_are_reported(smollm2):
    folder = ModelFolder(smollm2)
    entries = [folder.logprob(token, -1.0) for token in folder.encode("🦩")]
    assert len(entries) > 1
    assert {entry.text for entry in entries} == {"\ufffd"}
    assert b"".join(entry.bytes for entry in entries) == "🦩".encode()


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_likeliest_tokens_are_sorted_and_hold_the_greedy_one(make_smollm2, kind):
    (one,) = run(make_smollm2(kind), [(CAPITAL, Sampling(5, logprobs=3))], stream=True)
    for entry in one.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0][:3] == entry[:3]
        assert [t.logprob for t in entry.top] == sorted(t.logprob for t in entry.top)[::-1]


def test_openvino_rejects_likeliest_tokens(make_engine):
    with pytest.raises(ParameterError, match="ENGINE=transformers") as error:
        make_engine("openvino").submit(0, PROMPT, Sampling(logprobs=2), stream=False)
    assert error.value.parameter == "logprobs"


def test_no_logprobs_unless_asked_for(engine):
    assert run(engine, [(PROMPT, Sampling(4)), (PROMPT, Sampling(4, logprobs=0))])[0].logprobs == []


def short(most: int) -> dict:
    return {"type": "string", "maxLength": most}


SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {
            "city": short(12),
            "kind": {"enum": ["New York", "town", "village"]},
            "people": {"type": "integer", "minimum": 0, "maximum": 99999},
            "old": {"type": "boolean"},
        },
        "required": ["city", "kind", "people", "old"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "name": short(8),
                "tags": {"type": "array", "maxItems": 2, "items": short(5)},
            },
            "required": ["name", "tags"],
            "additionalProperties": False,
        },
    },
    "numbers": {
        "type": "object",
        "properties": {
            "ratio": {"type": "integer", "minimum": -5, "maximum": 5},
            "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3} [a-z]{1,4}$"},
            "key": {"type": "string", "format": "uuid"},  # of dates, 31 February passes
        },
        "required": ["ratio", "code", "key"],
        "additionalProperties": False,
    },
    "optional": {
        "$defs": {"note": {"anyOf": [short(6), {"type": "null"}]}},
        "type": "object",
        "properties": {"id": {"type": "integer"}, "note": {"$ref": "#/$defs/note"}},
        "required": ["id"],
        "additionalProperties": False,
    },
}


def check_schemas(engine: Engine, each: int, prompt: str, tokens: int) -> None:
    """Run requests of all schemas beside as many without; check both kinds."""
    kinds = [(name, i) for name in SCHEMAS for i in range(each)]
    plain = [(f"{prompt} {i}", Sampling(12)) for i in range(len(kinds))]
    alone = [run(engine, [job])[0].text for job in plain[:4]]
    jobs = [
        (
            f"{prompt} {name} {i}",
            Sampling(
                tokens, temperature=float(i % 2), seed=i, json_schema=json.dumps(SCHEMAS[name])
            ),
        )
        for name, i in kinds
    ]
    mixed = [job for pair in zip(jobs, plain, strict=True) for job in pair]
    done = run(engine, mixed)
    for (name, _), one in zip(kinds, done[::2], strict=True):
        assert one.finish_reason == "stop", (name, one.text)
        jsonschema.Draft202012Validator(
            SCHEMAS[name], format_checker=jsonschema.FormatChecker()
        ).validate(json.loads(one.text))
    assert [one.text for one in done[1:8:2]] == alone


def test_40_requests_with_schemas_beside_40_without(engine):
    """Random weights prefer no JSON, so what is valid is the engine's work."""
    check_schemas(engine, 10, PROMPT, 200)


@pytest.mark.parametrize(("kind", "each"), [("openvino", 10), ("transformers", 1), ("vllm", 1)])
def test_requests_with_schemas_to_a_real_model(make_smollm2, kind, each):
    """With `transformers`, 40 of them take minutes in 32 bits."""
    check_schemas(make_smollm2(kind), each, "Describe a place as JSON:", 400)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["aacaa", "a", "cbbb", "abaac", "aba"]},
        {"anyOf": [{"const": "a"}, {"const": "aba"}]},
        {"type": "integer", "minimum": 139, "maximum": 224},
        {"type": ["integer", "null"], "minimum": -4, "maximum": 120},
    ],
    ids=json.dumps,
)
def test_alternatives_that_begin_alike_stay_apart(engine, schema):
    """xgrammar alone makes "ababa" of "a" and "aba", and allows 130 between 139 and 224."""
    jobs = [
        (PROMPT, Sampling(40, temperature=2.0, seed=i, json_schema=json.dumps(schema)))
        for i in range(60)
    ]
    for one in run(engine, jobs):
        assert one.finish_reason == "stop"
        jsonschema.validate(json.loads(one.text), schema)


def test_schema_with_stop_string_length_logprobs_and_stream(engine):
    schema = json.dumps({"enum": ["abcdef"]})
    jobs = [
        (PROMPT, Sampling(50, json_schema=schema, stop=("cd",))),
        (PROMPT, Sampling(4, json_schema=schema)),
        (PROMPT, Sampling(50, json_schema=schema, logprobs=0, repetition_penalty=1.5)),
    ]
    stopped, cut, whole = run(engine, jobs, stream=True)
    assert (stopped.text, stopped.finish_reason) == ('"ab', "stop")
    assert (cut.text, cut.finish_reason) == ('"abc', "length")
    assert (whole.text, whole.finish_reason) == ('"abcdef"', "stop")
    assert len(whole.logprobs) == len(whole.token_ids)


def test_any_json_ends(smollm2_engine):
    chat = smollm2_engine.chat_prompt([{"role": "user", "content": "Describe Paris as JSON."}])
    for schema in ("{}", '{"type": "object"}'):
        (one,) = run(smollm2_engine, [(chat, Sampling(200, json_schema=schema))])
        assert one.finish_reason == "stop"
        json.loads(one.text)


def test_bad_schema_is_rejected_before_anything_runs(engine):
    engine.submit("good", PROMPT, Sampling(10), stream=False)
    with pytest.raises(ParameterError):
        engine.submit("bad", PROMPT, Sampling(json_schema='{"type": "x"}'), stream=False)
    assert engine.unfinished == 1
    (progress,) = [p for _ in range(100) for p in engine.advance(0.1)]
    assert (progress.key, progress.finish_reason is None) == ("good", False)
    assert engine.alive()


@pytest.mark.parametrize("kind", ENGINES)
def test_model_whose_tokens_are_unknown_is_served_without_schemas(
    kind, make_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(ModelFolder, "token_reader", lambda *_: None)
    engine = load(kind, make_weights(kind), tmp_path)
    (one,) = run(engine, [(PROMPT, Sampling(5, logprobs=0, ignore_eos=True))])
    assert len(one.logprobs) == 5
    assert one.logprobs[0].bytes is None
    with pytest.raises(ParameterError, match="cannot be used with this model"):
        engine.submit(0, PROMPT, Sampling(json_schema="{}"), stream=False)


def test_load_rises_with_sequences_and_falls_to_zero(engine):
    assert engine.load[:4] == (0, 0, 0, 0.0)
    for i in range(4):
        engine.submit(i, f"{i} {PROMPT}" * 4, Sampling(40, ignore_eos=True), stream=False)
    assert engine.load.waiting == 4
    engine.advance(0)
    engine.advance(0)
    load = engine.load
    assert load.running + load.waiting == 4
    assert 0 < load.cache_use < 0.5
    while engine.unfinished:
        engine.advance(0.1)
    assert engine.load[:4] == (0, 0, 0, 0.0)


def test_first_token_is_dated_when_it_exists(engine):
    begin = time.monotonic()
    (one,) = run(engine, [(PROMPT, Sampling(30, ignore_eos=True))])
    assert begin < one.first_token_at < time.monotonic()
