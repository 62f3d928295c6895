"""The error that ends a request, and what its client is told."""

from typing import Any

_STATUS = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""Google's names for HTTP codes. Source: google/rpc/code.proto; it has no names for 405, 413 and
415."""


class RequestError(Exception):
    """A request that cannot be served, and what its client is told.

    Args:
        code: HTTP status.
        message: one sentence with what was given and what is allowed.
        field: where in the body, as in `instances[1].parameters.temperature`; may be empty.
    """

    def __init__(self, code: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field

    def body(self) -> dict[str, Any]:
        """The response in the shape that Google's APIs use."""
        error = {"code": self.code, "status": _STATUS[self.code], "message": self.message}
        return {"error": error | ({"field": self.field} if self.field else {})}
