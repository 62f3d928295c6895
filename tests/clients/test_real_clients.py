"""Clients of other projects, unchanged, with only a `base_url`.

Each script in scripts/ runs in its own environment and does everything with one client.
"""

from typing import Any

import httpx
import pytest

from deploy.torchserve.server import Server
from tests.clients.conftest import APP, PAGE, Target, openai_url

pytestmark = pytest.mark.served

STRUCTURED = {"capital": {"Tokyo", "Kyoto"}, "island": {True, False}}


@pytest.fixture(scope="session", params=["bare", "container", "standin"])
def target(request: pytest.FixtureRequest) -> Target:
    """One server after the other."""
    return request.getfixturevalue(request.param)


def is_country(value: dict[str, Any]) -> bool:
    return value.keys() == STRUCTURED.keys() and all(value[k] in STRUCTURED[k] for k in value)


def test_openai_python(run_python, target, expected):
    found = run_python("openai_sdk", target.given())
    chat, counts = expected["chat"], expected["chat_tokens"]
    plain = {"text": chat, "finish_reason": "length", "usage": counts}
    for case in ("plain", "parts", "extra_fields"):
        assert found[case] == plain | {"model": APP}
    streamed = found["streamed"]
    assert streamed == plain | {"role": "assistant", "ids": 1, "pieces": streamed["pieces"]}
    assert streamed["pieces"] > 1
    assert found["stream_helper"]["text"].startswith(chat)
    assert {"chunk", "content.delta", "content.done"} <= {*found["stream_helper"]["events"]}
    assert found["asynchronous"] == [chat] * 4
    assert is_country(found["parsed"])
    assert found["raw"] == {"status": 200, "content_type": "application/json", "text": chat}
    first, second = found["several"]
    assert first == second and len(set(first)) == 3
    words = {"text": expected["text"], "usage": expected["text_tokens"]}
    assert found["completions"] == words | {"streamed": expected["text"]}
    assert found["early_end"] == "chat.completion.chunk"
    errors = found["errors"]
    assert {name: error["class"] for name, error in errors.items()} == {
        "temperature": "BadRequestError",
        "model": "NotFoundError",
        "messages": "BadRequestError",
    }
    assert all(error["param"] == name for name, error in errors.items())
    if target.gets:
        assert found["models"] == {"listed": APP, "retrieved": APP}


def test_openai_node_and_ai_sdk(run_node, target, expected):
    found = run_node("clients", target.given())
    chat, counts = expected["chat"], expected["chat_tokens"]
    assert found["plain"] == {"text": chat, "usage": counts}
    assert found["streamed"]["pieces"] > 1
    assert found["streamed"] == found["plain"] | {"pieces": found["streamed"]["pieces"]}
    assert found["streamHelper"] == chat
    assert is_country(found["parsed"])
    assert found["errors"] == {"class": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["leave"] == "chat.completion.chunk"
    ai = found["aiSdk"]
    assert (ai["text"], ai["usage"], ai["streamed"]) == (chat, counts, chat)
    assert is_country(ai["structured"])
    assert found.get("models", [APP]) == [APP]


def test_langchain_chat_openai(run_python, target, expected):
    found = run_python("langchain_chat", target.given())
    chat, counts = expected["chat"], expected["chat_tokens"]
    assert found["plain"] == {"text": chat, "usage": counts}
    assert found["streamed"]["pieces"] > 2
    assert found["streamed"] == found["plain"] | {"pieces": found["streamed"]["pieces"]}
    assert found["batch"] == [chat] * 3
    assert (found["asynchronous"], found["chain"]) == (chat, chat)
    assert found["completion"] == expected["text"]
    assert is_country(found["structured"])


def test_litellm(run_python, target, expected):
    found = run_python("litellm_client", target.given())
    chat, counts = expected["chat"], expected["chat_tokens"]
    assert found["plain"] == found["streamed"] == {"text": chat, "usage": counts}
    assert found["asynchronous"] == chat
    assert found["completion"] == expected["text"]
    assert "temperature" in found["refused"] and found["refused"] != "accepted"


def test_instructor_pydantic_ai_and_httpx_sse(run_python, target, expected):
    found = run_python("structured_clients", target.given())
    chat, counts = expected["chat"], expected["chat_tokens"]
    assert is_country(found["instructor"])
    assert is_country(found["pydantic_ai"].pop("structured"))
    assert found["pydantic_ai"] == {"text": chat, "usage": counts}
    assert found["httpx_sse"] == {"last": "[DONE]", "text": chat}


@pytest.mark.parametrize("name", ["bare", "container"])
def test_browser_on_a_page_of_an_allowed_origin(run_node, chromium, request, name, expected):
    target = request.getfixturevalue(name)
    given = target.given(browser=chromium, origin_port=PAGE, allowed=True)
    found = run_node("browser", given)
    chat = expected["chat"]
    assert (found["plain"], found["streamed"], found["events"]) == (chat,) * 3
    assert found["models"] == [APP] and found["last"] == "[DONE]"
    assert found["refused"] == {"status": 400, "param": "temperature"}


def test_browser_on_a_page_of_another_origin_is_refused(run_node, chromium, transformers_server):
    """This server allows no origin: the page gets neither a response nor a completion."""
    target = Target("closed", openai_url(transformers_server))
    before = completed(transformers_server)
    found = run_node("browser", target.given(browser=chromium, origin_port=PAGE, allowed=False))
    assert found == {"json": "TypeError", "text": "TypeError"}
    assert completed(transformers_server) == before


def completed(server: Server) -> list[str]:
    """The metrics that count completions and their tokens."""
    lines = httpx.get(server.metrics, timeout=10).text.splitlines()
    return [line for line in lines if line.startswith("llm_completion_tokens")]
