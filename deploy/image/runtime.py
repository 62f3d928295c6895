"""The container runtime: Docker or podman."""

import os
import shutil
import subprocess
from pathlib import Path

from deploy.common.paths import UserError


def container_runtime() -> str:
    """Return the program of the container runtime: $DOCKER, or docker or podman on the PATH.

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
    except OSError as error:  # DOCKER names a file that does not exist or is not a program
        raise UserError(f"{name} cannot be started: {error.strerror}") from error
    if run.returncode != 0:
        reason = (run.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{Path(name).name} does not work here: {reason}")
    return name


def runtime_output(program: str, *arguments: str) -> str | None:
    """Run a short command of the container runtime; return what it printed, None if it failed."""
    run = subprocess.run([program, *arguments], capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None
