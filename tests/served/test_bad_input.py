"""Bad requests among good ones: each gets its error, and the good ones succeed.

On a tiny model, so that thousands of requests take seconds.
"""

import asyncio
import json
import subprocess

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.torchserve.launch import max_request_size
from handler.request import Parameters
from tests.bad_input import BAD, GOOD, OK

pytestmark = pytest.mark.served


def payload(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def send(client: httpx.AsyncClient, url: str, body) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return await client.post(url, content=payload(body), headers=headers)


async def together(url: str, bodies: list) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        return await asyncio.gather(*(send(client, url, body) for body in bodies))


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def any_server(request):
    """Both engines."""
    names = {"transformers": "tiny_server", "openvino": "tiny_openvino_server"}
    return request.getfixturevalue(names[request.param])


@pytest.fixture(scope="module")
def worker_pid(any_server):
    return any_server.workers()[0]["pid"]


@pytest.fixture(scope="module")
def mixed(any_server):
    """Every bad body between two good ones, all in flight at once."""
    good = httpx.post(any_server.url, json=OK).json()
    bodies = [item for _, body, *_ in BAD for item in (OK, body)] + [OK]
    responses = asyncio.run(together(any_server.url, bodies))
    return good, responses[0::2], responses[1::2]


def test_good_requests_among_bad_ones_succeed(mixed, any_server, worker_pid):
    good, good_responses, _ = mixed
    assert len(good_responses) == len(BAD) + 1
    assert [response.status_code for response in good_responses] == [200] * len(good_responses)
    assert all(response.json() == good for response in good_responses)
    assert any_server.workers()[0]["pid"] == worker_pid, "the worker was replaced"


@pytest.mark.parametrize("index", range(len(BAD)), ids=[case[0] for case in BAD])
def test_rejects(mixed, index):
    _, _, status, part, field = BAD[index]
    response = mixed[2][index]
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == status and error["status"] == "INVALID_ARGUMENT"
    assert part in error["message"]
    assert field is None or error["field"] == field


@pytest.mark.parametrize("body", [body for _, body in GOOD], ids=[name for name, _ in GOOD])
def test_accepts(any_server, worker_pid, body):
    response = httpx.post(
        any_server.url, content=payload(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == 200, response.text
    assert response.json()["predictions"]
    assert any_server.workers()[0]["pid"] == worker_pid


def test_returns_control_characters_and_emoji_unchanged(smollm2_server):
    prompt = "a\u0000\u0007\u001b[31m\r\n🍳 👩‍🍳 日本語 𝕬"
    body = {"instances": [prompt], "parameters": {"max_new_tokens": 1}}
    response = httpx.post(smollm2_server.url, json=body, timeout=60)
    assert response.json()["predictions"][0].startswith(prompt)


def test_curl_needs_no_header_for_json(any_server):
    """`curl -d` calls the body a form, whose decoding would change "+", "%" and "&"."""
    prompt = "1 + 1 = 2 & 100% %41"
    body = {"instances": [prompt], "parameters": {"return_full_text": True, "max_new_tokens": 1}}
    command = ["curl", "-s", any_server.url, "-d", "  " + json.dumps(body)]
    (prediction,) = json.loads(subprocess.run(command, capture_output=True).stdout)["predictions"]
    assert prediction.startswith(prompt)


@pytest.mark.parametrize(
    "form", [{"data": {'{"instances": ["a"]}': ""}}, {"files": {"data": b"{}"}}]
)
def test_form_is_rejected_with_the_header_to_send(any_server, form):
    response = httpx.post(any_server.url, **form)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
def test_rejects_other_http_methods(any_server, worker_pid, method):
    """TorchServe passes every method to the handler; our frontend says which it is."""
    response = httpx.request(method, any_server.url, content=payload(OK))
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert method == "HEAD" or f"{method} is not supported" in response.json()["error"]["message"]
    assert any_server.workers()[0]["pid"] == worker_pid


def test_unknown_model_and_route_are_404(any_server):
    base = any_server.url.rsplit("/", 1)[0]
    assert httpx.post(f"{base}/other", json=OK).status_code == 404
    assert httpx.post(f"{base}/tiny/9.9", json=OK).status_code == 404
    assert httpx.get(f"{base}/../nothing").status_code in (404, 405)


def test_rejects_body_over_the_limit_of_the_frontend(any_server, worker_pid):
    """The frontend rejects bodies far over the app's limit; the handler does not see them."""
    body = b" " * (max_request_size(any_server.archive) + 1)
    response = httpx.post(any_server.url, content=body, timeout=60)
    assert response.status_code == 413 and not response.content
    response = httpx.post(any_server.url, content=body[:-1], timeout=60)
    assert response.status_code == 413
    assert "at most 300000 are allowed" in response.json()["error"]["message"]
    assert httpx.post(any_server.url, json=OK).status_code == 200


def test_accepts_unusual_headers(any_server, worker_pid):
    headers = {"x-odd": "caf\xe9".encode("latin-1"), "x-empty": "", "cookie": "a=b" * 500}
    assert httpx.post(any_server.url, json=OK, headers=headers).status_code == 200
    assert any_server.workers()[0]["pid"] == worker_pid


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from([*Parameters.model_fields, "stream", "nonsense"])
parameters = st.dictionaries(names, st.sampled_from([0, 1, 0.5, 2, "a", ["b"], True]) | values)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"])})
    | st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=50)}),
    max_size=3,
)
instances = st.lists(
    st.text(max_size=60)
    | st.fixed_dictionaries({"prompt": st.text(max_size=60)}, optional={"parameters": parameters})
    | st.fixed_dictionaries({"messages": messages})
    | values,
    max_size=4,
)
bodies = (
    st.fixed_dictionaries({"instances": instances}, optional={"parameters": parameters}).map(
        payload
    )
    | values.map(payload)
    | st.binary(max_size=100)
)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=bodies)
def test_500_random_requests_get_a_200_or_400(any_server, worker_pid, body):
    """Each gets its response within 20 s, never a 5xx, and the worker survives."""
    headers = {"content-type": "application/json"}
    response = httpx.post(any_server.url, content=body, headers=headers, timeout=20)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]


def test_worker_survived_all_tests(any_server, worker_pid):
    (worker,) = any_server.workers()
    assert worker["pid"] == worker_pid and worker["status"] == "READY"
    assert "Traceback" not in any_server.log.read_text()
