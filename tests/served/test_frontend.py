"""Requests to TorchServe's frontend that are no predictions. None may stop the server."""

from collections.abc import Iterator

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
