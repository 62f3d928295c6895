"""Locks between programs that make the same folder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from deploy.common.paths import BUILD


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another program makes this folder: two would delete each other's files."""
    locks = BUILD / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    with FileLock(locks / f"{folder.name}-{digest}.lock"):
        yield
