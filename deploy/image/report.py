"""Measure what is in an image, by part: a table, and build/image-report.json.

    python -m deploy.image.report smollm2-135m --tag dev --tag pro
    python -m deploy.image.report smollm2-135m --tag dev --compressed     # takes a minute more

The report counts the bytes of the files that a container sees (`docker export`). A file that a
later layer hides or deletes does not count; a hard link counts once. MB are 10^6 bytes.
"""

import json
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from typing import Annotated, TypedDict

import typer

from deploy.common import cli
from deploy.common.paths import BUILD, UserError, shown
from deploy.image.lookup import image_name, inspect_image
from deploy.image.runtime import container_runtime

REPORT = BUILD / "image-report.json"

_PACKAGES = "opt/venv/lib/python3.11/site-packages/"
PARTS = {
    "weights": ("models/",),
    "torch": (f"{_PACKAGES}torch", f"{_PACKAGES}sympy", f"{_PACKAGES}networkx"),
    "transformers": (f"{_PACKAGES}transformers", f"{_PACKAGES}accelerate"),
    "OpenVINO": (f"{_PACKAGES}openvino",),
    "TorchServe": (f"{_PACKAGES}ts/", f"{_PACKAGES}torchserve"),
    "CUDA": (f"{_PACKAGES}nvidia", f"{_PACKAGES}cuda", f"{_PACKAGES}triton"),
    "other packages": ("opt/venv/",),
    "Python": ("usr/lib/python3", "usr/bin/python3", "usr/share/python3"),
    "Java": ("opt/java/",),
    "ours": ("opt/serving/",),
}
"""Part -> how its paths begin; the first that matches."""

REST = "Debian"


class ImageSizes(TypedDict, total=False):
    """The sizes of one image in bytes."""

    parts: dict[str, int]
    total: int
    without_weights: int
    compressed: int


def part_of(path: str) -> str:
    """Return the part that a path of the image belongs to."""
    # Its name begins with torch's.
    if path.startswith(f"{_PACKAGES}torchserve"):
        return "TorchServe"
    return next((part for part, begins in PARTS.items() if path.startswith(begins)), REST)


def bytes_by_part(image: str) -> Counter[str]:
    """Return the bytes of regular files in a container of the image, by part.

    Raises:
        UserError: there is no such image.
    """
    program = container_runtime()
    run = subprocess.run([program, "create", image], capture_output=True, text=True)
    if run.returncode != 0:
        raise UserError(f"{image}: {run.stderr.strip().splitlines()[-1]}")
    container = run.stdout.strip()
    sizes: Counter[str] = Counter()
    try:
        with (
            subprocess.Popen([program, "export", container], stdout=subprocess.PIPE) as export,
            tarfile.open(fileobj=export.stdout, mode="r|") as files,
        ):
            for file in files:
                if file.isreg():
                    sizes[part_of(file.name)] += file.size
    finally:
        subprocess.run([program, "rm", container], capture_output=True)
    return sizes


def compressed_bytes(image: str) -> int:
    """Return the image's size under gzip: about what a push sends and a registry stores."""
    packer, size = zlib.compressobj(6), 0
    with subprocess.Popen([container_runtime(), "save", image], stdout=subprocess.PIPE) as save:
        assert save.stdout is not None  # noqa: S101  for the type checker: it is a pipe
        while chunk := save.stdout.read(2**20):
            size += len(packer.compress(chunk))
    return size + len(packer.flush())


def table(report: dict[str, ImageSizes]) -> str:
    """Return a table in MB: a row for each part, a column for each image."""
    rows = {part: [sizes["parts"].get(part, 0) for sizes in report.values()] for part in PARTS}
    rows[REST] = [sizes["parts"].get(REST, 0) for sizes in report.values()]
    rows["total"] = [sizes.get("total", 0) for sizes in report.values()]
    rows["without weights"] = [sizes.get("without_weights", 0) for sizes in report.values()]
    rows["compressed"] = [sizes.get("compressed", 0) for sizes in report.values()]
    lines = [f"{'MB':16}" + "".join(f"{image:>32}" for image in report)]
    for name, sizes in rows.items():
        if any(sizes):
            lines.append(f"{name:16}" + "".join(f"{size / 1e6:32.0f}" for size in sizes))
    return "\n".join(lines)


app = cli.app(__doc__)


@app.command()
def report(
    name: cli.App,
    tag: Annotated[list[str], typer.Option(help="Repeat it to compare images.")] = ["dev"],  # noqa: B006
    compressed: Annotated[bool, typer.Option("--compressed", help="Also measure gzip.")] = False,
) -> None:
    """Measure what is in an APP's image, by part."""
    sizes: dict[str, ImageSizes] = {}
    for each in tag:
        inspect_image(name, each)  # without it, docker looks for a missing image in a registry
        image = image_name(name, each)
        parts = bytes_by_part(image)
        total = parts.total()
        sizes[image] = {
            "parts": dict(parts),
            "total": total,
            "without_weights": total - parts["weights"],
        }
        if compressed:
            sizes[image]["compressed"] = compressed_bytes(image)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(sizes, indent=2) + "\n")
    print(table(sizes))
    print(shown(REPORT))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.image.report", arguments)


if __name__ == "__main__":
    sys.exit(main())
