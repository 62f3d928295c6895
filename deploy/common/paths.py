"""The folders of everything that is made and not written; git ignores them all."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
MODEL_STORE = ROOT / "model_store"
BUILD = ROOT / "build"


class UserError(Exception):
    """An error that the user can fix. Command lines print it in one line, without a traceback."""


def shown(path: Path) -> str:
    """Return the path as a user would type it: relative to the repository where possible."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, which costs no space; copy if the file systems differ."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
