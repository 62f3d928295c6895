"""A request's HTTP headers."""

from collections.abc import Callable, Mapping

Header = Callable[[str], str | None]
"""Returns the value of the header with this name, in lower case; None without such a header."""


def header_reader(headers: Mapping[str, str]) -> Header:
    """Return a function that finds a header in any case.

    TorchServe passes the names on as clients write them, and HTTP/1.1 allows any case.

    Args:
        headers: name -> value, as `context.get_all_request_header` returns them.
    """
    lower = {name.lower(): value.strip() for name, value in headers.items()}
    return lower.get
