"""Build, run and look into the image of an app, with Docker or podman.

    python -m deploy.image build smollm2-135m --tag pro      # make build-pro
    python -m deploy.image run smollm2-135m                  # make run
    python -m deploy.image stop smollm2-135m                 # make stop; also delete, shell, logs
    python -m deploy.image push smollm2-135m --registry europe-west4-docker.pkg.dev/PROJECT/serving

What the image holds is the business of `docker/Dockerfile`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploy.archive.build import prepare
from deploy.archive.export import EXPORTED
from deploy.common.locks import one_at_a_time
from deploy.common.paths import BUILD, ROOT, UserError, link_or_copy
from deploy.image.runtime import container_runtime, docker
from tools.setup_env import find_links

TARGETS = ("cpu", "cpu-lean", "gpu")
MADE = ("dev", "pro")
"""The tags that the Makefile builds."""

TARGET_LABEL, WEIGHTS_LABEL = "serving-llms.target", "serving-llms.weights"
"""Labels of our images: one of `TARGETS`; `baked` or `none`."""

DOCKERFILE = ROOT / "docker" / "Dockerfile"
CONTEXT = BUILD / "image"
TORCH_LOCK = ROOT / "docker" / "locks" / "torch.txt"


def image_name(app: str, tag: str) -> str:
    """What an app's image is called."""
    return f"serving-llms/{app.lower()}:{tag}"


def inspect_image(app: str, tag: str) -> dict[str, Any]:
    """What the engine knows of an app's image: `Id`, `Architecture`, `Config`, `RepoDigests`, ...

    Raises:
        UserError: there is no such image; says how to build one.
    """
    image = image_name(app, tag)
    found = docker(container_runtime(), "image", "inspect", image)
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
    program, name = container_runtime(), image_name(app, tag)
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


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def collect_wheels(folder: Path) -> None:
    """The wheel of torch, if pip's configuration names a folder that has it (find-links).

    Empty on most machines; then the build asks PyTorch's index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    version = re.match(r"torch==(\S+)", TORCH_LOCK.read_text()).group(1)
    for source in find_links(Path(sys.executable)):
        for wheel in Path(source).glob(f"torch-{version}-*.whl"):
            if not (folder / wheel.name).exists():
                link_or_copy(wheel, folder / wheel.name)
