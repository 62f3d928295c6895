"""Clean-up after stand-ins that were killed.

A stand-in that stops normally leaves nothing behind. For the others, a ledger in build/standin
lists what each one started, and its containers have a label. The next stand-in that starts removes
both.
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
    """A file that lists what this stand-in has started.

    Args:
        folder: the stand-in's folder, to be removed too; None if the user named it.
    """

    def __init__(self, folder: Path | None) -> None:
        LEDGERS.mkdir(parents=True, exist_ok=True)
        self.path = LEDGERS / f"{label_of_this_process()}.json"
        self._folder = str(folder) if folder else None
        self._processes: list[tuple[int, float]] = []
        self._save()

    def add(self, pid: int) -> None:
        """Add a process (and its group, if it leads one)."""
        with suppress(psutil.NoSuchProcess):
            self._processes.append((pid, psutil.Process(pid).create_time()))
            self._save()

    def close(self) -> None:
        self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        content = {"folder": self._folder, "processes": self._processes}
        self.path.write_text(json.dumps(content))


def label_of_this_process() -> str:
    """Return this process's ID and start time; IDs alone are reused."""
    return f"{os.getpid()}-{psutil.Process().create_time():.2f}"


def clean() -> None:
    """Remove what killed stand-ins have left behind."""
    for path in LEDGERS.glob("*.json"):
        if not _alive(path.stem):
            try:
                content = json.loads(path.read_text() or "{}")
            except FileNotFoundError:  # another stand-in that starts now removed it
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
        command = [container_runtime(), kind, "ls", *every, "--filter", f"label={LABEL}"]
        listed = subprocess.run([*command, "--format", form], capture_output=True, text=True)
        for line in listed.stdout.splitlines():
            identifier, label = line.split(" ", 1)
            if condition(label):
                subprocess.run(
                    [container_runtime(), kind, *remove, identifier], capture_output=True
                )


def _alive(label: str) -> bool:
    pid, _, began = label.partition("-")
    with suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        dead = process.status() == psutil.STATUS_ZOMBIE  # killed, but not reaped by its parent
        return not dead and f"{process.create_time():.2f}" == began
    return False


def _kill(pid: int, began: float) -> None:
    with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
        if psutil.Process(pid).create_time() == began:
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)
