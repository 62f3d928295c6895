"""Requests to TorchServe's frontend that are no predictions. None may stop the server."""

import gzip
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest

from deploy.torchserve.launch import grpc_address
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


def test_nobody_can_connect_to_grpc(server: Server):
    """One StreamPredictions kills the worker (TorchServe 0.12.0), and no setting removes gRPC."""
    listening = [
        connection.laddr
        for connection in psutil.Process(server.process.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    others = {ip.removeprefix("::ffff:") for ip, port in listening if port not in server.ports}
    assert others == {grpc_address()} == {"224.0.0.1"}


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
        400,
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
