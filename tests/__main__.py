"""Run every check, some side by side: `python -m tests` (make check), or only the parts you name.

A part is a folder of tests, a chapter with its solutions, or `vllm`: the engine's tests in the
environment of vLLM, where `make setup ENGINE=vllm` has made that. Each part has its own ports and
containers, so it can run beside any other. Parts often wait, mostly for a server to start, so some
run at the same time, even on two cores.

`make -j -k -O` does not replace this module: on SIGTERM it ends the tests before they stop their
servers, and macOS ships make 3.81, which has no `-O`.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from deploy.common.paths import BUILD, ROOT
from tools.setup_env import vllm_python

VLLM = "vllm"
VLLM_TESTS = [
    *("tests/unit/test_engine.py", "tests/unit/test_engine_options.py"),
    "tests/unit/test_json_schema.py",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/unit/test_vllm_engine*.py")),
]
"""What the part `vllm` runs: tests of engines, and of what a worker has in other versions."""

LONGEST_FIRST = [
    *("tests/vertex", "tests/served", "tests/clients", "notebooks/05", "tests/container"),
    *("notebooks/06", "tests/unit", "notebooks/07", "tests/families"),
]
"""The first parts to start, so that no long one runs alone at the end."""

MAKES = ("APP", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")
"""Variables that make passes on to the programs it starts."""

LOGS = BUILD / "check"
"""Holds the output of each part, while it runs and afterwards."""

NOTEBOOKS = sorted(ROOT.glob("notebooks/0*.ipynb"))


def parts() -> list[str]:
    """List all parts, as paths below the project's folder, in the order in which they start."""
    tests = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    chapters = {f"notebooks/{path.name[:2]}" for path in NOTEBOOKS}
    return [*LONGEST_FIRST, *sorted((tests | chapters) - {*LONGEST_FIRST}), VLLM]


def skipped(part: str) -> str | None:
    """Return why a part cannot run on this machine; None if it can."""
    if part == VLLM and vllm_python() is None:
        return "vLLM is not installed (make setup ENGINE=vllm)"
    return None


def command_of(part: str) -> list[str]:
    """Return the command that runs a part."""
    if part == VLLM:  # its environment has pytest, but no nbval
        return [str(vllm_python()), "-m", "pytest", "-o", "addopts=-ra", *VLLM_TESTS]
    chapters = [str(path) for path in NOTEBOOKS if str(path).startswith(f"{ROOT / part}_")]
    return [sys.executable, "-m", "pytest", *(["--nbval", *chapters] if chapters else [part])]


def start(part: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a part in its own session: Ctrl-C does not reach it, `run` passes it on."""
    command = [*command_of(part), "--durations=20"]
    # torch's threads sleep while they wait, so that other parts can use the cores (LOG.md).
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    for name in MAKES:  # for `make check APP=gpt2`: tests and chapters use the default app
        environment.pop(name, None)
    # Not a pipe: a server that a failed part left running would keep it open.
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Result(NamedTuple):
    """The result of one part."""

    name: str
    status: int
    """pytest's exit status."""
    output: str
    seconds: float
    cpu_seconds: float
    """Time on all cores, of the part and the processes it waited for."""


def run(names: list[str], jobs: int) -> Iterator[Result]:
    """Run parts, `jobs` at a time; yield a `Result` as each ends.

    If the caller leaves early (Ctrl-C), running parts are interrupted, so that they stop their
    servers.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def one(name: str) -> Result:
        began, log = time.monotonic(), LOGS / f"{name.strip('/').replace('/', '-')}.log"
        process = start(name, log)
        running.append(process)
        if stopping.is_set():  # it started while the others were being interrupted
            process.send_signal(signal.SIGINT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output, seconds = log.read_text(errors="replace"), time.monotonic() - began
        return Result(name, process.returncode, output, seconds, used.ru_utime + used.ru_stime)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(one, name) for name in names]):
                yield future.result()
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line; return 1 if a part failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests", description="run the project's checks")
    parser.add_argument("parts", nargs="*", metavar="PART", help="such as tests/unit, notebooks/04")
    parser.add_argument("--jobs", default="3", help="parts at a time, 1 or more")
    options = parser.parse_args(arguments)
    if not options.jobs.isdecimal() or int(options.jobs) < 1:
        parser.exit(2, f"error: JOBS={options.jobs}: use a whole number, 1 or more\n")
    for number in (signal.SIGTERM, signal.SIGHUP):  # running parts are interrupted then, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # A shell starts background jobs with SIGINT ignored, and the parts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return report(options.parts or parts(), int(options.jobs))
    except KeyboardInterrupt:
        print("\nstopped")
        return 130  # what a shell reports for a program that Ctrl-C ended


def report(names: list[str], jobs: int) -> int:
    """Run parts, print their output and the time each took; return 1 if one failed."""
    began = time.monotonic()
    results: list[Result] = []
    reasons = {name: reason for name in names if (reason := skipped(name))}
    names = [name for name in names if name not in reasons]
    for name, reason in reasons.items():
        print(f"{name}: skipped: {reason}")
    logs = LOGS.relative_to(ROOT)
    print(f"{len(names)} parts, {jobs} at a time; output in {logs}/ and here as each part ends")
    sys.stdout.flush()
    for result in run(names, jobs):
        print(f"\n{result.output}", flush=True)
        results.append(result)
        done = f"{len(results)} of {len(names)} parts done"
        print(f"{result.name}: {_clock(result.seconds)}, {done}", flush=True)
    print(f"\n{'part':20} {'time':>6} {'CPU':>6}")
    for result in sorted(results, key=lambda result: result.seconds, reverse=True):
        times = f"{_clock(result.seconds):>6} {_clock(result.cpu_seconds):>6}"
        print(f"{result.name:20} {times}  {'FAILED' if result.status else 'passed'}")
    for name, reason in reasons.items():
        print(f"{name:20} {'':13}  skipped: {reason}")
    cpu = sum(result.cpu_seconds for result in results)
    print(f"{'all':20} {_clock(time.monotonic() - began):>6} {_clock(cpu):>6}")
    return int(any(result.status for result in results))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
