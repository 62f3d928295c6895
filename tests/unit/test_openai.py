"""Requests and responses of OpenAI's API, without a server."""

import json

import pytest

from handler import doors, openai
from handler.config import load_app
from handler.engine import Progress, Sampling, SequenceKey, TokenLogprob
from handler.errors import RequestError, openai_error
from handler.request import Request, default_parameters
from handler.response import ActiveRequest, Delivery

APP = load_app("my-own-model", local=True)
DEFAULTS = default_parameters(APP)
HI = [{"role": "user", "content": "Hi"}]


def chat(**fields) -> Request:
    return doors.parse(openai.CHAT, {"messages": HI} | fields, APP, DEFAULTS, "model")


def complete(**fields) -> Request:
    return doors.parse(openai.COMPLETIONS, {"prompt": "Hi"} | fields, APP, DEFAULTS, "model")


def predict(body: dict) -> Request:
    return doors.parse("", body, APP, DEFAULTS, "model")


def rejected(parse, **fields) -> RequestError:
    with pytest.raises(RequestError) as error:
        parse(**fields)
    return error.value


def answer(request: Request, *progress: Progress) -> list[tuple[Delivery, bytes]]:
    """Give the engine's progress to a request, one tick each; return what is sent."""
    active = ActiveRequest(request)
    for i, _ in enumerate(request.instances):
        active.add(SequenceKey("id", i), 5, "")
    sent = []
    for one in progress:
        active.update(one)
        if response := active.take_response():
            sent.append((response.delivery, response.body))
    return sent


def events(request: Request, *progress: Progress) -> list:
    data = b"".join(body for _, body in answer(request, *progress)).decode()
    lines = [line.removeprefix("data: ") for line in data.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def step(text: str, tokens: int, reason=None, i: int = 0, **more) -> Progress:
    return Progress(SequenceKey("id", i), text, tokens, reason, **more)


def test_options_of_a_chat():
    request = chat(
        model="model",
        **{"max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": -3},
        **{"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "stop": "x"},
        **{"repetition_penalty": 1.5, "logprobs": True, "top_logprobs": 2, "timeout": 3},
    )
    assert [i.sampling for i in request.instances] == [
        Sampling(7, 0.5, 0.9, 0, 0.1, 1.5, 1, -1, ("x",), -3, logprobs=2)
    ]
    assert request.instances[0].prompt == HI and request.seconds == 3 and not request.stream


def test_chat_without_a_limit_ends_at_the_limit_of_the_app():
    """Clients leave `max_tokens` out and expect a whole answer."""
    assert chat().instances[0].sampling.max_new_tokens == APP.limits.max_new_tokens
    assert chat(max_tokens=3).instances[0].sampling.max_new_tokens == 3
    assert complete().instances[0].sampling.max_new_tokens == DEFAULTS["max_new_tokens"]


def test_each_of_n_completions_has_its_own_seed():
    seeds = [i.sampling.seed for i in chat(n=3, seed=2**63 - 2).instances]
    assert len(set(seeds)) == 3 and max(seeds) < 2**63
    assert [i.sampling.seed for i in chat(n=2).instances] == [None, None]


def test_completions_are_in_the_order_of_prompts_and_then_of_n():
    request = complete(prompt=["a", "b"], n=2)
    assert [i.prompt for i in request.instances] == ["a", "a", "b", "b"]
    assert all(i.raw for i in request.instances)
    progress = [step(str(i), 2, "stop", i) for i in range(4)]
    ((_, body),) = answer(request, *progress)
    found = json.loads(body)
    assert [(c["index"], c["text"]) for c in found["choices"]] == list(enumerate("0123"))
    assert found["usage"] == {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18}


def test_accepts_options_that_ask_for_nothing():
    nulls = dict.fromkeys(["stop", "logit_bias", "functions", "tools", "logprobs", "user", "n"])
    assert chat(**nulls).instances == chat().instances
    empty = {"logit_bias": {}, "modalities": ["text"], "tools": [], "store": False, "user": "me"}
    assert chat(**empty, metadata={"a": "b"}, service_tier="auto").instances == chat().instances
    assert complete(best_of=2, n=2, suffix="").instances == complete(n=2).instances
    assert complete(best_of=1, n=None).instances == complete().instances


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"logit_bias": {"1": 2}}, "logit_bias", "is not supported by this server"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"max_tokenz": 3}, "max_tokenz", "most similar name is max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "give one"),
        ({"max_tokens": 2000}, "max_tokens", "from 1 to 1024, not 2000"),
        ({"top_logprobs": 2}, "top_logprobs", '"logprobs": true'),
        ({"stream_options": {"include_usage": True}}, "stream_options", '"stream": true'),
        ({"n": 33}, "n", "from 1 to 32, not 33"),
        ({"n": 0}, "n", "from 1 to 32, not 0"),
        ({"temperature": "1"}, "temperature", 'not "1"'),
        ({"messages": []}, "messages", "1 to 1000 messages, not []"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", '"json_object"'),
        ({"response_format": {"type": "json_schema"}}, "response_format", 'needs "json_schema"'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            *("response_format.json_schema.schema", "is missing"),
        ),
    ],
)
def test_bad_field_is_named(fields, param, part):
    error = rejected(chat, **fields)
    assert (error.code, error.field) == (400, param) and part in error.message


def test_error_has_the_shape_of_openai():
    error = rejected(chat, model="gpt-4")
    assert error.code == 404
    assert openai_error(error)["error"] == {
        "message": 'model: "gpt-4" is not served here; use "model"',
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_too_many_completions_of_several_prompts():
    assert (
        "n: the request asks for 40 completions"
        in rejected(complete, prompt=["a"] * 20, n=2).message
    )


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], 5, [], {}])
def test_prompt_of_token_ids_is_rejected_by_name(prompt):
    error = rejected(complete, prompt=prompt)
    assert error.field.startswith("prompt") and error.code == 400


def test_schema_reaches_the_engine_as_text():
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(chat(response_format=wanted).instances[0].sampling.json_schema) == schema
    for kind, expected in (("text", None), ("json_object", '{"type": "object"}')):
        sampling = chat(response_format={"type": kind}).instances[0].sampling
        assert sampling.json_schema == expected


def test_turns_for_the_template_have_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    _, assistant, tool = chat(messages=messages).instances[0].prompt
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "1"}


def test_whole_chat():
    ((delivery, body),) = answer(chat(), step("Hel", 1), step("lo", 2, "timeout"))
    found = json.loads(body)
    assert delivery is Delivery.WHOLE and found["object"] == "chat.completion"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",  # OpenAI has no reason for a deadline
        }
    ]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def test_stream_of_a_chat():
    request = chat(stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(request, step("Hel", 1), step("lo", 2), step("", 3, "stop"))
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["total_tokens"] == 8
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [c["delta"] for c in choices] == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [c["finish_reason"] for c in choices] == [None, None, "stop"]
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)


def test_stream_without_usage_has_none():
    *chunks, done = events(chat(stream=True), step("a", 1, "stop"))
    assert done == "[DONE]" and len(chunks) == 1 and "usage" not in chunks[0]


def test_failure_ends_a_stream_with_an_error_of_openai():
    last = events(chat(stream=True), step("a", 1), step("", 1, "error"))[-1]
    assert last["error"]["type"] == "server_error"


def test_logprobs_of_a_chat_are_sent_once():
    tokens = [
        TokenLogprob(1, "Hel", -0.5, bytes=b"Hel"),
        TokenLogprob(2, "\ufffd", -1.0, bytes=b"\xc3"),
        TokenLogprob(3, "<|im_end|>", -1.5),
    ]
    request = chat(stream=True, logprobs=True)
    first, second, _ = events(
        request, step("Hel", 1, logprobs=tokens[:1]), step("é", 3, "stop", logprobs=tokens[1:])
    )
    assert [t["token"] for t in first["choices"][0]["logprobs"]["content"]] == ["Hel"]
    part, end = second["choices"][0]["logprobs"]["content"]
    assert part == {"token": "\ufffd", "logprob": -1.0, "bytes": [195], "top_logprobs": []}
    assert (end["token"], end["bytes"]) == ("<|im_end|>", None)


def test_logprobs_of_a_completion_have_offsets():
    tokens = [
        TokenLogprob(1, "Hel\ufffd", -0.5, bytes=b"Hel\xc3"),
        TokenLogprob(2, "\ufffd", -1.0, bytes=b"\xa9"),
        TokenLogprob(3, "lo", -1.0, bytes=b"lo"),
        TokenLogprob(4, "<|im_end|>", -1.0),
    ]
    first, second, _ = events(
        complete(stream=True, logprobs=0),
        *(step("Hel", 1, logprobs=tokens[:1]), step("élo", 4, "stop", logprobs=tokens[1:])),
    )
    assert first["choices"][0]["logprobs"]["text_offset"] == [0]
    assert second["choices"][0]["logprobs"] == {
        "tokens": ["\ufffd", "lo", "<|im_end|>"],
        "token_logprobs": [-1.0, -1.0, -1.0],
        "top_logprobs": None,
        "text_offset": [3, 4, 6],
    }


def test_chat_through_predict():
    body = {"instances": [{openai.FORMAT: "chatCompletions", "messages": HI, "max_tokens": 3}]}
    request = predict(body | {"parameters": None})
    assert request.instances[0].sampling.max_new_tokens == 3
    ((_, sent),) = answer(request, step("a", 1, "stop"))
    assert json.loads(sent)["predictions"]["choices"][0]["message"]["content"] == "a"


def test_bare_chat_through_predict_is_answered_without_predictions():
    """What raw_predict sends, and what Google's ENDPOINT/chat/completions may pass on."""
    request = predict({"model": "google/gemma", "messages": HI})
    ((_, sent),) = answer(request, step("a", 1, "stop"))
    assert json.loads(sent)["choices"][0]["message"]["content"] == "a"
    assert request.shape.error(RequestError(400, "x"))["error"]["status"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"instances": [{openai.FORMAT: "x", "messages": HI}]}, "instances[0].@requestFormat"),
        (
            {"instances": ["a", {openai.FORMAT: "chatCompletions", "messages": HI}]},
            "instances[1].@requestFormat",
        ),
        (
            {
                "instances": [{openai.FORMAT: "chatCompletions", "messages": HI}],
                "parameters": {"max_new_tokens": 5},
            },
            "parameters",
        ),
        (
            {"instances": [{openai.FORMAT: "chatCompletions", "messages": HI, "n": 0}]},
            "instances[0].n",
        ),
        (
            {"instances": [{openai.FORMAT: "chatCompletions", "messages": HI, "top_logprobs": 1}]},
            "instances[0].top_logprobs",
        ),
    ],
)
def test_bad_chat_through_predict_is_named(body, field):
    error = rejected(lambda: predict(body))
    assert error.field == field


def test_list_of_models():
    listed = openai.models(openai.MODELS, "model", 5)
    assert [m["id"] for m in listed["data"]] == ["model"]
    assert openai.models(f"{openai.MODELS}/model", "model", 5) == listed["data"][0]
    error = rejected(lambda: openai.models(f"{openai.MODELS}/other", "model", 5))
    assert (error.code, error.reason) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("", ""),
        ("v1/chat/completions", openai.CHAT),
        ("//v1//completions/", openai.COMPLETIONS),
        ("v1/models/a/b", openai.MODELS),
        ("v1/chat/completions?x=1", openai.CHAT),
    ],
)
def test_route_of_a_path(path, route):
    assert doors.find_route(doors.clean(path)) == route


@pytest.mark.parametrize("path", ["v1", "v1/responses", "chat/completions", "v2/models", "x"])
def test_unknown_route_names_the_known_ones(path):
    error = rejected(lambda: doors.find_route(path))
    assert error.code == 404 and "/v1/chat/completions" in error.message


def test_tables_have_every_field():
    rows = {
        route: [
            line.split("|")[1].strip(" `") for line in openai.parameter_table(route).split("\n")
        ]
        for route in ("chat", "completions")
    }
    assert sorted(rows["chat"][2:]) == sorted(openai.ChatBody.model_fields)
    assert rows["completions"][2:] == ["prompt", "max_tokens", "logprobs", "echo"]
