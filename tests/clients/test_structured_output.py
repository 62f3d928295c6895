"""JSON schemas over HTTP: 40 requests with four schemas beside 40 without, on both engines."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.clients.conftest import APP, MESSAGES, TINY, openai_url

pytestmark = pytest.mark.served

CHAT = "chat/completions"
COUNT, FREE_TOKENS = 40, 32
"""Requests of each kind, and the length of those without a schema."""

WORD = {"type": "string", "pattern": "^[a-z]{3,8}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "an object": {
        "type": "object",
        "properties": {
            "capital": {"enum": ["Tokyo", "Kyoto", "Osaka"]},
            "island": {"type": "boolean"},
            "seas": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["capital", "island", "seas"],
        "additionalProperties": False,
    },
    "a list": {
        "type": "array",
        "items": {"enum": ["red", "green", "blue"]},
        "minItems": 2,
        "maxItems": 3,
    },
    "nested": {
        "type": "object",
        "properties": {
            "name": WORD,
            "place": {
                "type": "object",
                "properties": {"city": WORD, "zip": {"type": "null"}},
                "required": ["city", "zip"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "place"],
        "additionalProperties": False,
    },
    "a union": {
        "$defs": {"kind": {"const": "cat"}},
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/kind"}, "lives": {"enum": [7, 9]}},
                "required": ["kind", "lives"],
                "additionalProperties": False,
            },
            {"type": "string", "enum": ["none", "unknown"]},
        ],
    },
}
QUESTIONS = {
    "an object": "Describe the capital of Japan.",
    "a list": "Name some colours.",
    "nested": "Invent a person and where they live.",
    "a union": "Which animal is it?",
}


class Api(NamedTuple):
    """A model at a `base_url`."""

    base_url: str
    model: str
    greedy: str
    """The beginning of the greedy completion of `MESSAGES`."""

    def free(self) -> dict[str, Any]:
        """A request without a schema."""
        body = {"model": self.model, "messages": MESSAGES, "temperature": 0}
        return body | {"max_tokens": FREE_TOKENS, "ignore_eos": True}

    def with_schema(self, name: str, **more: Any) -> dict[str, Any]:
        """A request whose completion fulfills one of the schemas."""
        named = {"name": name.replace(" ", "_"), "schema": SCHEMAS[name], "strict": True}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": f"{QUESTIONS[name]} Answer in JSON."}],
            "response_format": {"type": "json_schema", "json_schema": named},
            "max_tokens": 200,
            **more,
        }


@pytest.fixture(scope="module", params=["openvino", "transformers"])
def api(request) -> Iterator[Api]:
    """SmolLM2 on OpenVINO, and a tiny model with random weights on transformers."""
    if request.param == "openvino":
        base_url = request.getfixturevalue("bare").base_url
        yield Api(base_url, APP, "The capital of Japan is Tokyo")
        return
    from tests import tiny

    folder = request.getfixturevalue("tmp_path_factory").mktemp("models") / "tiny"
    weights = tiny.random_model(folder, tiny.LLAMA | {"max_position_embeddings": 512})
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (weights / "chat_template.jinja").write_text(template)
    with request.getfixturevalue("serve")("tiny", weights, "transformers", TINY) as server:
        yield Api(openai_url(server), "tiny", "")


def together(api: Api, bodies: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """Send requests at the same time; return the responses and the seconds."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(base_url=api.base_url, timeout=110, limits=limits) as client:
            return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))

    began = time.monotonic()
    responses = asyncio.run(send())
    seconds = time.monotonic() - began
    assert {response.status_code for response in responses} == {200}, responses[0].text
    return [response.json() for response in responses], seconds


def content(response: dict[str, Any]) -> str:
    return response["choices"][0]["message"]["content"]


def rate(responses: list[dict[str, Any]], seconds: float) -> float:
    """Tokens per second."""
    return sum(one["usage"]["completion_tokens"] for one in responses) / seconds


def test_every_output_parses_and_validates_beside_free_ones(api):
    """Prints the throughput with half of the requests bound by a schema, and with none."""
    names = [[*SCHEMAS][i % len(SCHEMAS)] for i in range(COUNT)]
    bound = [
        api.with_schema(name, temperature=i // 4 % 2, seed=i) for i, name in enumerate(names)
    ]  # greedy and sampled, for each schema
    mixed = [body for pair in zip(bound, [api.free()] * COUNT, strict=True) for body in pair]
    responses, seconds = together(api, mixed)
    for name, response in zip(names, responses[0::2], strict=True):
        assert response["choices"][0]["finish_reason"] == "stop", (name, content(response))
        value = json.loads(content(response))
        Draft202012Validator(SCHEMAS[name]).validate(value)
    for response in responses[1::2]:
        assert content(response).startswith(api.greedy)
        assert response["usage"]["completion_tokens"] == FREE_TOKENS
    free, free_seconds = together(api, [api.free()] * 2 * COUNT)
    print(
        f"\n{rate(responses, seconds):.0f} tokens/s with a schema in {COUNT} of {2 * COUNT} "
        f"requests, {rate(free, free_seconds):.0f} tokens/s without"
    )


@pytest.mark.parametrize("name", SCHEMAS)
def test_streamed_output_validates(api, name):
    """Bytes of a stream, put together."""
    body = api.with_schema(name, temperature=0, stream=True)
    lines = httpx.post(f"{api.base_url}/{CHAT}", json=body, timeout=60).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    pieces = [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]]
    Draft202012Validator(SCHEMAS[name]).validate(json.loads("".join(pieces)))
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_json_object_and_an_empty_schema_allow_any_json(api):
    """`json_object` is an object; the empty schema is any value. Both end."""
    bodies = [
        api.with_schema("an object", temperature=temperature, seed=seed)
        | {"response_format": {"type": "json_object"}, "max_tokens": 400}
        for seed, temperature in enumerate((0, 0.7, 0.7, 0.7))
    ]
    responses, _ = together(api, bodies)
    for response in responses:
        if response["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(content(response)), dict)
        else:  # a small model may write a long one; what there is begins an object
            assert content(response).lstrip().startswith("{")
    if api.model == APP:
        assert any(response["choices"][0]["finish_reason"] == "stop" for response in responses)
    empty = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}
    closed = {"type": "json_schema", "json_schema": {"name": "x", "schema": EMPTY_OBJECT}}
    free, none = together(
        api,
        [
            api.with_schema("an object", temperature=0) | {"response_format": wanted}
            for wanted in (empty, closed)
        ],
    )[0]
    if free["choices"][0]["finish_reason"] == "stop":
        json.loads(content(free))
    assert json.loads(content(none)) == {} and none["choices"][0]["finish_reason"] == "stop"


EMPTY_OBJECT = {"type": "object", "properties": {}, "additionalProperties": False}


def test_choices_with_a_schema_and_a_seed(api):
    """`n` and a schema: each choice validates, and the seed repeats them."""
    body = api.with_schema("nested", temperature=1, seed=3, n=3)
    first, second = (together(api, [body])[0][0] for _ in range(2))
    texts = [[choice["message"]["content"] for choice in run["choices"]] for run in (first, second)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    for text in texts[0]:
        Draft202012Validator(SCHEMAS["nested"]).validate(json.loads(text))
