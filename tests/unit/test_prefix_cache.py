"""The prefix cache of the openvino engine changes no token of any completion.

The reference is an engine of the same weights without a prefix cache. Precisions are such that a
text does not depend on what runs beside it, so every comparison is exact.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.archive.export import export
from handler.config import engine_config
from handler.engine import Engine, Sampling, create_engine, openvino_engine
from tests import tiny

pytestmark = pytest.mark.slow

EXACT = {"precision": "fp16", "dynamic_quantization": 0}
FEW = Sampling(max_new_tokens=8)
Result = tuple[list[int], str]
"""Token ids and finish reason."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture = tiny.LLAMA | {"max_position_embeddings": 1024}
    model = tiny.random_model(tmp_path_factory.mktemp("m") / "LLAMA", architecture)
    config = engine_config(name="openvino", openvino=EXACT)
    return export(model, config, tmp_path_factory.mktemp("export"))


def make(weights: Path, blocks: int | None = None, **settings) -> Engine:
    """A new engine with a KV cache of some blocks of 32 tokens, by default of 1 GB."""
    scheduler = openvino_engine._scheduler

    def limited(*arguments):
        made = scheduler(*arguments)
        if blocks:
            made.cache_size, made.num_kv_blocks = 0, blocks
        return made

    config = engine_config(name="openvino", threads=1, openvino=EXACT | settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_engine, "_scheduler", limited)
        engine = create_engine(weights, config)
    engine.end_tokens = set()  # random weights must not end a text by chance
    return engine


@pytest.fixture(scope="module")
def reference(weights: Path) -> Engine:
    return make(weights, prefix_caching=False)


@pytest.fixture
def caching(weights: Path) -> Engine:
    """An engine whose prefix cache is empty."""
    return make(weights)


def run(engine: Engine, prompts: list[str], sampling: Sampling = FEW) -> list[Result]:
    """Run all prompts at once."""
    return run_all(engine, [(prompt, sampling) for prompt in prompts])


def run_all(engine: Engine, requests: list[tuple[str, Sampling]]) -> list[Result]:
    for i, (prompt, sampling) in enumerate(requests):
        engine.submit(i, prompt, sampling, stream=False)
    ids: list[list[int]] = [[] for _ in requests]
    reasons = [""] * len(requests)
    while engine.unfinished:
        for progress in engine.advance(1.0):
            ids[progress.key] += progress.token_ids
            reasons[progress.key] = progress.finish_reason or ""
    return list(zip(ids, reasons, strict=True))


def letters(length: int, seed: int) -> str:
    """A prompt with one token for each letter, another for each seed."""
    return "".join(random.Random(seed).choices("abcdefghijklmnop", k=length))


@pytest.mark.parametrize("length", [1, 20, 33, 50, 63, 90])
def test_two_prompts_that_continue_one_text_do_not_share_its_last_block(
    length: int, caching: Engine, reference: Engine
):
    """GenAI gives both the block in which the text ended, and one overwrites the other."""
    text = letters(length, 1)
    to_the_block = 32 - length % 32
    for more in ([12, 9, 17], [to_the_block, 5, to_the_block], [40, 70, 3]):
        assert run(caching, [text], Sampling(1)) == run(reference, [text], Sampling(1))
        prompts = [text + letters(n, i) for i, n in enumerate(more)]
        assert run(caching, prompts) == run(reference, prompts)


def test_prompts_that_continue_a_text_while_it_is_generated(caching: Engine, reference: Engine):
    prompt, long = letters(40, 1), Sampling(max_new_tokens=100)
    [(tokens, _)] = run(reference, [prompt], long)
    caching.submit("long", prompt, long, stream=True)
    generated: list[int] = []
    for seed in range(8):
        for progress in caching.advance(0):
            generated += progress.token_ids
        text = prompt + caching.folder.decode(tokens[: max(len(generated) - 1, 0)])
        prompts = [text + letters(10, seed + i) for i in (10, 20)]
        wanted = run(reference, prompts, Sampling(4))
        keys = [(seed, i) for i in range(2)]
        for key, each in zip(keys, prompts, strict=True):
            caching.submit(key, each, Sampling(4), stream=False)
        found: dict[object, list[int]] = {key: [] for key in keys}
        ended = 0
        while ended < 2:
            for progress in caching.advance(0):
                (generated if progress.key == "long" else found[progress.key]).extend(
                    progress.token_ids
                )
                ended += progress.key != "long" and progress.finish_reason is not None
        assert [found[key] for key in keys] == [ids for ids, _ in wanted]
    caching.cancel("long")
    assert generated == tokens[: len(generated)]


@pytest.mark.parametrize("length", [5, 31, 32, 33, 64, 200, 600])
def test_same_prompt_50_times_at_once(length: int, caching: Engine, reference: Engine):
    prompt = letters(length, 2)
    [wanted] = run(reference, [prompt])
    for _ in range(2):
        assert run(caching, [prompt] * 50) == [wanted] * 50


def test_growing_chats_keep_their_texts(caching: Engine, reference: Engine):
    """Both completions of a turn are sent back, each with another question."""
    chats = [letters(45, 3) + letters(30, seed) for seed in range(4)]
    for turn in range(4):
        wanted = run(reference, chats, Sampling(20))
        assert run(caching, chats, Sampling(20)) == wanted
        decode = reference.folder.decode
        chats = [
            chat + decode(tokens) + letters(25, 10 * turn + question)
            for chat, (tokens, _) in zip(chats, wanted, strict=True)
            for question in range(2)
        ][:6]


def test_texts_after_stop_strings_seeds_and_schemas(caching: Engine, reference: Engine):
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    prompt = letters(100, 4)
    kinds = [Sampling(max_new_tokens=40, stop=(letter,)) for letter in "eiT<"] + [
        Sampling(max_new_tokens=40, temperature=1.0, seed=5),
        Sampling(max_new_tokens=40, temperature=1.0, seed=5, json_schema=schema),
        Sampling(max_new_tokens=40, repetition_penalty=1.5),
    ]
    requests = [(prompt + more, kind) for more in ("", "b", letters(50, 5)) for kind in kinds]
    wanted = run_all(reference, requests)
    for _ in range(2):
        assert run_all(caching, requests) == wanted


def test_wrong_guesses_of_prompt_lookup_stay_out_of_the_cache(weights: Path, reference: Engine):
    """GenAI's cache keeps the hash of a block with guessed tokens, so it is off with lookup."""
    engine, rng, tried = make(weights, prompt_lookup=4), random.Random(1), 0
    while tried < 20:
        prompt = "".join(rng.choices([chr(code) for code in range(33, 127)], k=30))
        first, second = map(
            reference.folder.decode, ([t] for t in run(reference, [prompt], Sampling(2))[0][0])
        )
        if first not in prompt[:-1] or prompt[prompt.index(first) + 1] == second:
            continue
        tried += 1
        assert run(engine, [prompt]) == run(reference, [prompt])
        guessed = prompt + first + prompt[prompt.index(first) + 1] + "xy"
        assert run(engine, [guessed]) == run(reference, [guessed])


def test_sequences_that_end_at_the_end_of_the_context(caching: Engine, reference: Engine):
    limit = caching.max_context
    prompts = [letters(limit - rest, 6) for rest in (1, 2, 31, 32, 33)]
    long = Sampling(max_new_tokens=1000)
    wanted = run(reference, prompts, long)
    assert [len(tokens) for tokens, _ in wanted] == [1, 2, 31, 32, 33]
    for _ in range(2):
        assert run(caching, prompts, long) == wanted


def test_cached_long_prompt_has_tokens(caching: Engine, reference: Engine):
    """openvino.genai #4047: with the cache, long prompts had 0 tokens (models with linear
    attention). #4367: the greedy text of the second half of a long completion was another."""
    prompt = letters(500, 7)
    long = Sampling(max_new_tokens=400)
    wanted = run(reference, [prompt], long)
    assert len(wanted[0][0]) == 400
    for _ in range(3):
        assert run(caching, [prompt], long) == wanted


def test_cache_that_evicts_keeps_the_texts(weights: Path, reference: Engine):
    """40 long prompts in a cache that holds six of them, then the first ones again."""
    engine = make(weights, blocks=80)
    prompts = [letters(400, seed) for seed in range(40)]
    wanted = run(reference, prompts)
    assert run(engine, prompts) == wanted
    assert run(engine, prompts[:8]) == wanted[:8]
    assert [run(engine, [prompt])[0] for prompt in prompts] == wanted


def test_dropped_prefills_count_as_used_cache(weights: Path, reference: Engine):
    """Else the sequences after them lack room, and GenAI takes it from one in its prefill."""
    engine = make(weights, blocks=40, max_num_batched_tokens=16)
    for i in range(12):
        engine.submit(("left", i), letters(900, i), FEW, stream=False)
        for _ in range(3):
            engine.advance(0)
        engine.cancel(("left", i))
        assert engine._room() <= engine.cache_tokens - len(engine._dropped) * 32
        prompt = letters(900, i)[:600]
        assert run(engine, [prompt]) == run(reference, [prompt])
    assert engine.alive()


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_has_the_texts_of_an_engine_without_cache(
    seed: int, weights: Path, reference: Engine
):
    """Bursts of prompts that continue earlier texts, with cancellations and deadlines."""
    engine = make(weights, blocks=60, max_num_batched_tokens=64)
    rng = random.Random(seed)
    pool = [letters(length, length) for length in (5, 31, 32, 64, 100, 300)]
    sent: dict[int, tuple[str, Sampling]] = {}
    ids: dict[int, list[int]] = {}
    ended: list[tuple[str, Sampling, list[int], str]] = []
    for key in range(1_000_000):
        if len(ended) >= 150:
            break
        base = rng.choice(pool)
        for i in range(rng.choice([0, 0, 1, 3, 6])):
            prompt = base[: rng.choice([len(base), len(base), rng.randrange(1, len(base) + 1)])]
            prompt = (prompt + letters(rng.choice([0, 1, 5, 31, 32, 60]), rng.random()))[:800]
            sampling = Sampling(max_new_tokens=rng.choice([1, 2, 8, 33]))
            if rng.random() < 0.2:
                sampling = replace(sampling, temperature=1.0, seed=3)
            engine.submit(10 * key + i, prompt, sampling, stream=rng.random() < 0.5)
            sent[10 * key + i], ids[10 * key + i] = (prompt, sampling), []
        if sent and rng.random() < 0.3:
            left = rng.choice(list(sent))
            drop = rng.choice([engine.cancel, engine.expire])
            drop(left)
            if drop == engine.cancel:
                del sent[left]
        for progress in engine.advance(0):
            ids[progress.key] += progress.token_ids
            if progress.finish_reason:
                prompt, sampling = sent.pop(progress.key)
                tokens = ids.pop(progress.key)
                ended.append((prompt, sampling, tokens, progress.finish_reason))
                text = prompt + engine.folder.decode(tokens)
                pool[rng.randrange(len(pool))] = text[:700]
    assert engine.alive()
    wanted = run_all(reference, [(prompt, sampling) for prompt, sampling, _, _ in ended])
    for (_, _, tokens, reason), (full, wanted_reason) in zip(ended, wanted, strict=True):
        if reason == "timeout":
            assert tokens == full[: len(tokens)]
        else:
            assert (tokens, reason) == (full, wanted_reason)
