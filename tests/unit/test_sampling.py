"""What both engines draw, compared with the probabilities that the model computes."""

import functools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import handler.engine.openvino_engine
from deploy.archive.export import export
from handler.config import engine_config
from handler.engine import Engine, Sampling, create_engine
from tests import tiny

pytestmark = pytest.mark.slow

ENGINES = ["transformers", "openvino"]
EXACT = {"precision": "fp16", "dynamic_quantization": 0}
"""Without these, greedy texts of the openvino engine depend on what runs beside them."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.random_model(tmp_path_factory.mktemp("m") / "LLAMA", tiny.LLAMA)


@pytest.fixture(scope="module")
def make_engine(weights: Path, tmp_path_factory: pytest.TempPathFactory):
    """A new engine of a kind; `openvino` has settings of that engine."""
    cache = tmp_path_factory.mktemp("export")

    def make(kind: str, **openvino) -> Engine:
        if kind == "transformers":
            engine = create_engine(weights, engine_config(name=kind))
        else:
            folder = export(weights, engine_config(name=kind, openvino=EXACT), cache)
            engine = create_engine(folder, engine_config(name=kind, openvino=EXACT | openvino))
        engine.end_tokens = set()  # random weights must not end a text by chance
        return engine

    return make


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, make_engine) -> Engine:
    return make_engine(request.param)


def run(engine: Engine, prompts: list[str], samplings: list[Sampling]) -> list[str]:
    """Submit all prompts at once; return the completions, which must not fail."""
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        engine.submit(i, prompt, sampling, stream=False)
    texts = [""] * len(prompts)
    while engine.unfinished:
        for progress in engine.advance(1.0):
            assert progress.finish_reason in (None, "length"), progress
            texts[progress.key] += progress.text
    return texts


@functools.cache
def logits(weights: Path, prompt: str) -> torch.Tensor:
    """The logits of the first token after a prompt, as transformers computes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(weights)(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(weights)(ids).logits[0, -1]


DRAWS = 2000
COLD = 0.1
"""A temperature at which the probabilities of a random model differ from each other."""


def expected_share(
    scores: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The definition: softmax of the logits, cut to the likeliest tokens, then scaled to 1."""
    chances, order = scores.softmax(-1).sort(descending=True)
    least = min_p * chances[0]
    if top_p < 1:
        chances = chances.where(chances.cumsum(-1) - chances < top_p, 0)
    chances = chances.where(chances >= least, 0)
    if top_k:
        chances[top_k:] = 0
    return torch.zeros_like(chances).scatter(0, order, chances / chances.sum())


CUTS = {
    "all": {},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.05},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.05},
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_tokens_are_drawn_with_the_probabilities_of_the_model(engine, weights, cut):
    """A chi-square test over 2,000 draws, each with its own seed, so the result never changes."""
    prompt = "The quick brown fox"
    share = expected_share(logits(weights, prompt) / COLD, **cut)
    samplings = [Sampling(1, temperature=COLD, seed=seed, **cut) for seed in range(DRAWS)]
    drawn = Counter(run(engine, [prompt] * DRAWS, samplings))
    expected = Counter()
    for token, chance in enumerate(share.tolist()):
        if chance:
            expected[engine.folder.decode([token])] += chance * DRAWS
    assert set(drawn) <= set(expected), "a token was drawn that the cut excludes"
    rare = [text for text, count in expected.items() if count < 5]
    pairs = [(drawn[text], count) for text, count in expected.items() if count >= 5]
    if rare:
        pairs.append((sum(drawn[t] for t in rare), sum(expected[t] for t in rare)))
    chi_square = sum((seen - count) ** 2 / count for seen, count in pairs)
    freedom = len(pairs) - 1
    assert freedom > 3
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (chi_square, freedom, drawn)


LENGTHS = sorted(
    {32 * blocks + more for blocks in range(1, 8) for more in (-1, 0, 1)} | set(range(6, 247, 10))
)
"""Tokens of a prompt: 45 lengths, among them those at and around whole blocks of the KV cache."""


def test_prefix_caching_keeps_the_text_of_45_prompt_lengths(make_engine):
    """Prompts that begin alike, each sent twice; the second time the cache holds all of it."""
    assert len(LENGTHS) == 45
    text = ("The quick brown fox jumps over the lazy dog. " * 6).replace(" ", "-")
    prompts = [text[:length] for length in LENGTHS]
    few = [Sampling(8)] * len(prompts)
    plain = run(make_engine("openvino", prefix_caching=False), prompts, few)
    caching = make_engine("openvino", prefix_caching=True)
    assert all(len(caching.folder.encode(p)) == n for p, n in zip(prompts, LENGTHS, strict=True))
    for _ in range(2):
        alone = [run(caching, [prompt], few[:1])[0] for prompt in prompts]
        assert alone == plain
        assert run(caching, prompts, few) == plain


def test_full_kv_cache_loses_no_sequence_and_keeps_the_texts(make_engine, monkeypatch):
    """64 sequences of 200 tokens, and blocks for about eight of them."""
    prompts = [f"{i} " + "abcdefgh" * 12 for i in range(64)]
    long = [Sampling(200 - len(prompt)) for prompt in prompts]
    expected = run(make_engine("openvino"), prompts, long)
    scheduler = handler.engine.openvino_engine._scheduler

    def small(*arguments):
        config = scheduler(*arguments)
        config.cache_size, config.num_kv_blocks = 0, 60
        return config

    monkeypatch.setattr(handler.engine.openvino_engine, "_scheduler", small)
    crowded = make_engine("openvino")
    crowded.cache_tokens *= 10  # admission would otherwise keep the cache from being full
    assert run(crowded, prompts, long) == expected
    assert crowded._pipeline.get_metrics().max_cache_usage == 100, "the cache was never full"
