"""Requests a server must reject, and unusual ones it must accept, in-process and over HTTP.

Each case: name, body, status, a part of the message, the field named. Bodies that are not bytes
are sent as JSON. Limits are those of handler/apps/defaults.yaml; contexts are the tiny model's.
"""

import json
from typing import Any

OK = {"instances": ["good"], "parameters": {"max_new_tokens": 2}}


def _with(**parameters: Any) -> dict[str, Any]:
    return {"instances": ["a"], "parameters": parameters}


def _own(**parameters: Any) -> dict[str, Any]:
    return {"instances": ["fine", {"prompt": "a", "parameters": parameters}]}


def _nested(depth: int) -> bytes:
    return b'{"instances": ' + b"[" * depth + b"]" * depth + b"}"


BAD = [
    ("not JSON", b"How to prepare a spanish omelette:", 400, "not valid JSON", None),
    ("half a JSON", b'{"instances": ["a"', 400, "not valid JSON", None),
    ("single quotes", b"{'instances': ['a']}", 400, "not valid JSON", None),
    ("trailing comma", b'{"instances": ["a",]}', 400, "not valid JSON", None),
    ("two documents", b'{"instances": ["a"]}{"instances": ["a"]}', 400, "not valid JSON", None),
    ("empty body", b"", 400, "body is empty", None),
    ("white space", b" \n\t ", 400, "body is empty", None),
    ("a null", b"null", 400, "not null", None),
    ("a list", b'["a"]', 400, 'should be {"instances": [...]}', None),
    ("a string", b'"a"', 400, 'not "a"', None),
    ("a number", b"17", 400, "not 17", None),
    ("NUL bytes", b"\x00" * 10, 400, "not valid JSON", None),
    ("invalid UTF-8", b'{"instances": ["\xff\xfe"]}', 400, "not valid JSON", None),
    ("cut UTF-8", b'{"instances": ["\xe2\x82"]}', 400, "not valid JSON", None),
    ("lone surrogate", b'{"instances": ["\\ud800"]}', 400, "not valid JSON", None),
    ("raw control character", b'{"instances": ["a\x01"]}', 400, "not valid JSON", None),
    ("UTF-16", '{"instances": ["a"]}'.encode("utf-16"), 400, "not valid JSON", None),
    ("UTF-16 without a mark", '{"instances": ["a"]}'.encode("utf-16-be"), 400, "UTF-16", None),
    ("UTF-32", '{"instances": ["a"]}'.encode("utf-32"), 400, "UTF-32", None),
    ("a byte order mark", b'\xef\xbb\xbf{"instances": ["a"]}', 400, "byte order mark", None),
    ("Latin-1", b'{"instances": ["caf\xe9"]}', 400, "byte 0xe9 at position 19", None),
    ("nested 100,000 deep", _nested(100_000), 400, "not valid JSON", None),
    ("nested 150 deep", _nested(150), 400, "should be a string", "instances[0]"),
    ("number of 10,000 digits", b'{"instances": [' + b"9" * 10_000 + b"]}", 400, "", None),
    ("NaN instance", b'{"instances": [NaN]}', 400, "not valid JSON", None),
    ("instances missing", {}, 400, "instances: is missing", "instances"),
    ("only parameters", {"parameters": {}}, 400, "instances: is missing", "instances"),
    (
        "instances misspelt",
        {"prompts": ["a"]},
        *(400, 'instances: is missing; "prompts" is not known here', "instances"),
    ),
    ("instances null", {"instances": None}, 400, "is missing", "instances"),
    ("instances empty", {"instances": []}, 400, "at least one instance, not []", "instances"),
    ("instances a string", {"instances": "a"}, 400, "should be a list", "instances"),
    ("instances an object", {"instances": {"prompt": "a"}}, 400, "should be a list", "instances"),
    ("instances a number", {"instances": 3}, 400, "should be a list", "instances"),
    ("a number in it", {"instances": ["a", 7]}, 400, "should be a string", "instances[1]"),
    ("a null in it", {"instances": [None]}, 400, "should be a string", "instances[0]"),
    ("true in it", {"instances": [True]}, 400, "should be a string", "instances[0]"),
    ("a list in it", {"instances": [["a"]]}, 400, "should be a string", "instances[0]"),
    ("empty object in it", {"instances": [{}]}, 400, 'exactly one of "prompt"', "instances[0]"),
    (
        "prompt misspelt",
        {"instances": [{"text": "a"}]},
        *(400, '"prompt" and "messages"; "text" is not known here', "instances[0]"),
    ),
    (
        "a long name instead of a prompt",
        {"instances": [{"x" * 10_000: "a"}]},
        *(400, "is not known here", "instances[0]"),
    ),
    (
        "content misspelt",
        {"instances": [{"messages": [{"role": "user", "text": "a"}]}]},
        *(400, 'missing; "text" is not known here', "instances[0].messages[0].content"),
    ),
    ("empty prompt", {"instances": ["ok", ""]}, 400, "prompt is empty", "instances[1]"),
    ("prompt null", {"instances": [{"prompt": None}]}, 400, "exactly one", "instances[0]"),
    ("prompt a list", {"instances": [{"prompt": []}]}, 400, "string", "instances[0].prompt"),
    (
        "prompt and messages",
        {"instances": [{"prompt": "a", "messages": []}]},
        *(400, 'needs exactly one of "prompt" and "messages"', "instances[0]"),
    ),
    ("messages empty", {"instances": [{"messages": []}]}, 400, "", "instances[0].messages"),
    ("messages a string", {"instances": [{"messages": "hi"}]}, 400, "", "instances[0].messages"),
    (
        "unknown role",
        {"instances": [{"messages": [{"role": "robot", "content": "a"}]}]},
        *(400, '"assistant" or "tool"', "instances[0].messages[0].role"),
    ),
    (
        "content missing",
        {"instances": [{"messages": [{"role": "user"}]}]},
        *(400, "is missing", "instances[0].messages[0].content"),
    ),
    (
        "content a number",
        {"instances": [{"messages": [{"role": "user", "content": 5}]}]},
        *(400, "text parts, not 5", "instances[0].messages[0].content"),
    ),
    ("unknown top level", {"instances": ["a"], "n": 1}, 400, "allowed are instances", "n"),
    ("unknown in instance", {"instances": [{"prompt": "a", "b": 1}]}, 400, "", "instances[0].b"),
    (
        "messages beside instances",
        {"instances": ["a"], "messages": []},
        400,
        "allowed are instances, parameters",
        "messages",
    ),
    ("messages as a parameter", _with(messages=[]), 400, "stream", "parameters.messages"),
    (
        "140,000 messages",
        b'{"instances": [{"messages": [' + b"0," * 140_000 + b"0]}]}",
        *(400, "should be an object", "instances[0].messages[0]"),
    ),
    ("unknown parameter", _with(temprature=1), 400, "temperature", "parameters.temprature"),
    ("OpenAI's name", _with(max_tokens=5), 400, "max_new_tokens", "parameters.max_tokens"),
    ("parameters a list", {"instances": ["a"], "parameters": []}, 400, "an object", "parameters"),
    ("temperature a string", _with(temperature="1"), 400, 'not "1"', "parameters.temperature"),
    ("temperature true", _with(temperature=True), 400, "number", "parameters.temperature"),
    ("temperature negative", _with(temperature=-0.1), 400, "-0.1", "parameters.temperature"),
    ("temperature tiny", _with(temperature=1e-40), 400, "0.01 to 2", "parameters.temperature"),
    ("temperature huge", _with(temperature=1e9), 400, "1000000000", "parameters.temperature"),
    (
        "temperature NaN",
        b'{"instances": ["a"], "parameters": {"temperature": NaN}}',
        *(400, "not valid JSON", None),
    ),
    (
        "temperature Infinity",
        b'{"instances": ["a"], "parameters": {"temperature": -Infinity}}',
        *(400, "not valid JSON", None),
    ),
    (
        "temperature overflows",
        b'{"instances": ["a"], "parameters": {"temperature": 1e999}}',
        *(400, "", "parameters.temperature"),
    ),
    ("top_p 0", _with(top_p=0), 400, "over 0, at most 1, not 0", "parameters.top_p"),
    ("top_p over 1", _with(top_p=1.01), 400, "at most 1, not 1.01", "parameters.top_p"),
    ("top_k negative", _with(top_k=-2), 400, "-2", "parameters.top_k"),
    ("top_k a float", _with(top_k=1.5), 400, "whole number", "parameters.top_k"),
    ("top_k huge", _with(top_k=10**12), 400, "1000000", "parameters.top_k"),
    ("repetition_penalty 0", _with(repetition_penalty=0), 400, "0.1", None),
    ("max_new_tokens 0", _with(max_new_tokens=0), 400, "", "parameters.max_new_tokens"),
    ("max_new_tokens -1", _with(max_new_tokens=-1), 400, "-1", "parameters.max_new_tokens"),
    ("max_new_tokens 2.5", _with(max_new_tokens=2.5), 400, "", "parameters.max_new_tokens"),
    ("max_new_tokens too many", _with(max_new_tokens=1025), 400, "from 1 to 1024, not 1025", None),
    ("max_new_tokens huge", _with(max_new_tokens=10**30), 400, "", "parameters.max_new_tokens"),
    ("stop a number", _with(stop=3), 400, "", "parameters.stop"),
    ("stop with a number", _with(stop=["a", 3]), 400, "", "parameters.stop[1]"),
    ("stop empty string", _with(stop=[""]), 400, "1 to 100 characters", "parameters.stop[0]"),
    ("stop too many", _with(stop=["a"] * 9), 400, "8", "parameters.stop"),
    ("seed too small", _with(seed=-(2**63) - 1), 400, "", "parameters.seed"),
    ("seed too large", _with(seed=2**63), 400, "", "parameters.seed"),
    ("seed a string", _with(seed="1"), 400, "", "parameters.seed"),
    ("stream a string", _with(stream="yes"), 400, "", "parameters.stream"),
    ("ignore_eos a string", _with(ignore_eos="no"), 400, "", "parameters.ignore_eos"),
    ("full text a number", _with(return_full_text=1), 400, "", "parameters.return_full_text"),
    (
        "own parameter wrong",
        _own(temperature=3),
        *(400, "from 0.01 to 2, not 3", "instances[1].parameters.temperature"),
    ),
    ("own unknown", _own(foo=1), 400, "", "instances[1].parameters.foo"),
    ("own stream", _own(stream=True), 400, "", "instances[1].parameters.stream"),
    (
        "own too long",
        _own(max_new_tokens=9999),
        400,
        "1024",
        "instances[1].parameters.max_new_tokens",
    ),
    ("1,000 instances", {"instances": ["a"] * 1000}, 400, "1000 were given", "instances"),
    (
        "prompt longer than the context",
        {"instances": ["short", "long " * 100]},
        *(400, "has 500 tokens; at most 255 fit into the context of 256", "instances[1]"),
    ),
    (
        "body over the limit",
        json.dumps({"instances": ["x" * 300_000]}).encode(),
        *(413, "at most 300000 are allowed", None),
    ),
]

GOOD = [
    ("plain", OK),
    ("a prompt object", {"instances": [{"prompt": "a"}]}),
    ("control characters, escaped", {"instances": ["a\u0000\u0007\u001b[31m\n\t\r b"]}),
    ("emoji", {"instances": ["🍳 tortilla 👩‍🍳 española"]}),
    ("scripts", {"instances": ["日本語 עברית العربية हिन्दी"]}),
    ("other planes", {"instances": ["𝕬𝖇𝖈 \U0001f9ff a"]}),
    (
        "lines that TorchServe obeys",
        {"instances": ["x\n[METRICS]a.b:1|#c:d\n[PID]1\nTorch worker started.\n"]},
    ),
    ("white space only", {"instances": ["   "]}),
    ("integer temperature", _with(temperature=1, seed=1)),
    ("stop as a string", _with(stop="z")),
    ("empty parameters", {"instances": ["a"], "parameters": {}}),
    ("duplicate keys", b'{"instances": [1], "instances": ["a"]}'),
    ("leading white space", b' \n {"instances": ["a"]} \n'),
    ("escaped slash", b'{"instances": ["a\\/b \\u00e9"]}'),
    ("template characters", {"instances": ["{prompt} {{ 7*7 }} %s {0}"]}),
]
