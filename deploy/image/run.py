"""Run the image of an APP in a hardened container."""

import subprocess
from pathlib import Path

from deploy.archive.pack import DIRECTORY, archive_path
from deploy.common.paths import UserError
from deploy.common.waiting import wait_until
from deploy.image.lookup import TARGET_LABEL, WEIGHTS_LABEL, image_name, inspect_image, labels_of
from deploy.image.runtime import container_runtime, runtime_output

PORT = 7080
"""The port inside the container: the image's default for AIP_HTTP_PORT."""

STOP_SECONDS = 30
"""From SIGTERM to SIGKILL: more than the sum of the entry's `DRAIN_SECONDS` and `JAVA_SECONDS`."""

HARDENED = [
    "--read-only",  # no file of the image can be changed
    *("--tmpfs", "/tmp"),  # noqa: S108  sockets, and what an image without weights downloads
    *("--cap-drop", "ALL"),  # no capability of root, even for a process that becomes root
    *("--security-opt", "no-new-privileges"),  # setuid programs have no effect
    *("--user", "1000"),
    *("--pids-limit", "512"),
]


def hardened(*, gpu: bool) -> list[str]:
    """Return `HARDENED`; for the image `gpu`, with a /tmp from which it loads compiled kernels."""
    return [f"{o}:exec" if gpu and o == "/tmp" else o for o in HARDENED]  # noqa: S108


def log_options(program: str) -> list[str]:
    """Return options that keep a container's log from filling the disk: 20 MB at most.

    Args:
        program: the container runtime. Podman has no `max-file`, and reads json-file as k8s-file.
    """
    options = ["--log-driver", "json-file", "--log-opt", "max-size=10m"]
    return options if Path(program).name == "podman" else [*options, "--log-opt", "max-file=2"]


def container_name(app: str) -> str:
    """Return the name of an app's container; one runs at a time."""
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
        app: the APP; an existing container of it is replaced.
        tag: the image's tag.
        port: the port on this machine's loopback; the container's other ports are not published.
        memory: the container's memory limit, such as "3g".
        store: the folder with the app's archive, which is mounted if the image has no weights.
        environment: variables for the container.
        arguments: additional arguments of `docker run`.

    Returns:
        The container's name.

    Raises:
        UserError: it did not become ready; the message includes the end of its log.
    """
    program, name, image = container_runtime(), container_name(app), image_name(app, tag)
    labels = labels_of(inspect_image(app, tag))
    runtime_output(program, "rm", "--force", name)
    gpu = labels.get(TARGET_LABEL) == "gpu"
    options = [*hardened(gpu=gpu), *log_options(program), "--stop-timeout", str(STOP_SECONDS)]
    options += ["--publish", f"127.0.0.1:{port}:{(environment or {}).get('AIP_HTTP_PORT', PORT)}"]
    options += ["--memory", memory] if memory else []
    options += ["--gpus", "all"] if gpu else []
    if labels.get(WEIGHTS_LABEL) == "none" and store:
        archive = archive_path(app, DIRECTORY, store)
        if not archive.exists():
            raise UserError(f"the image has no weights; run `make archive APP={app}` to mount some")
        options += ["--volume", f"{archive}:/models/{app}:ro"]
    for key, value in (environment or {}).items():
        options += ["--env", f"{key}={value}"]
    command = [program, "run", "--detach", "--name", name, *options, *(arguments or []), image]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        runtime_output(program, "rm", "--force", name)
        raise UserError(f"docker run: {run.stderr.strip()}")
    wait_until_ready(program, name)
    return name


def wait_until_ready(program: str, name: str, timeout: float = 600.0) -> None:
    """Run the container's own readiness probe until it succeeds.

    Raises:
        UserError: the container ended, or the time is over.
    """
    form = "{{.State.Status}}, out of memory: {{.State.OOMKilled}}"

    def ready() -> bool:
        if runtime_output(program, "exec", name, "/opt/serving/ready") is not None:
            return True
        if not state().startswith("running"):
            raise not_ready()
        return False

    def state() -> str:
        return (runtime_output(program, "inspect", "--format", form, name) or "deleted").strip()

    def not_ready() -> UserError:
        return UserError(f"the container is not ready ({state()}):\n{container_log(name)}")

    try:
        wait_until(ready, timeout, interval=0.3)
    except TimeoutError:
        raise not_ready() from None


def container_log(name: str, lines: int = 20) -> str:
    """Return the last lines of a container's log."""
    run = subprocess.run(
        [container_runtime(), "logs", "--tail", str(lines), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout
