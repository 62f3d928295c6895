"""What is in an image, by part: a table, and build/image-report.json.

    python -m deploy.image.report smollm2-135m --tag dev --tag pro
    python -m deploy.image.report smollm2-135m --tag dev --compressed     # a minute more

Counted are the bytes of the files a container sees (`docker export`), so a file that a later layer
hides or deletes is not; a hard link counts once. MB are 10^6 bytes.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import zlib
from collections import Counter

from deploy.common.cli import app_parser, command
from deploy.common.paths import BUILD, UserError, shown
from deploy.image.build import image_name, inspect_image
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
"""Part -> how its paths begin; the first that fits. TorchServe's own name begins with torch's."""

REST = "Debian"
_ORDER = [*PARTS, REST]


def part_of(path: str) -> str:
    """The part that a path of the image belongs to."""
    if path.startswith(f"{_PACKAGES}torchserve"):
        return "TorchServe"
    return next((part for part, begins in PARTS.items() if path.startswith(begins)), REST)


def bytes_by_part(image: str) -> Counter[str]:
    """Bytes of regular files in a container of the image.

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
    """The image as gzip makes it: about what a push sends and a registry keeps."""
    packer, size = zlib.compressobj(6), 0
    with subprocess.Popen([container_runtime(), "save", image], stdout=subprocess.PIPE) as save:
        while piece := save.stdout.read(2**20):
            size += len(packer.compress(piece))
    return size + len(packer.flush())


def table(report: dict[str, dict[str, int]]) -> str:
    """Parts by images, in MB."""
    names = list(report)
    lines = [f"{'MB':16}" + "".join(f"{name:>32}" for name in names)]
    for part in _ORDER:
        if any(report[name]["parts"].get(part) for name in names):
            cells = (f"{report[name]['parts'].get(part, 0) / 1e6:32.0f}" for name in names)
            lines.append(f"{part:16}" + "".join(cells))
    for row in ("total", "without_weights", "compressed"):
        if any(row in report[name] for name in names):
            cells = (f"{report[name].get(row, 0) / 1e6:32.0f}" for name in names)
            lines.append(f"{row.replace('_', ' '):16}" + "".join(cells))
    return "\n".join(lines)


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.image.report", "what is in an app's image")
    parser.add_argument("--tag", action="append", help="once or more; dev without")
    parser.add_argument("--compressed", action="store_true")
    options: argparse.Namespace = parser.parse_args(arguments)
    report = {}
    for tag in options.tag or ["dev"]:
        inspect_image(options.app, tag)  # docker would look for it in a registry
        image = image_name(options.app, tag)
        parts = bytes_by_part(image)
        report[image] = {"parts": dict(parts), "total": parts.total()}
        report[image]["without_weights"] = parts.total() - parts["weights"]
        if options.compressed:
            report[image]["compressed"] = compressed_bytes(image)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(shown(REPORT))


if __name__ == "__main__":
    sys.exit(main())
