"""What a stand-in leaves behind when it is killed, and how the next one removes it.

A stand-in that ends in order leaves nothing. For the others there is a file per stand-in in
build/standin with what it started, and a label on its containers.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.common.paths import BUILD, UserError
from deploy.image.runtime import container_runtime

LABEL = "serving-llms.standin"
LEDGERS = BUILD / "standin"


class Ledger:
    """What this stand-in has started, on disk.

    Args:
        folder: the stand-in's, to be removed with the rest; None if it is the user's.
    """

    def __init__(self, folder: Path | None) -> None:
        LEDGERS.mkdir(parents=True, exist_ok=True)
        self.path = LEDGERS / f"{label_of_this_process()}.json"
        self._content = {"folder": str(folder) if folder else None, "processes": []}
        self._save()

    def add(self, pid: int) -> None:
        """Note a process (and its group, if it leads one)."""
        with suppress(psutil.NoSuchProcess):
            self._content["processes"].append([pid, psutil.Process(pid).create_time()])
            self._save()

    def close(self) -> None:
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        self.path.write_text(json.dumps(self._content))


def label_of_this_process() -> str:
    """The process's number, and when it began: numbers are used again."""
    return f"{os.getpid()}-{psutil.Process().create_time():.2f}"


def clean() -> None:
    """Remove what stand-ins that are no more have left."""
    for path in LEDGERS.glob("*.json"):
        if not _alive(path.stem):
            try:
                content = json.loads(path.read_text() or "{}")
            except FileNotFoundError:  # another stand-in that starts just now was quicker
                continue
            for pid, began in content.get("processes", []):
                _kill(pid, began)
            if content.get("folder"):
                shutil.rmtree(content["folder"], ignore_errors=True)
            path.unlink(missing_ok=True)
    with suppress(UserError):
        remove_containers(lambda label: not _alive(label))


def remove_containers(condition: Callable[[str], bool]) -> None:
    """Remove containers and networks of stand-ins whose label meets a condition."""
    form = '{{.ID}} {{.Label "' + LABEL + '"}}'
    for kind, remove in (("container", ["rm", "--force", "--volumes"]), ("network", ["rm"])):
        every = ["--all"] if kind == "container" else []
        listed = subprocess.run(
            [
                container_runtime(),
                kind,
                "ls",
                *every,
                "--filter",
                f"label={LABEL}",
                "--format",
                form,
            ],
            capture_output=True,
            text=True,
        )
        for line in listed.stdout.splitlines():
            number, label = line.split(" ", 1)
            if condition(label):
                subprocess.run([container_runtime(), kind, *remove, number], capture_output=True)


def _alive(label: str) -> bool:
    pid, _, began = label.partition("-")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        dead = process.status() == psutil.STATUS_ZOMBIE  # killed, and its parent has not looked
        return not dead and f"{process.create_time():.2f}" == began
    return False


def _kill(pid: int, began: float) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        if psutil.Process(pid).create_time() == began:
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
