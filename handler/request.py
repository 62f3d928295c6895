"""The JSON body a client sends, checked and typed; the errors it gets back.

Vertex AI's shape: `{"instances": [...], "parameters": {...}}`. An instance is a string,
`{"prompt": ...}` or `{"messages": [...]}`, and may have `parameters` of its own, which win over the
shared ones. Nothing here knows about models or TorchServe.

A field is declared once: its type and bounds, and where these do not say it all, a `Rule`. From
this declaration come pydantic's checks, the error messages and `parameter_table`.
"""

import json
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, from_json

from handler.config import App, Limits, load_app, show
from handler.engine import Messages, Sampling

_STATUS = {
    400: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
"""Google's names for HTTP codes. Source: google/rpc/code.proto; it has none of its own for 413."""

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]
"""Where a value stands in the body: names and list indices, as pydantic reports them."""
Declaration = tuple[Any, list[Any]]
"""A field's type without `| None`, and the metadata from its `Annotated`."""


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


@dataclass(frozen=True)
class Rule:
    """What a field should be, where its type and bounds do not say it.

    `{ge}`, `{gt}`, `{le}`, `{min_length}` and `{max_length}` stand for the field's bounds.
    """

    text: str


@dataclass(frozen=True)
class Doc:
    """The effect of a parameter, and what is the default if no value says it."""

    effect: str
    default: str = ""


@dataclass(frozen=True)
class AppLimit:
    """An upper bound that each app sets under `limits:`; `name` is the field's name there."""

    name: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: int, info: core_schema.ValidationInfo) -> int:
            if value > getattr(info.context, self.name):
                raise PydanticCustomError("too_large", "is too large")
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))


@dataclass(frozen=True)
class ZeroOrAtLeast:
    """A lower bound, `ge`, that 0 may go below."""

    ge: float

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: float) -> float:
            if value < self.ge and value != 0:
                raise PydanticCustomError("too_small", "is too small")
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


class _Input(BaseModel):
    """No unknown names, no silent conversion ("5" is not 5, true is not 1), no NaN, no null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    rule: ClassVar[str] = "an object"

    @field_validator("*", mode="before")
    @classmethod
    def _reject_null(cls, value: Any) -> Any:
        # None stands for "not given" here. A client leaves such a field out.
        if value is None:
            raise PydanticCustomError("null", "is null")
        return value


def _integral(value: Any) -> Any:
    """Read 50.0 as 50. Every number is a double in `google.protobuf.Value`, so that is what comes
    from Vertex AI for a client that uses gRPC.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


WholeNumber = Annotated[int, BeforeValidator(_integral)]
StopString = Annotated[
    str,
    Field(min_length=1, max_length=100),
    Rule("a string of {min_length} to {max_length} characters"),
]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=8, fail_fast=True),
    BeforeValidator(_listed),
    Rule("a string, or a list of up to {max_length}"),
]


class Parameters(_Input):
    """What shapes one completion. A field that is not given falls back to the app's default."""

    max_new_tokens: Annotated[
        WholeNumber | None,
        Field(ge=1),
        AppLimit("max_new_tokens"),
        Doc("The most tokens to generate."),
    ] = None
    temperature: Annotated[
        float | None,
        ZeroOrAtLeast(0.01),  # dividing logits by less overflows
        Field(le=2),
        Rule("0, or a number from {ge} to {le}"),
        Doc("0 takes the likeliest token (greedy). Higher values vary the text more."),
    ] = None
    top_p: Annotated[
        float | None,
        Field(gt=0, le=1),
        Rule("a number over {gt}, at most {le}"),
        Doc("Draw from the likeliest tokens that together have this probability."),
    ] = None
    top_k: Annotated[
        WholeNumber | None,
        Field(ge=0, le=1_000_000),
        Doc("Draw from this many of the likeliest tokens; 0 is all."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Field(ge=0.1, le=10),
        Doc("Values over 1 make tokens that occurred before less likely."),
    ] = None
    stop: Annotated[
        StopStrings | None,
        Doc("Ends the completion before the first of these.", default="none"),
    ] = None
    seed: Annotated[
        WholeNumber | None,
        Field(ge=0, le=2**63 - 1),
        Doc("The same seed gives the same completion.", default="random"),
    ] = None
    ignore_eos: Annotated[
        bool | None,
        Doc("Continue after the end token; for benchmarks."),
    ] = None
    return_full_text: Annotated[
        bool | None,
        Doc("Begin the prediction with the prompt.", default="true for plain text, else false"),
    ] = None


class SharedParameters(Parameters):
    """Parameters of the whole request. A response is streamed as one, so `stream` is only here."""

    stream: Annotated[bool, Doc("Send events as text is generated. Shared only.")] = False


class Message(_Input):
    """One turn of a conversation."""

    rule = 'an object, {"role": ..., "content": ...}'

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = Annotated[
    list[Message],
    Field(min_length=1, max_length=100, fail_fast=True),
    Rule("a list of {min_length} to {max_length} messages"),
]


class InstanceBody(_Input):
    """One prompt, or one conversation."""

    rule = 'a string, {"prompt": ...} or {"messages": [...]}'

    prompt: str | None = None
    messages: Conversation | None = None
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

    instances: Annotated[
        list[InstanceBody],
        Field(min_length=1, fail_fast=True),
        Rule("a list with at least one instance"),
    ]
    parameters: SharedParameters = SharedParameters()


@dataclass(frozen=True)
class Instance:
    """One instance with all defaults filled in. `prompt` is a text, or a conversation."""

    prompt: str | Messages
    sampling: Sampling
    return_full_text: bool | None


@dataclass(frozen=True)
class Request:
    """A body that passed every check that needs no model."""

    instances: list[Instance]
    stream: bool


def default_parameters(app: App) -> dict[str, Any]:
    """Return the app's `parameters:`, checked as if a client had sent them.

    Raises:
        RequestError: the app's YAML holds a value that no client could send.
    """
    checked = _validate(Parameters, app.parameters, app.limits, "app.parameters")
    return checked.model_dump(exclude_unset=True)


def parse_request(parts: dict[str, Any], limits: Limits, defaults: dict[str, Any]) -> Request:
    """Read what TorchServe passes on of one request.

    Args:
        parts: name -> bytes. A plain POST has one part, "body"; a form has its fields, if any.
        limits: what one request may ask for.
        defaults: the app's, from `default_parameters`.

    Raises:
        RequestError: the body is not what it should be.
    """
    raw = _parse_json(_payload(parts), limits.max_body_bytes)
    if not isinstance(raw, dict):
        raise RequestError(400, f'the body should be {{"instances": [...]}}, not {show(raw)}')
    given = raw.get("instances")
    if isinstance(given, list) and len(given) > limits.max_instances:
        raise RequestError(
            400,
            f"instances: {len(given)} were given; one request may hold at most "
            f"{limits.max_instances}",
            "instances",
        )
    body = _validate(Body, raw, limits)
    shared = body.parameters.model_dump(exclude_unset=True, exclude={"stream"})
    instances = []
    for instance in body.instances:
        values = defaults | shared | instance.parameters.model_dump(exclude_unset=True)
        full_text = values.pop("return_full_text", None)
        values["stop"] = tuple(values.get("stop", ()))
        prompt: str | Messages = instance.prompt or ""
        if instance.messages:
            prompt = [message.model_dump() for message in instance.messages]
        instances.append(Instance(prompt, Sampling(**values), full_text))
    return Request(instances, body.parameters.stream)


def _payload(parts: dict[str, Any]) -> bytes:
    value = parts.get("body") if parts.get("body") is not None else parts.get("data")
    if value is None:  # every request but a form has a "body", even if it is empty
        raise RequestError(
            400,
            "the body arrived as a form, whose encoding changes text; send JSON with the header "
            'Content-Type: application/json (curl: -H "Content-Type: application/json")',
        )
    return value.encode() if isinstance(value, str) else bytes(value)


def _parse_json(payload: bytes, limit: int) -> Any:
    if len(payload) > limit:
        raise RequestError(413, f"the body has {len(payload)} bytes; at most {limit} are allowed")
    if not payload.strip():
        raise RequestError(400, 'the body is empty; POST {"instances": ["a prompt"]}')
    try:
        return from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error


def _validate(model: type[Model], value: Any, limits: Limits, where: str = "") -> Model:
    try:
        return model.model_validate(value, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    field = _path(where, location)
    if kind == "missing":
        names = _names_at(model, location[:-1])
        problem = f"is missing{_unknown(first['input'], names)}"
    elif kind == "extra_forbidden":
        names = _names_at(model, location[:-1])
        problem = f"is not known here; allowed are {', '.join(names)}"
    elif kind == "one_of":
        problem = first["msg"] + _unknown(first["input"], _names_at(model, location))
    else:
        rule = _rule(*_declaration_at(model, location), limits)
        problem = f"should be {rule}, not {show(first['input'])}"
    raise RequestError(400, f"{field}: {problem}", field)


def _path(where: str, location: Location) -> str:
    path = where
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if len(part) <= 60 else f"{part[:57]}..."
            path += f".{name}" if path else name
    return path


def _names_at(model: type[BaseModel], location: Location) -> list[str]:
    """The names allowed in the object at `location`."""
    kind, _ = _declaration_at(model, location)
    return list(kind.model_fields)


def _unknown(given: dict[str, Any], allowed: list[str]) -> str:
    """The first name given that is not allowed: most often the missing one, misspelt."""
    name = next((name for name in given if name not in allowed), None)
    return f"; {show(name)} is not known here" if name is not None else ""


def _declaration_at(model: type[BaseModel], location: Location) -> Declaration:
    """How the field at `location` is declared in `model`."""
    kind: Any = model
    metadata: list[Any] = []
    for part in location:
        if isinstance(part, int):
            kind, metadata = _declaration(get_args(kind)[0])
        else:
            field = kind.model_fields[part]
            kind, metadata = _declaration(field.annotation, field.metadata)
    return kind, metadata


def _declaration(annotation: Any, metadata: Iterable[Any] = ()) -> Declaration:
    """Split `Annotated[... | None, ...]` into the type and its metadata."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        if get_origin(annotation) is Annotated:
            annotation, *inner = get_args(annotation)
            metadata = [*inner, *metadata]
        else:
            (annotation,) = (a for a in get_args(annotation) if a is not types.NoneType)
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    return annotation, flat


def _rule(kind: Any, metadata: list[Any], limits: Limits) -> str:
    """What a field with this declaration should be."""
    bounds: dict[str, Any] = {}
    text = {
        bool: "true or false",
        int: "a whole number from {ge} to {le}",
        float: "a number from {ge} to {le}",
        str: "a string",
    }.get(kind, "")
    for item in metadata:
        if isinstance(item, Rule):
            text = item.text
        elif isinstance(item, AppLimit):
            bounds["le"] = getattr(limits, item.name)
        for name in ("ge", "gt", "le", "min_length", "max_length"):
            if hasattr(item, name):
                bounds[name] = getattr(item, name)
    if text:
        return text.format(**bounds)
    if get_origin(kind) is Literal:
        *first, last = (json.dumps(value) for value in get_args(kind))
        return f"{', '.join(first)} or {last}"
    return kind.rule


def parameter_table(model: type[Parameters] = SharedParameters) -> str:
    """Write the parameters as a Markdown table: what each may be, its default, its effect.

    Limits and defaults are those of an app that changes none.
    """
    app = load_app("an-app-without-a-yaml", local=True)
    defaults = asdict(Sampling()) | app.parameters
    lines = ["| parameter | value | default | effect |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        kind, metadata = _declaration(field.annotation, field.metadata)
        value = _rule(kind, metadata, app.limits)
        if get_origin(kind) is list:
            value += f", each {_rule(*_declaration(get_args(kind)[0]), app.limits)}"
        doc = next(item for item in metadata if isinstance(item, Doc))
        default = doc.default or json.dumps(defaults.get(name, field.default)).removesuffix(".0")
        lines.append(f"| `{name}` | {value} | {default} | {doc.effect} |")
    return "\n".join(lines)
