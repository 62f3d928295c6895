"""Build the image of an APP. `docker/Dockerfile` declares what the image holds."""

import os
import subprocess
from pathlib import Path

from deploy.common.locks import one_at_a_time
from deploy.common.paths import ROOT, UserError
from deploy.image.context import CONTEXT, prepare_context
from deploy.image.lookup import image_name
from deploy.image.runtime import container_runtime
from deploy.torchserve.launch import without_secrets

TARGETS = ("cpu", "cpu-lean", "gpu")
"""The Dockerfile's targets."""

DOCKERFILE = ROOT / "docker" / "Dockerfile"


def build_image(
    app: str, weights: Path, *, target: str | None = None, tag: str = "dev", baked: bool = True
) -> str:
    """Build an app's image and return its name.

    Args:
        app: the APP.
        weights: a complete folder, as `get_weights` returns it.
        target: one of `TARGETS`. None chooses the smallest that has the app's engine.
        tag: the image's tag.
        baked: whether the weights are in the image. If not, /models is empty.

    Raises:
        UserError: the build failed; its last lines were printed.
    """
    program, name = container_runtime(), image_name(app, tag)
    # docker 20.10 has BuildKit, but not by default.
    environment = without_secrets(os.environ) | {"DOCKER_BUILDKIT": "1"}
    with one_at_a_time(CONTEXT):
        target = prepare_context(app, weights, target)
        command: list[str | Path] = [program, "build", "--file", DOCKERFILE]
        command += ["--target", target, "--tag", name]
        command += ["--build-arg", f"APP={app}"]
        command += ["--build-arg", f"WEIGHTS={'baked' if baked else 'none'}"]
        command += ["--label", f"org.opencontainers.image.version={tag}"]
        command += ["--label", f"org.opencontainers.image.revision={_commit()}"]
        run = subprocess.run([*command, ROOT], env=environment)
    if run.returncode != 0:
        raise UserError(f"the build of {name} failed; see above")
    return name


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
