"""Requests in OpenAI's shape that a server must reject.

Each case: name, route, body, status, the field that the error names. Bodies that are not bytes are
sent as JSON. Nothing is checked that OpenAI's own API would accept and this one could ignore.
"""

import json
from typing import Any

CHAT, TEXT = "chat/completions", "completions"
APP = "smollm2-135m"
USER: dict[str, Any] = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

Case = tuple[str, str, Any, int, str | None]


def chat(name: str, field: str, **change: Any) -> Case:
    """A chat request with other fields."""
    return name, CHAT, {"model": APP, "messages": [USER], "max_tokens": 2} | change, 400, field


def turn(name: str, field: str, *messages: Any) -> Case:
    """A chat request with other messages."""
    return chat(name, field, messages=list(messages))


def part(name: str, value: Any) -> Case:
    """A chat request with another content part after a good one."""
    content = [{"type": "text", "text": "Describe:"}, value]
    return turn(name, "messages[0].content[1]", {"role": "user", "content": content})


def schema(name: str, value: Any) -> Case:
    """A chat request with another `response_format`."""
    return chat(name, "response_format", response_format=value)


def text(name: str, field: str, **change: Any) -> Case:
    """A request for a plain completion with other fields."""
    return name, TEXT, {"model": APP, "prompt": "hi", "max_tokens": 2} | change, 400, field


def named(value: Any) -> dict[str, Any]:
    """A `response_format` with a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


def without(field: str) -> dict[str, Any]:
    body = {"model": APP, "messages": [USER], "max_tokens": 2}
    del body[field]
    return body


def payload(body: Any) -> bytes:
    """What is sent."""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


DEEP = json.dumps({"model": APP}).encode()[:-1] + b', "messages": ' + b"[" * 100_000
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}

SURROGATE = {"model": APP, "messages": [USER | {"content": "\ud800"}]}
DEEP_SCHEMA = {
    "model": APP,
    "messages": [USER],
    "response_format": named(json.loads('{"items":' * 300 + "{}" + "}" * 300)),
}

BAD: list[Case] = [
    ("empty body", CHAT, b"", 400, None),
    ("not JSON", CHAT, b"hello", 400, None),
    ("half a JSON", CHAT, b'{"model": "smollm2-135m", "messages": [', 400, None),
    ("a list", CHAT, b"[1]", 400, None),
    ("a string", CHAT, b'"hi"', 400, None),
    ("null", CHAT, b"null", 400, None),
    ("a number", TEXT, b"7", 400, None),
    ("NUL bytes", CHAT, b"\x00" * 8, 400, None),
    ("invalid UTF-8", CHAT, b'{"model": "\xff"}', 400, None),
    ("NaN", CHAT, b'{"model": "smollm2-135m", "messages": [], "temperature": NaN}', 400, None),
    ("a surrogate alone", CHAT, payload(SURROGATE), 400, None),
    ("a schema nested 300 deep", CHAT, payload(DEEP_SCHEMA), 400, None),
    ("nested 100,000 deep", CHAT, DEEP, 400, None),
    ("empty object", CHAT, {}, 400, None),
    ("no messages", CHAT, without("messages"), 400, "messages"),
    ("the other route's shape", CHAT, {"model": APP, "prompt": "hi"}, 400, None),
    ("Vertex AI's shape", CHAT, {"instances": ["hi"]}, 400, None),
    ("wrong model", CHAT, {"model": "gpt-5", "messages": [USER]}, 404, "model"),
    ("wrong model of a completion", TEXT, {"model": "gpt-5", "prompt": "hi"}, 404, "model"),
    chat("model a number", "model", model=7),
    chat("model a list", "model", model=[APP]),
    turn("messages empty", "messages"),
    chat("messages a string", "messages", messages="hi"),
    chat("messages an object", "messages", messages=USER),
    turn("a message a string", "messages[0]", "hi"),
    turn("a null message", "messages[1]", USER, None),
    turn("no role", "messages[0].role", {"content": "hi"}),
    turn("unknown role", "messages[0].role", {"role": "robot", "content": "hi"}),
    turn("role a number", "messages[0].role", {"role": 1, "content": "hi"}),
    turn("no content", "messages[0].content", {"role": "user"}),
    turn("content null", "messages[0].content", {"role": "user", "content": None}),
    turn("content a number", "messages[0].content", {"role": "user", "content": 5}),
    turn("content an object", "messages[0].content", {"role": "user", "content": {"text": "a"}}),
    turn("content an empty list", "messages[0].content", {"role": "user", "content": []}),
    part("an image", IMAGE),
    part("audio", AUDIO),
    part("a file", {"type": "file", "file": {"file_id": "file-1"}}),
    part("a part without a type", {"text": "a"}),
    part("a text part without text", {"type": "text"}),
    part("a part a string", "a"),
    chat("temperature 9", "temperature", temperature=9),
    chat("temperature below 0", "temperature", temperature=-0.5),
    chat("temperature a string", "temperature", temperature="1"),
    chat("top_p 0", "top_p", top_p=0),
    chat("top_p 1.5", "top_p", top_p=1.5),
    chat("max_tokens 0", "max_tokens", max_tokens=0),
    chat("max_tokens -1", "max_tokens", max_tokens=-1),
    chat("max_tokens a fraction", "max_tokens", max_tokens=1.5),
    chat("max_tokens of ten digits", "max_tokens", max_tokens=10**10),
    chat("max_completion_tokens a string", "max_completion_tokens", max_completion_tokens="9"),
    chat("two limits that differ", "max_", max_completion_tokens=3),
    chat("n 0", "n", n=0),
    chat("n -1", "n", n=-1),
    chat("n of a million", "n", n=10**6),
    chat("n true", "n", n=True),
    chat("stop a number", "stop", stop=7),
    chat("stop with a null", "stop", stop=["a", None]),
    chat("stop empty", "stop", stop=[""]),
    chat("seed a string", "seed", seed="7"),
    chat("presence_penalty 3", "presence_penalty", presence_penalty=3),
    chat("frequency_penalty -3", "frequency_penalty", frequency_penalty=-3),
    chat("min_p 2", "min_p", min_p=2),
    chat("top_k a fraction", "top_k", top_k=0.5),
    chat("repetition_penalty 0", "repetition_penalty", repetition_penalty=0),
    chat("logprobs a number", "logprobs", logprobs=3),
    chat("top_logprobs 100", "top_logprobs", logprobs=True, top_logprobs=100),
    chat("top_logprobs without logprobs", "top_logprobs", top_logprobs=2),
    chat("logit_bias", "logit_bias", logit_bias={"50256": -100}),
    chat("functions", "functions", functions=[{"name": "f", "parameters": {}}]),
    chat("audio output", "modalities", modalities=["text", "audio"]),
    chat("web search", "web_search_options", web_search_options={}),
    chat("an unknown field", "flavour", flavour="sweet"),
    chat("a misspelt field", "max_token", max_token=3),
    chat("stream a string", "stream", stream="yes"),
    chat("stream_options alone", "stream_options", stream_options={"include_usage": True}),
    chat("stream_options a list", "stream_options", stream=True, stream_options=[]),
    schema("response_format a string", "json"),
    schema("response_format unknown", {"type": "xml"}),
    schema("response_format without a type", {}),
    schema("a schema missing", {"type": "json_schema"}),
    schema("a schema a string", named("object")),
    schema("a schema with an unknown type", named({"type": "thing"})),
    schema("a schema with a wrong $ref", named({"$ref": "#/$defs/nope"})),
    schema("a schema with a wrong pattern", named({"type": "string", "pattern": "("})),
    chat("tools a string", "tools", tools="f"),
    chat("a tool without a function", "tools", tools=[{"type": "function"}]),
    chat("a tool of another kind", "tools", tools=[{"type": "retrieval"}]),
    chat("tools that the model lacks", "tools", tools=[FUNCTION]),
    chat("tool_choice without tools", "tool_choice", tool_choice="required"),
    text("prompt missing", "prompt", prompt=None),
    text("prompt empty", "prompt", prompt=""),
    text("prompt a number", "prompt", prompt=5),
    text("prompt of tokens", "prompt", prompt=[1, 2, 3]),
    text("prompt an empty list", "prompt", prompt=[]),
    text("suffix", "suffix", suffix="the end"),
    text("logprobs true", "logprobs", logprobs=True),
    text("best_of 3", "best_of", best_of=3),
    text("temperature 9 of a completion", "temperature", temperature=9),
    text("messages at completions", "messages", messages=[USER]),
    text("a prompt longer than the context", "prompt", prompt="word " * 20_000),
]


def streamed(case: Case) -> Case | None:
    """The same body with `stream: true`; None if it is no object or has its own."""
    name, route, body, status, field = case
    if not isinstance(body, dict) or not body or "stream" in body or field == "stream_options":
        return None
    return f"{name}, streamed", route, body | {"stream": True}, status, field


BAD_STREAMS = [other for case in BAD if (other := streamed(case))]
