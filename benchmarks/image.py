"""The images: what is in them, how long a build and a start take. Needs Docker or podman.

    python -m benchmarks.image                 # fifteen minutes
    python -m benchmarks.image --sizes-only    # three

"Cold" builds without the engine's cache of layers; pip's cache of downloads stays, so unpacking is
timed and not the network. "Edit" appends one line to the handler and builds again. Starts alternate
with those of the same archive as a process of this machine (`deploy.torchserve`); "ready" is the
same question to the management port in both.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from benchmarks.record import summary, write
from benchmarks.systems import APP, PORT, STORE
from deploy.archive.build import build_archive
from deploy.archive.pack import HANDLER
from deploy.common.cli import command
from deploy.image.build import build_image
from deploy.image.lookup import image_name
from deploy.image.report import bytes_by_part, compressed_bytes
from deploy.image.run import run_container
from deploy.image.runtime import container_runtime
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights

TARGETS = ("cpu-lean", "cpu")
ROUNDS = 5
EDITED = HANDLER / "llm_handler.py"


@contextmanager
def one_more_line(path: Path) -> Iterator[None]:
    """A comment at the end of a file, while the block runs."""
    text = path.read_text()
    path.write_text(f"{text}# {time.time_ns()}\n")
    try:
        yield
    finally:
        path.write_text(text)


def build(target: str) -> float:
    """Seconds that `make build-...` takes, without finding the weights."""
    began = time.perf_counter()
    build_image(APP, get_weights(APP), target=target, tag=f"bench-{target}")
    return time.perf_counter() - began


def builds(target: str) -> dict[str, float | list[float]]:
    """One build from nothing, and three after an edit of the handler."""
    program = container_runtime()
    subprocess.run([program, "builder", "prune", "--all", "--force", "--filter", "type=regular"])
    found: dict[str, float | list[float]] = {"cold_seconds": build(target)}
    edits = []
    for _ in range(3):
        with one_more_line(EDITED):
            edits.append(build(target))
    build(target)  # as committed, from the cache
    return found | {"edit_seconds": summary(edits)}


def start_container(target: str) -> tuple[float, float]:
    """Seconds to ready, and MB then, as the kernel counts the container."""
    began = time.perf_counter()
    name = run_container(APP, tag=f"bench-{target}", port=PORT, memory="2g")
    ready = time.perf_counter() - began
    form = "{{.MemUsage}}"
    stats = [container_runtime(), "stats", "--no-stream", "--format", form, name]
    used = subprocess.run(stats, capture_output=True, text=True, check=True).stdout.split()[0]
    subprocess.run([container_runtime(), "rm", "--force", name], capture_output=True)
    return ready, float(used.removesuffix("MiB")) * 1.048576


def start_process() -> float:
    """The same archive without a container."""
    archive = build_archive(APP, get_weights(APP), store=STORE)
    began = time.perf_counter()
    with Server(archive, port=PORT):
        return time.perf_counter() - began


@command
def main(arguments: list[str] | None) -> None:
    """Measure, and write results/image.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image")
    parser.add_argument("--sizes-only", action="store_true")
    sizes_only = parser.parse_args(arguments).sizes_only
    figures: dict[str, dict] = {}
    for target in TARGETS:
        if sizes_only:
            build(target)
        figures[target] = {} if sizes_only else builds(target)
        name = image_name(APP, f"bench-{target}")
        parts = bytes_by_part(name)
        figures[target]["bytes"] = dict(parts)
        figures[target]["bytes_without_weights"] = parts.total() - parts["weights"]
        figures[target]["compressed_bytes"] = compressed_bytes(name)
    if not sizes_only:
        measure_starts(figures)
    print(write("image", figures, ["torch", "torchserve", "openvino"], {"engine": _version()}).name)


def measure_starts(figures: dict[str, dict]) -> None:
    """Add the times to ready, and the memory then, of containers and of the process."""
    starts: dict[str, list[float]] = {"process": [], **{t: [] for t in TARGETS}}
    memory: dict[str, list[float]] = {t: [] for t in TARGETS}
    for number in tqdm(range(ROUNDS + 1), unit="round"):
        process = start_process()
        found = {target: start_container(target) for target in TARGETS}
        if number:  # the first round reads files from the disk
            starts["process"].append(process)
            for target, (ready, used) in found.items():
                starts[target].append(ready)
                memory[target].append(used)
    for target in TARGETS:
        pairs = zip(starts[target], starts["process"], strict=True)
        figures[target]["ready_seconds"] = summary(starts[target])
        figures[target]["ready_to_process"] = summary([a / b for a, b in pairs])
        figures[target]["memory_mb"] = summary(memory[target])
    figures["process"] = {"ready_seconds": summary(starts["process"])}


def _version() -> str:
    run = [container_runtime(), "version", "--format", "{{.Server.Version}}"]
    version = subprocess.run(run, capture_output=True, text=True).stdout.strip()
    return f"{Path(container_runtime()).name} {version}"


if __name__ == "__main__":
    sys.exit(main())
