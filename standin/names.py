"""Resource names, identifiers, filters, pages, labels: what every list and lookup needs."""

import random
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS

from standin.errors import ApiError, denied, invalid
from standin.settings import Settings

Item = TypeVar("Item")

_NAME = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)(?P<rest>/.*)?")
_HOST = re.compile(
    r"(?:[a-z0-9-]+\.)?(?P<region>[a-z]+-[a-z]+\d+)"
    r"(?:(?:-prediction)?-aiplatform\.googleapis\.com|-\d+\.prediction\.vertexai\.goog)"
)
_TERM = re.compile(
    r"\s*(?P<field>display_?[nN]ame|labels\.[a-z][a-z0-9_-]*)\s*(?P<sign>!=|=|:)\s*"
    r'(?P<value>"[^"]*"|[^\s"]+)\s*'
)
_LABEL = re.compile(r"[a-z0-9_-]{0,63}")
MOST_PER_PAGE = 100


def region_of_host(host: str) -> str | None:
    """The region a host name belongs to; None if it is no regional host of Vertex AI."""
    match = _HOST.fullmatch(host.partition(":")[0])
    return match["region"] if match and match["region"] in SUPPORTED_REGIONS else None


def region_of(name: str) -> str:
    """The location in a resource name."""
    return name.split("/")[3]


def canonical(name: str, settings: Settings, host: str, permission: str) -> str:
    """The name as Vertex AI writes it: with the project's number.

    Raises:
        ApiError: it is no such name, names another project, or another region than the host.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ApiError("INVALID_ARGUMENT", f"Invalid resource name: {name!r}.")
    if match["project"] not in (settings.project, settings.number):
        raise denied(permission, name)
    if match["region"] != region_of_host(host):
        raise ApiError(
            "INVALID_ARGUMENT",
            f"The location {match['region']!r} of the resource does not match the service's "
            f"endpoint {host!r}; use {match['region']}-aiplatform.googleapis.com.",
        )
    return f"projects/{settings.number}/locations/{match['region']}{match['rest'] or ''}"


class Identifiers:
    """Numbers of 19 digits, as Vertex AI gives them, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"identifiers {seed}")  # noqa: S311

    def __call__(self) -> str:
        return str(self._random.randrange(10**18, 9 * 10**18))


def matches(text: str) -> Callable[[Any], bool]:
    """A filter of a list method, as a function of the resource.

    Imitated: display_name and labels with =, != and :*, joined with AND.

    Raises:
        ApiError: another filter.
    """
    terms = [_TERM.fullmatch(part) for part in re.split(r"\s+AND\s+", text)] if text else []
    if not all(terms):
        raise ApiError("INVALID_ARGUMENT", f"Invalid filter: {text!r}.")
    return lambda item: all(_holds(term, item) for term in terms)


def _holds(term: re.Match, item: Any) -> bool:
    wanted = term["value"].strip('"')
    if term["field"].startswith("labels."):
        key = term["field"].removeprefix("labels.")
        value = item.labels.get(key)
        if term["sign"] == ":":
            return value is not None and wanted in ("*", value)
    else:
        value = item.display_name
    return (value == wanted) != (term["sign"] == "!=")


def page(items: Iterable[Item], size: int, token: str) -> tuple[list[Item], str]:
    """One page of a list, and the token of the next ("" after the last).

    Raises:
        ApiError: the size or the token cannot be.
    """
    if size < 0:
        raise ApiError("INVALID_ARGUMENT", f"page_size: {size} is negative.")
    try:
        start = int(urlsafe_b64decode(token).decode()) if token else 0
    except ValueError as error:
        raise ApiError("INVALID_ARGUMENT", "The page token is invalid.") from error
    everything = list(items)
    end = start + min(size or MOST_PER_PAGE, MOST_PER_PAGE)
    following = urlsafe_b64encode(str(end).encode()).decode() if end < len(everything) else ""
    return everything[start:end], following


def check_common(kind: str, item: Any) -> None:
    """Check what every resource has: a display name and labels.

    Raises:
        ApiError: a field is missing or cannot be.
    """
    if not item.display_name:
        raise invalid(f"{kind}.display_name", "Required field is not set.")
    if len(item.display_name) > 128:
        raise invalid(f"{kind}.display_name", "The display name has more than 128 characters.")
    for key, value in item.labels.items():
        if not (_LABEL.fullmatch(key) and key[:1].isalpha() and _LABEL.fullmatch(value)):
            raise invalid(
                f"{kind}.labels",
                f"Label {key!r}: {value!r} may have lowercase letters, digits, _ and - only, 63 at "
                "most, and its key begins with a letter.",
            )
