"""Responses in OpenAI's shape: what the types of the official client say, and what they count."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from deploy.common.waiting import wait_until
from tests.clients.bad_bodies import BAD, BAD_STREAMS, CHAT, TEXT, Case, payload
from tests.clients.conftest import APP, GREEDY, MESSAGES, PROMPT, openai_url

pytestmark = pytest.mark.served

ASK: dict[str, Any] = {"model": APP, "messages": MESSAGES, **GREEDY}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
EVENT = "data: "


@pytest.fixture
def top(request) -> int:
    """How many likely tokens an engine reports: openvino, only the chosen one."""
    return 0 if request.node.callspec.params["api"] == "openvino" else 3


@pytest.fixture(scope="module", params=["openvino", "transformers"])
def api(request) -> Iterator[httpx.Client]:
    """Both engines, at their `base_url`."""
    if request.param == "openvino":
        address = request.getfixturevalue("bare").base_url
    else:
        address = openai_url(request.getfixturevalue("transformers_server"))
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def post(api: httpx.Client, route: str, body: dict) -> dict[str, Any]:
    response = api.post(route, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def stream(api: httpx.Client, route: str, body: dict) -> list[dict[str, Any]]:
    """The events of a stream, which ends with [DONE]."""
    response = api.post(route, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == (f"{EVENT}[DONE]", "")
    assert all(event.startswith(EVENT) and "\n" not in event for event in events), events
    return [json.loads(event.removeprefix(EVENT)) for event in events]


def chunks_of(api: httpx.Client, route: str, body: dict) -> list[tuple[str, str]]:
    """A stream's events as the validator takes them."""
    kind = "chat.completion.chunk" if route == CHAT else "text_completion.chunk"
    return [(kind, json.dumps(event)) for event in stream(api, route, body)]


COUNTRY = {
    "type": "object",
    "properties": {"capital": {"enum": ["Tokyo", "Kyoto"]}, "island": {"type": "boolean"}},
    "required": ["capital", "island"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "country", "schema": COUNTRY}}


def test_responses_have_the_types_of_openais_client(api, run_python, top):
    """Every field is one of the types, none is missing, none is unknown."""
    several = ASK | {"n": 3, "temperature": 1, "seed": 1, "logprobs": True, "top_logprobs": top}
    words = {"model": APP, "prompt": PROMPT, **GREEDY}
    many = words | {"prompt": [PROMPT, "Paris is"], "n": 2, "logprobs": top, "temperature": 1}
    found: list[tuple[str, str]] = []
    for body in (
        ASK,
        several,
        ASK | {"stop": ["Tokyo", "."], "max_tokens": 30},
        ASK | {"response_format": SCHEMA, "max_tokens": 60},
        ASK | {"response_format": {"type": "json_object"}},
    ):
        found.append(("chat.completion", api.post(CHAT, json=body).text))
        found += chunks_of(api, CHAT, body)
        found += chunks_of(api, CHAT, body | USAGE)
    for body in (words, many):
        found.append(("text_completion", api.post(TEXT, json=body).text))
        found += chunks_of(api, TEXT, body)
        found += chunks_of(api, TEXT, body | USAGE)
    found.append(("models", api.get("models").text))
    found.append(("model", api.get(f"models/{APP}").text))
    errors = (
        api.post(CHAT, json=ASK | {"temperature": 9}),
        api.post(TEXT, json=words | {"temperature": 9}),
        api.post(CHAT, json=ASK | {"model": "gpt-5"}),
        api.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}),
        api.post("embeddings", json={"model": APP, "input": "hi"}),
        api.get("models/gpt-5"),
    )
    assert [error.status_code for error in errors] == [400, 400, 404, 400, 404, 404]
    found += [("error", error.text) for error in errors]
    wrong = [
        (problems, text)
        for problems, (_, text) in zip(run_python("conformance", found), found, strict=True)
        if problems
    ]
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:5]}"


def test_validator_finds_unknown_missing_and_wrong_fields(api, run_python):
    """The check above can fail."""
    good = post(api, CHAT, ASK)
    choice = good["choices"][0]
    cases = [
        good | {"extra": 1},
        good | {"choices": [choice | {"extra": 1}]},
        good | {"choices": [choice | {"message": {"role": "assistant", "content": "a"}}]},
        good | {"choices": [choice | {"finish_reason": "timeout"}]},
        good | {"created": "now"},
        good | {"created": 1.5},
        good | {"object": "chat.completion.chunk"},
        good | {"usage": {"prompt_tokens": 1}},
    ]
    pairs = [("chat.completion", json.dumps(case)) for case in (good, *cases)]
    first, *others = run_python("conformance", pairs)
    assert first == [] and all(others), others


def test_chunks_of_a_stream_are_in_order(api):
    events = stream(api, CHAT, ASK | USAGE)
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    *chunks, last = events
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == GREEDY["max_tokens"]
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert not any("role" in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices][-1] == "length"
    assert not any(choice["finish_reason"] for choice in choices[:-1])
    without = stream(api, CHAT, ASK)
    assert not any("usage" in chunk and chunk["usage"] for chunk in without)
    assert all(len(chunk["choices"]) == 1 for chunk in without)


def deltas(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [one.get("delta", one) for one in choices if one["index"] == index]
    return "".join(piece.get("content") or piece.get("text") or "" for piece in pieces)


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_stream_and_plain_response_agree(api, route):
    body = ASK if route == CHAT else {"model": APP, "prompt": PROMPT, **GREEDY}
    plain = post(api, route, body)
    events = stream(api, route, body | USAGE)
    (choice,) = plain["choices"]
    assert deltas(events) == (choice["message"]["content"] if route == CHAT else choice["text"])
    assert events[-1]["usage"] == plain["usage"]
    assert events[-2]["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"


def test_three_choices_with_a_seed(api):
    """Three texts, the same again with the same seed, others with another, streamed or not."""
    body = ASK | {"n": 3, "seed": 7, "temperature": 1, "max_tokens": 12}
    first, second = post(api, CHAT, body), post(api, CHAT, body)

    def texts(response: dict[str, Any]) -> list[str]:
        assert [choice["index"] for choice in response["choices"]] == [0, 1, 2]
        return [choice["message"]["content"] for choice in response["choices"]]

    assert texts(first) == texts(second) and len(set(texts(first))) == 3
    assert texts(post(api, CHAT, body | {"seed": 8})) != texts(first)
    events = stream(api, CHAT, body | USAGE)
    assert [deltas(events, index) for index in range(3)] == texts(first)
    ended = [choice["index"] for e in events for choice in e["choices"] if choice["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]
    assert events[-1]["usage"] == first["usage"]
    alone = post(api, CHAT, body | {"n": 1})["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_tokens"] == alone  # the prompt counts once, as OpenAI counts it
    assert first["usage"]["completion_tokens"] <= 36


def test_completions_of_several_prompts(api):
    """Choices in the order of the prompts, `n` for each."""
    words = {"model": APP, **GREEDY}
    one, other = (
        post(api, TEXT, words | {"prompt": prompt}) for prompt in (PROMPT, "Once upon a time")
    )
    both = post(api, TEXT, words | {"prompt": [PROMPT, "Once upon a time"], "n": 2})
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    single = [response["choices"][0]["text"] for response in (one, one, other, other)]
    assert [choice["text"] for choice in both["choices"]] == single
    counts = [response["usage"]["prompt_tokens"] for response in (one, other)]
    assert both["usage"]["prompt_tokens"] == sum(counts)
    assert both["usage"]["completion_tokens"] == 4 * GREEDY["max_tokens"]
    echo = post(api, TEXT, words | {"prompt": PROMPT, "echo": True})
    assert echo["choices"][0]["text"] == PROMPT + single[0]


def test_logprobs_are_those_of_the_tokens(api, top):
    body = ASK | {"logprobs": True, "top_logprobs": top}
    plain = post(api, CHAT, body)
    (choice,) = plain["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == plain["usage"]["completion_tokens"]
    assert (
        b"".join(bytes(token["bytes"]) for token in tokens).decode()
        == (choice["message"]["content"])
    )
    for token in tokens:
        likely = token["top_logprobs"]
        assert len(likely) == top and token["logprob"] <= 0
        values = [one["logprob"] for one in likely]
        assert values == sorted(values, reverse=True)
        if likely:  # greedy
            assert likely[0]["token"] == token["token"]
            assert values[0] == pytest.approx(token["logprob"], abs=1e-3)
    streamed = [
        token
        for event in stream(api, CHAT, body)
        for one in event["choices"]
        for token in (one["logprobs"] or {}).get("content") or []
    ]
    assert [token["token"] for token in streamed] == [token["token"] for token in tokens]
    bare = post(api, CHAT, ASK | {"logprobs": True})["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in bare] == [token["token"] for token in tokens]
    assert all(token["top_logprobs"] == [] for token in bare)
    words = post(api, TEXT, {"model": APP, "prompt": PROMPT, **GREEDY, "logprobs": top})
    (choice,) = words["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    lengths = {len(found[name]) for name in ("tokens", "token_logprobs", "text_offset")}
    assert lengths == {GREEDY["max_tokens"]}
    assert top == 0 or {len(likely) for likely in found["top_logprobs"]} == {top}


def test_stop_and_both_names_of_the_limit(api):
    whole = post(api, CHAT, ASK | {"max_tokens": 16})["choices"][0]["message"]["content"]
    stop = whole.split()[3]
    cut = post(api, CHAT, ASK | {"max_tokens": 16, "stop": stop})["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert post(api, CHAT, ASK | {"max_tokens": 16, "stop": [stop, "never"]})["choices"][0] == cut
    newer = {**{k: v for k, v in ASK.items() if k != "max_tokens"}, "max_completion_tokens": 5}
    response = post(api, CHAT, newer)
    assert response["usage"]["completion_tokens"] == 5
    assert response["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1, "seed": 7},
        {"temperature": 2, "seed": 7, "top_p": 0.5},
        {"temperature": 2, "seed": 7, "min_p": 0.9},
        {"temperature": 2, "seed": 7, "top_k": 2},
        {"repetition_penalty": 5},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
    ],
    ids=lambda change: [*change][-1],
)
def test_parameters_change_the_text(api, change, request):
    """Each last one, compared with the request without it."""
    changed = [*change][-1]
    if changed in ("presence_penalty", "frequency_penalty") and "openvino" in request.node.name:
        error = api.post(CHAT, json=ASK | change)  # documented: OpenVINO GenAI applies them wrongly
        assert error.status_code == 400 and error.json()["error"]["param"] == changed
        return
    free = {"max_tokens": 40, "messages": [{"role": "user", "content": "Count: one one one one"}]}
    before = {k: v for k, v in change.items() if k != changed}
    texts = [
        post(api, CHAT, ASK | free | options)["choices"][0]["message"]["content"]
        for options in (before, change)
    ]
    assert texts[0] != texts[1]


def test_null_means_not_given(api):
    names = (
        *("top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "response_format", "tools"),
        *("tool_choice", "user", "max_completion_tokens", "min_p", "top_k", "repetition_penalty"),
    )
    plain = post(api, CHAT, ASK)
    nulls = post(api, CHAT, ASK | dict.fromkeys(names))
    assert (nulls["choices"], nulls["usage"]) == (plain["choices"], plain["usage"])


def test_defaults_of_openai_change_nothing(api):
    """What clients send along although it is the default."""
    usual = {"top_p": 1, "n": 1, "stream": False, "presence_penalty": 0, "frequency_penalty": 0}
    usual |= {"logprobs": False, "response_format": {"type": "text"}, "user": "someone"}
    plain = post(api, CHAT, ASK)
    assert post(api, CHAT, ASK | usual)["choices"] == plain["choices"]


def test_roles_and_text_parts(api):
    """A developer's message is a system's; parts are lines; an assistant's turn is context."""

    def completed(*messages: dict[str, Any]) -> tuple[str, int]:
        response = post(api, CHAT, ASK | {"messages": list(messages)})
        return response["choices"][0]["message"]["content"], response["usage"]["prompt_tokens"]

    user = {"role": "user", "content": "What is the capital of Japan?"}
    system = {"role": "system", "content": "Answer in French."}
    assert completed(system, user) == completed(system | {"role": "developer"}, user)
    assert completed(system, user)[1] != completed(user)[1]
    parts = [
        {"type": "text", "text": "What is the"},
        {"type": "text", "text": "capital of Japan?"},
    ]
    joined = user | {"content": "What is the\ncapital of Japan?"}
    assert completed(user | {"content": parts}) == completed(joined)
    assert completed({"role": "user", "content": parts[1:]}) != completed(user)
    turn = {"role": "assistant", "content": "Tokyo."}
    more = {"role": "user", "content": "And of France?"}
    assert completed(user, turn, more)[1] > completed(user)[1] + 10


def test_usage_is_what_the_models_tokenizer_counts(api, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for question in ("Hi", "What is the capital of Japan?", "Zähle: 一 二 三 🙂" * 20):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        usage = post(api, CHAT, ASK | {"messages": messages})["usage"]
        assert usage["prompt_tokens"] == len(tokenizer(prompt)["input_ids"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        words = post(api, TEXT, {"model": APP, "prompt": question, **GREEDY})["usage"]
        assert words["prompt_tokens"] == len(tokenizer(question)["input_ids"])
    ended = post(api, CHAT, ASK | {"max_tokens": 40})
    (choice,) = ended["choices"]
    assert choice["finish_reason"] == "stop", choice
    text = tokenizer(choice["message"]["content"])["input_ids"]
    # The end token is a token that was generated.
    assert ended["usage"]["completion_tokens"] - len(text) in (0, 1)


async def _together(address: str, sent: list[tuple[str, Any]]) -> list[httpx.Response]:
    headers = {"Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=48)
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
        tasks = [client.post(route, content=payload(b), headers=headers) for route, b in sent]
        return await asyncio.gather(*tasks)


GOOD: dict[str, Any] = ASK | {"max_tokens": 4}


@pytest.fixture(scope="module")
def mixed(bare) -> tuple[list[httpx.Response], list[httpx.Response]]:
    """Each bad body beside a good one, all at once; the responses to both."""
    sent = [pair for case in (*BAD, *BAD_STREAMS) for pair in ((CHAT, GOOD), (case[1], case[2]))]
    responses = asyncio.run(_together(bare.base_url, sent))
    return responses[0::2], responses[1::2]


def test_good_requests_among_bad_ones_have_their_greedy_text(mixed, bare):
    alone = httpx.post(f"{bare.base_url}/{CHAT}", json=GOOD, timeout=60).json()
    good, _ = mixed
    assert [response.status_code for response in good] == [200] * len(good)
    assert {
        (one["choices"][0]["message"]["content"], one["usage"]["total_tokens"])
        for one in (response.json() for response in good)
    } == {(alone["choices"][0]["message"]["content"], alone["usage"]["total_tokens"])}


@pytest.mark.parametrize(
    "index", range(len(BAD) + len(BAD_STREAMS)), ids=[case[0] for case in (*BAD, *BAD_STREAMS)]
)
def test_rejects_in_openais_shape(mixed, index):
    response = mixed[1][index]
    case: Case = (*BAD, *BAD_STREAMS)[index]
    _, _, _, status, field = case
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"]
    assert error["type"] == "invalid_request_error"
    if field is not None:
        assert (error["param"] or "").startswith(field), error
        assert field.rsplit(".")[-1] in error["message"], error


def test_places_of_streams_that_clients_left_are_free(bare):
    """Three streams fill the server, so other requests get 429 until their clients leave."""
    story = [{"role": "user", "content": "Write a long story."}]
    body = ASK | {"messages": story, "max_tokens": 1000, "n": 32, "stream": True}
    body |= {"temperature": 1, "ignore_eos": True}

    def leave() -> None:
        with suppress(httpx.ReadTimeout), httpx.Client(timeout=3) as client:
            with client.stream("POST", f"{bare.base_url}/{CHAT}", json=body) as response:
                assert response.status_code == 200, response.read()
                began = time.monotonic()
                for _ in response.iter_lines():
                    if time.monotonic() - began > 2:
                        return

    with ThreadPoolExecutor() as pool:
        left = [pool.submit(leave) for _ in range(3)]
        time.sleep(1)
        refused = httpx.post(f"{bare.base_url}/{CHAT}", json=GOOD, timeout=60)
        assert [future.result() for future in left] == [None] * 3
    assert refused.status_code == 429, refused.text
    assert refused.json()["error"].keys() == {"message", "type", "param", "code"}
    assert int(refused.headers["retry-after"]) > 0

    def accepted() -> bool:
        return httpx.post(f"{bare.base_url}/{CHAT}", json=GOOD, timeout=60).status_code == 200

    wait_until(accepted, 5)
