"""Push the image of an APP to a registry."""

import subprocess
import sys

from deploy.common.paths import UserError
from deploy.image.lookup import image_name, inspect_image
from deploy.image.runtime import container_runtime, runtime_output


def push_image(app: str, registry: str, tag: str, *, remote_tag: str | None = None) -> str:
    """Push an app's image and return its address with the digest.

    Args:
        app: the APP.
        registry: host and folder, such as `europe-west4-docker.pkg.dev/PROJECT/serving`.
        tag: the image's tag on this machine.
        remote_tag: the image's tag in the registry; None uses `tag`.

    Raises:
        UserError: there is no such image, or the registry rejected it; the message includes the
            reason.
    """
    program = container_runtime()
    repository = f"{registry.rstrip('/')}/{app.lower()}"
    address = f"{repository}:{remote_tag or tag}"
    inspect_image(app, tag)  # docker's own message for a missing image is about a registry
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    for arguments in (["tag", image_name(app, tag), address], ["push", *quiet, address]):
        run = subprocess.run([program, *arguments], stderr=subprocess.PIPE, text=True)
        if run.returncode != 0:
            raise UserError(f"{arguments[0]} {address}: {run.stderr.strip()}")
    form = '{{join .RepoDigests "\\n"}}'
    digests = runtime_output(program, "image", "inspect", "--format", form, address) or ""
    return next((d for d in digests.split() if d.startswith(f"{repository}@")), address)
