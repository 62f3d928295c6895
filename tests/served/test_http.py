"""HTTP as clients speak it: connections that end, order, methods, paths and compressed bodies.

Much of it is the work of our frontend (`deploy/torchserve/Frontend.java`).
"""

import gzip
import json
import socket
import subprocess
import urllib.request
from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest

from deploy.torchserve.server import Server
from tests.bad_input import OK

pytestmark = pytest.mark.served

CLOSE, HTTP_10 = "Connection: close\r\n", "1.0"


def request(body: object, *, version: str = "1.1", headers: str = "", path: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path or '/predictions/tiny'} HTTP/{version}\r\nHost: x\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def body(prompt: str, tokens: int = 2, *, stream: bool = False) -> dict:
    parameters = {"max_new_tokens": tokens, "ignore_eos": True, "stream": stream}
    return {"instances": [prompt], "parameters": parameters | {"return_full_text": True}}


def exchange(server: Server, data: bytes, seconds: float = 20) -> tuple[bytes, bool]:
    """Send bytes; return all that came, and whether the server closed the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        try:
            while piece := connection.recv(65536):
                received += piece
        except TimeoutError:
            return received, False
    return received, True


PING = "GET /ping HTTP/{version}\r\nHost: x\r\n{headers}\r\n"
KINDS = {
    "a whole response": body("abc"),
    "a stream": body("abc", 5, stream=True),
    "a stream of one event": body("abc", 1, stream=True),
    "an error": {"instances": []},
    "ping": None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("version", "headers"), [("1.1", CLOSE), (HTTP_10, ""), (HTTP_10, CLOSE)])
def test_connection_ends_when_the_client_asks(tiny_server, kind, version, headers):
    if kind == "ping":
        data = PING.format(version=version, headers=headers).encode()
    else:
        data = request(KINDS[kind], version=version, headers=headers)
    response, closed = exchange(tiny_server, data)
    assert closed and b"connection: close" in response.lower()
    if kind == "a stream":
        end = b'"completion_tokens": 5'
        assert response.startswith(b"HTTP/1.1 200") and response.count(end) == 1


def test_stream_to_a_client_of_http_1_0_has_no_chunks(tiny_server):
    """Such a client knows no Transfer-Encoding and reads until the connection ends."""
    data = request(body("abc", 5, stream=True), version=HTTP_10)
    response, closed = exchange(tiny_server, data)
    head, _, content = response.partition(b"\r\n\r\n")
    assert closed and b"transfer-encoding" not in head.lower()
    events = content.decode().removesuffix("\n\n").split("\n\n")
    assert all(json.loads(event.removeprefix("data: "))["index"] == 0 for event in events)


@pytest.mark.parametrize(
    ("version", "headers"), [("1.1", ""), (HTTP_10, "Connection: keep-alive\r\n")]
)
def test_connection_stays_open_otherwise(tiny_server, version, headers):
    address = ("127.0.0.1", tiny_server.port)
    with socket.create_connection(address, timeout=20) as connection:
        for _ in range(3):
            connection.sendall(request(OK, version=version, headers=headers))
            response = connection.recv(65536)
            assert response.startswith(b"HTTP/1.1 200") and b"keep-alive" in response.lower()


def test_pipelined_requests_get_their_responses_in_order(tiny_server):
    """The first one takes longest, so TorchServe alone would answer it last."""
    prompts = [f"client-{i:02}" for i in range(12)]
    requests = [request(body(p, 100 - 8 * i)) for i, p in enumerate(prompts)]
    requests[5] = PING.format(version="1.1", headers="").encode()
    requests[6] = request(body(prompts[6], 9, stream=True))
    requests[-1] = request(body(prompts[-1], 1), headers=CLOSE)
    response, closed = exchange(tiny_server, b"".join(requests))
    parts = response.split(b"HTTP/1.1 200")[1:]
    assert closed and len(parts) == len(prompts)
    assert b"Healthy" in parts[5]
    for i, part in enumerate(parts):
        assert i == 5 or (prompts[i].encode() in part and part.count(b"client-") == 1)
    ids = {part.split(b"x-request-id: ")[1][:36] for part in parts}
    assert len(ids) == len(prompts)


def test_pipelined_requests_after_an_error_are_dropped_with_the_connection(tiny_server):
    """TorchServe closes after each error, which tells the client to send the others again."""
    response, closed = exchange(tiny_server, request({}) + request(body("SECOND")))
    assert closed and response.startswith(b"HTTP/1.1 400") and b"SECOND" not in response


def test_client_that_leaves_with_pipelined_requests_affects_no_other(tiny_server):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", tiny_server.port)) as connection:
            connection.sendall(request(body("gone", 50)) * 20)
    assert httpx.post(tiny_server.url, json=OK, timeout=60).status_code == 200


def test_clients_that_close_after_each_request(tiny_server):
    """They wait for the end of the connection, or at least ask for it."""
    content = json.dumps(OK).encode()
    header = "Content-Type: application/json"
    for options in (["--http1.0"], ["--http1.1", "-H", "Connection: close"], ["--http1.1"]):
        command = ["curl", "-sS", "--max-time", "10", *options, "-H", header]
        run = subprocess.run([*command, "-d", content, tiny_server.url], capture_output=True)
        assert b"predictions" in run.stdout, run.stderr
    with urllib.request.urlopen(
        urllib.request.Request(tiny_server.url, content, {"Content-Type": "application/json"})
    ) as response:
        assert b"predictions" in response.read()
    with closing(HTTPConnection("127.0.0.1", tiny_server.port, timeout=10)) as connection:
        connection.request("POST", "/predictions/tiny", content, {"Connection": "close"})
        response = connection.getresponse()
        assert response.will_close and b"predictions" in response.read()


COMPLETION = {"prompt": "abc", "max_tokens": 3, "temperature": 0}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/completions/",
        "//v1//completions",
        "/v1/completions?api-version=2",
        "/openai/v1/completions",
        "/predictions/tiny/v1/completions",
        "/predictions/tiny/1.0//v1//completions/",
        "/predictions//tiny/1.0/v1/completions",
    ],
)
def test_openai_paths_without_name_or_version_lead_to_the_model(tiny_server, path):
    base = tiny_server.url.split("/predictions")[0]
    full = httpx.post(f"{tiny_server.url}/1.0/v1/completions", json=COMPLETION, timeout=30)
    response = httpx.post(base + path, json=COMPLETION, timeout=30)
    assert response.status_code == full.status_code == 200, response.text
    assert response.json()["choices"] == full.json()["choices"]
    assert len(response.history) == 0, "no redirect, which not all clients follow"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/predictions/tiny/v1/models"])
def test_models_are_listed_without_name_or_version(tiny_server, path):
    response = httpx.get(tiny_server.url.split("/predictions")[0] + path, timeout=30)
    assert response.status_code == 200 and '"tiny"' in response.text


@pytest.mark.parametrize("path", ["/v1/models/tiny:predict", "/invocations", "/models/tiny/invoke"])
def test_paths_of_kserve_and_sagemaker_still_work(tiny_server, path):
    url = tiny_server.url.split("/predictions")[0] + path
    expected = httpx.post(tiny_server.url, json=OK, timeout=30).json()
    forged = {"url_path": "v1/models", "http_method": "GET"}
    assert httpx.post(url, json=OK, headers=forged, timeout=30).json() == expected


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/nothing", "/v1/chat/completions"),
        ("/v1/embeddings", "/v1/chat/completions"),
        ("/predictions/tiny/1.0/chat/completions", "/v1/chat/completions"),
        ("/predictions/tiny/2.0/v1/completions", "2.0 does not exist"),
        ("/predictions/other/v1/completions", "not found"),
        ("/chat/completions", "not found"),
        ("/v2/completions", "not found"),
    ],
)
def test_wrong_path_is_404_and_named(tiny_server, path, named):
    url = tiny_server.url.split("/predictions")[0] + path
    response = httpx.post(url, json=COMPLETION, timeout=30)
    assert response.status_code == 404 and named in response.text, response.text


def generated_tokens(server: Server) -> str:
    """Return the lines of the metrics that count tokens."""
    lines = httpx.get(server.metrics, timeout=10).text.splitlines()
    counts = [line for line in lines if "token" in line and not line.startswith("#")]
    assert counts
    return "\n".join(sorted(counts))


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", ["", "/1.0", "/1.0/v1/chat/completions", "/1.0/v1/models"])
def test_other_methods_answer_at_once_and_generate_nothing(tiny_server, method, path):
    before = generated_tokens(tiny_server)
    response = httpx.request(method, tiny_server.url + path, json=OK, timeout=5)
    lists = path.endswith("models") and method in ("GET", "HEAD")
    expected = 200 if method == "OPTIONS" or lists else 405
    assert response.status_code == expected, response.text
    if expected == 405:
        assert response.headers["allow"] == ("GET" if path.endswith("models") else "POST")
    assert generated_tokens(tiny_server) == before


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "PATCH", "DELETE"])
def test_metrics_answer_get_and_head_only(tiny_server, method):
    url = tiny_server.url.split("/predictions")[0] + "/metrics"
    response = httpx.request(method, url, timeout=5)
    assert response.status_code == (200 if method in ("GET", "HEAD") else 405)


@pytest.mark.parametrize("name", ["Content-Encoding", "content-encoding"])
def test_gzip_bodies_are_read(tiny_server, name):
    content = gzip.compress(json.dumps(OK).encode())
    headers = {name: "gzip", "content-type": "application/json"}
    expected = httpx.post(tiny_server.url, json=OK, timeout=30).json()
    response = httpx.post(tiny_server.url, content=content, headers=headers, timeout=30)
    assert response.status_code == 200 and response.json() == expected


@pytest.mark.parametrize(
    ("content", "headers", "status", "named"),
    [
        (gzip.compress(b"{}")[:-5], {"content-encoding": "gzip"}, 400, "its end is missing"),
        (b"{}", {"content-encoding": "br"}, 415, "br"),
        (gzip.compress(b" " * 10_000_000), {"content-encoding": "gzip"}, 413, "300000 bytes"),
        ('{"instances": ["a"]}'.encode("utf-16"), {}, 400, "UTF-16"),
        (b'\xef\xbb\xbf{"instances": ["a"]}', {}, 400, "BOM"),
        (b'{"instances": ["\xe9"]}', {}, 400, "0xe9"),
        (b'{"instances": ["a"]}', {"content-type": "text/plain"}, 415, "text/plain"),
        (b"instances=a", {"content-type": "application/x-www-form-urlencoded"}, 415, "form"),
        (b'{"instances": ["a"]}', {"origin": "http://example.com"}, 403, "example.com"),
        (b'{"instances": ["a"]}', {"Sec-Fetch-Site": "cross-site"}, 403, "web page"),
    ],
)
def test_wrong_body_is_named(tiny_server, content, headers, status, named):
    for path in ("", "/1.0/v1/completions"):
        response = httpx.post(tiny_server.url + path, content=content, headers=headers, timeout=30)
        assert response.status_code == status, response.text
        assert named in response.json()["error"]["message"]
