"""A model that is limited by memory: the dolly-v2-3b shape, random weights of its true size.

    python -m benchmarks.large        # 15 minutes, 14 GB of disk

Measures time and memory of the export, then decoding at 1 and 8 sequences in int8, int4 and
bfloat16, each in its own process, in alternated rounds. One token of one sequence needs every
weight once, so memory bandwidth divided by the weights' bytes limits the tokens per second (the
roofline); the bandwidth is measured in the same rounds.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.load import prompts
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive.build import model_config
from deploy.archive.export import export, exported_files
from deploy.common import cli
from deploy.common.paths import BUILD
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.engine import Engine, Sampling, create_engine

APP = "dolly-v2-3b"
ROUNDS = 3
NEW_TOKENS = 24
SEQUENCES = (1, 8)
CACHE = BUILD / "bench" / "export"

SYSTEMS: dict[str, dict[str, Any]] = {
    "transformers bfloat16": {"name": "transformers", "transformers": {"dtype": "bfloat16"}},
    "openvino int8": {"name": "openvino", "openvino": {"precision": "int8"}},
    "openvino int4": {"name": "openvino", "openvino": {"precision": "int4"}},
}


def seconds_of(engine: Engine, sequences: int, new_tokens: int) -> float:
    """Measure the seconds in which a batch of prompts gets `new_tokens` tokens each."""
    next_prompt = prompts(sequences)
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    began = time.perf_counter()
    for key in range(sequences):
        engine.submit(key, next_prompt(), sampling, stream=False)
    left = sequences
    while left:
        left -= sum(p.finish_reason is not None for p in engine.advance(1))
    return time.perf_counter() - began


def decode_rate(engine: Engine, sequences: int, new_tokens: int = NEW_TOKENS) -> float:
    """Measure tokens per second without the prefill: the time of the tokens after the first."""
    first = seconds_of(engine, sequences, 1)
    return sequences * new_tokens / (seconds_of(engine, sequences, 1 + new_tokens) - first)


def bandwidth() -> float:
    """Measure the bytes a second that all cores read from RAM: the best of five sums over 2 GB."""
    values = torch.ones(2**29, dtype=torch.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - began)
    return values.nbytes / min(seconds)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Measure the block's seconds, and the peak memory of this process and its children."""
    measured = {"seconds": 0.0, "peak_memory_gb": 0.0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            held = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    held += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            measured["peak_memory_gb"] = max(measured["peak_memory_gb"], held / 1e9)

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    try:
        yield measured
    finally:
        measured["seconds"] = time.perf_counter() - began
        done.set()
        watcher.join()


def files_of(settings: dict) -> list[Path]:
    """List the files that an engine with these settings loads; export them if necessary."""
    weights = get_weights(APP, shape_only=True)
    _, config = model_config(APP, weights, settings)
    if config.name == "openvino":
        return exported_files(export(weights, config, CACHE))
    return weight_files(weights)


def measure(settings: dict) -> None:
    """Load one engine, measure it, and print the measurements as JSON."""
    speed = bandwidth()
    files = files_of(settings)
    _, config = model_config(APP, get_weights(APP, shape_only=True), settings)
    began = time.perf_counter()
    engine = create_engine(files[0].parent, config)
    measured = {"bandwidth": speed, "load_seconds": time.perf_counter() - began}
    measured["bytes"] = sum(f.stat().st_size for f in files if f.suffix in {".bin", ".safetensors"})
    decode_rate(engine, 8, 4)
    for sequences in SEQUENCES:
        measured[f"tokens_per_second {sequences}"] = decode_rate(engine, sequences)
    share = measured["tokens_per_second 1"] * measured["bytes"] / speed
    measured |= {"share_of_roofline": share, "peak_memory_gb": peak_memory_gb()}
    print(json.dumps(measured))


app = cli.app(__doc__)


@app.command()
def main(
    child: Annotated[str | None, typer.Option(hidden=True, help="A case, as JSON.")] = None,
) -> None:
    """Measure, and write results/large.json."""
    if child:
        measure(json.loads(child))
        return
    get_weights(APP, shape_only=True)
    shutil.rmtree(CACHE, ignore_errors=True)
    exports = {}
    for name in ("openvino int8", "openvino int4"):  # the second finds the model already traced
        with watched() as measured:
            files_of(SYSTEMS[name])
        exports[name] = measured
    rows = in_rounds("benchmarks.large", SYSTEMS, ROUNDS)
    packages = ["torch", "transformers", "openvino", "openvino-genai", "optimum-intel", "nncf"]
    print(write("large", {"exports": exports, "engines": rows}, packages).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.large"))
