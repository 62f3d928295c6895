"""Errors in Google's shape, for REST and gRPC.

Source of the pairs: https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
"""

from typing import Any

import grpc
from google.rpc import status_pb2

HTTP = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "UNAUTHENTICATED": 401,
}
"""Google's status -> HTTP code."""

STATUS_OF_HTTP = {code: status for status, code in HTTP.items() if status != "FAILED_PRECONDITION"}


class ApiError(Exception):
    """An error that the client gets as the response.

    Args:
        status: a key of `HTTP`.
        message: the text for the client.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    @property
    def http(self) -> int:
        return HTTP[self.status]

    @property
    def grpc(self) -> grpc.StatusCode:
        return grpc.StatusCode[self.status]

    def body(self) -> dict[str, Any]:
        """Return the body of a REST response."""
        return {"error": {"code": self.http, "message": self.message, "status": self.status}}

    def operation(self) -> status_pb2.Status:
        """Return the `error` of a long-running operation."""
        return status_pb2.Status(code=self.grpc.value[0], message=self.message)


def invalid(field: str, message: str) -> ApiError:
    """Make the error for a field that Vertex AI rejects, in its own wording."""
    return ApiError(
        "INVALID_ARGUMENT", f"List of found errors: 1.Field: {field}; Message: {message}"
    )


def denied(permission: str, resource: str) -> ApiError:
    """Make IAM's error for a missing permission; another project's resource gets the same."""
    return ApiError(
        "PERMISSION_DENIED",
        f"Permission '{permission}' denied on resource "
        f"'//aiplatform.googleapis.com/{resource}' (or it may not exist).",
    )
