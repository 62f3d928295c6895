"""The requests of OpenAI's API: `/v1/chat/completions`, `/v1/completions` and `/v1/models`.

TorchServe passes the rest of the path on, so clients use the base URL
`http://localhost:7080/predictions/APP/1.0/v1`. Vertex AI's `predict` has no path. There an instance
with `"@requestFormat": "chatCompletions"` is the body of a chat, as for Model Garden's containers.

Source: https://platform.openai.com/docs/api-reference. `top_k`, `min_p`, `repetition_penalty` and
`ignore_eos` are vLLM's additions; `timeout` is ours.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from handler.config import App, load_app, show
from handler.engine import Messages, Sampling
from handler.errors import RequestError
from handler.fields import (
    AppLimit,
    Doc,
    Input,
    Rule,
    WholeNumber,
    markdown_table,
    problem,
    validate,
)
from handler.openai_response import ChatShape, CompletionsShape, OpenAIShape
from handler.request import Conversation, Decoding, Instance, MaxTokens, Request, Timeout
from handler.tool_calls import RequestedTools

CHAT, COMPLETIONS, MODELS = "v1/chat/completions", "v1/completions", "v1/models"

FORMAT = "@requestFormat"
"""The key of an instance that names the API of its content."""

_NOT_HERE = dict.fromkeys(
    (
        *("audio", "best_of", "function_call", "functions", "logit_bias", "modalities"),
        *("moderation", "prediction", "reasoning", "reasoning_effort", "suffix", "verbosity"),
        *("web_search_options", "prompt_token_ids", "guided_regex"),
        *("guided_choice", "guided_grammar", "use_beam_search", "chat_template", "documents"),
        *("min_tokens", "stop_token_ids", "bad_words", "prompt_logprobs", "length_penalty"),
    ),
    "is not supported by this server; leave it out",
)
"""Fields of OpenAI or vLLM that this server does not support."""


class StreamOptions(Input):
    """What a stream reports besides text."""

    rule = 'an object, {"include_usage": true or false}'

    include_usage: bool = False
    include_obfuscation: bool = False


class _OpenAIBody(Decoding):
    """The fields of both routes."""

    hints: ClassVar[dict[str, str]] = _NOT_HERE

    model: Annotated[str | None, Doc("The name of the model.", default="the served one")] = None
    max_tokens: MaxTokens = None
    n: Annotated[
        WholeNumber,
        Field(ge=1),
        AppLimit("max_instances"),
        Doc("The completions of each prompt. With a `seed`, each one uses the next seed."),
    ] = 1
    stream: Annotated[bool, Doc("Send chunks as text is generated.")] = False
    stream_options: Annotated[
        StreamOptions | None,
        Doc("With `include_usage`, the last chunk has the token counts.", default="none"),
    ] = None
    timeout: Timeout = None
    user: Annotated[str | None, Doc("Ignored.", default="none")] = None
    metadata: Annotated[
        dict[str, Any] | None, Rule("an object"), Doc("Ignored.", default="none")
    ] = None
    store: Annotated[bool | None, Doc("Ignored: nothing is stored.")] = False
    service_tier: Annotated[str | None, Doc("Ignored.", default="none")] = None
    safety_identifier: Annotated[str | None, Doc("Ignored.", default="none")] = None
    prompt_cache_key: Annotated[str | None, Doc("Ignored.", default="none")] = None
    prompt_cache_retention: Annotated[str | None, Doc("Ignored.", default="none")] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """Drop options that ask for nothing, which some clients send."""
        if not isinstance(value, dict):
            return value
        nothing: dict[str, Any] = {
            "logit_bias": {},
            "modalities": ["text"],
            "best_of": value.get("n") or 1,
        }
        nothing |= {"tools": [], "functions": [], "suffix": ""}
        return {
            name: item
            for name, item in value.items()
            if item is not None and not (name in nothing and nothing[name] == item)
        }

    @model_validator(mode="after")
    def _check_stream_options(self) -> "_OpenAIBody":
        if self.stream_options and not self.stream:
            raise problem('is only allowed with "stream": true', "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class FunctionTool(Input):
    """A function that the model may call."""

    rule = 'an object, {"name": ..., "description": ..., "parameters": {...}}'

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$"),
        Rule("1 to 128 letters, digits and _ . -"),
    ]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Rule("a JSON schema, an object")] = None
    strict: bool | None = None


class Tool(Input):
    """Something that the model may call."""

    rule = 'an object, {"type": "function", "function": {...}}'

    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates read it, with the keys in the usual order."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class ToolChoice(NamedTuple):
    """Whether to call a tool: `RequestedTools.mode`, and the name of the one to call."""

    mode: Literal["auto", "required", "none"]
    name: str | None = None


def _read_choice(value: Any) -> ToolChoice:
    """Read a word, or an object that names a function."""
    if value in ("auto", "required", "none"):
        return ToolChoice(value)
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(name, str) and value.get("type", "function") == "function":
        return ToolChoice("required", name)
    raise ValueError("is no choice")


class ChatBody(_OpenAIBody):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[Conversation, Doc("The conversation.", default="required")]
    max_completion_tokens: Annotated[
        MaxTokens, Doc("The newer name of `max_tokens`; give only one.")
    ] = None
    logprobs: Annotated[bool | None, Doc("Return the log-probability of each token.")] = False
    top_logprobs: Annotated[
        WholeNumber | None,
        Field(ge=0, le=20),
        Doc("Return this many of the likeliest tokens at each position; needs `logprobs`."),
    ] = 0
    tools: Annotated[
        list[Tool] | None,
        Field(max_length=128, fail_fast=True),
        Rule("a list of up to {max_length} tools"),
        Doc("Functions that the model may call, if its chat template supports tools.", "none"),
    ] = None
    tool_choice: Annotated[
        Any,
        BeforeValidator(_read_choice),
        Rule('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
        Doc("Whether the model must call a function, and which one.", default='"auto"'),
    ] = ToolChoice("auto")
    parallel_tool_calls: Annotated[bool, Doc("Allow more than one call in a completion.")] = True

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.max_tokens and self.max_completion_tokens:
            raise problem("was given as well as max_tokens; give one", "max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise problem('is only allowed with "logprobs": true', "top_logprobs")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        choice: ToolChoice = self.tool_choice
        if choice.mode == "required" and not names:
            raise problem("needs tools, but none were given", "tool_choice")
        if choice.name is not None and choice.name not in names:
            text = f"{show(choice.name)} is not one of the tools: {', '.join(names)}"
            raise problem(text, "tool_choice.function.name")
        for i, name in enumerate(names):
            if name in names[:i]:
                text = f"{show(name)} is already the name of another tool; give each its own name"
                raise problem(text, f"tools[{i}].function.name")
        free = self.response_format is None or self.response_format.type == "text"
        if names and choice.mode != "none" and not free:
            text = (
                'is not supported together with tools; leave one out, or set "tool_choice": "none"'
            )
            raise problem(text, "response_format")

    def requested_tools(self, prefix: str) -> RequestedTools | None:
        """Return the tools, if there are any."""
        if not self.tools:
            return None
        tools = [tool.for_template() for tool in self.tools]
        choice: ToolChoice = self.tool_choice
        parallel = self.parallel_tool_calls
        return RequestedTools(tools, choice.mode, choice.name, parallel, prefix)


Prompts = Annotated[
    list[str],
    Field(min_length=1),
    Rule("a string, or a list of strings; token ids are not supported"),
]


class CompletionsBody(_OpenAIBody):
    """The body of `/v1/completions`."""

    prompt: Annotated[
        Prompts,
        Doc("One text to continue, or several. Each is the model's whole input.", "required"),
    ]
    logprobs: Annotated[
        WholeNumber | None,
        Field(ge=0, le=20),
        Doc(
            "Return the log-probability of each token, and of this many likeliest tokens.",
            default="none",
        ),
    ] = None
    echo: Annotated[bool | None, Doc("Begin with the prompt; not with `logprobs`.")] = False

    @model_validator(mode="before")
    @classmethod
    def _list_of_prompts(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            return value | {"prompt": [value["prompt"]]}
        return value

    @model_validator(mode="after")
    def _check_completions(self) -> "CompletionsBody":
        if self.echo and self.logprobs is not None:
            raise problem('is not supported with "logprobs"', "echo")
        return self


def parse_chat(
    raw: Any,
    app: App,
    defaults: dict[str, Any],
    model: str,
    *,
    where: str = "",
    predict: bool = False,
) -> Request:
    """Check the body of a chat completion.

    Args:
        raw: the body's JSON.
        app: has the limits of one request.
        defaults: the app's, from `default_parameters`.
        model: the served model's name.
        where: the place of `raw` in the body, if it is an instance of Vertex AI's API.
        predict: whether it came to Vertex AI's route. There the endpoint determines the model, and
            errors have the shape of Google's APIs.

    Raises:
        RequestError: a field is wrong; the message names it.
    """
    body = validate(ChatBody, _object(raw, where), app.limits, where)
    limit = body.max_tokens or body.max_completion_tokens or app.limits.max_new_tokens
    sampling = _sampling(body, defaults, limit)
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    messages: Messages = [message.for_template() for message in body.messages]
    shape = ChatShape(model, body.n, body.include_usage, predict=predict, wrapped=bool(where))
    prefix = f"{where}." if where else ""
    if not predict:
        _check_model(body, model)
    return _request(body, app, [(messages, f"{prefix}messages")], sampling, shape, prefix)


def parse_completions(raw: Any, app: App, defaults: dict[str, Any], model: str) -> Request:
    """Check the body of a completion; see `parse_chat`."""
    body = validate(CompletionsBody, _object(raw), app.limits)
    sampling = _sampling(body, defaults, body.max_tokens)
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    shape = CompletionsShape(model, body.n, body.include_usage, top=bool(body.logprobs))
    _check_model(body, model)
    many = len(body.prompt) > 1
    prompts = [(text, f"prompt[{i}]" if many else "prompt") for i, text in enumerate(body.prompt)]
    return _request(body, app, prompts, sampling, shape, "")


def chat_instance(raw: Any) -> Any:
    """Return the body of a chat in a request to Vertex AI's `predict`; None if it has none.

    Raises:
        RequestError: there are other instances or parameters, or the format is unknown.
    """
    instances = raw.get("instances") if isinstance(raw, dict) else None
    if not isinstance(instances, list):
        return None
    marked = [i for i, item in enumerate(instances) if isinstance(item, dict) and FORMAT in item]
    if not marked:
        return None
    field = f"instances[{marked[0]}].{FORMAT}"
    if len(instances) > 1:
        message = f"{field}: a chat should be the only instance, but {len(instances)} were given"
        raise RequestError(400, message, field)
    instance = dict(instances[0])
    if (given := instance.pop(FORMAT)) != "chatCompletions":
        raise RequestError(400, f'{field}: should be "chatCompletions", not {show(given)}', field)
    for name in raw:
        if name != "instances" and raw[name] not in (None, {}):
            message = f"{name}: is not allowed with {FORMAT}; give its fields in the instance"
            raise RequestError(400, message, name)
    return instance


def models(path: str, model: str, created: int) -> dict[str, Any]:
    """Answer `/v1/models`, or `/v1/models/NAME`.

    Raises:
        RequestError: the model has another name.
    """
    entry = {"id": model, "object": "model", "created": created, "owned_by": "serving-llms"}
    name = path.removeprefix(MODELS).strip("/")
    if not name:
        return {"object": "list", "data": [entry]}
    if name != model:
        raise _no_model(name, model)
    return entry


def parameter_table(route: Literal["chat", "completions"]) -> str:
    """Write the fields of a route as a Markdown table, with the limits of a plain app.

    The table of completions has only those that chats do not have.
    """
    app = load_app("an-app-without-a-yaml", local=True)
    most, usual = app.limits.max_new_tokens, app.parameters["max_new_tokens"]
    if route == "completions":
        extra = CompletionsBody.model_fields.keys() - ChatBody.model_fields.keys()
        names = [n for n in CompletionsBody.model_fields if n in {*extra, "max_tokens", "logprobs"}]
        names = ["prompt", *(name for name in names if name != "prompt")]
        return markdown_table(CompletionsBody, app.limits, {"max_tokens": usual}, names)
    defaults = {name: getattr(Sampling(), name, None) for name in Decoding.model_fields}
    given = {name: value for name, value in defaults.items() if value is not None}
    given |= {"max_tokens": most, "max_completion_tokens": most} | app.parameters
    names = ["model", "messages", "max_completion_tokens", "max_tokens", "n", "stream"]
    names += ["stream_options", *(name for name in ChatBody.model_fields if name not in names)]
    names = sorted(dict.fromkeys(names), key=_is_ignored)
    return markdown_table(ChatBody, app.limits, given, names)


def _is_ignored(name: str) -> bool:
    """Whether a field of `ChatBody` has no effect; such fields are the last rows of the table."""
    docs = (item for item in ChatBody.model_fields[name].metadata if isinstance(item, Doc))
    return any(doc.effect.startswith("Ignored") for doc in docs)


def _object(raw: Any, where: str = "") -> Any:
    if not isinstance(raw, dict):
        text = f"should be an object, not {show(raw)}"
        raise RequestError(400, f"{where}: {text}" if where else f"the body {text}", where)
    return raw


def _check_model(body: _OpenAIBody, model: str) -> None:
    if body.model not in (None, "", model):
        raise _no_model(str(body.model), model)


def _no_model(name: str, model: str) -> RequestError:
    message = f"model: {show(name)} is not served here; use {show(model)}"
    return RequestError(404, message, "model", "model_not_found")


def _sampling(body: Decoding, defaults: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return the values for `Sampling`."""
    usual = {name: value for name, value in defaults.items() if name != "return_full_text"}
    return usual | body.sampling() | ({"max_new_tokens": limit} if limit else {})


def _request(
    body: _OpenAIBody,
    app: App,
    prompts: Sequence[tuple[str | Messages, str]],
    sampling: dict[str, Any],
    shape: OpenAIShape,
    prefix: str,
) -> Request:
    """Make one instance for each completion; `prompts` are prompts and their fields."""
    wanted, most = len(prompts) * body.n, app.limits.max_instances
    if wanted > most:
        message = f"n: the request asks for {wanted} completions; at most {most} are allowed"
        raise RequestError(400, message, f"{prefix}n")
    echo = isinstance(body, CompletionsBody) and bool(body.echo)
    seed = sampling.pop("seed", None)
    instances = [
        Instance(
            prompt,
            Sampling(**sampling, seed=None if seed is None else _next_seed(seed, j)),
            return_full_text=echo,
            field=field,
            raw=isinstance(prompt, str),
        )
        for prompt, field in prompts
        for j in range(body.n)
    ]
    given = "max_completion_tokens" if getattr(body, "max_completion_tokens", 0) else "max_tokens"
    names = {"max_new_tokens": given, "json_schema": "response_format"}
    if sampling.get("logprobs"):
        names["logprobs"] = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
    fields = {name: f"{prefix}{names.get(name, name)}" for name in Sampling.__dataclass_fields__}
    seconds = app.limits.seconds if body.timeout is None else body.timeout
    tools = body.requested_tools(prefix) if isinstance(body, ChatBody) else None
    if tools and tools.mode == "required":
        fields["json_schema"] = f"{prefix}tools"
    return Request(instances, body.stream, seconds, shape, tools, fields)


def _next_seed(seed: int, i: int) -> int:
    """Return the seed of the i-th completion, within 64 bits."""
    return seed + i if seed + i < 2**63 else seed - i
