"""Read TorchServe's management API on its Unix socket.

A web page can send a request to every port of loopback, and one GET on the management API stops all
predictions. It cannot open a Unix socket, whose folder also keeps other users out.

The container's probe (`docker/ready`) imports this file, which imports only the standard library.
"""

import json
import platform
import socket
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SOCKET = "management.sock"
"""The socket's name in the server's private folder."""
METRICS_SOCKET = "metrics.sock"
"""The name of the socket with the frontend's own metrics, which the worker reads."""
UNIX = "unix:"
"""What an address that is a socket begins with."""


def address(folder: Path, name: str = SOCKET) -> str:
    """Return an address for one of TorchServe's APIs: a socket in a private folder.

    On macOS with Apple silicon it is a random port of loopback. There TorchServe 0.12.0 has no Unix
    sockets: its netty has native code only for Linux and for macOS on Intel.
    """
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return f"{UNIX}{folder / name}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def get(address: str, path: str, timeout: float = 3.0) -> Any:
    """Return the parsed JSON of a GET request.

    Args:
        address: TorchServe's `management_address`.
        path: such as `/models`.
        timeout: seconds to connect, and to wait for each part of the response.

    Raises:
        OSError: nothing listens there, the server did not answer in time, or not with 200.
        ValueError: the response is not JSON.
    """
    connection = _connection(address, timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"{path}: status {response.status}")
        return json.loads(response.read())
    except HTTPException as error:
        raise OSError(f"{path}: {error!r}") from error
    finally:
        connection.close()


def _connection(address: str, timeout: float) -> HTTPConnection:
    if not address.startswith(UNIX):
        return HTTPConnection(urlsplit(address).netloc, timeout=timeout)
    connection = HTTPConnection("management", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(timeout)
    try:
        connection.sock.connect(address.removeprefix(UNIX))
    except OSError:
        connection.close()
        raise
    return connection
