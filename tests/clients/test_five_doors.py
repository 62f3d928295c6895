"""The same greedy chat through every door gives the same text and the same token counts."""

import json
from typing import Any, NamedTuple

import httpx
import pytest
from google.cloud import aiplatform

from deploy.torchserve.client import server_sent_events
from tests.clients.conftest import APP, GREEDY, MESSAGES

pytestmark = pytest.mark.served

CHAT = {"messages": MESSAGES, **GREEDY}
FORMAT = {"@requestFormat": "chatCompletions"}
HEADERS = {"Content-Type": "application/json"}
TEXT, COUNTS = "The capital of Japan is Tokyo", [37, 6]


class Answer(NamedTuple):
    text: str
    tokens: list[int]


def from_openai(response: dict[str, Any]) -> Answer:
    (choice,) = response["choices"]
    usage = response["usage"]
    counts = [int(usage["prompt_tokens"]), int(usage["completion_tokens"])]
    return Answer(choice["message"]["content"], counts)


def from_chunks(lines: Any) -> Answer:
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    assert [line for line in lines if line.strip()][-1] == b"data: [DONE]"
    chunks = list(server_sent_events([line for line in lines if b"[DONE]" not in line], "stream"))
    usage = chunks[-1]["usage"]
    pieces = [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]]
    return Answer("".join(pieces), [usage["prompt_tokens"], usage["completion_tokens"]])


def vertex_instance(bare, platform) -> Answer:
    parameters = {"max_new_tokens": GREEDY["max_tokens"], "temperature": 0}
    body = {"instances": [{"messages": MESSAGES}], "parameters": parameters}
    response = httpx.post(bare.predict_url, json=body, timeout=60)
    counts = [int(response.headers[f"x-{kind}-tokens"]) for kind in ("prompt", "completion")]
    return Answer(response.json()["predictions"][0], counts)


def vertex_flat_instance(bare, platform) -> Answer:
    """Options beside the messages, as LangChain and litellm send them."""
    body = {"instances": [CHAT], "parameters": None}
    response = httpx.post(bare.predict_url, json=body, timeout=60)
    counts = [int(response.headers[f"x-{kind}-tokens"]) for kind in ("prompt", "completion")]
    return Answer(response.json()["predictions"][0], counts)


def request_format(bare, platform) -> Answer:
    body = {"instances": [FORMAT | CHAT]}
    return from_openai(httpx.post(bare.predict_url, json=body, timeout=60).json()["predictions"])


def openai_plain(bare, platform) -> Answer:
    body = {"model": APP, **CHAT}
    return from_openai(
        httpx.post(f"{bare.base_url}/chat/completions", json=body, timeout=60).json()
    )


def openai_streamed(bare, platform) -> Answer:
    body = {"model": APP, "stream": True, "stream_options": {"include_usage": True}, **CHAT}
    response = httpx.post(f"{bare.base_url}/chat/completions", json=body, timeout=60)
    return from_chunks(response.text.splitlines())


def endpoint(platform, kind: str) -> aiplatform.Endpoint:
    standin = platform.standin
    aiplatform.init(project=standin.project, location=standin.region)
    return aiplatform.Endpoint(platform.endpoints[kind])


def sdk_invoke(bare, platform) -> Answer:
    path, body = f"/predictions/{APP}/1.0/v1/chat/completions", {"model": APP, **CHAT}
    response = endpoint(platform, "invoke").invoke(path, json.dumps(body).encode(), HEADERS)
    return from_openai(response.json())


def sdk_invoke_streamed(bare, platform) -> Answer:
    path, body = f"/predictions/{APP}/1.0/v1/chat/completions", {"model": APP, **CHAT}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    sent = json.dumps(body).encode()
    return from_chunks(endpoint(platform, "invoke").invoke(path, sent, HEADERS, stream=True))


def sdk_predict(bare, platform) -> Answer:
    return from_openai(endpoint(platform, "predict").predict([FORMAT | CHAT]).predictions)


def sdk_raw_predict(bare, platform) -> Answer:
    body = json.dumps({"instances": [FORMAT | CHAT]}).encode()
    return from_openai(
        endpoint(platform, "predict").raw_predict(body, HEADERS).json()["predictions"]
    )


def sdk_stream_raw_predict(bare, platform) -> Answer:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"instances": [FORMAT | CHAT | options]}).encode()
    return from_chunks(endpoint(platform, "predict").stream_raw_predict(body, HEADERS))


def shared_raw_predict(bare, platform) -> Answer:
    body = json.dumps({"instances": [FORMAT | CHAT]}).encode()
    return from_openai(
        endpoint(platform, "shared").raw_predict(body, HEADERS).json()["predictions"]
    )


DOORS = (
    *(vertex_instance, vertex_flat_instance, request_format, openai_plain, openai_streamed),
    *(sdk_invoke, sdk_invoke_streamed, sdk_predict, sdk_raw_predict, sdk_stream_raw_predict),
    shared_raw_predict,
)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_same_text_and_token_counts(door, bare, platform):
    assert door(bare, platform) == Answer(TEXT, COUNTS)


def test_langchain_model_garden_on_a_shared_endpoint(run_python, platform, expected):
    """It sends `{"prompt": ..., "max_tokens": ..., "temperature": 0}` as an instance."""
    given = {
        "project": platform.standin.project,
        "location": platform.standin.region,
        "endpoint": platform.endpoints["shared"].rsplit("/", 1)[1],
        "prompt": "The capital of Japan is",
        "max_tokens": GREEDY["max_tokens"],
    }
    text = run_python("model_garden", given)["text"]
    assert text.removeprefix(given["prompt"]) == expected["text"]
