"""All engines on tiny models of several architectures, without a server."""

import functools
import json
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.archive.export import export
from handler.config import engine_config, load_app
from handler.engine import PromptError, Sampling, create_engine
from handler.engine.sampling import Sampler
from handler.request import parse_body
from tests import tiny
from tests.engines import ENGINES, load_engine, need, tiny_weights

pytestmark = pytest.mark.slow

TORCH = {"name": "transformers"}
PROMPTS = ["a", "The quick brown fox jumps over the lazy dog", "Hello, world", "x" * 100]


def run(engine, prompts, sampling=None, stream=False):
    """Submit all prompts at once; return text and finish reason of each."""
    samplings = sampling if isinstance(sampling, list) else [sampling or Sampling()] * len(prompts)
    for i, prompt in enumerate(prompts):
        engine.submit(i, prompt, samplings[i], stream=stream)
    texts, reasons = dict.fromkeys(range(len(prompts)), ""), {}
    while len(reasons) < len(prompts):
        for progress in engine.advance(0.05):
            if progress.key in texts:
                texts[progress.key] += progress.text
                if progress.finish_reason:
                    reasons[progress.key] = progress.finish_reason
    return list(texts.values()), [reasons[i] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory):
    """Engines by the name of a tiny architecture, each loaded once."""

    cache = tmp_path_factory.mktemp("export")

    @functools.cache
    def make(kind: str, name: str):
        need(kind)
        weights = tiny_weights(kind, name, tmp_path_factory.mktemp("m") / name)
        engine = load_engine(kind, weights, cache, max_batch=8)
        engine.end_tokens = set()  # random weights must not end a text by chance
        return engine

    return make


TRANSFORMERS = [("transformers", name) for name in ("LLAMA", "GPT2", "DOLLY", "MISTRAL")]
OPENVINO = [("openvino", name) for name in ("LLAMA", "GPT2", "DOLLY")]
VLLM = [("vllm", name) for name in ("LLAMA", "GPT2", "DOLLY", "MISTRAL")]


@pytest.fixture(params=[*TRANSFORMERS, *OPENVINO, *VLLM], ids="-".join)
def engine(request, make_engine):
    """Each engine on each architecture."""
    return make_engine(*request.param)


@pytest.fixture(params=TRANSFORMERS, ids="-".join)
def transformers_engine(request, make_engine):
    return make_engine(*request.param)


def test_greedy_text_in_a_batch_is_the_text_alone(engine):
    together, reasons = run(engine, PROMPTS)
    alone = [run(engine, [prompt])[0][0] for prompt in PROMPTS]
    assert together == alone
    assert reasons == ["length"] * len(PROMPTS)
    assert len(set(together)) == len(PROMPTS)


def test_greedy_text_equals_that_of_generate(transformers_engine):
    engine = transformers_engine
    ids = torch.tensor([engine.folder.encode(PROMPTS[1])]).to(engine.model.device)
    out = engine.model.generate(
        ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    expected = engine.folder.decode(out[0, ids.shape[1] :].tolist())
    assert run(engine, [PROMPTS[1]], Sampling(max_new_tokens=20))[0][0] == expected


def test_sequence_that_joins_late_has_the_text_alone(engine):
    expected = run(engine, [PROMPTS[1]])[0][0]
    engine.submit("late-partner", PROMPTS[3], Sampling(max_new_tokens=60), stream=False)
    for _ in range(3):
        engine.advance(0)
    assert run(engine, [PROMPTS[1]], stream=True)[0][0] == expected
    engine.cancel("late-partner")
    assert engine.unfinished == 0


def test_sequences_have_their_own_sampling(engine):
    settings = [
        Sampling(max_new_tokens=3),
        Sampling(max_new_tokens=30, temperature=1.0, seed=1),
        Sampling(max_new_tokens=30, temperature=1.0, seed=2),
        Sampling(max_new_tokens=30, temperature=1.0, seed=1),
        Sampling(max_new_tokens=30, repetition_penalty=2.0),
    ]
    texts, _ = run(engine, [PROMPTS[1]] * 5, settings)
    short, one, two, again, penalized = texts
    greedy = run(engine, [PROMPTS[1]], Sampling(max_new_tokens=30))[0][0]
    assert greedy.startswith(short) and len(short) < len(greedy)
    assert one == again
    assert len({one, two, penalized, greedy}) == 4
    assert run(engine, [PROMPTS[1]], settings[1])[0][0] == one


def test_top_k_1_is_greedy(engine):
    sampled = run(engine, [PROMPTS[0]], Sampling(temperature=1.5, top_k=1, seed=3))[0]
    assert sampled == run(engine, [PROMPTS[0]])[0]


@pytest.mark.parametrize("narrow", [{"temperature": 1e-5}, {"temperature": 1.5, "top_p": 1e-6}])
def test_low_temperature_and_low_top_p_are_greedy(engine, narrow):
    greedy = run(engine, [PROMPTS[0]])[0]
    if narrow.get("temperature") == 1e-5 and "VLLM" in type(engine).__name__:
        pytest.skip("vLLM raises temperatures below 0.01, the least that the API allows, to it")
    assert run(engine, [PROMPTS[0]], Sampling(seed=3, **narrow))[0] == greedy
    assert run(engine, [PROMPTS[0]], Sampling(seed=3, temperature=1.5))[0] != greedy


def test_temperature_changes_the_text(engine):
    """One seed, so that only the temperature differs."""
    texts = [
        run(engine, [PROMPTS[0]], Sampling(seed=3, temperature=t, max_new_tokens=60))[0][0]
        for t in (0.02, 0.2, 2.0)  # the API allows 2.0 at most
    ]
    assert len(set(texts)) == 3


EXTREMES = {
    "temperature": st.sampled_from([0, 0.01, 2]) | st.floats(0.01, 2),
    "top_p": st.sampled_from([5e-324, 1e-310, 1e-45, 2**-126, 1 - 2**-53, 1])
    | st.floats(0, 1, exclude_min=True),
    "top_k": st.sampled_from([0, 1, 10**6]),
    "repetition_penalty": st.sampled_from([0.1, 1, 10]) | st.floats(0.1, 10),
    "seed": st.sampled_from([0, 2**32, 2**63 - 1]) | st.integers(0, 2**63 - 1),
}
"""Values that `request.Parameters` allows, its bounds first."""


@pytest.mark.parametrize("kind", ENGINES)
@settings(max_examples=60, deadline=None)
@given(values=st.fixed_dictionaries(EXTREMES))
def test_every_allowed_sampling_value_gives_a_completion(make_engine, kind, values):
    body = {"instances": ["Hello"], "parameters": {"max_new_tokens": 3, **values}}
    (instance,) = parse_body(body, load_app("any", local=True), {}).instances
    _, reasons = run(make_engine(kind, "LLAMA"), ["Hello"], instance.sampling)
    assert reasons == ["length"]


def test_seeds_that_differ_only_above_32_bits_draw_differently(engine):
    seeds = [7, 7 + 2**32, 7 + 2**33, 7 + 2**62]
    settings = [Sampling(max_new_tokens=20, temperature=1.0, seed=seed) for seed in seeds]
    texts, _ = run(engine, [PROMPTS[0]] * 4, settings)
    assert len(set(texts)) == 4
    assert run(engine, [PROMPTS[0]] * 4, settings)[0] == texts


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1))
def test_seeds_with_one_lower_or_one_upper_half_never_coincide(seed, upper):
    state = Sampling(seed=seed).random_state
    assert 0 <= state < 2**32
    assert Sampling(seed=seed % 2**32).random_state == seed % 2**32
    other = (upper << 32) + seed % 2**32
    assert (other == seed) == (Sampling(seed=other).random_state == state)
    assert Sampling(seed=seed ^ 1).random_state != state


def test_queue_time_is_in_seconds(engine):
    began = time.monotonic()
    engine.submit("k", PROMPTS[0], Sampling(max_new_tokens=1), stream=False)
    time.sleep(0.1)
    done = []
    while not done:
        done = engine.advance(0.05)
    assert 0.1 <= done[0].queue_seconds <= time.monotonic() - began


def test_short_sequence_ends_before_a_long_one(engine):
    engine = engine
    engine.submit("long", PROMPTS[0], Sampling(max_new_tokens=200), stream=False)
    engine.advance(0)
    engine.submit("short", PROMPTS[1], Sampling(max_new_tokens=2), stream=False)
    finished = [p.key for _ in range(20) for p in engine.advance(0) if p.finish_reason]
    assert finished == ["short"]
    engine.cancel("long")


def test_stop_string_ends_the_completion(engine):
    text = run(engine, [PROMPTS[1]])[0][0]
    stop = text[10:13]
    stopped, reasons = run(engine, [PROMPTS[1]], Sampling(stop=(stop,)))
    assert stopped[0] == text[: text.index(stop)]
    assert reasons == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_on_the_last_token_is_the_reason(engine, stream):
    """Also if the text is certain only at the end: here `stop` itself may go on."""
    text = run(engine, [PROMPTS[1]], Sampling(max_new_tokens=20, ignore_eos=True))[0][0]
    for size in (1, 3):
        stop = text[-size:]
        limit = 20 - len(text) + text.index(stop) + size  # one character a token
        sampling = Sampling(max_new_tokens=limit, ignore_eos=True, stop=(stop, stop + "and more"))
        stopped, reasons = run(engine, [PROMPTS[1]], sampling, stream=stream)
        assert (stopped[0], reasons) == (text[: text.index(stop)], ["stop"])


def test_end_token_ends_the_completion_unless_ignored(engine):
    text = run(engine, [PROMPTS[0]], Sampling(max_new_tokens=8))[0][0]
    engine.end_tokens = {engine.folder.encode(text)[-1]}
    try:
        shorter, reasons = run(engine, [PROMPTS[0]], Sampling(max_new_tokens=8))
        ignoring = Sampling(max_new_tokens=8, ignore_eos=True)
        same, ignored = run(engine, [PROMPTS[0]], ignoring)
    finally:
        engine.end_tokens = set()
    assert reasons == ["stop"] and len(shorter[0]) < len(text)
    assert ignored == ["length"] and same == [text]


def test_cancel_drops_only_that_sequence(engine):
    expected = run(engine, [PROMPTS[1]], Sampling(max_new_tokens=40))[0][0]
    engine.submit("stay", PROMPTS[1], Sampling(max_new_tokens=40), stream=False)
    for key in ("go", "never started"):
        engine.submit(key, PROMPTS[3], Sampling(max_new_tokens=100), stream=False)
        engine.advance(0)
    engine.cancel("go")
    engine.cancel("never started")
    engine.cancel("unknown")
    done = []
    while not done:
        done = [p for p in engine.advance(0.05) if p.finish_reason]
    assert [(p.key, p.text) for p in done] == [("stay", done[0].text)]
    assert expected.endswith(done[0].text)
    assert engine.unfinished == 0 and engine.advance(0) == []


def test_full_context_ends_the_completion(engine):
    room = engine.max_context - 250
    engine.submit("k", "y" * 250, Sampling(max_new_tokens=500), stream=False)
    done = []
    while not done:
        done = [p for p in engine.advance(0.05) if p.finish_reason]
    assert (done[0].finish_reason, done[0].completion_tokens) == ("length", min(500, room))


def test_rejects_empty_and_too_long_prompts(engine):
    limit = engine.max_context
    with pytest.raises(PromptError, match=rf"has {limit} tokens; at most {limit - 1} fit"):
        engine.submit("k", "z" * limit, Sampling(), stream=False)
    with pytest.raises(PromptError, match="empty"):
        engine.submit("k", "", Sampling(), stream=False)
    assert engine.advance(0) == []


@pytest.fixture(
    scope="module", params=[{}, {"prompt_lookup": 5}, {"prefix_caching": True}], ids=str
)
def small_cache_engine(request, tiny_llama, tmp_path_factory):
    """An engine whose KV cache is 5 blocks of 32 tokens; the model's context is 256."""
    need("openvino")
    from handler.engine import openvino_engine

    scheduler = openvino_engine._scheduler

    def small(*arguments):
        made = scheduler(*arguments)
        made.cache_size, made.num_kv_blocks = 0, 5
        return made

    settings = request.param
    config = engine_config(name="openvino", openvino={"precision": "fp16", **settings})
    weights = export(tiny_llama, config, tmp_path_factory.mktemp("export"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_engine, "_scheduler", small)
        engine = create_engine(weights, config)
    engine.end_tokens = set()
    return engine


def test_model_without_an_end_token_generates_up_to_the_limit(tmp_path: Path):
    """Without stop tokens, OpenVINO GenAI uses the token -1, and every request fails."""
    need("openvino")
    weights = tiny.random_model(tmp_path / "no-end", tiny.LLAMA)
    for name, field in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        content = json.loads((weights / name).read_text()) | {field: None}
        (weights / name).write_text(json.dumps(content))
    config = engine_config(name="openvino", openvino={"precision": "fp16"})
    engine = create_engine(export(weights, config, tmp_path / "cache"), config)
    assert engine.end_tokens == set()
    for sampling in (Sampling(max_new_tokens=5), Sampling(max_new_tokens=5, temperature=1.0)):
        texts, reasons = run(engine, ["one", "three"], sampling)
        assert all(texts) and reasons == ["length", "length"]


def test_context_is_what_the_cache_holds(small_cache_engine):
    engine = small_cache_engine
    assert engine.cache_tokens == 5 * 32
    assert engine.max_context == 160 - engine._lookup
    assert (
        f"KV cache 1 GB for 160 tokens, context {engine.max_context} instead of 256, to fit into "
        "the cache" in engine.description
    )
    for prompt in (1, 31, 32, 100, engine.max_context - 1):
        engine.submit("k", "y" * prompt, Sampling(max_new_tokens=500), stream=False)
        done = []
        while not done:
            done = [p for p in engine.advance(0.05) if p.finish_reason]
        reached = (done[0].finish_reason, prompt + done[0].completion_tokens)
        assert reached == ("length", engine.max_context)
    with pytest.raises(PromptError, match=f"at most {engine.max_context - 1} fit"):
        engine.submit("k", "y" * engine.max_context, Sampling(), stream=False)


@pytest.mark.parametrize(
    "small_cache_engine", [{}, {"prefix_caching": True}], indirect=True, ids=str
)
def test_sequences_that_fit_only_one_after_the_other_all_end(small_cache_engine):
    prompts = ["a" * 100, "b" * 120, "c" * 3, "d" * 150, "e" * 3]
    sampling = Sampling(max_new_tokens=30)
    texts, reasons = run(small_cache_engine, prompts, sampling)
    assert reasons == ["length"] * 5
    assert texts == [run(small_cache_engine, [p], sampling)[0][0] for p in prompts]


@pytest.mark.parametrize("small_cache_engine", [{}], indirect=True, ids=str)
def test_sequence_that_the_pipeline_gives_up_does_not_end_the_engine(small_cache_engine):
    """Then it has no output. Reading it ended the worker, and all sequences with it."""
    engine = small_cache_engine
    limit, engine.max_context = engine.max_context, 256  # as if the check were missing
    try:
        assert run(engine, ["x" * 200], Sampling(max_new_tokens=3)) == ([""], ["error"])
    finally:
        engine.max_context = limit
    assert engine.alive()
    assert run(engine, ["Hi"], Sampling(max_new_tokens=3))[1] == ["length"]


def test_failing_prefill_fails_only_its_prompts(transformers_engine, monkeypatch):
    engine = transformers_engine
    expected = run(engine, [PROMPTS[1]], Sampling(max_new_tokens=30))[0][0]
    engine.submit("good", PROMPTS[1], Sampling(max_new_tokens=30), stream=False)
    engine.advance(0)
    forward = engine._forward

    def fail_on_prompts(ids, mask, cache):
        if ids.shape[1] > 1:
            raise RuntimeError("out of memory")
        return forward(ids, mask, cache)

    monkeypatch.setattr(engine, "_forward", fail_on_prompts)
    engine.submit("bad", PROMPTS[2], Sampling(max_new_tokens=30), stream=False)
    done = {}
    while len(done) < 2:
        done |= {p.key: p for p in engine.advance(0.05) if p.finish_reason}
    assert done["bad"].finish_reason == "error"
    assert expected.endswith(done["good"].text) and engine.alive()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_fail_only_their_sequence(
    transformers_engine, monkeypatch, caplog, value, temperature
):
    engine = transformers_engine
    expected = run(engine, PROMPTS[:3], Sampling(max_new_tokens=5))[0]
    forward = engine._forward

    def last_is_broken(ids, mask, cache):
        logits = forward(ids, mask, cache).clone()
        if len(logits) == 4:
            logits[3] = value
        return logits

    monkeypatch.setattr(engine, "_forward", last_is_broken)
    samplings = [Sampling(max_new_tokens=5)] * 3
    samplings += [Sampling(max_new_tokens=5, temperature=temperature)]
    texts, reasons = run(engine, [*PROMPTS[:3], PROMPTS[1]], samplings)
    assert texts[:3] == expected and reasons == ["length"] * 3 + ["error"]
    assert "the logits are not numbers" in caplog.text
    assert engine.alive()


def test_sampling_that_overflows_fails_only_its_sequence(transformers_engine, monkeypatch):
    engine = transformers_engine
    expected = run(engine, PROMPTS[:3], Sampling(max_new_tokens=5))[0]
    choose = Sampler.choose

    def broken(self, ids, logits):
        return choose(self, ids, logits * float("nan"))

    monkeypatch.setattr(Sampler, "choose", broken)
    samplings = [Sampling(max_new_tokens=5)] * 3 + [Sampling(max_new_tokens=5, temperature=1.0)]
    texts, reasons = run(engine, [*PROMPTS[:3], PROMPTS[0]], samplings)
    assert texts[:3] == expected and reasons == ["length"] * 3 + ["error"]
    assert engine.alive()


def test_new_sequences_do_not_starve_running_ones(engine):
    engine = engine
    engine.submit("running", PROMPTS[0], Sampling(max_new_tokens=50), stream=False)
    finished = []
    for i in range(60):
        engine.submit(i, PROMPTS[1], Sampling(max_new_tokens=1), stream=False)
        finished += [p.key for p in engine.advance(0) if p.finish_reason]
    assert "running" in finished


@pytest.fixture(scope="module", params=ENGINES)
def small_steps(request, tmp_path_factory):
    """An engine whose forward pass has 16 prompt tokens, so that 200 are many steps."""
    kind = request.param
    need(kind)
    engine = load_engine(
        kind,
        tiny_weights(kind, "LLAMA", tmp_path_factory.mktemp("m") / "small-steps"),
        tmp_path_factory.mktemp("export"),
        max_batch=8,
        openvino={"max_num_batched_tokens": 16, "prefix_caching": True},
        transformers={"max_prefill_tokens": 16},
        vllm={"max_num_batched_tokens": 16},
    )
    engine.end_tokens = set()
    return engine


def long_prompt(i: int) -> str:
    """A prompt of 200 tokens, another for each number: the prefix cache knows none of them."""
    return chr(48 + i) + "".join(chr(97 + (i * k * k) % 23) for k in range(199))


def test_short_prompt_does_not_wait_for_the_long_ones_before_it(small_steps):
    engine, ended = small_steps, []
    for prompt in [*(long_prompt(i) for i in range(5)), "ab"]:
        engine.submit(prompt, prompt, Sampling(max_new_tokens=2), stream=False)
    while engine.unfinished:
        ended += [p.key for p in engine.advance(0) if p.finish_reason]
    assert ended[0] == "ab" and len(ended) == 6


def test_oldest_long_prompt_does_not_wait_for_a_flood_of_short_ones(small_steps):
    engine = small_steps
    engine.submit("long", long_prompt(5), Sampling(max_new_tokens=1), stream=False)
    ended = []
    for i in range(200):
        for j in range(4):
            engine.submit((i, j), "abcd", Sampling(max_new_tokens=1), stream=False)
        ended += [p.key for p in engine.advance(0) if p.finish_reason]
        if "long" in ended:
            break
    assert "long" in ended and len(ended) > 4
    while engine.unfinished:
        engine.advance(1)


def test_short_prompt_interrupts_a_long_prefill(small_steps):
    """And the long prompt's text is the text alone, wherever it was interrupted."""
    engine = small_steps
    for i, steps in enumerate((1, 3, 7, 10), start=6):
        engine.submit("long", long_prompt(i), Sampling(max_new_tokens=8), stream=False)
        for _ in range(steps):
            assert engine.advance(0) == []
        engine.submit("short", "ab", Sampling(max_new_tokens=1), stream=True)
        first, passes = [], 0
        while not first:
            first, passes = engine.advance(0), passes + 1
        assert [p.key for p in first] == ["short"] and passes <= 5
        text = ""
        while engine.unfinished:
            text += "".join(p.text for p in engine.advance(0) if p.key == "long")
        assert text == run(engine, [long_prompt(i)], Sampling(max_new_tokens=8))[0][0]


def test_prompt_dropped_in_its_prefill_leaves_nothing_wrong_in_the_cache(small_steps):
    """A client leaves in the middle of a block; the next one sends the same prompt."""
    engine = small_steps
    sampling = Sampling(max_new_tokens=8)
    engine.submit("other", "abc", Sampling(max_new_tokens=200), stream=False)
    engine.advance(0)  # its tokens move the ends of the steps into the middle of blocks
    for i, drop in ((1, engine.cancel), (2, engine.expire), (6, engine.cancel)):
        prompt = long_prompt(i)[::-1]
        engine.submit("left", prompt, sampling, stream=False)
        for _ in range(i + 1):
            assert engine.advance(0) == []
        drop("left")
        assert run(engine, [prompt], sampling)[0] == run_uncached(engine, prompt, sampling)
    engine.cancel("other")


def test_clients_that_left_in_their_prefill_delay_nobody(small_steps):
    """The pipeline prefills what they left; more than a few steps of it must not pile up."""
    engine = small_steps
    for i in range(30, 70):
        engine.submit("left", long_prompt(i), Sampling(), stream=True)
        engine.advance(0)
        engine.cancel("left")
    engine.submit("short", "ab", Sampling(max_new_tokens=1), stream=True)
    passes = 1
    while not engine.advance(0):
        passes += 1
    assert passes <= 6


def run_uncached(engine, prompt: str, sampling: Sampling) -> list[str]:
    """Run a prompt in an engine of the same weights that has no prefix cache."""
    kinds = {"OpenVINOEngine": "openvino", "VLLMEngine": "vllm"}
    kind = kinds.get(type(engine).__name__, "transformers")
    sections = {"openvino": {"precision": "fp16"}, "vllm": {"dtype": "float32"}}
    section = {kind: sections[kind] | {"prefix_caching": False}} if kind in sections else {}
    other = create_engine(engine.folder._path, engine_config(name=kind, **section))
    other.end_tokens = set()
    return run(other, [prompt], sampling)[0]


def test_expired_sequence_ends_with_what_it_has(engine):
    text = run(engine, [PROMPTS[1]], Sampling(max_new_tokens=60))[0][0]
    sampling = Sampling(max_new_tokens=200)
    engine.submit("runs", PROMPTS[1], sampling, stream=False)
    for _ in range(5):
        engine.advance(0)
    engine.submit("waits", PROMPTS[3], sampling, stream=False)
    assert engine.waiting_tokens == 100
    for key in ("runs", "waits", "unknown", "runs"):
        engine.expire(key)
    ended = {p.key: p for p in engine.advance(0.05)}
    assert {key: p.finish_reason for key, p in ended.items()} == dict.fromkeys(ended, "timeout")
    assert ended["waits"].completion_tokens == 0 and ended["waits"].text == ""
    assert 1 <= ended["runs"].completion_tokens < 60
    assert text.startswith(ended["runs"].text) and ended["runs"].text
    assert engine.unfinished == 0 and engine.waiting_tokens == 0 and engine.advance(0) == []


def test_engine_is_dead_after_three_failures(tiny_llama, monkeypatch):
    engine = create_engine(tiny_llama, engine_config(**TORCH))
    monkeypatch.setattr(engine, "_forward", lambda *_: 1 / 0)
    for key in range(3):
        assert engine.alive()
        engine.submit(key, "a", Sampling(), stream=False)
        assert [p.finish_reason for p in engine.advance(0)] == ["error"]
    assert not engine.alive()


def test_more_sequences_than_the_batch_holds(tiny_llama):
    engine = create_engine(
        tiny_llama, engine_config(**TORCH, max_batch=3, transformers={"max_prefill_tokens": 64})
    )
    engine.end_tokens = set()
    prompts = [f"{i} " * (i + 1) for i in range(10)]
    together, reasons = run(engine, prompts, Sampling(max_new_tokens=12))
    assert reasons == ["length"] * 10
    assert together == [run(engine, [p], Sampling(max_new_tokens=12))[0][0] for p in prompts]


@pytest.mark.parametrize("folder", ["offload", None])
def test_offload_to_disk_gives_the_same_text(tiny_llama, tmp_path, monkeypatch, folder):
    """`max_memory` leaves no room in RAM: accelerate reads the layers from disk at every step."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain = create_engine(tiny_llama, engine_config(**TORCH))
    place = str(tmp_path / folder) if folder else None
    settings = {"max_memory": {"cpu": 300_000}, "offload_folder": place}
    offloaded = create_engine(tiny_llama, engine_config(**TORCH, transformers=settings))
    assert [p.name for p in tmp_path.iterdir()] == ([folder] if folder else []), (
        "an empty folder is left"
    )
    assert "disk" in offloaded.description, offloaded.description
    assert run(offloaded, PROMPTS) == run(plain, PROMPTS)


def test_rejects_max_memory_that_holds_no_module(tiny_llama):
    with pytest.raises(
        ValueError, match=r"app\.engine\.transformers\.max_memory: \{'cpu': 0\} leaves no module"
    ):
        create_engine(tiny_llama, engine_config(**TORCH, transformers={"max_memory": {"cpu": 0}}))


def test_rejects_stop_token_of_several_tokens(tiny_llama):
    with pytest.raises(ValueError, match="'### End' is 7 tokens"):
        create_engine(tiny_llama, engine_config(**TORCH, stop_tokens=["### End"]))


def test_smollm2_in_a_batch_and_alone(smollm2: Path):
    """SmolLM2 in float32: three requests of unequal length, alone and together."""
    engine = create_engine(smollm2, engine_config(**TORCH, max_context=2048))
    prompts = ["How to prepare a spanish omelette:", "Paris", "One, two, three, four, five, six,"]
    together, _ = run(engine, prompts, Sampling(max_new_tokens=24))
    alone = [run(engine, [p], Sampling(max_new_tokens=24))[0][0] for p in prompts]
    assert together == alone
    assert "seven" in together[2]


@pytest.fixture(scope="module")
def quantized(smollm2: Path) -> Path:
    """SmolLM2 as the archive of a CPU holds it."""
    need("openvino")
    return export(smollm2, engine_config(name="openvino"))


def test_settings_reach_openvino(tiny_llama, monkeypatch):
    """Each has a value that is not the default."""
    genai = need("openvino")
    seen = {}

    def stop_here(weights, tokenizer, scheduler, device, **properties):
        seen.update(scheduler=scheduler, properties=properties)
        raise InterruptedError

    monkeypatch.setattr(genai, "ContinuousBatchingPipeline", stop_here)
    own = {"cache_gb": 3, "max_num_batched_tokens": 77, "prefix_caching": False}
    own |= {"dynamic_quantization": 32, "prompt_lookup": 4, "inference_precision": "bf16"}
    config = engine_config(name="openvino", threads=5, max_batch=9, openvino=own)
    with pytest.raises(InterruptedError):
        create_engine(tiny_llama, config)
    scheduler = seen["scheduler"]
    assert scheduler.cache_size == 3
    assert scheduler.max_num_batched_tokens == 77
    assert scheduler.enable_prefix_caching is False
    assert scheduler.max_num_seqs == 9
    assert scheduler.dynamic_split_fuse is True
    assert seen["properties"] == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
        "INFERENCE_NUM_THREADS": 5,
        "prompt_lookup": True,
    }


def test_cache_can_be_a_fraction_of_a_gigabyte(tmp_path_factory):
    weights = tiny_weights("openvino", "LLAMA", tmp_path_factory.mktemp("fraction") / "LLAMA")
    engine = load_engine("openvino", weights, openvino={"cache_gb": 0.01})
    # Keys and values of 2 layers with 2 heads of 16 numbers, in 16 bits.
    wanted = 0.01 * 2**30 / (2 * 2 * 2 * 16 * 2)
    assert 0.9 * wanted < engine.cache_tokens <= wanted


def test_threads_reach_torch(tiny_llama):
    before = torch.get_num_threads()
    try:
        engine = create_engine(tiny_llama, engine_config(**TORCH, threads=before + 1))
        assert torch.get_num_threads() == before + 1
        assert f"{before + 1} threads" in engine.description
    finally:
        torch.set_num_threads(before)


def test_rejects_cache_larger_than_the_memory(tiny_llama):
    """Rejected where the model is loaded, since an archive may be made on a smaller machine."""
    need("openvino")
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    too_much = memory // 2**30 + 1
    message = rf"app\.engine\.openvino\.cache_gb: {too_much} does not fit .*: .*\(the KV cache\)"
    with pytest.raises(ValueError, match=message):
        create_engine(tiny_llama, engine_config(name="openvino", openvino={"cache_gb": too_much}))


STATEMENTS = [
    "Paris is the capital of",
    "One, two, three, four, five, six,",
    "The opposite of hot is",
]


def test_both_engines_generate_the_same_first_tokens(smollm2: Path, quantized: Path):
    """int8 weights and float32 agree on the first tokens; later ones differ by rounding."""
    few = Sampling(max_new_tokens=4)
    exact = run(create_engine(smollm2, engine_config(**TORCH)), STATEMENTS, few)
    assert run(create_engine(quantized, engine_config(name="openvino")), STATEMENTS, few) == exact


def test_batch_is_exact_without_dynamic_quantization(quantized: Path):
    """With `dynamic_quantization: 0`: 12 texts of 32 tokens, alone and together."""
    engine = create_engine(
        quantized, engine_config(name="openvino", openvino={"dynamic_quantization": 0})
    )
    prompts = [f"Number {i}. Write a story about a river and {i} lanterns." for i in range(12)]
    together, _ = run(engine, prompts, Sampling(max_new_tokens=32))
    assert together == [run(engine, [p], Sampling(max_new_tokens=32))[0][0] for p in prompts]


def test_prompt_lookup_keeps_the_text(tiny_llama: Path, tmp_path: Path):
    """Greedy texts that repeat themselves are the same; sampled ones have the right length."""
    need("openvino")
    exact = {"precision": "fp16", "dynamic_quantization": 0}
    config = engine_config(name="openvino", openvino=exact)
    folder = export(tiny_llama, config, tmp_path)
    plain = create_engine(folder, config)
    looking = create_engine(
        folder, engine_config(name="openvino", openvino=exact | {"prompt_lookup": 4})
    )
    assert "prompt lookup of 4" in looking.description
    greedy = Sampling(max_new_tokens=40, ignore_eos=True)
    assert run(looking, PROMPTS, greedy) == run(plain, PROMPTS, greedy)
    one = Sampling(max_new_tokens=1, ignore_eos=True)
    assert run(looking, PROMPTS, one) == run(plain, PROMPTS, one)
    sampled = Sampling(max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    assert run(looking, PROMPTS, sampled)[1] == ["length"] * len(PROMPTS)
