"""Three ways of batching: ours, a static batch of `generate`, transformers' continuous batching.

    python -m benchmarks.engine_batching

In-process, SmolLM2-135M, greedy, no end token: every completion has the requested length. The
systems take turns within a round. Two kinds of load: equal lengths, and lengths from 8 to 128,
where short sequences of a static batch wait for the longest.
"""

import random
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from benchmarks.record import summary, write
from deploy.common import cli
from deploy.weights.fetch import get_weights
from handler.config import engine_config
from handler.engine import Engine, Sampling
from handler.engine.transformers_engine import TransformersEngine

ROUNDS = 3
NEW_TOKENS = 64
_WORDS = [
    "river",
    "copper",
    "lantern",
    "bridge",
    "orchard",
    "winter",
    "engine",
    "paper",
    "garden",
    "village",
    "doctor",
]

Load = list[tuple[str, int]]
"""Prompt and number of new tokens of each sequence."""


def load(sequences: int, *, mixed: bool) -> Load:
    """Make distinct prompts of about 30 to 60 tokens."""
    draw = random.Random(sequences)
    texts = [
        f"Number {i}. Write a story with these words: "
        + " ".join(draw.choice(_WORDS) for _ in range(draw.randint(15, 40)))
        for i in range(sequences)
    ]
    return [(text, draw.choice([8, 16, 32, 128]) if mixed else NEW_TOKENS) for text in texts]


def ours(engine: Engine, requests: Load) -> list[float]:
    """Measure the seconds until each sequence finishes."""
    began = time.monotonic()
    for i, (text, length) in enumerate(requests):
        engine.submit(i, text, Sampling(max_new_tokens=length), stream=False)
    lengths: dict[Hashable, int] = {i: length for i, (_, length) in enumerate(requests)}
    done: dict[Hashable, float] = {}
    while len(done) < len(requests):
        for progress in engine.advance(0.05):
            if progress.finish_reason:
                assert progress.completion_tokens == lengths[progress.key]
                done[progress.key] = time.monotonic() - began
    return list(done.values())


def static_generate(engine: TransformersEngine, requests: Load) -> list[float]:
    """Generate one padded batch; every sequence ends with the longest."""
    longest = max(length for _, length in requests)
    tokenizer = AutoTokenizer.from_pretrained(get_weights("smollm2-135m"))
    texts = [text for text, _ in requests]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    began = time.monotonic()
    with torch.inference_mode():
        model: Any = engine.model
        model.generate(**inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False)
    return [time.monotonic() - began] * len(requests)


def continuous(engine: TransformersEngine, requests: Load) -> list[float]:
    """Use transformers' ContinuousBatchingManager: one generation config, in a thread."""
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(block_size=32, num_blocks=1024, max_batch_tokens=2048)
    model: Any = engine.model
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=sizes
    ) as manager:
        began = time.monotonic()
        for i, (text, length) in enumerate(requests):
            ids = engine.folder.encode(text)
            manager.add_request(ids, request_id=str(i), max_new_tokens=length)
        done: dict[str, float] = {}
        while len(done) < len(requests):
            result = manager.get_result(timeout=60)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == requests[int(result.request_id)][1]
                done[result.request_id] = time.monotonic() - began
    return list(done.values())


SYSTEMS: dict[str, Callable[[TransformersEngine, Load], list[float]]] = {
    "ours": ours,
    "generate": static_generate,
    "continuous": continuous,
}


app = cli.app(__doc__)


@app.command()
def main() -> None:
    """Measure and write results/engine_batching.json."""
    folder: Path = get_weights("smollm2-135m")
    cases = [(1, False), (8, False), (32, False), (16, True)]
    measured = {}
    progress = tqdm(total=2 * len(cases) * ROUNDS * len(SYSTEMS), unit="run")
    for dtype in ("float32", "bfloat16"):
        engine = TransformersEngine(folder, engine_config(transformers={"dtype": dtype}))
        engine.end_tokens = set()
        for sequences, mixed in cases:
            requests = load(sequences, mixed=mixed)
            tokens = sum(length for _, length in requests)
            rates: dict[str, list[float]] = {name: [] for name in SYSTEMS}
            waits: dict[str, list[float]] = {name: [] for name in SYSTEMS}
            for _ in range(ROUNDS):
                for name, system in SYSTEMS.items():
                    seconds = system(engine, requests)
                    rates[name].append(tokens / max(seconds))
                    waits[name].append(sum(seconds) / len(seconds))
                    progress.update()
            case = f"{dtype}, {sequences} sequences" + (", mixed lengths" if mixed else "")
            measured[case] = {
                name: {
                    "tokens_per_second": summary(rates[name]),
                    "mean_latency_seconds": summary(waits[name]),
                }
                for name in SYSTEMS
            }
    print(write("engine_batching", measured, ["torch", "transformers"]).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.engine_batching"))
