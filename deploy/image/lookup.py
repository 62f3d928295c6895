"""Name an APP's image, look it up in the container runtime, and say how to build it."""

import json
from typing import Any

from deploy.common.paths import UserError
from deploy.image.runtime import container_runtime, runtime_output

TAGS = ("dev", "pro")
"""The tags that the Makefile builds."""

TARGET_LABEL, WEIGHTS_LABEL = "serving-llms.target", "serving-llms.weights"
"""Labels of our images: one of `TARGETS` in `build.py`; `baked` or `none`."""


def image_name(app: str, tag: str) -> str:
    """Return the name of an app's image."""
    return f"serving-llms/{app.lower()}:{tag}"


def inspect_image(app: str, tag: str) -> dict[str, Any]:
    """Return the container runtime's data of an app's image: `Id`, `Config`, `RepoDigests`, ...

    Raises:
        UserError: there is no such image; the message says how to build one.
    """
    image = image_name(app, tag)
    text = runtime_output(container_runtime(), "image", "inspect", image)
    if text is None:
        raise UserError(f"there is no image {image}; build one with {how_to_build(app, tag)}")
    return json.loads(text)[0]


def how_to_build(app: str, tag: str, *variables: str) -> str:
    """Return the commands that build an app's image, with that tag if the Makefile builds it."""
    tags = (tag,) if tag in TAGS else TAGS
    arguments = " ".join([f"APP={app}", *variables])
    return " or ".join(f"`make build-{name} {arguments}`" for name in tags)


def labels_of(image: dict[str, Any]) -> dict[str, str]:
    """Return the labels in what `inspect_image` returned; a runtime may omit an empty list."""
    return image["Config"].get("Labels") or {}
