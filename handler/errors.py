"""The error of a request that cannot be served, and its JSON in the shape of each API."""

from typing import Any

_GOOGLE = {
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
"""Google's names for HTTP codes. Source: google/rpc/code.proto; it has none for 405, 413, 415."""

_OPENAI = {
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "server_error"),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "timeout"),
}
"""OpenAI's `type` and `code` for HTTP codes; all others are an `invalid_request_error`."""


class RequestError(Exception):
    """A request that cannot be served, and what its client is told.

    Args:
        code: HTTP status.
        message: one sentence with what was given and what is allowed.
        field: where in the body, as in `instances[1].parameters.temperature`; may be empty.
        reason: OpenAI's `code` for it, such as `model_not_found`.
        counted_as: one of `metrics.REFUSALS`; empty if the status alone says it.
    """

    def __init__(
        self,
        code: int,
        message: str,
        field: str = "",
        reason: str | None = None,
        counted_as: str = "",
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.field, self.reason = code, message, field, reason
        self.counted_as = counted_as


def google_error(error: RequestError) -> dict[str, Any]:
    """Write an error as Google's APIs do, with `field` added."""
    content = {"code": error.code, "status": _GOOGLE[error.code], "message": error.message}
    return {"error": content | ({"field": error.field} if error.field else {})}


def openai_error(error: RequestError) -> dict[str, Any]:
    """Write an error as OpenAI's API does."""
    kind, reason = _OPENAI.get(error.code, ("invalid_request_error", None))
    content = {"message": error.message, "type": kind, "param": error.field or None}
    return {"error": content | {"code": error.reason or reason}}
