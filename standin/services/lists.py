"""What all list methods share: filters and pages."""

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from standin.errors import ApiError

PAGE_LIMIT = 100

_TERM = re.compile(
    r"\s*(?P<field>display_?[nN]ame|labels\.[a-z][a-z0-9_-]*)\s*(?P<sign>!=|=|:)\s*"
    r'(?P<value>"[^"]*"|[^\s"]+)\s*'
)


class Labelled(Protocol):
    """A resource that lists can be filtered by."""

    @property
    def display_name(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


Item = TypeVar("Item")
Resource = TypeVar("Resource", bound=Labelled)


def select(items: Iterable[Resource], filter_text: str) -> list[Resource]:
    """Return the resources that match a list method's filter.

    Imitated: display_name and labels with =, != and :*, joined with AND.

    Raises:
        ApiError: another filter.
    """
    terms = []
    for part in re.split(r"\s+AND\s+", filter_text) if filter_text else []:
        match = _TERM.fullmatch(part)
        if not match:
            raise ApiError("INVALID_ARGUMENT", f"Invalid filter: {filter_text!r}.")
        terms.append(match)
    return [item for item in items if all(_matches(item, term) for term in terms)]


def _matches(item: Labelled, term: re.Match[str]) -> bool:
    wanted = term["value"].strip('"')
    value: str | None = item.display_name
    if term["field"].startswith("labels."):
        value = item.labels.get(term["field"].removeprefix("labels."))
        if term["sign"] == ":":
            return value is not None and wanted in ("*", value)
    return (value == wanted) != (term["sign"] == "!=")


def page(items: Iterable[Item], size: int, token: str) -> tuple[list[Item], str]:
    """Return one page of a list and the token of the next page ("" after the last).

    Raises:
        ApiError: the size is negative or the token is invalid.
    """
    if size < 0:
        raise ApiError("INVALID_ARGUMENT", f"page_size: {size} is negative.")
    try:
        start = int(urlsafe_b64decode(token).decode()) if token else 0
    except ValueError as error:
        raise ApiError("INVALID_ARGUMENT", "The page token is invalid.") from error
    everything = list(items)
    end = start + min(size or PAGE_LIMIT, PAGE_LIMIT)
    next_token = urlsafe_b64encode(str(end).encode()).decode() if end < len(everything) else ""
    return everything[start:end], next_token
