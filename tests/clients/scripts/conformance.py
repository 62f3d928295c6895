"""Validate JSON texts strictly against the types of OpenAI's client, with no unknown fields.

Reads [[type, text], ...] and prints for each the list of what is wrong with it.
"""

import json
import sys

from openai.types import Completion, ErrorObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, ConfigDict, ValidationError, create_model


def listed(model: type[BaseModel]) -> type[BaseModel]:
    """The page that OpenAI's lists are."""
    name = f"{model.__name__}List"
    return create_model(name, __config__=FORBID, object=(str, ...), data=(list[model], ...))


FORBID = ConfigDict(extra="forbid")
TYPES: dict[str, type[BaseModel]] = {
    "chat.completion": ChatCompletion,
    "chat.completion.chunk": ChatCompletionChunk,
    "text_completion": Completion,
    "text_completion.chunk": Completion,
    "model": Model,
    "models": listed(Model),
    "error": create_model("Error", __config__=FORBID, error=(ErrorObject, ...)),
}
REQUIRED = {
    # OpenAI's OpenAPI document requires these and lets them be null; the client's types let them
    # be absent.
    "chat.completion": [
        *("choices.*.logprobs", "choices.*.message.content", "choices.*.message.refusal"),
        "usage",
    ],
    "chat.completion.chunk": ["choices.*.finish_reason"],
    "text_completion": ["choices.*.logprobs", "usage"],
    "text_completion.chunk": ["choices.*.logprobs", "choices.*.finish_reason"],
    "error": ["error.message", "error.type", "error.param", "error.code"],
}


def unknown(value: object, path: str) -> list[str]:
    """List the fields, at any depth, that the types do not have."""
    if isinstance(value, BaseModel):
        found = [f"{path}.{name}: no such field" for name in value.model_extra or {}]
        for name in type(value).model_fields:
            found += unknown(getattr(value, name), f"{path}.{name}")
        return found
    if isinstance(value, list):
        return [text for i, one in enumerate(value) for text in unknown(one, f"{path}.{i}")]
    return []


def absent(value: object, path: list[str], at: str) -> list[str]:
    """Say whether a field that is required is missing."""
    if not path:
        return []
    first, rest = path[0], path[1:]
    if first == "*":
        return [text for i, one in enumerate(value) for text in absent(one, rest, f"{at}.{i}")]
    if first not in value:
        return [f"{at}.{first}: missing"]
    return absent(value[first], rest, f"{at}.{first}")


def problems(kind: str, text: str) -> list[str]:
    """List what is wrong with one JSON text."""
    original, given = text, json.loads(text)
    if kind == "text_completion.chunk":  # OpenAI sends null until the last one; its types forbid it
        for choice in given["choices"]:
            choice["finish_reason"] = choice.get("finish_reason") or "stop"
        text = json.dumps(given)
    try:
        value = TYPES[kind].model_validate_json(text, strict=True)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    required = [
        missing
        for path in REQUIRED.get(kind, [])
        for missing in absent(json.loads(original), path.split("."), kind)
    ]
    return unknown(value, kind) + required


print(json.dumps([problems(kind, text) for kind, text in json.load(sys.stdin)]))
