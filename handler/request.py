"""Requests as typed, checked values that are the same for every API.

This module has the parameters and messages that all APIs share, and Vertex AI's shape:
`{"instances": [...], "parameters": {...}}`. An instance is a string, `{"prompt": ...}` or
`{"messages": [...]}`. It may have `parameters`, which override the shared ones, or the same names
beside the prompt, as LangChain and litellm send them. `openai.py` has the bodies of OpenAI's API.
Nothing here knows about models or TorchServe.

Each field is declared once (`fields.py`). From its declaration come pydantic's checks, the error
messages and `parameter_table`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

from handler.config import App, load_app, show
from handler.engine import Messages, Sampling
from handler.errors import RequestError
from handler.fields import (
    AppLimit,
    Doc,
    Input,
    Rule,
    WholeNumber,
    ZeroOrAtLeast,
    in_a_list,
    markdown_table,
    problem,
    validate,
)
from handler.shapes import Shape, VertexShape
from handler.tool_calls import RequestedTools

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


class JsonSchema(Input):
    """The schema of a response format."""

    rule = 'an object, {"name": ..., "schema": {...}}'

    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any], Rule("a JSON schema, an object")] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Input):
    """The form of a completion: free text, a JSON object, or JSON that fulfills a schema."""

    rule = (
        '{"type": "text"}, {"type": "json_object"} or '
        '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            verb = "needs" if self.json_schema is None else "has no"
            raise problem(f'with "type": "{self.type}" {verb} "json_schema"')
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema for the engine; None for free text."""
        if self.type == "text":
            return None
        schema = self.json_schema.definition if self.json_schema else {"type": "object"}
        return json.dumps(schema)


class Decoding(Input):
    """How tokens are chosen, and when a completion ends. Every API has these names.

    A field that is not given falls back to the app's default.
    """

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
        Field(ge=-1, le=1_000_000),
        Doc("Draw from this many of the likeliest tokens; 0 or -1 means all."),
    ] = None
    min_p: Annotated[
        float | None,
        Field(ge=0, le=1),
        Doc("Draw from tokens with at least this fraction of the likeliest one's probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Field(ge=0.1, le=10),
        Doc("Values over 1 make tokens of the prompt and the completion less likely."),
    ] = None
    presence_penalty: Annotated[
        float | None,
        Field(ge=-2, le=2),
        Doc("Values over 0 make tokens of the completion less likely."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        Field(ge=-2, le=2),
        Doc("Like `presence_penalty`, but for each time the token was generated."),
    ] = None
    stop: Annotated[
        StopStrings | None,
        Doc("The completion ends before the first of these strings.", default="none"),
    ] = None
    seed: Annotated[
        WholeNumber | None,
        Field(ge=-(2**63), le=2**63 - 1),
        Rule("a whole number from -2^63 to 2^63 - 1"),
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
    response_format: Annotated[
        ResponseFormat | None,
        Doc("Generate JSON, with or without a schema.", default="text"),
    ] = None

    def sampling(self) -> dict[str, Any]:
        """Return the given values, by the names of `Sampling`."""
        values = {name: getattr(self, name) for name in Decoding.model_fields}
        values = {name: value for name, value in values.items() if value is not None}
        if "top_k" in values:
            values["top_k"] = max(values["top_k"], 0)
        if "stop" in values:
            values["stop"] = tuple(values["stop"])
        if wanted := values.pop("response_format", None):
            values["json_schema"] = wanted.schema_text
        return values


MaxTokens = Annotated[
    WholeNumber | None,
    Field(ge=1),
    AppLimit("max_new_tokens"),
    Doc("The most tokens to generate."),
]
Timeout = Annotated[
    float | None,
    Field(ge=0.1),
    AppLimit("seconds"),
    Doc(
        "Seconds after which the request ends with the text generated so far.",
        default="the maximum",
    ),
]

_OTHER_NAMES = {
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens"),
        "is not known here; write max_new_tokens",
    ),
    "max_length": "is not known here; write max_new_tokens, which does not count the prompt",
    **{
        other: f"is not known here; write {name}"
        for name, others in {
            "top_k": ("topK",),
            "top_p": ("topP",),
            "stop": ("stop_sequences", "stopSequences", "stop_strings", "stop_words"),
            "repetition_penalty": ("repeat_penalty",),
            "presence_penalty": ("presencePenalty",),
            "frequency_penalty": ("frequencyPenalty",),
            "response_format": ("guided_json", "json_schema", "responseSchema"),
        }.items()
        for other in others
    },
    "do_sample": "is not known here; a temperature over 0 samples, and 0 does not",
    **dict.fromkeys(
        ("n", "best_of", "num_return_sequences", "candidateCount", "candidate_count"),
        "is not known here; repeat the instance, or use /v1/chat/completions",
    ),
    "logprobs": "is not known here; /v1/chat/completions has it",
    **dict.fromkeys(
        ("num_beams", "use_beam_search", "length_penalty", "no_repeat_ngram_size", "typical_p"),
        "is not supported by this server; leave it out",
    ),
    "inputs": "is not known here; write prompt",
}
"""Names that other servers use -> what the error says."""


class Parameters(Decoding):
    """What shapes one completion, in Vertex AI's API."""

    hints: ClassVar[dict[str, str]] = _OTHER_NAMES

    max_new_tokens: MaxTokens = None
    return_full_text: Annotated[
        bool | None,
        Doc("Begin the prediction with the prompt.", default="true for plain text, else false"),
    ] = None

    def sampling(self) -> dict[str, Any]:
        """Return the given values, by the names of `Sampling`."""
        given = super().sampling()
        if self.max_new_tokens is not None:
            given["max_new_tokens"] = self.max_new_tokens
        return given


class SharedParameters(Parameters):
    """Parameters of the whole request, besides those that hold for each instance.

    Only here: `stream` and `timeout`.
    """

    stream: Annotated[bool, Doc("Send events as text is generated.")] = False
    timeout: Timeout = None


def _joined_parts(content: Any) -> Any:
    """Read a list of text parts as one text, with a line end between parts, as vLLM does."""
    if not isinstance(content, list):
        return content
    if not content:
        raise problem("is an empty list; give a string or text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind != "text":
            raise problem(f'{show(kind)} is not supported; only "text" is', f"[{i}].type")
        else:
            rule = 'a text part, {"type": "text", "text": ...}'
            raise problem(f"should be {rule}, not {show(part)}", f"[{i}]")
    return "\n".join(texts)


Content = Annotated[str, BeforeValidator(_joined_parts), Rule("a string, or a list of text parts")]


class FunctionCall(Input):
    """A function that the assistant called, and its arguments as JSON."""

    rule = 'an object, {"name": ..., "arguments": "{...}"}'

    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """Return the call with its arguments as an object, as chat templates read it."""
        return {"name": self.name, "arguments": self._object()}

    def _object(self) -> Any:
        return from_json(self.arguments or "{}", allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> "FunctionCall":
        try:
            is_object = isinstance(self._object(), dict)
        except ValueError:
            is_object = False
        if not is_object:
            text = f"should be a JSON object in a string, not {show(self.arguments)}"
            raise problem(text, ".arguments")
        return self


class ToolCall(Input):
    """A call in a turn of the assistant."""

    rule = 'an object, {"id": ..., "type": "function", "function": {...}}'

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Input):
    """One turn of a conversation."""

    rule = 'an object, {"role": ..., "content": ...}'

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Rule("a list of tool calls")] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _needs_content(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("content") is None and not value.get("tool_calls"):
            known = {"role", "content", *Message.model_fields}
            other = next((f"; {show(n)} is not known here" for n in value if n not in known), "")
            raise problem(f"is missing{other}", ".content")
        return value

    def for_template(self) -> dict[str, Any]:
        """Return the turn as chat templates read it: only what was given."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        for name in ("name", "tool_call_id"):
            if value := getattr(self, name):
                turn[name] = value
        if self.tool_calls:
            turn["tool_calls"] = [
                {"type": "function", "function": call.function.parsed()}
                | ({"id": call.id} if call.id else {})
                for call in self.tool_calls
            ]
        return turn


Conversation = Annotated[
    list[Message],
    Field(min_length=1, max_length=1000, fail_fast=True),
    Rule("a list of {min_length} to {max_length} messages"),
]


class InstanceBody(Parameters):
    """One prompt, or one conversation; parameters may stand beside it."""

    rule = 'a string, {"prompt": ...} or {"messages": [...]}'

    prompt: str | None = None
    messages: Conversation | None = None
    parameters: Parameters = Parameters()
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"prompt": value}
        if isinstance(value, dict):
            prompt, messages = (value.get(name) is not None for name in ("prompt", "messages"))
            if prompt == messages:
                raise PydanticCustomError("one_of", 'needs exactly one of "prompt" and "messages"')
        return value

    @model_validator(mode="after")
    def _check_names(self) -> "InstanceBody":
        names = ("max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise problem(f"has both {' and '.join(given)}; give one of them")
        return self

    def sampling(self) -> dict[str, Any]:
        """Return the given values, by the names of `Sampling`; those beside the prompt win."""
        given = self.parameters.sampling() | super().sampling()
        limit = self.max_tokens or self.max_completion_tokens
        return given | ({"max_new_tokens": limit} if limit else {})

    def full_text(self) -> bool | None:
        """Return whether the prediction begins with the prompt, if the client says so."""
        beside = self.return_full_text
        return self.parameters.return_full_text if beside is None else beside


class Body(Input):
    """The whole request."""

    hints: ClassVar[dict[str, str]] = dict.fromkeys(
        ("contents", "generationConfig", "systemInstruction"),
        "belongs to Gemini's API; send instances with messages",
    )

    instances: Annotated[
        list[InstanceBody],
        Field(min_length=1, fail_fast=True),
        Rule("a list with at least one instance"),
    ]
    parameters: SharedParameters = SharedParameters()


@dataclass(frozen=True)
class Instance:
    """One completion to generate, with all defaults filled in.

    Args:
        prompt: a text, or a conversation.
        sampling: how it is decoded.
        return_full_text: whether the prediction begins with the prompt; None: if it is plain text.
        field: its place in the body, for error messages.
        raw: the prompt is the model's whole input, whatever the app's prompt style is.
    """

    prompt: str | Messages
    sampling: Sampling
    return_full_text: bool | None = None
    field: str = ""
    raw: bool = False


@dataclass(frozen=True)
class Request:
    """A body that passed every check that needs no model.

    Args:
        instances: one for each completion.
        stream: whether text is sent as it is generated.
        seconds: how long the request may take.
        shape: writes the responses.
        tools: what the model may call.
        fields: field of `Sampling` -> its name in the body, where the two differ.
    """

    instances: list[Instance]
    stream: bool
    seconds: float
    shape: Shape
    tools: RequestedTools | None = None
    fields: dict[str, str] = field(default_factory=lambda: {"json_schema": "response_format"})


def default_parameters(app: App) -> dict[str, Any]:
    """Return the app's `parameters:`, checked as if a client had sent them.

    Returns:
        The values by the names of `Sampling`, and `return_full_text` if the app sets it.

    Raises:
        RequestError: the app's YAML holds a value that no client could send.
    """
    checked = validate(Parameters, app.parameters, app.limits, "app.parameters")
    full = checked.return_full_text
    return checked.sampling() | ({} if full is None else {"return_full_text": full})


def parse_body(raw: Any, app: App, defaults: dict[str, Any]) -> Request:
    """Check a body in Vertex AI's shape.

    Args:
        raw: the body's JSON.
        app: has the limits of one request.
        defaults: the app's, from `default_parameters`.

    Raises:
        RequestError: a field is wrong; the message names it.
    """
    limits = app.limits
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
    body = validate(Body, raw, limits)
    shared = body.parameters.sampling()
    usual_full_text = defaults.get("return_full_text")
    usual = {name: value for name, value in defaults.items() if name != "return_full_text"}
    instances = []
    for i, instance in enumerate(body.instances):
        full_text = instance.full_text()
        if full_text is None:
            full_text = body.parameters.return_full_text
        prompt: str | Messages = instance.prompt or ""
        if instance.messages:
            prompt = [message.for_template() for message in instance.messages]
        instances.append(
            Instance(
                prompt,
                Sampling(**(usual | shared | instance.sampling())),
                usual_full_text if full_text is None else full_text,
                f"instances[{i}]",
            )
        )
    seconds = body.parameters.timeout
    return Request(
        instances,
        body.parameters.stream or any(instance.stream for instance in body.instances),
        limits.seconds if seconds is None else seconds,
        VertexShape(app.random_weights),
    )


def parameter_table(model: type[BaseModel] = SharedParameters, names: Iterable[str] = ()) -> str:
    """Write parameters as a Markdown table, with the limits and defaults of a plain app.

    Args:
        model: declares them.
        names: the rows; all fields without it.
    """
    app = load_app("an-app-without-a-yaml", local=True)
    return markdown_table(model, app.limits, asdict(Sampling()) | app.parameters, names)
