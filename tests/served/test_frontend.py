"""Requests to TorchServe's frontend that are no predictions. None may stop the server."""

import gzip
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest

from deploy.common.waiting import wait_until
from deploy.torchserve.server import Server
from tests.bad_input import OK

pytestmark = pytest.mark.served


@pytest.fixture
def server(tiny_server: Server) -> Iterator[Server]:
    """A server that predicts before and after the test, with the same worker."""
    pid = tiny_server.workers()[0]["pid"]
    expected = httpx.post(tiny_server.url, json=OK, timeout=10).json()
    yield tiny_server
    assert httpx.post(tiny_server.url, json=OK, timeout=10).json() == expected
    assert tiny_server.workers()[0]["pid"] == pid


PAGES = (
    "/models/tiny?customized=true",
    "/models/tiny/1.0?customized=true",
    "/models/tiny?min_worker=2",
    "/models?url=http://127.0.0.1:9/other.mar",
    "/models/tiny",
    "/models",
    "/workflows",
    "/workflows/tiny",
    "/tokens",
    "/metrics?name[]=a",
    "/",
    "/ping",
    "/api-description",
    "/v2/health/live",
    "/v2/models/tiny/ready",
    "/wfpredict/tiny",
)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_no_web_page_can_stop_or_change_the_server(server: Server, method: str):
    """A page sends such requests to any port of loopback: by <img>, a form, or a preflight."""
    headers = {"origin": "http://example.com", "content-type": "text/plain"}
    for port in server.ports:
        for page in PAGES:
            url = f"http://127.0.0.1:{port}{page}"
            response = httpx.request(method, url, headers=headers, timeout=10)
            assert "access-control-allow-origin" not in response.headers, page
    with server.management_api() as management:
        (model,) = management.get("/models/tiny").json()
        assert len(management.get("/models").json()["models"]) == 1
    assert (model["minWorkers"], model["maxWorkers"]) == (1, 1)


def test_grpc_is_not_started(server: Server):
    """One StreamPredictions kills the worker (TorchServe 0.12.0), and no setting removes gRPC."""
    listening = [
        connection.laddr
        for connection in psutil.Process(server.process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {port for _, port in listening} <= set(server.ports)


BOMB = gzip.compress(b" " * 200_000_000)

UNUSUAL = {
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 500),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 500),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 500),
    "no path": (b"GET  HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "absolute URL": (b"GET http://x/ping HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    "invalid percent-encoding": (b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 403),
    "only slashes": (b"GET /// HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "long URL": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "5,000 headers": (b"GET /ping HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 400),
    "HTTP/0.9": (b"GET /ping\r\n\r\n", 400),
    "upgrade to WebSocket": (
        b"GET /ping HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        200,
    ),
    "TLS": (b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n", 400),
    "100 MB announced, waiting for 100 Continue": (
        b"POST /predictions/tiny HTTP/1.1\r\nExpect: 100-continue\r\n"
        b"Content-Length: 99999999\r\n\r\n",
        413,
    ),
    "chunk of 64 GB": (
        b"POST /predictions/tiny HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\nabc",
        400,
    ),
    "gzip bomb": (
        b"POST /predictions/tiny HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        % len(BOMB)
        + BOMB,
        413,
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_request_gets_its_status_and_stops_nobody(server: Server, name: str):
    data, status = UNUSUAL[name]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        assert connection.recv(4096).split()[1] == str(status).encode()


def test_sixteen_bodies_of_ten_megabytes_stop_nobody(server: Server):
    """Each client sends all of its body but the last byte, and waits."""
    size = 9_900_000
    head = b"POST /predictions/tiny HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size
    with ExitStack() as stack:
        clients = []
        for _ in range(16):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            clients.append(stack.enter_context(client))
            client.sendall(head + b" " * (size - 1))
        assert httpx.post(server.url, json=OK, timeout=10).status_code == 200
        for client in clients:
            assert client.recv(4096).split()[1] == b"413"


def test_urls_and_forms_put_no_control_characters_or_lines_into_the_log(server: Server):
    forged = "2026-01-01T00:00:00,000 INFO  forged"
    form = f"a=x\n{forged}\x1b[31m%zz".encode()
    with server.log.open("rb") as log:
        log.seek(0, 2)
        for head, body in (
            ("GET /\x1b[31m\x07\x9b31m\x7f", b""),
            (f"GET /%0d%0a{forged.replace(' ', '%20')}%1b%5b31m", b""),
            ("GET /\u2028\u2029\u0085\u202e", b""),
            ("POST /predictions/tiny", form),
            ("POST /predictions/tiny", b"a=%zz"),
        ):
            content = "Content-Type: application/x-www-form-urlencoded"
            lines = [f"{head} HTTP/1.1", "Host: x", content, f"Content-Length: {len(body)}", "", ""]
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall("\r\n".join(lines).encode() + body)
                assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        time.sleep(1)
        text = log.read().decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", text), text
    assert not any(line.startswith(forged) for line in text.splitlines())
    assert "\n\tat " in text, "tracebacks stay readable"


def test_log_of_a_server_is_bounded(server: Server):
    """Long URLs fill it: one line each. The file is renamed at 10 MB, and one old file is kept."""
    request = b"GET /ping?" + b"a" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    old = server.log.with_name(f"{server.log.name}.1")
    old.unlink(missing_ok=True)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for _ in range(2800):
            connection.sendall(request)
            assert b"Healthy" in connection.recv(4096)
    assert old.stat().st_size < 11e6 and server.log.stat().st_size < 3e6
    assert set(server.log.parent.glob(f"{server.log.name}.*")) == {old}


def test_killed_worker_leaves_a_line_in_the_log(tiny_server: Server):
    with tiny_server.log.open() as log:
        log.seek(0, 2)
        os.kill(tiny_server.workers()[0]["pid"], signal.SIGKILL)
        wait_until(tiny_server.ready, timeout=60)
        assert "Worker disconnected" in log.read()
