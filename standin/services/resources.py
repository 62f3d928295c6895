"""What models and endpoints share: display names, labels and updates by mask."""

import re
from collections.abc import Sequence
from typing import TypeVar

from google.cloud.aiplatform_v1 import types as t

from standin.errors import invalid

Resource = TypeVar("Resource", t.Model, t.Endpoint)

DISPLAY_NAME_LENGTH = 128
"""Characters. https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.models"""
_LABEL = re.compile(r"[a-z0-9_-]{0,63}")


def check_common_fields(kind: str, resource: t.Model | t.Endpoint) -> None:
    """Check the fields that every resource has: display name and labels.

    Raises:
        ApiError: a field is missing or invalid.
    """
    if not resource.display_name:
        raise invalid(f"{kind}.display_name", "Required field is not set.")
    if len(resource.display_name) > DISPLAY_NAME_LENGTH:
        raise invalid(
            f"{kind}.display_name",
            f"The display name has more than {DISPLAY_NAME_LENGTH} characters.",
        )
    for key, value in resource.labels.items():
        if not (_LABEL.fullmatch(key) and key[:1].isalpha() and _LABEL.fullmatch(value)):
            raise invalid(
                f"{kind}.labels",
                f"Label {key!r}: {value!r} may have lowercase letters, digits, _ and - only, 63 at "
                "most, and its key begins with a letter.",
            )


def update(
    resource: Resource, new: Resource, paths: Sequence[str], allowed: Sequence[str], kind: str
) -> None:
    """Copy the fields of an update mask from `new` to `resource`.

    Raises:
        ApiError: the mask is empty or has a field that cannot be changed.
    """
    for path in paths:
        if path not in allowed:
            raise invalid("update_mask", f"{kind}.{path} cannot be updated.")
    if not paths:
        raise invalid("update_mask", "Required field is not set.")
    for path in paths:
        resource.ClearField(path)
        if resource.DESCRIPTOR.fields_by_name[path].message_type:  # a map
            getattr(resource, path).MergeFrom(getattr(new, path))
        else:
            setattr(resource, path, getattr(new, path))
    resource.update_time.GetCurrentTime()
