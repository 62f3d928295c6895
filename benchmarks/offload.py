"""A model that does not fit: the dolly-v2-3b shape under a RAM budget, the rest read from disk.

    python -m benchmarks.offload

accelerate fills `max_memory` and leaves the other layers in their files; each step reads those
again. Two states of the same machine: "warm" leaves the files in the page cache, as on a machine
with RAM to spare; "cold" drops them from it all the time, as if there were none. The disk's own
speed, by reading the same files from end to end, is the limit to compare with.
"""

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.large import decode_rate
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive.build import model_config
from deploy.common.cli import command
from deploy.common.paths import BUILD
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.engine import create_engine

ROUNDS = 3
BUDGETS = ("1GiB", "2GiB", "4GiB", "all")
NEW_TOKENS = 3


def question(budget: str, state: str = "warm", *, app: str, random: bool, dtype: str) -> dict:
    """What a child is asked: `budget` for accelerate's `max_memory`, or "all"."""
    return {"app": app, "random": random, "dtype": dtype, "budget": budget, "state": state}


def tensors(weights: Path) -> list[Path]:
    """The checkpoint's shards."""
    return [path for path in weight_files(weights) if path.suffix == ".safetensors"]


def forget(weights: Path) -> None:
    """Drop the shards from the page cache, as far as nobody has them mapped."""
    for path in tensors(weights):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(weights: Path) -> float:
    """Bytes a second when the shards are read from end to end, not from the cache."""
    forget(weights)
    began = time.perf_counter()
    for path in tensors(weights):
        with path.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    return sum(p.stat().st_size for p in tensors(weights)) / (time.perf_counter() - began)


def bytes_on_disk(model: PreTrainedModel) -> int:
    """Of the weights, those that accelerate reads from disk at every step."""
    device_map = getattr(model, "hf_device_map", {})
    disk = tuple(f"{module}." for module, place in device_map.items() if place == "disk")
    named = model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if f"{name}.".startswith(disk))


def child(asked: dict) -> None:
    """Load within the budget, decode a little, print the figures as JSON."""
    loading: dict[str, object] = {"dtype": asked["dtype"]}
    if asked["budget"] != "all":
        loading["max_memory"] = {"cpu": asked["budget"]}
        loading["offload_folder"] = str(BUILD / "offload")
    settings = {"name": "transformers", "transformers": loading}
    weights = get_weights(asked["app"], shape_only=asked["random"])
    _, config = model_config(asked["app"], weights, settings)
    speed = disk_speed(weights)
    done = threading.Event()

    def keep_cold() -> None:
        while not done.wait(0.2):
            forget(weights)

    if asked["state"] == "cold":
        threading.Thread(target=keep_cold, daemon=True).start()
    engine = create_engine(weights, config)
    figures = {
        "disk_bytes_per_second": speed,
        "tokens_per_second": decode_rate(engine, 1, NEW_TOKENS),
        "bytes_on_disk": bytes_on_disk(engine.model),
    }
    done.set()
    if figures["bytes_on_disk"]:
        figures["disk_limit_tokens_per_second"] = speed / figures["bytes_on_disk"]
    places = getattr(engine.model, "hf_device_map", {}).values()
    on_disk = sum(place == "disk" for place in places)
    figures |= {"modules_on_disk": on_disk, "modules": len(places) or 1}
    print(json.dumps(figures | {"peak_memory_gb": peak_memory_gb()}))


@command
def main(arguments: list[str] | None) -> None:
    """Measure, and write results/offload.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload")
    parser.add_argument("--child", type=json.loads, help="used by the program itself")
    options = parser.parse_args(arguments)
    if options.child:
        child(options.child)
        return
    cases = [(budget, state) for budget in BUDGETS for state in ("warm", "cold")]
    cases.remove(("all", "cold"))  # nothing is read then
    dolly = {"app": "dolly-v2-3b", "random": True, "dtype": "bfloat16"}
    questions = {f"{budget} {state}": question(budget, state, **dolly) for budget, state in cases}
    rows = in_rounds("benchmarks.offload", questions, ROUNDS)
    print(write("offload", rows, ["torch", "transformers", "accelerate"]).name)


if __name__ == "__main__":
    sys.exit(main())
