"""The JSON body a client sends, checked and typed; the errors it gets back.

Vertex AI's shape: `{"instances": [...], "parameters": {...}}`. An instance is a string,
`{"prompt": ...}` or `{"messages": [...]}`, and may carry `parameters` of its own, which win over
the shared ones. Nothing here knows about models or TorchServe.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from handler.config import App, Limits, show
from handler.engine import Sampling

_STATUS = {
    400: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
"""Google's names for HTTP codes. Source: google/rpc/code.proto; it has none of its own for 413."""

RULES = {
    "instances": "a list with at least one instance",
    "instances[]": 'a string, {"prompt": ...} or {"messages": [...]}',
    "prompt": "a string",
    "messages": "a list of 1 to 100 messages",
    "messages[]": 'an object, {"role": ..., "content": ...}',
    "role": '"system", "user" or "assistant"',
    "content": "a string",
    "parameters": "an object",
    "max_new_tokens": "a whole number from 1 to {limit}",
    "temperature": "0, or a number from 0.01 to 2",
    "top_p": "a number over 0, at most 1",
    "top_k": "a whole number from 0 to 1000000",
    "repetition_penalty": "a number from 0.1 to 10",
    "stop": "a string, or a list of up to 8",
    "stop[]": "a string of 1 to 100 characters",
    "seed": "a whole number from 0 to 9223372036854775807",
    "ignore_eos": "true or false",
    "return_full_text": "true or false",
    "stream": "true or false",
}
"""What each field should be, in the words of the error messages. `[]` is an item of the list."""

Model = TypeVar("Model", bound=BaseModel)


class RequestError(Exception):
    """A request that cannot be served, and what to tell its sender.

    Args:
        code: HTTP status.
        message: one sentence with what was given and what is allowed.
        field: where in the body, as in `instances[1].parameters.temperature`; may be empty.
    """

    def __init__(self, code: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field

    def body(self) -> dict[str, Any]:
        """The reply in the shape Google's APIs use."""
        error = {"code": self.code, "status": _STATUS[self.code], "message": self.message}
        return {"error": error | ({"field": self.field} if self.field else {})}


class _Input(BaseModel):
    """No unknown names, no silent conversion ("5" is not 5, true is not 1), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """Take 50.0 for 50. Every number is a double in `google.protobuf.Value`, so that is what comes
    from Vertex AI for a client that uses gRPC.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]


class Parameters(_Input):
    """What shapes one completion. A field that is not given falls back to the app's default."""

    max_new_tokens: Annotated[Whole, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = None
    top_p: Annotated[float, Field(gt=0, le=1)] = None
    top_k: Annotated[Whole, Field(ge=0, le=1_000_000)] = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=100)]],
        Field(max_length=8, fail_fast=True),
    ] = None
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = None
    ignore_eos: bool = None
    return_full_text: bool = None

    @field_validator("max_new_tokens")
    @classmethod
    def _within_the_apps_limit(cls, value: int, info: ValidationInfo) -> int:
        if value > info.context.max_new_tokens:
            raise PydanticCustomError("too_large", "is too large")
        return value

    @field_validator("temperature")
    @classmethod
    def _greedy_or_well_above(cls, value: float) -> float:
        # Dividing logits by next to nothing overflows. Whoever wants that wants greedy: 0.
        if 0 < value < 0.01:
            raise PydanticCustomError("too_small", "is too small")
        return value

    @model_validator(mode="before")
    @classmethod
    def _one_stop_string_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stop"), str):
            return value | {"stop": [value["stop"]]}
        return value


class SharedParameters(Parameters):
    """Parameters of the whole request. A reply is streamed as one, so `stream` is only here."""

    stream: bool = False


class Message(_Input):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Instance(_Input):
    """One prompt, or one conversation."""

    prompt: str = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=100, fail_fast=True)] = None
    parameters: Parameters = Parameters()

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"prompt": value}
        if isinstance(value, dict) and ("prompt" in value) == ("messages" in value):
            raise PydanticCustomError("one_of", 'needs exactly one of "prompt" and "messages"')
        return value


class Body(_Input):
    """The whole request."""

    instances: Annotated[list[Instance], Field(min_length=1, fail_fast=True)]
    parameters: SharedParameters = SharedParameters()


@dataclass(frozen=True)
class Item:
    """One instance with everything settled. Either `prompt` or `messages` is given."""

    prompt: str | None
    messages: list[dict[str, str]] | None
    sampling: Sampling
    return_full_text: bool | None


@dataclass(frozen=True)
class Request:
    """A body that passed every check that needs no model."""

    items: list[Item]
    stream: bool


def default_parameters(app: App) -> dict[str, Any]:
    """The app's `parameters:`, checked as if a client had sent them.

    Raises:
        RequestError: the app's YAML holds a value no client could send.
    """
    return _given(_validate(Parameters, app.parameters, app.limits, "app.parameters"))


def parse_request(row: dict[str, Any], limits: Limits, defaults: dict[str, Any]) -> Request:
    """Read what TorchServe hands over for one request.

    Args:
        row: parameter name -> bytes. A plain POST has one, "body"; a form has its fields, if any.
        limits: what one request may ask for.
        defaults: the app's, from `default_parameters`.

    Raises:
        RequestError: the body is not what it should be.
    """
    raw = _json(_payload(row), limits.max_body_bytes)
    if not isinstance(raw, dict):
        raise RequestError(400, f'the body should be {{"instances": [...]}}, not {show(raw)}')
    instances = raw.get("instances")
    if isinstance(instances, list) and len(instances) > limits.max_instances:
        raise RequestError(
            400,
            f"instances: {len(instances)} were given; one request may hold at most "
            f"{limits.max_instances}",
            "instances",
        )
    body = _validate(Body, raw, limits)
    shared = _given(body.parameters)
    stream = shared.pop("stream", False)
    items = []
    for instance in body.instances:
        values = defaults | shared | _given(instance.parameters)
        full_text = values.pop("return_full_text", None)
        values["stop"] = tuple(values.get("stop", ()))
        messages = [m.model_dump() for m in instance.messages] if instance.messages else None
        items.append(Item(instance.prompt, messages, Sampling(**values), full_text))
    return Request(items, stream)


def _payload(row: dict[str, Any]) -> bytes:
    value = row.get("body") if row.get("body") is not None else row.get("data")
    if value is None:  # any other request has a "body", be it empty
        raise RequestError(
            400,
            "the body arrived as a form, whose encoding changes text; send JSON with the header "
            'Content-Type: application/json (curl: -H "Content-Type: application/json")',
        )
    return value.encode() if isinstance(value, str) else bytes(value)


def _json(payload: bytes, limit: int) -> Any:
    if len(payload) > limit:
        raise RequestError(413, f"the body has {len(payload)} bytes; at most {limit} are allowed")
    if not payload.strip():
        raise RequestError(400, 'the body is empty; POST {"instances": ["a prompt"]}')
    try:
        return from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error


def _given(parameters: Parameters) -> dict[str, Any]:
    return parameters.model_dump(include=parameters.model_fields_set)


def _validate(model: type[Model], value: Any, limits: Limits, where: str = "") -> Model:
    try:
        return model.model_validate(value, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    field = _path(where, location)
    if kind == "missing":
        problem = f"is missing{_unknown(first['input'], _siblings(model, location))}"
    elif kind == "extra_forbidden":
        problem = f"is not known here; allowed are {', '.join(_siblings(model, location))}"
    elif kind == "one_of":
        problem = first["msg"] + _unknown(first["input"], _siblings(model, (*location, "")))
    else:
        name = next((part for part in reversed(location) if isinstance(part, str)), "parameters")
        rule = RULES[f"{name}[]" if location and isinstance(location[-1], int) else name]
        rule = rule.format(limit=limits.max_new_tokens) if name == "max_new_tokens" else rule
        problem = f"should be {rule}, not {show(first['input'])}"
    raise RequestError(400, f"{field}: {problem}", field)


def _path(where: str, location: tuple[int | str, ...]) -> str:
    path = where
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if len(part) <= 60 else f"{part[:57]}..."
            path += f".{name}" if path else name
    return path


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names allowed beside the one that `location` ends with."""
    parent = location[:-1]
    if parent == ("parameters",):
        model = SharedParameters
    elif parent and parent[-1] == "parameters":
        model = Parameters
    elif len(parent) > 1:
        model = Message if "messages" in parent else Instance
    return list(model.model_fields)


def _unknown(given: dict[str, Any], allowed: list[str]) -> str:
    """The first name given that is not allowed: most often what is missing, misspelt."""
    name = next((name for name in given if name not in allowed), None)
    return f"; {show(name)} is not known here" if name is not None else ""
