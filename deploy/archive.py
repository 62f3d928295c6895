"""Weights + handler + configuration -> what TorchServe loads.

    python -m deploy.archive smollm2-135m                      # a directory, the default
    python -m deploy.archive smollm2-135m --format zip-store   # one .mar file

`torch-model-archiver` does the work. The archive is self-contained: the handler's package, the
app's completed YAML as `model-config.yaml`, and the weights.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

import handler
from deploy.cli import app_parser, command
from deploy.export import choose_engine, export, exported_files
from deploy.paths import BUILD, MODEL_STORE, UserError, link_or_copy, shown
from deploy.weights import RANDOM, get_weights, source_of, weight_files
from handler.config import EngineConfig, app_yaml, parse_app
from handler.request import RequestError, default_parameters

FORMATS = ("no-archive", "zip-store", "default")
"""torch-model-archiver's: a directory, an uncompressed zip, a compressed zip (both `.mar`)."""

HANDLER = Path(handler.__file__).parent
ENTRY = "llm_handler.py"


def build_archive(
    name: str,
    weights: Path,
    *,
    archive_format: str = "no-archive",
    engine: dict[str, Any] | None = None,
    store: Path = MODEL_STORE,
) -> Path:
    """Make the archive of an app and return its path; one that stood there before is replaced.

    Args:
        name: the APP, and the model's name in the URL.
        weights: a complete folder, as `get_weights` returns it.
        archive_format: one of `FORMATS`.
        engine: fields of `app.engine` that win over the app's YAML.
        store: TorchServe's model store.

    Raises:
        UserError: the app's YAML is wrong, or torch-model-archiver refuses; says why.
    """
    config, settings = model_config(name, weights, engine)
    if settings.name == "openvino":
        files = exported_files(export(weights, settings))
    else:
        files = weight_files(weights)
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        files = _with_tokenizer(files, weights, Path(temporary))
        return pack(
            *(name, HANDLER / ENTRY, config, files),
            package=HANDLER,
            archive_format=archive_format,
            store=store,
        )


def pack(
    name: str,
    entry: Path,
    config: dict[str, Any],
    weights: list[Path],
    *,
    package: Path | None = None,
    archive_format: str = "no-archive",
    store: Path = MODEL_STORE,
) -> Path:
    """Run torch-model-archiver and return what it made; one that stood there before is replaced.

    Args:
        name: the model's name in the URL.
        entry: the handler's file.
        config: becomes `model-config.yaml`.
        weights: files that go into the folder `weights`.
        package: the Python package `entry` belongs to, if any; goes in without `entry`.
        archive_format: one of `FORMATS`.
        store: TorchServe's model store.

    Raises:
        UserError: torch-model-archiver refuses; says why.
    """
    if archive_format not in FORMATS:
        raise UserError(f"format {archive_format!r}: use one of {', '.join(FORMATS)}")
    store.mkdir(parents=True, exist_ok=True)
    as_directory = archive_format == "no-archive"
    target = archive_path(name, archive_format, store)
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
        stage, out = Path(temporary, "stage"), Path(temporary, "out")
        for folder in (stage, out, Path(temporary, "tmp")):
            folder.mkdir()
        if package:
            ignored = shutil.ignore_patterns("__pycache__", entry.name)
            shutil.copytree(package, stage / package.name, ignore=ignored)
        if not as_directory:
            _stage(weights, stage / "weights")
        Path(temporary, "model-config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        _run_archiver(name, entry, archive_format, stage, out, Path(temporary))
        made = out / target.name
        if as_directory:  # the archiver would copy gigabytes that hard links give for nothing
            _stage(weights, made / "weights")
        _replace(made, target)
    return target


def archive_path(name: str, archive_format: str, store: Path = MODEL_STORE) -> Path:
    """Where an archive is, or will be."""
    return store / (name if archive_format == "no-archive" else f"{name}.mar")


def model_config(
    name: str, weights: Path, engine: dict[str, Any] | None = None
) -> tuple[dict[str, Any], EngineConfig]:
    """The app's completed and checked YAML, which becomes the archive's `model-config.yaml`.

    `app.engine.name: auto` is decided here, where the weights are prepared for it.
    """
    config = app_yaml(name, local=True)
    config["app"]["engine"].update(engine or {})
    if source_of(weights).get("source") == RANDOM:
        config["app"]["random_weights"] = True
    app = parse_app(config, f"handler/apps/{name}.yaml")
    try:
        default_parameters(app)
    except RequestError as error:
        raise UserError(f"handler/apps/{name}.yaml: {error}") from error
    chosen, why = choose_engine(app.engine, weights)
    config["app"]["engine"].update(name=chosen, chosen=why)
    return config, app.engine.model_copy(update={"name": chosen})


def _stage(files: list[Path], target: Path) -> None:
    for path in files:
        link_or_copy(path.resolve(), target / path.name)


def _with_tokenizer(files: list[Path], weights: Path, folder: Path) -> list[Path]:
    """Engines read `tokenizer.json` alone; what older repositories hold is converted here."""
    if any(path.name == "tokenizer.json" for path in files):
        return files
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
        # With no files at all transformers gives an empty tokenizer, which reads nothing.
        readable = tokenizer.decode(tokenizer("Hello")["input_ids"], skip_special_tokens=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise UserError(f"{shown(weights)}: its tokenizer cannot be read ({error})") from error
    made = {path.name: path for path in folder.iterdir()}
    if not readable.strip() or "tokenizer.json" not in made:
        raise UserError(f"{shown(weights)}: has no tokenizer that can become a tokenizer.json")
    return [path for path in files if path.name not in made] + list(made.values())


def _run_archiver(
    name: str, entry: Path, archive_format: str, stage: Path, out: Path, temporary: Path
) -> None:
    command = [Path(sys.executable).with_name("torch-model-archiver")]
    command += ["--model-name", name, "--version", "1.0", "--archive-format", archive_format]
    command += ["--handler", entry, "--config-file", temporary / "model-config.yaml"]
    command += ["--extra-files", stage, "--export-path", out]
    # The archiver begins by deleting $TMPDIR/<model name>: give it a folder of its own.
    environment = os.environ | {"TMPDIR": str(temporary / "tmp")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"torch-model-archiver: {last}")


def _replace(made: Path, target: Path) -> None:
    """Put the new archive where the old one was, so that a failed build leaves the old one."""
    if target.is_dir():
        shutil.rmtree(target)
    made.replace(target)


def add_archive_options(parser: argparse.ArgumentParser) -> None:
    """What every command that makes an archive takes."""
    parser.add_argument("--format", default="no-archive", choices=FORMATS)
    parser.add_argument("--engine", choices=["openvino", "transformers"], help="not the app's own")


def build_app(options: argparse.Namespace) -> Path:
    """Weights and archive, as the command line asks for them."""
    weights = get_weights(options.app, model_dir=options.model_dir, shape_only=options.shape_only)
    engine = {"name": options.engine} if options.engine else None
    archive = build_archive(options.app, weights, archive_format=options.format, engine=engine)
    print(f"{options.app}: archived as {shown(archive)}", flush=True)
    return archive


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.archive", "make a model archive")
    add_archive_options(parser)
    build_app(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
