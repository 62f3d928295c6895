"""Every check, some side by side: `python -m tests` (make check), or only the parts that are named.

A part is a folder of tests, or a chapter with its solutions. Each has ports and containers of its
own, so that it can run beside any other part. Much of their time they wait, mostly for a server to
start: two at a time are done sooner than one after the other, on two cores as well.
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

from deploy.common.paths import BUILD, ROOT

LONGEST_FIRST = [
    *("tests/vertex", "tests/served", "notebooks/05", "tests/container", "notebooks/06"),
    *("tests/unit", "notebooks/07"),
]
"""So that no long part is left for the end, with nothing beside it."""

MAKES = ("APP", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")
"""What make passes on to the programs that it starts, and they to the make that they start."""

LOGS = BUILD / "check"
"""What each part prints, while it runs and after."""

NOTEBOOKS = sorted(ROOT.glob("notebooks/0*.ipynb"))


def parts() -> list[str]:
    """All parts, as paths below the project's folder, in the order in which they are begun."""
    tests = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    chapters = {f"notebooks/{path.name[:2]}" for path in NOTEBOOKS}
    return [*LONGEST_FIRST, *sorted((tests | chapters) - {*LONGEST_FIRST})]


def start(part: str, log: Path) -> subprocess.Popen[bytes]:
    """Begin a part, away from the terminal's Ctrl-C: `run` passes it on."""
    chapters = [str(path) for path in NOTEBOOKS if str(path).startswith(f"{ROOT / part}_")]
    command = [sys.executable, "-m", "pytest", *(["--nbval", *chapters] if chapters else [part])]
    # torch's threads wait asleep, not spinning: the cores are for whoever has work (LOG.md).
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    for name in MAKES:  # `make check APP=gpt2`: tests and chapters are about the default
        environment.pop(name, None)
    # Not a pipe: a server that a failed part left behind would hold it open for ever.
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(names: list[str], jobs: int) -> Iterator[tuple[str, int, str, float]]:
    """Run parts, `jobs` at a time: name, pytest's exit status, output, seconds; as each ends.

    If the caller leaves early (Ctrl-C), what runs is interrupted, so that it stops its servers.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def one(name: str) -> tuple[str, int, str, float]:
        began, log = time.monotonic(), LOGS / f"{name.strip('/').replace('/', '-')}.log"
        process = start(name, log)
        running.append(process)
        if stopping.is_set():  # it began while the others were being interrupted
            process.send_signal(signal.SIGINT)
        status = process.wait()
        return name, status, log.read_text(errors="replace"), time.monotonic() - began

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
    """The command line; returns 1 if a part failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests", description="run the project's checks")
    parser.add_argument("parts", nargs="*", metavar="PART", help="such as tests/unit, notebooks/04")
    parser.add_argument("--jobs", default="2", help="parts at a time, 1 or more")
    options = parser.parse_args(arguments)
    if not options.jobs.isdecimal() or int(options.jobs) < 1:
        parser.exit(2, f"error: JOBS={options.jobs}: use a whole number, 1 or more\n")
    for number in (signal.SIGTERM, signal.SIGHUP):  # what runs is interrupted then, too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # A shell starts what is in its background deaf to SIGINT, and the parts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return report(options.parts or parts(), int(options.jobs))
    except KeyboardInterrupt:
        print("\nstopped")
        return 130  # what a shell reports for a program that Ctrl-C ended


def report(names: list[str], jobs: int) -> int:
    """Run parts and print what they print, and at the end how long each took; 1 if one failed."""
    began, ended = time.monotonic(), []
    logs = LOGS.relative_to(ROOT)
    print(
        f"{len(names)} parts, {jobs} at a time; each is shown when it ends, and before in {logs}/"
    )
    sys.stdout.flush()
    for name, status, output, seconds in run(names, jobs):
        print(f"\n{output}", flush=True)
        ended.append((seconds, name, status))
        print(f"{name}: {_clock(seconds)}, {len(ended)} of {len(names)} parts done", flush=True)
    print()
    for seconds, name, status in sorted(ended, reverse=True):
        print(f"{name:20} {_clock(seconds):>6}  {'FAILED' if status else 'passed'}")
    print(f"{'all':20} {_clock(time.monotonic() - began):>6}")
    return int(any(status for _, _, status in ended))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
