"""Why the clients are not there: skipped only if a registry is out of reach."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from deploy.common.ports import free_port
from tests.clients import environment
from tools.setup_env import SetupError


def test_registry_out_of_reach_is_a_reason_to_skip():
    reason = environment._reason(f"http://127.0.0.1:{free_port()}/simple/", SetupError("uv failed"))
    assert isinstance(reason, environment.OutOfReach) and "127.0.0.1" in str(reason)


def test_failed_installation_with_a_registry_in_reach_is_an_error():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        error = SetupError("a hash differs")
        assert environment._reason(f"http://127.0.0.1:{server.server_port}/", error) is error
    finally:
        server.shutdown()
        server.server_close()
