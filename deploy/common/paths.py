"""The folders of everything that is made and not written; git ignores them all."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
MODEL_STORE = ROOT / "model_store"
BUILD = ROOT / "build"

_TEMPORARY = "tmp"
_NEW_SECONDS = 60


class UserError(Exception):
    """An error that the user can fix. Command lines print it in one line, without a traceback."""


def shown(path: Path) -> str:
    """Return the path as a user would type it: relative to the repository where possible."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder in `build`, and remove it, and those of programs that were killed.

    A program holds a lock on its folder, which the system releases however the program ends.
    """
    BUILD.mkdir(exist_ok=True)
    for folder in BUILD.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # another program removes it too, or its owner is running
            # A new folder has no lock for a moment.
            if time.time() - folder.stat().st_mtime > _NEW_SECONDS:
                with _locked(folder):
                    shutil.rmtree(folder)
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=BUILD))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder; raise OSError if another program holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, which costs no space; copy if the file systems differ."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
