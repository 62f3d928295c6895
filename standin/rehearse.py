"""Rehearse a deployment on the stand-in for Vertex AI, from plan to cleanup (`make rehearse`).

    python -m standin.rehearse smollm2-135m

Runs the commands behind `make plan`, `make deploy`, ... unchanged, each in its own process. They
reach the stand-in through environment variables alone. At the end it counts their requests. With
Docker it pushes and starts the image of `make build-pro`, without Docker it needs `make archive`.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from deploy.common import cli
from deploy.common.paths import UserError
from deploy.image.lookup import image_name, inspect_image
from deploy.image.runtime import container_runtime
from standin.local import Standin

CANARY_TAG = "canary"


def rehearse(app: str, tag: str, scale: float) -> None:
    """Run every command and print its output, then the seconds and the requests of them all.

    Args:
        app: the APP.
        tag: of its image, with Docker.
        scale: what the platform's own durations are multiplied by.

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
    """Give the image a second tag: for Vertex AI that is another image."""
    if runner != "docker":
        yield
        return
    names = image_name(app, tag), image_name(app, CANARY_TAG)
    inspect_image(app, tag)  # its error says how to build a missing one
    subprocess.run([container_runtime(), "tag", *names], check=True)
    try:
        yield
    finally:  # removes the name, not the image
        subprocess.run([container_runtime(), "rmi", names[1]], capture_output=True)


command_line = cli.app(__doc__)


@command_line.command()
def command(
    app: cli.App,
    tag: Annotated[str, typer.Option(help="The image's tag, with Docker.")] = "pro",
    scale: Annotated[
        float, typer.Option(help="What the platform's own durations are multiplied by.")
    ] = 0.02,
) -> None:
    """Rehearse a deployment on the stand-in for Vertex AI."""
    rehearse(app, tag, scale)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return cli.run(command_line, "standin.rehearse", arguments)


if __name__ == "__main__":
    sys.exit(main())
