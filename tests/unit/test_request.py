"""Parsing and refusing, without a server."""

import json

import pytest

from handler.config import App, load_app
from handler.engine import Sampling
from handler.request import RequestError, default_parameters, parse_request
from tests.bad_input import BAD, GOOD

APP = load_app("my-own-model", local=True)
NEEDS_MODEL = {"empty prompt", "prompt longer than the context"}


def parse(body, app: App = APP):
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_request({"body": payload}, app.limits, default_parameters(app))


def test_at_least_60_bad_cases_with_distinct_names():
    assert len({name for name, *_ in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize(
    ("body", "status", "part", "field"),
    [case[1:] for case in BAD if case[0] not in NEEDS_MODEL],
    ids=[case[0] for case in BAD if case[0] not in NEEDS_MODEL],
)
def test_bad(body, status, part, field):
    with pytest.raises(RequestError) as refused:
        parse(body)
    error = refused.value.body()["error"]
    assert error["code"] == status and error["status"] == "INVALID_ARGUMENT"
    assert part in error["message"]
    assert field is None or error["field"] == field
    assert len(error["message"]) < 400


@pytest.mark.parametrize("body", [b for _, b in GOOD], ids=[name for name, _ in GOOD])
def test_good(body):
    assert parse(body).items


def test_instance_wins_over_shared_wins_over_app():
    app = APP.model_copy(update={"parameters": {"top_k": 5, "top_p": 0.5, "seed": 1}})
    body = {
        "instances": ["a", {"prompt": "b", "parameters": {"top_k": 7, "stop": "x"}}],
        "parameters": {"top_k": 6, "temperature": 0.5, "stream": True},
    }
    request = parse(body, app)
    assert request.stream
    first, second = (item.sampling for item in request.items)
    assert first == Sampling(temperature=0.5, top_k=6, top_p=0.5, seed=1)
    assert second == Sampling(temperature=0.5, top_k=7, top_p=0.5, seed=1, stop=("x",))


def test_the_error_names_value_and_rule():
    with pytest.raises(RequestError) as refused:
        parse({"instances": ["a"], "parameters": {"top_p": 1.5}})
    assert refused.value.body() == {
        "error": {
            "code": 400,
            "status": "INVALID_ARGUMENT",
            "message": "parameters.top_p: should be a number over 0, at most 1, not 1.5",
            "field": "parameters.top_p",
        }
    }


def test_a_form_is_refused_with_the_remedy():
    """`curl -d` without a header sends a form, which decodes "+" and "%" inside the text."""
    with pytest.raises(RequestError, match="Content-Type: application/json"):
        parse_request({'{"instances": ["1 1"]}': b""}, APP.limits, {})
    with pytest.raises(RequestError, match="Content-Type: application/json"):
        parse_request({}, APP.limits, {})


def test_a_file_in_a_multipart_form_works():
    assert parse_request({"data": b'{"instances": ["a"]}'}, APP.limits, {}).items


@pytest.mark.parametrize("name", ["smollm2-135m", "gpt2", "dolly-v2-3b"])
def test_the_apps_defaults_are_valid(name):
    assert default_parameters(load_app(name))["max_new_tokens"] >= 1


def test_a_wrong_default_is_named():
    app = APP.model_copy(update={"parameters": {"temperature": 5}})
    with pytest.raises(RequestError, match=r"app\.parameters\.temperature: .* not 5"):
        default_parameters(app)


def test_whole_doubles_are_whole_numbers():
    """gRPC's Struct has doubles only: 50 arrives as 50.0."""
    body = b'{"instances": ["a"], "parameters": {"max_new_tokens": 5.0, "top_k": 6.0, "seed": 7e0}}'
    sampling = parse(body).items[0].sampling
    assert (sampling.max_new_tokens, sampling.top_k, sampling.seed) == (5, 6, 7)
    assert isinstance(sampling.top_k, int)
    for wrong in ("5.5", "true", '"5"', "1e300", "-1.0"):
        with pytest.raises(RequestError, match="should be a whole number"):
            parse(f'{{"instances": ["a"], "parameters": {{"top_k": {wrong}}}}}'.encode())
