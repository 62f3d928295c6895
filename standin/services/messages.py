"""Protobuf messages of the API: the classes behind the SDK's types, and JSON.

The stand-in works with the protobuf classes behind the SDK's types (`raw`): JSON, gRPC and
operations take these only. They have the fields of the SDK's types but no type stubs, so
annotations name the SDK's types: `model: t.Model` is a message of the class `raw(t.Model)`.
"""

from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from standin.errors import ApiError

SdkType = TypeVar("SdkType")
AnyMessage = TypeVar("AnyMessage", bound=Message)


def raw(kind: type[SdkType]) -> type[SdkType]:
    """Return the protobuf class behind a type of the SDK."""
    # The one place where a protobuf class takes the type of its wrapper; `pb` is the wrapper's.
    behind: type[SdkType] = getattr(kind, "pb")()  # noqa: B009
    return behind


def parse(fields: Any, message: AnyMessage) -> AnyMessage:
    """Fill a message from JSON and reject unknown fields, as Google's front end does.

    Raises:
        ApiError: a field that the API does not know, or of another type.
    """
    try:
        return json_format.ParseDict(fields, message, ignore_unknown_fields=False)
    except (json_format.ParseError, TypeError, AttributeError) as error:
        raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from error


def dump(message: Message, *, enum_numbers: bool = False) -> dict[str, Any]:
    """Return a message as JSON; enums are numbers if the client asked for `enum-encoding=int`."""
    return json_format.MessageToDict(message, use_integers_for_enums=enum_numbers)


def value_to_json(value: Any) -> Any:
    """Return a `google.protobuf.Value` as JSON; all its numbers are doubles."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: value_to_json(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [value_to_json(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)
