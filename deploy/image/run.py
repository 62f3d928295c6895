"""Run the image of an APP, hardened."""

import subprocess
import time
from pathlib import Path

from deploy.archive.pack import archive_path
from deploy.common.paths import UserError
from deploy.image.build import TARGET_LABEL, WEIGHTS_LABEL, image_name, inspect_image, labels_of
from deploy.image.runtime import container_runtime, docker

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


def container_name(app: str) -> str:
    """What an app's container is called; one runs at a time."""
    return f"serving-llms-{app.lower()}"


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
    program, name, image = container_runtime(), container_name(app), image_name(app, tag)
    labels = labels_of(inspect_image(app, tag))
    docker(program, "rm", "--force", name)
    options = [*HARDENED, "--stop-timeout", str(STOP_SECONDS)]
    options += ["--publish", f"127.0.0.1:{port}:{(environment or {}).get('AIP_HTTP_PORT', PORT)}"]
    options += ["--memory", memory] if memory else []
    options += ["--gpus", "all"] if labels.get(TARGET_LABEL) == "gpu" else []
    if labels.get(WEIGHTS_LABEL) == "none" and store:
        archive = archive_path(app, "no-archive", store)
        if not archive.exists():
            raise UserError(f"the image has no weights; run `make archive APP={app}` to mount some")
        options += ["--volume", f"{archive}:/models/{app}:ro"]
    for key, value in (environment or {}).items():
        options += ["--env", f"{key}={value}"]
    command = [program, "run", "--detach", "--name", name, *options, *(arguments or []), image]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        docker(program, "rm", "--force", name)
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
    while docker(program, "exec", name, "/opt/serving/ready") is None:
        state = docker(program, "inspect", "--format", form, name)
        if not (state or "").startswith("running") or time.monotonic() > end:
            raise UserError(
                f"the container is not ready ({(state or 'gone').strip()}):\n{container_log(name)}"
            )
        time.sleep(0.3)


def container_log(name: str, lines: int = 20) -> str:
    """The end of a container's log."""
    run = subprocess.run(
        [container_runtime(), "logs", "--tail", str(lines), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout
