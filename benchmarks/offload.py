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

from benchmarks.large import APP, decode_rate
from benchmarks.record import in_rounds, peak_memory_gb, write
from deploy.archive import model_config
from deploy.cli import command
from deploy.paths import BUILD
from deploy.weights import get_weights
from handler.engine import create_engine

ROUNDS = 3
BUDGETS = ("1GiB", "2GiB", "3GiB", "4GiB", "5GiB", "all")
NEW_TOKENS = 3


def tensors() -> list[Path]:
    """The checkpoint's shards."""
    return sorted(get_weights(APP, shape_only=True).glob("*.safetensors"))


def forget() -> None:
    """Drop the shards from the page cache, as far as nobody has them mapped."""
    for path in tensors():
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed() -> float:
    """Bytes a second when the shards are read from end to end, not from the cache."""
    forget()
    began = time.perf_counter()
    for path in tensors():
        with path.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    return sum(path.stat().st_size for path in tensors()) / (time.perf_counter() - began)


def child(question: dict) -> None:
    """Load within the budget, decode a little, print the figures as JSON."""
    settings = {"name": "transformers", "dtype": "bfloat16"}
    if question["budget"] != "all":
        settings["max_memory"] = {"cpu": question["budget"]}
        settings["offload_folder"] = str(BUILD / "offload")
    weights = get_weights(APP, shape_only=True)
    _, config = model_config(APP, weights, settings)
    speed = disk_speed()
    done = threading.Event()

    def keep_cold() -> None:
        while not done.wait(0.2):
            forget()

    if question["state"] == "cold":
        threading.Thread(target=keep_cold, daemon=True).start()
    engine = create_engine(weights, config)
    figures = {
        "disk_bytes_per_second": speed,
        "tokens_per_second": decode_rate(engine, 1, NEW_TOKENS),
    }
    done.set()
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
    questions = {f"{budget} {state}": {"budget": budget, "state": state} for budget, state in cases}
    rows = in_rounds("benchmarks.offload", questions, ROUNDS)
    print(write("offload", rows, ["torch", "transformers", "accelerate"]).name)


if __name__ == "__main__":
    sys.exit(main())
