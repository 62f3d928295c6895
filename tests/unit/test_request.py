"""Which bodies are accepted and which rejected, without a server."""

import json
import re
from typing import Annotated

import pytest
from pydantic import Field

from handler.body import read_json
from handler.config import App, load_app
from handler.engine import Sampling
from handler.errors import RequestError, google_error
from handler.fields import Doc, validate
from handler.headers import header_reader
from handler.request import (
    Parameters,
    SharedParameters,
    default_parameters,
    parameter_table,
    parse_body,
)
from tests.bad_input import BAD, GOOD

APP = load_app("my-own-model", local=True)
NEEDS_MODEL = {"empty prompt", "prompt longer than the context"}


def parse(body, app: App = APP):
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    raw = read_json({"body": payload}, header_reader({}), app.limits.max_body_bytes)
    return parse_body(raw, app, default_parameters(app))


def test_bad_cases_are_60_and_have_distinct_names():
    assert len({name for name, *_ in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize(
    ("body", "status", "part", "field"),
    [case[1:] for case in BAD if case[0] not in NEEDS_MODEL],
    ids=[case[0] for case in BAD if case[0] not in NEEDS_MODEL],
)
def test_rejects(body, status, part, field):
    with pytest.raises(RequestError) as rejected:
        parse(body)
    error = google_error(rejected.value)["error"]
    assert error["code"] == status and error["status"] == "INVALID_ARGUMENT"
    assert part in error["message"]
    assert field is None or error["field"] == field
    assert len(error["message"]) < 400


@pytest.mark.parametrize("body", [b for _, b in GOOD], ids=[name for name, _ in GOOD])
def test_accepts(body):
    assert parse(body).instances


def test_precedence_of_instance_shared_and_app_parameters():
    app = APP.model_copy(update={"parameters": {"top_k": 5, "top_p": 0.5, "seed": 1}})
    body = {
        "instances": ["a", {"prompt": "b", "parameters": {"top_k": 7, "stop": "x"}}],
        "parameters": {"top_k": 6, "temperature": 0.5, "stream": True},
    }
    request = parse(body, app)
    assert request.stream
    first, second = (instance.sampling for instance in request.instances)
    assert first == Sampling(temperature=0.5, top_k=6, top_p=0.5, seed=1)
    assert second == Sampling(temperature=0.5, top_k=7, top_p=0.5, seed=1, stop=("x",))


def test_error_names_value_and_rule():
    with pytest.raises(RequestError) as rejected:
        parse({"instances": ["a"], "parameters": {"top_p": 1.5}})
    assert google_error(rejected.value) == {
        "error": {
            "code": 400,
            "status": "INVALID_ARGUMENT",
            "message": "parameters.top_p: should be a number over 0, at most 1, not 1.5",
            "field": "parameters.top_p",
        }
    }


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "dolly-v2-3b"])
def test_defaults_of_the_apps_are_valid(name):
    assert default_parameters(load_app(name))["max_new_tokens"] >= 1


def test_wrong_default_is_named():
    app = APP.model_copy(update={"parameters": {"temperature": 5}})
    with pytest.raises(RequestError, match=r"app\.parameters\.temperature: .* not 5"):
        default_parameters(app)


def test_accepts_whole_doubles_as_whole_numbers():
    """gRPC's Struct has doubles only: 50 arrives as 50.0."""
    body = b'{"instances": ["a"], "parameters": {"max_new_tokens": 5.0, "top_k": 6.0, "seed": 7e0}}'
    sampling = parse(body).instances[0].sampling
    assert (sampling.max_new_tokens, sampling.top_k, sampling.seed) == (5, 6, 7)
    assert isinstance(sampling.top_k, int)
    for wrong in ("5.5", "true", '"5"', "1e300", "-2.0"):
        with pytest.raises(RequestError, match="should be a whole number"):
            parse(f'{{"instances": ["a"], "parameters": {{"top_k": {wrong}}}}}'.encode())


class NarrowParameters(Parameters):
    """One range is declared anew."""

    top_p: Annotated[float | None, Field(ge=0.25, le=0.5), Doc("As before.")] = None


def test_check_message_and_table_follow_the_declaration():
    assert validate(NarrowParameters, {"top_p": 0.5}, APP.limits).top_p == 0.5
    for value in (0.2, 0.51):
        with pytest.raises(RequestError) as rejected:
            validate(NarrowParameters, {"top_p": value}, APP.limits)
        assert rejected.value.message == f"top_p: should be a number from 0.25 to 0.5, not {value}"
    assert "| `top_p` | a number from 0.25 to 0.5 | 1 | As before. |" in parameter_table(
        NarrowParameters
    )


def test_limit_of_the_app_is_in_the_message():
    limits = APP.limits.model_copy(update={"max_new_tokens": 7})
    with pytest.raises(RequestError, match="should be a whole number from 1 to 7, not 8"):
        validate(Parameters, {"max_new_tokens": 8}, limits)
    assert validate(Parameters, {"max_new_tokens": 7}, limits).max_new_tokens == 7


def test_table_has_every_parameter_and_its_default():
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [A-Z0-9][^|]+\. \|$", parameter_table(), re.M
    )
    assert [name for name, *_ in rows] == list(SharedParameters.model_fields)
    assert {name: default for name, _, default in rows} == {
        "temperature": "0",
        "top_p": "1",
        "top_k": "0",
        "min_p": "0",
        "repetition_penalty": "1",
        "presence_penalty": "0",
        "frequency_penalty": "0",
        "stop": "none",
        "seed": "random",
        "ignore_eos": "false",
        "response_format": "text",
        "max_new_tokens": "50",
        "return_full_text": "true for plain text, else false",
        "stream": "false",
        "timeout": "the maximum",
    }


@pytest.mark.parametrize("name", SharedParameters.model_fields)
def test_null_means_not_given(name):
    assert parse({"instances": ["a"], "parameters": {name: None}}) == parse({"instances": ["a"]})
    assert parse({"instances": [{"prompt": "a", name: None}]}) == parse({"instances": ["a"]})


@pytest.mark.parametrize(
    "body",
    [
        {"instances": ["a"], "parameters": None},
        {"instances": [{"prompt": "a", "messages": None}]},
        {"instances": [{"prompt": "a", "parameters": None}]},
    ],
)
def test_null_in_place_of_an_object_means_not_given(body):
    assert parse(body) == parse({"instances": ["a"]})


def test_null_in_a_schema_is_kept():
    schema = {"enum": ["a", None], "default": None}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    request = parse({"instances": ["a"], "parameters": {"response_format": wanted}})
    assert json.loads(request.instances[0].sampling.json_schema) == schema


def test_options_beside_the_prompt():
    """What LangChain and litellm send."""
    instance = {"prompt": "a", "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "top_k": 3}
    expected = Sampling(max_new_tokens=5, temperature=0.5, stop=("x",), top_k=3)
    assert parse({"instances": [instance]}).instances[0].sampling == expected
    both = {"instances": [instance], "parameters": {"temperature": 1, "top_p": 0.5}}
    sampling = parse(both).instances[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.5)
    assert parse({"instances": [instance | {"stream": True}]}).stream


def test_two_names_of_one_option_are_rejected():
    with pytest.raises(RequestError, match="both max_new_tokens and max_tokens; give one"):
        parse({"instances": [{"prompt": "a", "max_tokens": 5, "max_new_tokens": 6}]})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_tokens", "max_new_tokens"), ("topK", "top_k"), ("do_sample", "temperature")],
)
def test_names_of_other_servers_get_a_hint(name, hint):
    with pytest.raises(RequestError, match=rf"^parameters\.{name}: .* {hint}"):
        parse({"instances": ["a"], "parameters": {name: 1}})


def test_text_parts_are_one_text():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": content}
    assert parse({"instances": [{"messages": [message]}]}).instances[0].prompt == [
        {"role": "user", "content": "a\nb"}
    ]


def test_image_part_is_named():
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with pytest.raises(RequestError, match='"image_url" is not supported') as error:
        parse({"instances": [{"messages": [{"role": "user", "content": [part]}]}]})
    assert error.value.field == "instances[0].messages[0].content[0].type"


def test_timeout_may_lower_the_deadline_of_the_app():
    def seconds(**parameters) -> float:
        return parse({"instances": ["a"], "parameters": parameters}).seconds

    assert seconds() == APP.limits.seconds == 120
    assert seconds(timeout=0.5) == 0.5 and seconds(timeout=120) == 120
    with pytest.raises(RequestError) as error:
        seconds(timeout=121)
    assert error.value.message == "parameters.timeout: should be a number from 0.1 to 120, not 121"
