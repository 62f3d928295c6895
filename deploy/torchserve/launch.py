"""The command that starts TorchServe, on this machine (`server.py`) and in the container.

The container's entry (`docker/serve.py`) imports only this file, which imports only the standard
library.
"""

import importlib.util
import socket
import sys
from pathlib import Path

HEAP = "512m"
"""Java's heap limit. Java's default is a quarter of the machine; the frontend uses 0.2 GB."""
_MULTICAST = "224.0.0.1"


def java_command(
    java: Path | str, *, config: Path, log4j: Path, store: Path, archive: str, temporary: Path
) -> list[str]:
    """Return Java and its arguments.

    We do not use the `torchserve` command: it leaves Java running when it is stopped, and does not
    report when Java has died.

    Args:
        java: the program.
        config: config.properties.
        log4j: the logging configuration.
        store: the model store.
        archive: the archive's name in the store; without `.mar` it is the model's name.
        temporary: an empty folder for Java's temporary files.
    """
    spec = importlib.util.find_spec("ts")  # importing TorchServe's package would import torch
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchserve is not installed")
    home = Path(spec.origin).parent.parent
    name = archive.removesuffix(".mar")
    command: list[str | Path] = [java, f"-Xmx{HEAP}", f"-Dmodel_server_home={home}"]
    command += [f"-Djava.io.tmpdir={temporary}", f"-Dlog4j.configurationFile={log4j}"]
    command += ["-cp", home / "ts" / "frontend" / "*", "org.pytorch.serve.ModelServer"]
    command += ["--python", sys.executable, "-f", config, "-ncs"]
    command += ["-s", store, "-m", f"{name}={archive}"]
    return [str(part) for part in command]


def grpc_address() -> str:
    """Return the address for TorchServe's gRPC server, which no setting switches off.

    One gRPC call stops the worker and all requests in it. On Linux a program can listen on a
    multicast address, to which nobody can connect. Elsewhere it is loopback, with a random port.
    """
    with socket.socket() as probe:
        try:
            probe.bind((_MULTICAST, 0))
            probe.listen()
        except OSError:
            return "127.0.0.1"
    return _MULTICAST


def read_properties(path: Path) -> dict[str, str]:
    """Read a file of `key=value` lines; `#` begins a comment line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
