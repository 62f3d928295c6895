"""The JSON body a client sends, checked and typed; the errors it gets back.

Vertex AI's shape: `{"instances": [...], "parameters": {...}}`. An instance is a string,
`{"prompt": ...}` or `{"messages": [...]}`, and may carry `parameters` of its own, which win over
the shared ones. Nothing here knows about models or TorchServe.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from handler.config import App, rule, show
from handler.engine import Sampling

_STATUS = {
    400: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
"""Google's names for HTTP codes. Source: google/rpc/code.proto; it has none of its own for 413."""

Model = TypeVar("Model", bound=BaseModel)
StopString = Annotated[str, Field(min_length=1, max_length=100)]


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


class _Strict(BaseModel):
    """No unknown names, no silent conversion ("5" is not 5, true is not 1), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Parameters(_Strict):
    """What shapes one completion. A field that is not given falls back to the app's default."""

    max_new_tokens: Annotated[int, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = None
    top_p: Annotated[float, Field(gt=0, le=1)] = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = None
    stop: Annotated[list[StopString], Field(max_length=8)] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = None
    return_full_text: bool = None

    @model_validator(mode="before")
    @classmethod
    def _one_stop_string_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stop"), str):
            return value | {"stop": [value["stop"]]}
        return value


class SharedParameters(Parameters):
    """Parameters of the whole request. A reply is streamed as one, so `stream` is only here."""

    stream: bool = False


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Instance(_Strict):
    """One prompt, or one conversation."""

    prompt: str = None
    messages: Annotated[list[Message], Field(min_length=1)] = None
    parameters: Parameters = Parameters()

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"prompt": value}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "instance", 'should be a string, {"prompt": ...} or {"messages": [...]}'
            )
        if ("prompt" in value) == ("messages" in value):
            raise PydanticCustomError("instance", 'needs exactly one of "prompt" and "messages"')
        return value


class Body(_Strict):
    """The whole request."""

    instances: Annotated[list[Instance], Field(min_length=1)]
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
    given = _validate(Parameters, app.parameters, "app.parameters")
    return given.model_dump(include=given.model_fields_set)


def parse_request(row: dict[str, Any], app: App) -> Request:
    """Read what TorchServe hands over for one request.

    Args:
        row: parameter name -> bytes. A plain POST has one, "body"; a form has its fields, if any.
        app: defaults and limits.

    Raises:
        RequestError: the body is not what it should be.
    """
    raw = _json(_payload(row), app.limits.max_body_bytes)
    if not isinstance(raw, dict):
        what = show(raw)
        raise RequestError(400, f'the body should be {{"instances": [...]}}, not {what}')
    instances = raw.get("instances")
    if isinstance(instances, list) and len(instances) > app.limits.max_instances:
        raise RequestError(
            400,
            f"instances: {len(instances)} were given; one request may hold at most "
            f"{app.limits.max_instances}",
            "instances",
        )
    body = _validate(Body, raw)
    defaults = default_parameters(app)
    shared = body.parameters.model_dump(include=body.parameters.model_fields_set - {"stream"})
    _check_length(shared, app, "parameters")
    items = []
    for i, instance in enumerate(body.instances):
        own = instance.parameters.model_dump(include=instance.parameters.model_fields_set)
        _check_length(own, app, f"instances[{i}].parameters")
        values = defaults | shared | own
        full_text = values.pop("return_full_text", None)
        values["stop"] = tuple(values.get("stop", ()))
        messages = [m.model_dump() for m in instance.messages] if instance.messages else None
        items.append(Item(instance.prompt, messages, Sampling(**values), full_text))
    return Request(items, body.parameters.stream)


def _payload(row: dict[str, Any]) -> bytes:
    value = row.get("body") if row.get("body") is not None else row.get("data")
    if value is None:  # any other request has a "body", be it empty
        raise RequestError(
            400,
            "the body arrived as a form, whose encoding changes text; send JSON with the header "
            'Content-Type: application/json (curl: -H "Content-Type: application/json")',
        )
    if isinstance(value, str):
        return value.encode()
    return bytes(value or b"")


def _json(payload: bytes, limit: int) -> Any:
    if len(payload) > limit:
        raise RequestError(413, f"the body has {len(payload)} bytes; at most {limit} are allowed")
    if not payload.strip():
        raise RequestError(400, 'the body is empty; POST {"instances": ["a prompt"]}')
    try:
        return from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}") from error


def _check_length(parameters: dict[str, Any], app: App, where: str) -> None:
    given, allowed = parameters.get("max_new_tokens", 1), app.limits.max_new_tokens
    if given > allowed:
        field = f"{where}.max_new_tokens"
        raise RequestError(400, f"{field}: should be at most {allowed}, not {given}", field)


def _validate(model: type[Model], value: Any, where: str = "") -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    field = _path(where, first["loc"])
    if first["type"] == "missing":
        message = f"{field}: is missing"
    elif first["type"] == "extra_forbidden":
        known = ", ".join(_fields(model, first["loc"]))
        message = f"{field}: is not known here; allowed are {known}"
    elif first["type"] in ("too_long", "too_short"):
        bound = {"too_long": "at most", "too_short": "at least"}[first["type"]]
        size = first["ctx"].get("max_length") or first["ctx"].get("min_length")
        message = f"{field}: should have {bound} {size} items, not {first['ctx']['actual_length']}"
    elif first["type"] == "model_type":
        message = f"{field}: should be an object, not {show(first['input'])}"
    else:
        message = f"{field}: {rule(first)}, not {show(first['input'])}"
    raise RequestError(400, message, field)


def _path(where: str, location: tuple[int | str, ...]) -> str:
    path = where
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{_show_name(part)}" if path else _show_name(part)
    return path


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names allowed beside the unknown one that `location` ends with."""
    if "messages" in location:
        model = Message
    elif location[-2:-1] == ("parameters",):
        model = SharedParameters if len(location) == 2 else Parameters
    elif "instances" in location:
        model = Instance
    return list(model.model_fields)


def _show_name(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
