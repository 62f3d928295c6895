"""Build, run and look into the image of an app, with Docker or podman.

    python -m deploy.image build smollm2-135m --tag pro      # make build-pro
    python -m deploy.image run smollm2-135m                  # make run
    python -m deploy.image stop smollm2-135m                 # make stop; also delete, shell, logs
    python -m deploy.image push smollm2-135m --registry europe-west4-docker.pkg.dev/PROJECT/serving

What the image holds is the business of `docker/Dockerfile`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploy.archive import prepare
from deploy.cli import app_parser, command, port_number
from deploy.export import EXPORTED
from deploy.lock import collect_wheels
from deploy.pack import archive_path
from deploy.paths import BUILD, MODEL_STORE, ROOT, UserError
from deploy.weights import get_weights, one_at_a_time

TARGETS = ("cpu", "cpu-lean", "gpu")
MADE = ("dev", "pro")
"""The tags that the Makefile builds."""

TARGET, WEIGHTS = "serving-llms.target", "serving-llms.weights"
"""Labels of our images: one of `TARGETS`; `baked` or `none`."""

DOCKERFILE = ROOT / "docker" / "Dockerfile"
CONTEXT = BUILD / "image"
PORT = 7080
"""Inside the container; the image's default for AIP_HTTP_PORT."""

STOP_SECONDS = 30
"""From SIGTERM to SIGKILL: the entry drains for 20 s, and Java gets 5."""

HARDENED = [
    "--read-only",  # nothing in the image can be changed
    *("--tmpfs", "/tmp"),  # noqa: S108  sockets, and what an image without weights downloads
    *("--cap-drop", "ALL"),  # no privilege of root's, even if somebody becomes root
    *("--security-opt", "no-new-privileges"),  # and nobody does: setuid programs have no effect
    *("--user", "1000"),
    *("--pids-limit", "512"),
]


def engine() -> str:
    """The container engine's program.

    Raises:
        UserError: there is none, or it does not answer.
    """
    name = os.environ.get("DOCKER") or shutil.which("docker") or shutil.which("podman")
    if not name:
        raise UserError(
            "neither docker nor podman is installed; see https://docs.docker.com/engine"
        )
    try:
        run = subprocess.run([name, "version"], capture_output=True, text=True)
    except OSError as error:  # DOCKER names what is not there, or is no program
        raise UserError(f"{name} cannot be started: {error.strerror}") from error
    if run.returncode != 0:
        reason = (run.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{Path(name).name} does not work here: {reason}")
    return name


def image_name(app: str, tag: str) -> str:
    """What an app's image is called."""
    return f"serving-llms/{app.lower()}:{tag}"


def container_name(app: str) -> str:
    """What an app's container is called; one runs at a time."""
    return f"serving-llms-{app.lower()}"


def inspect_image(app: str, tag: str) -> dict[str, Any]:
    """What the engine knows of an app's image: `Id`, `Architecture`, `Config`, `RepoDigests`, ...

    Raises:
        UserError: there is no such image; says how to build one.
    """
    image = image_name(app, tag)
    found = _docker(engine(), "image", "inspect", image)
    if found is None:
        raise UserError(f"there is no image {image}; build one with {how_to_build(app, tag)}")
    return json.loads(found)[0]


def how_to_build(app: str, tag: str, *variables: str) -> str:
    """The commands that build an app's image: with that tag, if the Makefile builds it."""
    rest = " ".join([f"APP={app}", *variables])
    return " or ".join(f"`make build-{name} {rest}`" for name in ((tag,) if tag in MADE else MADE))


def labels_of(found: dict[str, Any]) -> dict[str, str]:
    """The labels in what `inspect_image` returned; an engine may leave out that there are none."""
    return found["Config"].get("Labels") or {}


def build_image(
    app: str, weights: Path, *, target: str | None = None, tag: str = "dev", baked: bool = True
) -> str:
    """Build an app's image and return its name.

    Args:
        app: the APP.
        weights: a complete folder, as `get_weights` returns it.
        target: one of `TARGETS`. None takes the smallest that has the app's engine.
        tag: the image's tag.
        baked: whether the weights are in the image. If not, /models is empty.

    Raises:
        UserError: the build failed; its last lines were printed.
    """
    program, name = engine(), image_name(app, tag)
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}  # docker 20.10 has it, but not by default
    with one_at_a_time(CONTEXT):
        target = prepare_context(app, weights, target)
        arguments = ["--file", DOCKERFILE, "--target", target, "--tag", name]
        arguments += ["--build-arg", f"APP={app}"]
        arguments += ["--build-arg", f"WEIGHTS={'baked' if baked else 'none'}"]
        arguments += ["--label", f"org.opencontainers.image.version={tag}"]
        arguments += ["--label", f"org.opencontainers.image.revision={_commit()}"]
        run = subprocess.run([program, "build", *arguments, ROOT], env=environment)
    if run.returncode != 0:
        raise UserError(f"the build of {name} failed; see above")
    return name


def prepare_context(app: str, weights: Path, target: str | None = None) -> str:
    """Put into build/image what the Dockerfile takes beside the sources; return the target."""
    chosen = {"name": "transformers"} if target == "gpu" else None
    prepared = prepare(app, weights, CONTEXT / "prepared" / app, engine=chosen)
    collect_wheels(CONTEXT / "wheels")
    if target is None:
        target = "cpu-lean" if (prepared / "weights" / EXPORTED).is_file() else "cpu"
    return target


def run_container(
    app: str,
    *,
    tag: str = "dev",
    port: int = PORT,
    memory: str | None = None,
    store: Path | None = None,
    environment: dict[str, str] | None = None,
    arguments: list[str] | None = None,
) -> str:
    """Start an app's container, hardened, and return when its worker is ready.

    Args:
        app: the APP; a container of it that is there is replaced.
        tag: of the image.
        port: on this machine's loopback; the container's other ports are not published.
        memory: the most it may use, such as "2g".
        store: where the app's archive is, to be mounted if the image has no weights.
        environment: variables for the container.
        arguments: further arguments of `docker run`.

    Returns:
        The container's name.

    Raises:
        UserError: it did not become ready; the message has the end of its log.
    """
    program, name, image = engine(), container_name(app), image_name(app, tag)
    labels = labels_of(inspect_image(app, tag))
    _docker(program, "rm", "--force", name)
    options = [*HARDENED, "--stop-timeout", str(STOP_SECONDS)]
    options += ["--publish", f"127.0.0.1:{port}:{(environment or {}).get('AIP_HTTP_PORT', PORT)}"]
    options += ["--memory", memory] if memory else []
    options += ["--gpus", "all"] if labels.get(TARGET) == "gpu" else []
    if labels.get(WEIGHTS) == "none" and store:
        archive = archive_path(app, "no-archive", store)
        if not archive.exists():
            raise UserError(f"the image has no weights; run `make archive APP={app}` to mount some")
        options += ["--volume", f"{archive}:/models/{app}:ro"]
    for key, value in (environment or {}).items():
        options += ["--env", f"{key}={value}"]
    command = [program, "run", "--detach", "--name", name, *options, *(arguments or []), image]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        _docker(program, "rm", "--force", name)
        raise UserError(f"docker run: {run.stderr.strip()}")
    wait_until_ready(program, name)
    return name


def wait_until_ready(program: str, name: str, deadline: float = 600.0) -> None:
    """Ask the container's own probe until it says yes.

    Raises:
        UserError: the container ended, or time is up.
    """
    end = time.monotonic() + deadline
    form = "{{.State.Status}}, out of memory: {{.State.OOMKilled}}"
    while _docker(program, "exec", name, "/opt/serving/ready") is None:
        state = _docker(program, "inspect", "--format", form, name)
        if not (state or "").startswith("running") or time.monotonic() > end:
            raise UserError(
                f"the container is not ready ({(state or 'gone').strip()}):\n{log(name)}"
            )
        time.sleep(0.3)


def log(name: str, lines: int = 20) -> str:
    """The end of a container's log."""
    run = subprocess.run(
        [engine(), "logs", "--tail", str(lines), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout


def push(app: str, registry: str, tag: str, *, remote_tag: str | None = None) -> str:
    """Push an app's image and return its address with the digest.

    Args:
        app: the APP.
        registry: host and folder, such as `europe-west4-docker.pkg.dev/PROJECT/serving`.
        tag: of the image here.
        remote_tag: of the image there; None takes the same.

    Raises:
        UserError: there is no such image; or the registry refused, with its message.
    """
    program, address = engine(), f"{registry.rstrip('/')}/{app.lower()}:{remote_tag or tag}"
    inspect_image(app, tag)  # docker's own words for a missing image are about a registry
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    for arguments in (("tag", image_name(app, tag), address), ("push", *quiet, address)):
        run = subprocess.run([program, *arguments], stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise UserError(f"{arguments[0]} {address}: {run.stderr.strip()}")
    digests = _docker(
        program, "image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', address
    )
    repository = address.rsplit(":", 1)[0]
    return next((d for d in (digests or "").split() if d.startswith(f"{repository}@")), address)


def _docker(program: str, *arguments: str) -> str | None:
    """What a short command printed; None if it failed."""
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def _weights(options: argparse.Namespace) -> Path:
    return get_weights(options.app, model_dir=options.model_dir, shape_only=options.shape_only)


def _prepare(options: argparse.Namespace) -> None:
    print(prepare_context(options.app, _weights(options), options.target))


def _build(options: argparse.Namespace) -> None:
    engine()  # before the minutes that weights may take
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
    if _docker(engine(), "container", "inspect", container_name(options.app)):
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
    run = subprocess.run([engine(), *arguments], stderr=subprocess.PIPE, text=True)
    if run.returncode != 0 and "No such container" in run.stderr:
        raise UserError(f"there is no container {name}; `make run APP={options.app}` starts one")
    if run.returncode != 0:
        raise UserError(run.stderr.strip() or f"it ended with {run.returncode}")


def _push(options: argparse.Namespace) -> None:
    if not options.registry:
        raise UserError(
            "name the registry: make push REGISTRY=europe-west4-docker.pkg.dev/PROJECT/serving"
        )
    print(push(options.app, options.registry, options.tag))


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
