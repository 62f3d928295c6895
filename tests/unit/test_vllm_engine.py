"""What only the engine vllm does, on a tiny model and without a server."""

import json
import os
import subprocess
import sys

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make setup ENGINE=vllm")

from handler.config import engine_config
from handler.engine import ParameterError, Sampling, create_engine
from tests.engines import load_engine, tiny_weights
from tests.unit.test_engine import run

pytestmark = pytest.mark.slow

LONG = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights("vllm", "LLAMA", tmp_path_factory.mktemp("m") / "LLAMA")


@pytest.fixture(scope="module")
def engine(weights):
    made = load_engine("vllm", weights, max_batch=4)
    made.end_tokens = set()
    return made


def test_self_check_compares_with_transformers(engine):
    assert "self-check passed" in engine.description


def test_prefix_cache_is_counted_and_changes_no_text(engine, weights):
    plain = load_engine("vllm", weights, vllm={"prefix_caching": False}, self_check=False)
    plain.end_tokens = set()
    prompts = [LONG + end for end in ("a", "b", "a", LONG[:20])]
    expected = [run(plain, [prompt])[0][0] for prompt in prompts]
    assert plain.load.cached_prompt_tokens == 0
    before = engine.load.cached_prompt_tokens
    assert [run(engine, [prompt])[0][0] for prompt in prompts] == expected
    block = engine._block_tokens
    assert engine.load.cached_prompt_tokens - before == 3 * (len(LONG) // block * block)
    assert run(engine, prompts)[0] == expected


def test_failure_of_a_step_ends_all_sequences_and_the_engine(weights, monkeypatch):
    engine = load_engine("vllm", weights, max_batch=1, self_check=False)
    for key in ("runs", "waits"):
        engine.submit(key, "Hello", Sampling(max_new_tokens=50, ignore_eos=True), stream=False)
    engine.advance(0)
    assert engine.alive()
    monkeypatch.setattr(engine._engine, "step", lambda: 1 / 0)
    ended = {progress.key: progress.finish_reason for progress in engine.advance(0)}
    assert ended == {"runs": "error", "waits": "error"}
    assert engine.unfinished == 0 and not engine.alive()


def test_sequence_that_vllm_rejects_fails_alone(engine, monkeypatch):
    expected = run(engine, ["Hello"], Sampling(max_new_tokens=8))
    add = engine._engine.add_request

    def reject_long(request_id, prompt, parameters):
        if len(prompt["prompt_token_ids"]) > 100:
            raise ValueError("too long")
        return add(request_id, prompt, parameters)

    monkeypatch.setattr(engine._engine, "add_request", reject_long)
    texts, reasons = run(engine, ["Hello", LONG], Sampling(max_new_tokens=8))
    assert (texts[0], reasons) == (expected[0][0], ["length", "error"])
    assert engine.alive() and engine.unfinished == 0


def test_completion_that_vllm_ends_within_its_schema_fails(engine, monkeypatch):
    """vLLM's masks have their own limits. Beyond them, it allows only the end token."""
    schema = json.dumps({"enum": ["a" * 60]})
    sampling = Sampling(max_new_tokens=80, json_schema=schema)
    assert run(engine, ["Hello"], sampling) == ([f'"{"a" * 60}"'], ["stop"])
    engine.submit("k", "Hello", sampling, stream=False)
    (end,) = engine._schema_end
    read = engine._read

    def end_early(output):
        (new,) = output.outputs
        new.token_ids = [end]
        read(output)

    monkeypatch.setattr(engine, "_read", end_early)
    done = []
    while not done:
        done = [p for p in engine.advance(0.05) if p.finish_reason]
    assert done[0].finish_reason == "error"
    assert engine.alive() and engine.unfinished == 0


@pytest.mark.parametrize("schema", ['{"type": "x"}', "[", '{"x-guidance": {}}', "1", '{"not": {}}'])
def test_bad_schemas_name_their_parameter_and_end_nothing(engine, schema):
    with pytest.raises(ParameterError) as error:
        engine.submit("k", "Hello", Sampling(json_schema=schema), stream=False)
    assert error.value.parameter == "json_schema"
    assert engine.unfinished == 0
    assert run(engine, ["Hello"], Sampling(max_new_tokens=3))[1] == ["length"]


def test_rejects_more_likeliest_tokens_than_vllm_reports(engine):
    with pytest.raises(ParameterError, match="at most 20") as error:
        engine.submit("k", "Hello", Sampling(logprobs=21), stream=False)
    assert error.value.parameter == "logprobs"


@pytest.fixture(scope="module")
def small_cache(weights):
    """An engine whose KV cache holds 160 tokens; the model's context is 256."""
    from handler.engine import vllm_engine

    arguments = vllm_engine.EngineArgs

    def small(**given):
        return arguments(**given, block_size=32, num_gpu_blocks_override=6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "EngineArgs", small)
        made = load_engine("vllm", weights, self_check=False)
    made.end_tokens = set()
    return made


def test_context_is_what_the_cache_holds(small_cache):
    assert small_cache.cache_tokens == small_cache.max_context == 160
    assert "context 160 instead of 256, to fit into the cache" in small_cache.description
    for length in (1, 31, 32, 100, 159):
        small_cache.submit("k", "y" * length, Sampling(max_new_tokens=500), stream=False)
        done = []
        while not done:
            done = [p for p in small_cache.advance(0.05) if p.finish_reason]
        reached = (done[0].finish_reason, length + done[0].completion_tokens)
        assert reached == ("length", 160)


def test_sequences_that_fit_only_one_after_the_other_all_end(small_cache):
    prompts = ["a" * 100, "b" * 120, "c" * 3, "d" * 129, "e" * 3]
    sampling = Sampling(max_new_tokens=30)
    texts, reasons = run(small_cache, prompts, sampling)
    assert reasons == ["length"] * 5
    assert texts == [run(small_cache, [p], sampling)[0][0] for p in prompts]


def test_rejects_cache_larger_than_the_memory(weights):
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    too_much = memory // 2**30 + 1
    message = rf"app\.engine\.vllm\.cache_gb: {too_much} does not fit .*: .*\(the KV cache\)"
    with pytest.raises(ValueError, match=message):
        create_engine(weights, engine_config(name="vllm", vllm={"cache_gb": too_much}))


def test_prints_nothing_on_stdout_and_sends_nothing(weights):
    """TorchServe obeys lines on its worker's stdout."""
    program = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "def refuse(*arguments): raise AssertionError(f'connects to {arguments[1:]}')\n"
        "socket.socket.connect = refuse\n"
        "from handler.config import engine_config\n"
        "from handler.engine import Sampling, create_engine\n"
        "engine = create_engine(Path(sys.argv[1]), engine_config(name='vllm'))\n"
        "engine.submit(0, 'Hello', Sampling(3, json_schema='{}'), stream=False)\n"
        "while engine.unfinished: engine.advance(1)\n"
        "from vllm.usage.usage_lib import is_usage_stats_enabled\n"
        "assert not is_usage_stats_enabled()\n"
    )
    unset = ("VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "VLLM_LOGGING_STREAM", "HF_HUB_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program, str(weights)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
