"""Result files: measurements together with what made them, so that no number stands alone."""

import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import psutil

RESULTS = Path(__file__).parent / "results"


class Summary(TypedDict):
    """Repeated measurements; `values` in the order of the rounds."""

    median: float
    min: float
    max: float
    rounds: int
    values: list[float]


def summary(values: list[float]) -> Summary:
    """Sum up repeated measurements by median and spread."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
        "values": values,
    }


def write(
    name: str, measurements: dict, packages: list[str], others: dict[str, str] | None = None
) -> Path:
    """Write `results/<name>.json` with the command, versions, commit and machine.

    Args:
        name: the file's stem.
        measurements: what was measured; the keys say the units.
        packages: distributions whose versions matter.
        others: versions of what is not installed here: programs, other environments.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    # With "-dirty" at its end where files differ from the commit.
    git = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    run = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = run.stdout.strip()
    record = {
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages} | (others or {}),
        "machine": machine(),
        "measurements": measurements,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Read `results/<name>.json` as `write` wrote it."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return record


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def in_rounds(
    module: str, cases: dict[str, dict], rounds: int, report: Callable[[str], None] = print
) -> dict[str, dict[str, Summary]]:
    """Measure each case in turn with `python -m module --child CASE`, `rounds` times.

    The last line that the child prints is its measurements, as JSON. Each case gets a new process,
    so that its peak memory is its own and all of it is freed.

    Returns:
        Name of the case -> quantity -> `summary` over the rounds.
    """
    values: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            command = [sys.executable, "-m", module, "--child", json.dumps(case)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(run.stdout.splitlines()[-1])
            shown = {quantity: round(v, 2) for quantity, v in measured.items()}
            report(f"{name} {shown}")
            for quantity, value in measured.items():
                values[name].setdefault(quantity, []).append(value)
    return {name: {q: summary(v) for q, v in found.items()} for name, found in values.items()}


def memory(pid: int) -> int:
    """Count the bytes of a process and its descendants in RAM, shared pages once (PSS)."""
    root = psutil.Process(pid)
    return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])


def peak_memory_gb() -> float:
    """Peak memory of this process so far in GB, mapped files included. Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def machine() -> dict[str, str | int | float | None]:
    """Describe processor, cores, memory and system: no names, no paths."""
    found: dict[str, str | int | float | None] = {
        "processor": _processor(),
        "bits8_and_bfloat16": _instructions(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | _gpu()


def _gpu() -> dict[str, str | int | float | None]:
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True)
    return {"gpu": "; ".join(run.stdout.split("\n")).strip("; ")} if run.returncode == 0 else {}


def _instructions() -> str:
    """Name the instructions for small numbers: `processor` often does not reveal them."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return ", ".join(name for name in wanted if name in flags) or "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
