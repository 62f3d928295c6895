"""The images: what is in them, how long a build and a start take. Needs Docker or podman.

    python -m benchmarks.image                 # fifteen minutes
    python -m benchmarks.image --sizes-only    # three

"Cold" builds without the container runtime's cache of layers; pip's cache of downloads stays, so
that the network is not timed. "Edit" appends one line to the handler and builds again. Starts
alternate with those of the same archive as a process of this machine (`deploy.torchserve`); "ready"
is what the management API reports in both.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.record import summary, write
from benchmarks.systems import APP, PORT, STORE
from deploy.archive.build import build_archive
from deploy.archive.pack import HANDLER
from deploy.common import cli
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
    """Append a comment to a file while the block runs."""
    text = path.read_text()
    path.write_text(f"{text}# {time.time_ns()}\n")
    try:
        yield
    finally:
        path.write_text(text)


def build(target: str) -> float:
    """Time `make build-...`, without getting the weights."""
    began = time.perf_counter()
    build_image(APP, get_weights(APP), target=target, tag=f"bench-{target}")
    return time.perf_counter() - began


def builds(target: str) -> dict[str, Any]:
    """Time one build without cached layers, and three after an edit of the handler."""
    program = container_runtime()
    subprocess.run([program, "builder", "prune", "--all", "--force", "--filter", "type=regular"])
    cold = build(target)
    edits = []
    for _ in range(3):
        with one_more_line(EDITED):
            edits.append(build(target))
    build(target)  # as committed, from the cache
    return {"cold_seconds": cold, "edit_seconds": summary(edits)}


def start_container(target: str) -> tuple[float, float]:
    """Measure the seconds to ready, and the MB then, as the kernel counts the container."""
    began = time.perf_counter()
    name = run_container(APP, tag=f"bench-{target}", port=PORT, memory="2g")
    ready = time.perf_counter() - began
    form = "{{.MemUsage}}"
    stats = [container_runtime(), "stats", "--no-stream", "--format", form, name]
    used = subprocess.run(stats, capture_output=True, text=True, check=True).stdout.split()[0]
    subprocess.run([container_runtime(), "rm", "--force", name], capture_output=True)
    return ready, float(used.removesuffix("MiB")) * 1.048576


def start_process() -> float:
    """Time the start of the same archive without a container."""
    archive = build_archive(APP, get_weights(APP), store=STORE)
    began = time.perf_counter()
    with Server(archive, port=PORT):
        return time.perf_counter() - began


app = cli.app(__doc__)


@app.command()
def main(
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Build, and do not time.")
    ] = False,
) -> None:
    """Measure, and write results/image.json."""
    measured: dict[str, dict] = {}
    for target in TARGETS:
        if sizes_only:
            build(target)
        measured[target] = {} if sizes_only else builds(target)
        name = image_name(APP, f"bench-{target}")
        parts = bytes_by_part(name)
        measured[target]["bytes"] = dict(parts)
        measured[target]["bytes_without_weights"] = parts.total() - parts["weights"]
        measured[target]["compressed_bytes"] = compressed_bytes(name)
    if not sizes_only:
        measure_starts(measured)
    print(
        write(
            "image",
            measured,
            ["torch", "torchserve", "openvino"],
            {"container runtime": _version()},
        ).name
    )


def measure_starts(measured: dict[str, dict]) -> None:
    """Measure the times to ready, and the memory then, of containers and of the process."""
    starts: dict[str, list[float]] = {"process": [], **{t: [] for t in TARGETS}}
    memory: dict[str, list[float]] = {t: [] for t in TARGETS}
    for round_index in tqdm(range(ROUNDS + 1), unit="round"):
        process = start_process()
        found = {target: start_container(target) for target in TARGETS}
        if round_index:  # the first round reads files from the disk
            starts["process"].append(process)
            for target, (ready, used) in found.items():
                starts[target].append(ready)
                memory[target].append(used)
    for target in TARGETS:
        pairs = zip(starts[target], starts["process"], strict=True)
        measured[target]["ready_seconds"] = summary(starts[target])
        measured[target]["ready_to_process"] = summary([a / b for a, b in pairs])
        measured[target]["memory_mb"] = summary(memory[target])
    measured["process"] = {"ready_seconds": summary(starts["process"])}


def _version() -> str:
    run = [container_runtime(), "version", "--format", "{{.Server.Version}}"]
    version = subprocess.run(run, capture_output=True, text=True).stdout.strip()
    return f"{Path(container_runtime()).name} {version}"


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.image"))
