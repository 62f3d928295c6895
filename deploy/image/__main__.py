"""Build, run, inspect and push the image of an APP, with Docker or podman.

python -m deploy.image build smollm2-135m --tag pro      # make build-pro
python -m deploy.image run smollm2-135m                  # make run
python -m deploy.image stop smollm2-135m                 # make stop; also delete, shell, logs
python -m deploy.image push smollm2-135m --registry europe-west4-docker.pkg.dev/PROJECT/serving
"""

import os
import subprocess
import sys
import time
from typing import Annotated

import click
import typer

from deploy.common import cli
from deploy.common.locks import one_at_a_time
from deploy.common.paths import MODEL_STORE, UserError
from deploy.image.build import TARGETS, build_image
from deploy.image.context import CONTEXT, prepare_context
from deploy.image.push import push_image
from deploy.image.run import PORT, STOP_SECONDS, container_name, run_container
from deploy.image.runtime import container_runtime, runtime_output
from deploy.torchserve.launch import CORS_ORIGIN
from deploy.weights.fetch import get_weights

Tag = Annotated[str, typer.Option(help="The image's tag.")]
Target = Annotated[
    str | None,
    typer.Option(
        click_type=click.Choice(TARGETS), help="By default, the smallest with the APP's engine."
    ),
]

app = cli.app(__doc__)


@app.command()
def prepare(
    name: cli.App,
    model_dir: cli.ModelDir = None,
    shape_only: cli.ShapeOnly = False,
    target: Target = None,
) -> None:
    """Prepare the build context, and print the target to build from it."""
    weights = get_weights(name, model_dir=model_dir, shape_only=shape_only)
    with one_at_a_time(CONTEXT):
        print(prepare_context(name, weights, target))


@app.command()
def build(
    name: cli.App,
    model_dir: cli.ModelDir = None,
    shape_only: cli.ShapeOnly = False,
    target: Target = None,
    tag: Tag = "dev",
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="Build an image to which you add weights.")
    ] = False,
) -> None:
    """Build the image."""
    container_runtime()  # fails before the minutes that weights may take
    weights = get_weights(name, model_dir=model_dir, shape_only=shape_only)
    began = time.monotonic()
    image = build_image(name, weights, target=target, tag=tag, baked=not without_weights)
    print(f"{image}: built in {time.monotonic() - began:.0f} s", flush=True)


@app.command()
def run(
    name: cli.App,
    tag: Tag = "dev",
    port: cli.Port = PORT,
    memory: Annotated[str | None, typer.Option(help="A memory limit, such as 3g.")] = None,
) -> None:
    """Run the image in a hardened container."""
    began = time.monotonic()
    container = container_name(name)
    if runtime_output(container_runtime(), "container", "inspect", container):
        print(f"replacing the existing container {container}")
    origin = os.environ.get(CORS_ORIGIN)
    run_container(
        name,
        tag=tag,
        port=port,
        memory=memory or None,
        store=MODEL_STORE,
        environment={CORS_ORIGIN: origin} if origin else None,
    )
    print(f"{container}: ready after {time.monotonic() - began:.1f} s on port {port}")


@app.command()
def stop(name: cli.App) -> None:
    """Stop the container; requests in flight are answered."""
    _call_runtime(name, "stop", "-t", str(STOP_SECONDS), container_name(name))


@app.command()
def delete(name: cli.App) -> None:
    """Delete the container."""
    _call_runtime(name, "rm", "--force", container_name(name))


@app.command()
def shell(name: cli.App) -> None:
    """Open a shell in the container."""
    _call_runtime(name, "exec", "--interactive", "--tty", container_name(name), "/bin/bash")


@app.command()
def logs(name: cli.App) -> None:
    """Follow the container's log."""
    _call_runtime(name, "logs", "--follow", container_name(name))


@app.command()
def push(
    name: cli.App,
    tag: Tag = "dev",
    registry: Annotated[str, typer.Option(help="Host and folder of the registry.")] = "",
) -> None:
    """Push the image to a registry, and print its address there."""
    if not registry:
        raise UserError(
            "name the registry: make push REGISTRY=europe-west4-docker.pkg.dev/PROJECT/serving"
        )
    print(push_image(name, registry, tag))


def _call_runtime(name: str, *arguments: str) -> None:
    """Run a command of the container runtime on the APP's container."""
    run = subprocess.run([container_runtime(), *arguments], stderr=subprocess.PIPE, text=True)
    if run.returncode != 0 and "No such container" in run.stderr:
        raise UserError(
            f"there is no container {container_name(name)}; `make run APP={name}` starts one"
        )
    if run.returncode != 0:
        raise UserError(run.stderr.strip() or f"{arguments[0]} ended with code {run.returncode}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    return cli.run(app, "deploy.image", arguments)


if __name__ == "__main__":
    sys.exit(main())
