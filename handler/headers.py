"""A request's HTTP headers."""

from collections.abc import Callable, Mapping
from typing import Any

Header = Callable[[str], str | None]
"""Returns the value of the header with this name, in lower case; None without such a header."""


def header_reader(headers: Mapping[str, Any]) -> Header:
    """Return a function that finds a header in any case.

    TorchServe passes the names on as clients write them, and HTTP/1.1 allows any case.

    Args:
        headers: name -> value, as `context.get_all_request_header` returns them. TorchServe adds
            an entry for each part of the body, whose value is a mapping; these are left out.
    """
    lower = {name.lower(): v.strip() for name, v in headers.items() if isinstance(v, str)}
    return lower.get
