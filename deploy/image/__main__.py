"""Build, run and look into the image of an APP, with Docker or podman.

python -m deploy.image build smollm2-135m --tag pro      # make build-pro
python -m deploy.image run smollm2-135m                  # make run
python -m deploy.image stop smollm2-135m                 # make stop; also delete, shell, logs
python -m deploy.image push smollm2-135m --registry europe-west4-docker.pkg.dev/PROJECT/serving
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from deploy.common.cli import app_parser, command, port_number
from deploy.common.paths import MODEL_STORE, UserError
from deploy.image.build import TARGETS, build_image, prepare_context
from deploy.image.push import push_image
from deploy.image.run import PORT, STOP_SECONDS, container_name, run_container
from deploy.image.runtime import container_runtime, docker
from deploy.weights.fetch import get_weights


def _weights(options: argparse.Namespace) -> Path:
    return get_weights(options.app, model_dir=options.model_dir, shape_only=options.shape_only)


def _prepare(options: argparse.Namespace) -> None:
    print(prepare_context(options.app, _weights(options), options.target))


def _build(options: argparse.Namespace) -> None:
    container_runtime()  # before the minutes that weights may take
    weights = _weights(options)
    began = time.monotonic()
    name = build_image(
        *(options.app, weights),
        target=options.target,
        tag=options.tag,
        baked=not options.without_weights,
    )
    print(f"{name}: built in {time.monotonic() - began:.0f} s", flush=True)


def _run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    if docker(container_runtime(), "container", "inspect", container_name(options.app)):
        print(f"replacing the container {container_name(options.app)} that is there")
    name = run_container(
        options.app,
        tag=options.tag,
        port=options.port,
        memory=options.memory or None,
        store=MODEL_STORE,
    )
    print(f"{name}: ready after {time.monotonic() - began:.1f} s on port {options.port}")


def _act(options: argparse.Namespace) -> None:
    """Stop, delete, shell, logs: one command of the engine each."""
    name = container_name(options.app)
    arguments = {
        "stop": ["stop", "-t", str(STOP_SECONDS), name],
        "delete": ["rm", "--force", name],
        "shell": ["exec", "--interactive", "--tty", name, "/bin/bash"],
        "logs": ["logs", "--follow", name],
    }[options.action]
    run = subprocess.run([container_runtime(), *arguments], stderr=subprocess.PIPE, text=True)
    if run.returncode != 0 and "No such container" in run.stderr:
        raise UserError(f"there is no container {name}; `make run APP={options.app}` starts one")
    if run.returncode != 0:
        raise UserError(run.stderr.strip() or f"it ended with {run.returncode}")


def _push(options: argparse.Namespace) -> None:
    if not options.registry:
        raise UserError(
            "name the registry: make push REGISTRY=europe-west4-docker.pkg.dev/PROJECT/serving"
        )
    print(push_image(options.app, options.registry, options.tag))


ACTIONS = {"prepare": _prepare, "build": _build, "run": _run, "push": _push} | dict.fromkeys(
    ("stop", "delete", "shell", "logs"), _act
)


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    parser = app_parser("deploy.image", "build and run the image of an app", actions=[*ACTIONS])
    parser.add_argument("--tag", default="dev")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--without-weights", action="store_true")
    parser.add_argument("--port", type=port_number, default=PORT)
    parser.add_argument("--memory")
    parser.add_argument("--registry")
    options = parser.parse_args(arguments)
    ACTIONS[options.action](options)


if __name__ == "__main__":
    sys.exit(main())
