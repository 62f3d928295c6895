"""Resource names, host names and identifiers."""

import random
import re

from standin.errors import ApiError, denied
from standin.limits import REGIONS
from standin.settings import StandinSettings

_NAME = re.compile(r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)(?P<rest>/.*)?")
_HOST = re.compile(
    r"(?:[a-z0-9-]+\.)?(?P<region>[a-z]+-[a-z]+\d+)"
    r"(?:(?:-prediction)?-aiplatform\.googleapis\.com|-\d+\.prediction\.vertexai\.goog)"
)


def region_of_host(host: str) -> str | None:
    """Return the region of a host name; None if it is not a regional host of Vertex AI."""
    match = _HOST.fullmatch(host.partition(":")[0])
    return match["region"] if match and match["region"] in REGIONS else None


def region_of(name: str) -> str:
    """Return the location in a resource name."""
    return name.split("/")[3]


def last_part(name: str) -> str:
    """Return the identifier at the end of a resource name."""
    return name.rsplit("/", 1)[1]


def canonical(name: str, settings: StandinSettings, host: str, permission: str) -> str:
    """Return a resource name as Vertex AI writes it: with the project's number.

    Raises:
        ApiError: the name is malformed, of another project, or of another region than the host.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ApiError("INVALID_ARGUMENT", f"Invalid resource name: {name!r}.")
    if match["project"] not in (settings.project, settings.project_number):
        raise denied(permission, name)
    if match["region"] != region_of_host(host):
        raise ApiError(
            "INVALID_ARGUMENT",
            f"The location {match['region']!r} of the resource does not match the service's "
            f"endpoint {host!r}; use {match['region']}-aiplatform.googleapis.com.",
        )
    return f"projects/{settings.project_number}/locations/{match['region']}{match['rest'] or ''}"


class Identifiers:
    """Makes identifiers of 19 digits, like Vertex AI's, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"identifiers {seed}")  # noqa: S311

    def __call__(self) -> str:
        return str(self._random.randrange(10**18, 9 * 10**18))
