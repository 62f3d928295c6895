"""Where things that are made, not written, are kept (git ignores them all), and how they move."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
MODEL_STORE = ROOT / "model_store"
BUILD = ROOT / "build"


class UserError(Exception):
    """Something the reader can mend. Shown as one line, without a traceback."""


def shown(path: Path) -> str:
    """The path as the reader would type it: relative to the repository where possible."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where both are on one file system, which costs no space; else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
