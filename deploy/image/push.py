"""Push the image of an APP into a registry."""

import subprocess
import sys

from deploy.common.paths import UserError
from deploy.image.build import image_name, inspect_image
from deploy.image.runtime import container_runtime, docker


def push_image(app: str, registry: str, tag: str, *, remote_tag: str | None = None) -> str:
    """Push an app's image and return its address with the digest.

    Args:
        app: the APP.
        registry: host and folder, such as `europe-west4-docker.pkg.dev/PROJECT/serving`.
        tag: of the image here.
        remote_tag: of the image there; None takes the same.

    Raises:
        UserError: there is no such image; or the registry refused, with its message.
    """
    program, address = (
        container_runtime(),
        f"{registry.rstrip('/')}/{app.lower()}:{remote_tag or tag}",
    )
    inspect_image(app, tag)  # docker's own words for a missing image are about a registry
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    for arguments in (("tag", image_name(app, tag), address), ("push", *quiet, address)):
        run = subprocess.run([program, *arguments], stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise UserError(f"{arguments[0]} {address}: {run.stderr.strip()}")
    digests = docker(
        program, "image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', address
    )
    repository = address.rsplit(":", 1)[0]
    return next((d for d in (digests or "").split() if d.startswith(f"{repository}@")), address)
