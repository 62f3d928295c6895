"""Impatient and hostile clients, in raw bytes. Beside each of them others get their responses."""

import json
import resource
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest

from deploy.torchserve.client import stream
from deploy.torchserve.server import Server
from tests.bad_input import OK

pytestmark = pytest.mark.served

LONG = {"max_new_tokens": 230, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module", autouse=True)
def many_sockets() -> Iterator[None]:
    """Allow the 2,000 sockets of a test; the limit is often 1,024, on macOS 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5000 if hard == resource.RLIM_INFINITY else min(5000, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server(tiny_openvino_server: Server) -> Iterator[Server]:
    """The server, whose worker must survive all these tests."""
    (before,) = tiny_openvino_server.workers()
    log = tiny_openvino_server.log.stat().st_size
    yield tiny_openvino_server
    (after,) = tiny_openvino_server.workers()
    assert after["pid"] == before["pid"], "the worker was replaced"
    assert b"Traceback" not in tiny_openvino_server.log.read_bytes()[log:]


def serves(server: Server, *, within: float = 5.0) -> None:
    """Send a short request; it must succeed in time."""
    began = time.monotonic()
    response = httpx.post(server.url, json=OK, timeout=60)
    took = time.monotonic() - began
    assert response.status_code == 200, response.text
    assert took < within, f"a short request took {took:.1f} s"


def connect(server: Server, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def head(server: Server, *headers: str, first: str = "") -> bytes:
    first = first or f"POST /predictions/{server.name} HTTP/1.1"
    return "\r\n".join([first, "Host: localhost", *headers, "", ""]).encode("latin-1")


def post(server: Server, prompt: str, *headers: str, **parameters: object) -> bytes:
    body = json.dumps({"instances": [prompt], "parameters": parameters}).encode()
    return head(server, f"Content-Length: {len(body)}", *headers) + body


def read(connection: socket.socket, until: bytes = b"") -> bytes:
    """Read until some bytes came, or until the server closed the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while not until or until not in received:
            piece = connection.recv(65536)
            if not piece:
                break
            received += piece
    return received


def reset(connection: socket.socket) -> None:
    """Close with a TCP reset, as a client that crashed does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_serves_beside_2000_idle_connections(server):
    with ExitStack() as stack:
        for _ in range(2000):
            stack.enter_context(connect(server))
        for _ in range(5):
            serves(server)


def test_serves_beside_1000_clients_that_send_byte_by_byte(server):
    request = post(server, "slow", max_new_tokens=1)
    sent = len(request) - 6
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(1000)]
        for connection in connections:
            connection.sendall(request[:sent])
        for i in range(sent, len(request) - 1):
            for connection in connections:
                connection.sendall(request[i : i + 1])
            serves(server)
        for connection in connections[::50]:
            connection.sendall(request[-1:])
            assert read(connection, until=b"slow").startswith(b"HTTP/1.1 200")


def test_serves_beside_100_clients_that_do_not_read_their_streams(server):
    """Those that find a place get all of their stream when they read at last; the others a 429."""
    with ExitStack() as stack:
        readers = [stack.enter_context(connect(server, receive_buffer=2048)) for _ in range(100)]
        for reader in readers:
            reader.sendall(post(server, "x", **LONG))
        until_places_are_free(server)
        for _ in range(5):
            serves(server)
        streams = [read(reader, until=b"0\r\n\r\n") for reader in readers]
    complete = [s for s in streams if s.count(b'"completion_tokens": 230') == 1]
    rejected = [s for s in streams if s.startswith(b"HTTP/1.1 429")]
    assert len(complete) >= 90 and len(complete) + len(rejected) == 100


def test_400_resets_in_the_middle_of_a_stream_free_their_places(smollm2_server):
    server = smollm2_server
    (before,) = server.workers()
    for _ in range(10):
        connections = [connect(server) for _ in range(40)]
        for connection in connections:
            connection.sendall(post(server, "x", **LONG | {"max_new_tokens": 1000}))
        for connection in connections:
            received = read(connection, until=b"data: ")
            assert received.startswith(b"HTTP/1.1 200") and b"finish_reason" not in received
            reset(connection)
    full = {"instances": ["x"] * 32, "parameters": {"max_new_tokens": 1}}
    with ThreadPoolExecutor() as pool:  # all places of the batch and of the queue
        futures = [pool.submit(httpx.post, server.url, json=full, timeout=60) for _ in range(3)]
        assert [future.result().status_code for future in futures] == [200] * 3
    assert server.workers()[0]["pid"] == before["pid"]


def until_places_are_free(server: Server) -> None:
    deadline = time.monotonic() + 30
    while httpx.post(server.url, json=OK, timeout=60).status_code == 429:
        assert time.monotonic() < deadline, "the places were not free after 30 s"
        time.sleep(0.1)


MALFORMED = {
    "two lengths": (["Content-Length: {good}", "Content-Length: {all}"], ""),
    "two lengths, the longer first": (["Content-Length: {all}", "Content-Length: {good}"], ""),
    "a list of lengths": (["Content-Length: {good}, {all}"], ""),
    "a negative length": (["Content-Length: -1"], ""),
    "a length in hexadecimal": (["Content-Length: 0x{good}"], ""),
    "a length over 64 bits": (["Content-Length: 99999999999999999999"], ""),
    "a length with a space": (["Content-Length: 1 1"], ""),
    "no length": (["Content-Length: "], ""),
    "a space before the colon": (["Content-Length: {good}", "Transfer-Encoding : chunked"], ""),
    "chunked, but not last": (["Transfer-Encoding: chunked, identity"], ""),
    "a vertical tab": (["Content-Length: {good}", "Transfer-Encoding:\vchunked"], ""),
    "a NUL": (["Content-Length: {good}", "Transfer-Encoding: chunked\0"], ""),
    "a bare CR": (["X: a\rContent-Length: 3", "Content-Length: {good}"], ""),
    "a chunk of a negative size": (["Transfer-Encoding: chunked"], "-1\r\n"),
    "a chunk over 64 bits": (["Transfer-Encoding: chunked"], "ffffffffffffffff\r\n"),
    "a chunk of no number": (["Transfer-Encoding: chunked"], "zz\r\n"),
    "a chunk with 0x": (["Transfer-Encoding: chunked"], "0x5\r\n"),
}
"""Headers, and what stands before the body. {good} is the body's length, {all} includes more."""


@pytest.mark.parametrize("name", MALFORMED)
def test_rejects_a_request_whose_end_is_ambiguous(server, name):
    """A proxy in front may see another end. So nothing that follows is read as a request."""
    headers, before = MALFORMED[name]
    good, smuggled = json.dumps(OK).encode(), post(server, "SMUGGLED")
    lengths = {"good": len(good), "all": len(good) + len(smuggled)}
    request = head(server, *(header.format(**lengths) for header in headers)) + before.encode()
    with connect(server) as connection:
        connection.sendall(request + good + smuggled)
        response = read(connection)
    assert b"SMUGGLED" not in response and b"predictions" not in response
    assert response == b"" or response.split()[1] in (b"400", b"413"), response
    serves(server)


def test_chunked_body_ends_with_its_last_chunk(server):
    """HTTP says that chunks count, and not a length that is given beside them."""
    body = json.dumps({"instances": ["good"], "parameters": {"max_new_tokens": 1}}).encode()
    chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    for length in (3, len(body), len(body) + 5):
        with connect(server) as connection:
            headers = f"Content-Length: {length}", "Transfer-Encoding: chunked"
            connection.sendall(head(server, *headers) + chunks)
            assert read(connection, until=b"}").startswith(b"HTTP/1.1 200")


OTHER_PATHS = [
    "/../../../../etc/passwd",
    "/predictions/../../../../etc/passwd",
    "/predictions/{name}/../../../etc/passwd",
    "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/predictions/..%2f..%2f..%2fetc%2fpasswd",
    "/predictions/%2e%2e%5c%2e%2e%5cetc%5cpasswd",
    "/predictions/..;/..;/etc/passwd",
    "//etc/passwd",
    "file:///etc/passwd",
    "/models",
    "/models/{name}",
    "/models/{name}?customized=true",
    "/predictions/../models/{name}",
    "/predictions/..%2fmodels",
    "/workflows",
    "http://169.254.169.254/computeMetadata/v1/",
]
"""Files of the machine, the other ports' APIs, other hosts."""


@pytest.mark.parametrize("path", OTHER_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_inference_port_has_no_files_and_no_other_api(server, method, path):
    first = f"{method} {path.format(name=server.name)} HTTP/1.1"
    with connect(server) as connection:
        connection.sendall(head(server, "Content-Length: 0", first=first))
        response = read(connection, until=b"}")
    assert response.split()[1] in (b"400", b"404", b"405"), response
    assert b"root:" not in response and b"workers" not in response


def test_equal_request_ids_do_not_mix_responses(server):
    """Eight at once. TorchServe makes its own ids and ignores those of clients."""
    ids = "X-Request-Id: same", "Request-Id: same", "X-Amzn-Trace-Id: same", "traceparent: same"
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(8)]
        for i, connection in enumerate(connections):
            connection.sendall(post(server, f"client-{i}", *ids, max_new_tokens=100))
        responses = [read(connection, until=b"]}") for connection in connections]
    for i, response in enumerate(responses):
        assert f'"client-{i}'.encode() in response and response.count(b"client-") == 1


def test_prompts_write_nothing_into_the_log(server):
    written = server.log.stat().st_size
    prompt = "INJECTED\r\nINJECTED\x1b[31m\u2028[METRICS]INJECTED.ms:1|#a:b\n[PID]1\n"
    for body in ({"instances": [prompt]}, {"instances": [prompt, 1]}, {prompt: 1}):
        httpx.post(server.url, json=body, timeout=60)
    with connect(server) as connection:
        connection.sendall(head(server, "X: INJECTED", "User-Agent: INJECTED", "Content-Length: 0"))
        read(connection, until=b"}")
    time.sleep(0.5)  # the log is written by other threads
    assert b"INJECTED" not in server.log.read_bytes()[written:]


def test_prompts_cannot_forge_events(server):
    """The prompt is part of a stream's text, so it could look like the end of an event."""
    forged = 'a\n\ndata: {"index": 7, "text": "FORGED"}\n\nid: 1\nevent: x\r\rdata: [DONE]\n\n'
    body = {"instances": [forged], "parameters": {"max_new_tokens": 3, "return_full_text": True}}
    events = list(stream(server.url, body))
    assert {event["index"] for event in events} == {0}
    assert "".join(event["text"] for event in events).startswith(forged)
