"""The whole life of a deployment, on the stand-in for Vertex AI: `make rehearse`.

    python -m standin.rehearse smollm2-135m

Runs the commands behind `make plan`, `make deploy`, ... as they are, each in a process of its own.
They know nothing of the stand-in but the environment variables that lead to it. Then it counts the
requests that they made. With Docker the image of `make build-pro` is pushed and started, without
the archive of `make archive`.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from deploy.common.cli import app_parser, command
from deploy.common.paths import UserError
from deploy.image.lookup import image_name, inspect_image
from deploy.image.runtime import container_runtime
from standin.local import Standin

CANARY_TAG = "canary"


def rehearse(app: str, tag: str, scale: float) -> None:
    """From `plan` to `cleanup`; prints what each command prints, the seconds, and the requests.

    Args:
        app: the APP.
        tag: of its image, if there is Docker.
        scale: what the platform's own waiting is multiplied by.

    Raises:
        UserError: a command failed; it has printed why.
    """
    began = time.monotonic()
    standin = Standin(scale=scale, limit_scale=1.0)
    print(f"stand-in for Vertex AI: models run with {standin.runner}", flush=True)
    with standin, _another_tag(app, tag, standin.runner):
        for step in (
            ["plan"],
            ["deploy", "--tag", tag],
            ["test"],
            ["deploy", "--tag", CANARY_TAG, "--canary", "20"],
            ["status"],
            ["rollback"],
            ["status"],
            ["cleanup"],
        ):
            _run([step[0], app, *step[1:]])
        calls = Counter(call["method"] for call in standin.calls())
    print(f"\n{sum(calls.values())} requests in {time.monotonic() - began:.0f} s:")
    for method, count in calls.most_common():
        print(f"{count:5}  {method}")


def _run(arguments: list[str]) -> None:
    print(f"\n$ python -m deploy.vertex {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", "deploy.vertex", *arguments]).returncode != 0:
        raise UserError(f"{arguments[0]} failed; see above")


@contextmanager
def _another_tag(app: str, tag: str, runner: str) -> Iterator[None]:
    """Another name for the same image: for Vertex AI it is another image, enough to rehearse."""
    if runner != "docker":
        yield
        return
    names = image_name(app, tag), image_name(app, CANARY_TAG)
    inspect_image(app, tag)  # says how to build one that is missing
    subprocess.run([container_runtime(), "tag", *names], check=True)
    try:
        yield
    finally:  # takes away the name, not the image
        subprocess.run([container_runtime(), "rmi", names[1]], capture_output=True)


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser: argparse.ArgumentParser = app_parser("standin.rehearse", "rehearse a deployment")
    parser.add_argument("--tag", default="pro", help="of the image")
    parser.add_argument("--scale", type=float, default=0.02, help="of the platform's waiting")
    options = parser.parse_args(arguments)
    rehearse(options.app, options.tag, options.scale)


if __name__ == "__main__":
    sys.exit(main())
