"""Pack a prepared folder into an archive that TorchServe loads, with `torch-model-archiver`.

    python -m deploy.archive.pack smollm2-135m PREPARED STORE   # the image's first stage runs this

Imports nothing outside docker/locks/archive.txt: no torch, no Typer.
"""

import argparse
import errno
import os
import subprocess
import sys
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

import handler
from deploy.common.paths import MODEL_STORE, UserError, link_or_copy, temporary_folder

DIRECTORY = "no-archive"
FORMATS = (DIRECTORY, "zip-store", "default")
"""Formats of torch-model-archiver: a directory, an uncompressed and a compressed zip (`.mar`)."""

HANDLER = Path(handler.__file__).parent
ENTRY = HANDLER / "llm_handler.py"
CONFIG = "model-config.yaml"
WEIGHTS = "weights"


def pack(
    name: str,
    entry: Path,
    config: dict[str, Any],
    weights: list[Path],
    *,
    package: Path | None = None,
    archive_format: str = DIRECTORY,
    store: Path = MODEL_STORE,
) -> Path:
    """Run torch-model-archiver and return the archive; it replaces an existing one.

    Args:
        name: the model's name in the URL.
        entry: the handler's file.
        config: the content of `model-config.yaml`.
        weights: the files for the folder `weights`.
        package: the Python package that `entry` belongs to, if any; added without `entry`.
        archive_format: one of `FORMATS`.
        store: TorchServe's model store.

    Raises:
        UserError: torch-model-archiver failed; the message includes its reason.
    """
    check_format(archive_format)
    store.mkdir(parents=True, exist_ok=True)
    as_directory = archive_format == DIRECTORY
    target = archive_path(name, archive_format, store)
    with temporary_folder() as temporary:
        stage, out = temporary / "stage", temporary / "out"
        for folder in (stage, out, temporary / "tmp"):
            folder.mkdir()
        if package:
            for path in sources(package):
                if path != entry:
                    link_or_copy(path, stage / package.name / path.relative_to(package))
        if not as_directory:
            place(weights, stage / WEIGHTS)
        (temporary / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        _run_archiver(name, entry, archive_format, stage, out, temporary)
        made = out / target.name
        if as_directory:  # the archiver copies gigabytes; hard links cost no space
            place(weights, made / WEIGHTS)
        _replace(made, target)
    return target


def check_format(archive_format: str) -> None:
    """Make sure that there is such a format.

    Raises:
        UserError: names those that there are.
    """
    if archive_format not in FORMATS:
        raise UserError(f"format {archive_format!r}: use one of {', '.join(FORMATS)}")


def archive_path(name: str, archive_format: str, store: Path = MODEL_STORE) -> Path:
    """Return the path of an archive, which need not exist."""
    return store / (name if archive_format == DIRECTORY else f"{name}.mar")


def pack_prepared(
    name: str, prepared: Path, *, archive_format: str = DIRECTORY, store: Path = MODEL_STORE
) -> Path:
    """Pack our handler with a folder that `deploy.archive.build.prepare` made."""
    config = yaml.safe_load((prepared / CONFIG).read_text())
    weights = sorted((prepared / WEIGHTS).iterdir())
    return pack(
        name, ENTRY, config, weights, package=HANDLER, archive_format=archive_format, store=store
    )


def sources(package: Path) -> list[Path]:
    """Return the files of a handler's package that belong in an archive: modules, apps' YAML.

    A developer's folder may hold others, such as `.env`; print their names.
    """
    wanted, others = [], []
    for path in sorted(p for p in package.rglob("*") if p.is_file() or p.is_symlink()):
        parts = path.relative_to(package).parts
        link = any(p.is_symlink() for p in (path, *path.parents) if p.is_relative_to(package))
        hidden = any(part.startswith(".") for part in parts)
        code = path.suffix == ".py" or (parts[0] == "apps" and path.suffix == ".yaml")
        if code and not hidden and not link:
            wanted.append(path)
        elif "__pycache__" not in parts:
            others.append("/".join((package.name, *parts)))
    if others:
        print(f"leaving out {', '.join(others)}", flush=True)
    return wanted


def place(files: list[Path], target: Path) -> None:
    """Put files into a folder, as hard links where possible."""
    for path in files:
        link_or_copy(path.resolve(), target / path.name)


def _run_archiver(
    name: str, entry: Path, archive_format: str, stage: Path, out: Path, temporary: Path
) -> None:
    command: list[str | Path] = [Path(sys.executable).with_name("torch-model-archiver")]
    command += ["--model-name", name, "--version", "1.0", "--archive-format", archive_format]
    command += ["--handler", entry, "--config-file", temporary / CONFIG]
    command += ["--extra-files", stage, "--export-path", out]
    # The archiver deletes $TMPDIR/<model name> first.
    environment = os.environ | {"TMPDIR": str(temporary / "tmp")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"torch-model-archiver: {last}")


def _replace(made: Path, target: Path) -> None:
    """Replace an archive only when the new one is complete: a failed build keeps the old one.

    Several programs may do so at once. The archive is missing only for the moment between two
    renames, and the last program's archive stays.
    """
    for attempt in count():
        try:
            made.replace(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        with suppress(FileNotFoundError):  # another program moved it
            target.rename(made.with_name(f"replaced-{attempt}"))


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m deploy.archive.pack")
    parser.add_argument("app")
    parser.add_argument("prepared", type=Path, help="what deploy.archive.build.prepare made")
    parser.add_argument("store", type=Path)
    options = parser.parse_args()
    print(pack_prepared(options.app, options.prepared, store=options.store))


if __name__ == "__main__":
    main()
