"""The part of TorchServe's context that the handler uses, as types.

TorchServe 0.12.0 has no type information. Source: ts/context.py.
"""

from collections.abc import Callable
from typing import Any, Protocol


class Context(Protocol):
    """What TorchServe passes to `initialize` and `handle`.

    A position is the place of a request in the batch of one tick.
    """

    system_properties: dict[str, Any]
    model_name: str
    model_yaml_config: dict[str, Any]
    request_ids: dict[int, str]
    """Position -> request id."""
    stopping_criteria: list[Callable[[Any], bool | None] | None]
    """By position: returns how the response is sent; see `handler.response.Delivery`."""

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        """Return the headers of the request at position `idx`, in the client's spelling."""
        ...

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        """Set the HTTP status of the request at position `idx`."""
        ...

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Set an HTTP header of the request at position `idx`."""
        ...
