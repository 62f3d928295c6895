"""A model that does not fit: the dolly-v2-3b shape under a RAM budget, the rest on disk.

    python -m benchmarks.offload

accelerate fills `max_memory` and leaves the other layers in their files; each step reads those
again. Two states of the same machine: "warm" leaves the files in the page cache, as on a machine
with RAM to spare; "cold" keeps dropping them from it, as if there were none. The limit to compare
with is the disk's own speed, measured by reading the same files from end to end.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from benchmarks.large import decode_rate
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive.build import model_config
from deploy.common import cli
from deploy.common.paths import BUILD
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.engine.transformers_engine import TransformersEngine

ROUNDS = 3
BUDGETS = ("1GiB", "2GiB", "4GiB", "all")
NEW_TOKENS = 3


def case(budget: str, state: str = "warm", *, app: str, random: bool, dtype: str) -> dict:
    """Describe a case for `measure`; `budget` is accelerate's `max_memory`, or "all"."""
    return {"app": app, "random": random, "dtype": dtype, "budget": budget, "state": state}


def tensors(weights: Path) -> list[Path]:
    """List the checkpoint's shards."""
    return [path for path in weight_files(weights) if path.suffix == ".safetensors"]


def drop_from_cache(weights: Path) -> None:
    """Drop the shards from the page cache, except what a process has mapped."""
    for path in tensors(weights):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(weights: Path) -> float:
    """Measure the bytes a second of reading the shards from end to end, not from the cache."""
    drop_from_cache(weights)
    began = time.perf_counter()
    for path in tensors(weights):
        with path.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    return sum(p.stat().st_size for p in tensors(weights)) / (time.perf_counter() - began)


def bytes_on_disk(model: PreTrainedModel) -> int:
    """Count the bytes of the weights that accelerate reads from disk at every step."""
    device_map = getattr(model, "hf_device_map", {})
    disk = tuple(f"{module}." for module, place in device_map.items() if place == "disk")
    named = model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if f"{name}.".startswith(disk))


def measure(case: dict) -> None:
    """Load within the budget, decode a little, and print the measurements as JSON."""
    loading: dict[str, object] = {"dtype": case["dtype"]}
    if case["budget"] != "all":
        loading["max_memory"] = {"cpu": case["budget"]}
        loading["offload_folder"] = str(BUILD / "offload")
    settings = {"name": "transformers", "transformers": loading}
    weights = get_weights(case["app"], shape_only=case["random"])
    _, config = model_config(case["app"], weights, settings)
    speed = disk_speed(weights)
    done = threading.Event()

    def keep_cold() -> None:
        while not done.wait(0.2):
            drop_from_cache(weights)

    if case["state"] == "cold":
        threading.Thread(target=keep_cold, daemon=True).start()
    engine = TransformersEngine(weights, config)
    measured = {
        "disk_bytes_per_second": speed,
        "tokens_per_second": decode_rate(engine, 1, NEW_TOKENS),
        "bytes_on_disk": bytes_on_disk(engine.model),
    }
    done.set()
    if measured["bytes_on_disk"]:
        measured["disk_limit_tokens_per_second"] = speed / measured["bytes_on_disk"]
    places = getattr(engine.model, "hf_device_map", {}).values()
    on_disk = sum(place == "disk" for place in places)
    measured |= {"modules_on_disk": on_disk, "modules": len(places) or 1}
    print(json.dumps(measured | {"peak_memory_gb": peak_memory_gb()}))


command_line = cli.app(__doc__)


@command_line.command()
def main(
    child: Annotated[str | None, typer.Option(hidden=True, help="A case, as JSON.")] = None,
) -> None:
    """Measure, and write results/offload.json."""
    if child:
        measure(json.loads(child))
        return
    pairs = [(budget, state) for budget in BUDGETS for state in ("warm", "cold")]
    pairs.remove(("all", "cold"))  # nothing is read from disk then
    cases = {
        f"{budget} {state}": case(budget, state, app="dolly-v2-3b", random=True, dtype="bfloat16")
        for budget, state in pairs
    }
    rows = in_rounds("benchmarks.offload", cases, ROUNDS)
    print(write("offload", rows, ["torch", "transformers", "accelerate"]).name)


if __name__ == "__main__":
    sys.exit(cli.run(command_line, "benchmarks.offload"))
