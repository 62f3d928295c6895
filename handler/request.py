"""The JSON body a client sends, checked and typed; the errors it gets back.

Vertex AI's shape: `{"instances": [...], "parameters": {...}}`. An instance is a string,
`{"prompt": ...}` or `{"messages": [...]}`, and may have `parameters`, which override the shared
ones. Nothing here knows about models or TorchServe.

Each field is declared once (`fields.py`). From its declaration come pydantic's checks, the error
messages and `parameter_table`.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from handler.body import read_json
from handler.config import App, Limits, load_app, show
from handler.engine import Messages, Sampling
from handler.errors import RequestError
from handler.fields import (
    AppLimit,
    Doc,
    Input,
    Location,
    Rule,
    WholeNumber,
    ZeroOrAtLeast,
    declaration_at,
    describe,
    in_a_list,
    markdown_table,
)
from handler.headers import Header, header_reader

Model = TypeVar("Model", bound=BaseModel)


StopString = Annotated[
    str,
    Field(min_length=1, max_length=100),
    Rule("a string of {min_length} to {max_length} characters"),
]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=8, fail_fast=True),
    BeforeValidator(in_a_list),
    Rule("a string, or a list of up to {max_length}"),
]


class Parameters(Input):
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
        Doc(
            "The same seed gives the same completion. Seeds of 2^32 and above are reduced to 32 "
            "bits, so two of them can give the same completion.",
            default="random",
        ),
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
    """Parameters of the whole request, besides those that hold for each instance."""

    stream: Annotated[bool, Doc("Send events as text is generated. Shared only.")] = False
    timeout: Annotated[
        float | None,
        Field(ge=0.1),
        AppLimit("seconds"),
        Doc(
            "Seconds after which the request ends with the text generated so far. Shared only.",
            default="the maximum",
        ),
    ] = None


class Message(Input):
    """One turn of a conversation."""

    rule = 'an object, {"role": ..., "content": ...}'

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = Annotated[
    list[Message],
    Field(min_length=1, max_length=100, fail_fast=True),
    Rule("a list of {min_length} to {max_length} messages"),
]


class InstanceBody(Input):
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


class Body(Input):
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
    seconds: float
    """The time in which it must be answered."""


def default_parameters(app: App) -> dict[str, Any]:
    """Return the app's `parameters:`, checked as if a client had sent them.

    Raises:
        RequestError: the app's YAML holds a value that no client could send.
    """
    checked = _validate(Parameters, app.parameters, app.limits, "app.parameters")
    return checked.model_dump(exclude_unset=True)


NO_HEADERS = header_reader({})


def parse_request(
    parts: dict[str, Any],
    limits: Limits,
    defaults: dict[str, Any],
    header: Header = NO_HEADERS,
) -> Request:
    """Read what TorchServe passes on of one request.

    Args:
        parts: name -> bytes. A plain POST has one part, "body"; a form has its fields, if any.
        limits: what one request may ask for.
        defaults: the app's, from `default_parameters`.
        header: the request's headers.

    Raises:
        RequestError: the body is not what it should be.
    """
    raw = read_json(parts, header, limits.max_body_bytes)
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
    shared = body.parameters.model_dump(exclude_unset=True, exclude={"stream", "timeout"})
    instances = []
    for instance in body.instances:
        values = defaults | shared | instance.parameters.model_dump(exclude_unset=True)
        full_text = values.pop("return_full_text", None)
        values["stop"] = tuple(values.get("stop", ()))
        prompt: str | Messages = instance.prompt or ""
        if instance.messages:
            prompt = [message.model_dump() for message in instance.messages]
        instances.append(Instance(prompt, Sampling(**values), full_text))
    seconds = body.parameters.timeout
    return Request(
        instances, body.parameters.stream, limits.seconds if seconds is None else seconds
    )


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
        rule = describe(declaration_at(model, location), limits)
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
    kind, _ = declaration_at(model, location)
    return list(kind.model_fields)


def _unknown(given: dict[str, Any], allowed: list[str]) -> str:
    """The first name given that is not allowed: most often the missing one, misspelt."""
    name = next((name for name in given if name not in allowed), None)
    return f"; {show(name)} is not known here" if name is not None else ""


def parameter_table(model: type[Parameters] = SharedParameters) -> str:
    """Write the parameters as a Markdown table, with the limits and defaults of a plain app."""
    app = load_app("an-app-without-a-yaml", local=True)
    return markdown_table(model, app.limits, asdict(Sampling()) | app.parameters)
