"""The container's entry: start TorchServe, watch it, and drain and stop it on SIGTERM.

Environment variables, all optional:
    AIP_HTTP_PORT     the port to listen on; Vertex AI sets it
    AIP_STORAGE_URI   gs://bucket/folder with the archive, for an image without weights; also set
                      by Vertex AI
    CORS_ORIGIN       the origin of the web pages that may use the server, such as
                      http://localhost:3000, or * for all; the default is none
    MODEL_STORE       the folder with the archive, default /models
    DRAIN_SECONDS     time for requests in flight after SIGTERM; the default is below

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP; 2 for a wrong environment variable; 1 if TorchServe
ended by itself, with any code, or does not serve any more (`watch.py`), so that the platform
restarts the container.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import TextIO

import management
from launch import (
    CORS_ORIGIN,
    cors_settings,
    java_command,
    max_request_size,
    server_environment,
)
from watch import Frontend, Watcher

HERE = Path(__file__).parent
TEMPORARY = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108  the only writable folder
STATE = TEMPORARY / "serving"
DRAIN_SECONDS = 20
"""The default of the environment variable."""
METRICS_PORT = 7082
"""A port of loopback, where the worker serves metrics."""
JAVA_SECONDS = 5
"""From SIGTERM to SIGKILL for TorchServe, after the drain."""
QUIET_SECONDS = 1.0
"""TorchServe is stopped when no request was in flight for this long: responses need time to leave,
and requests need time to reach the worker."""


def main() -> int:
    """Run until a signal or until TorchServe ends; return the exit code."""
    stop = Event()
    for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(stop_signal, lambda *_: stop.set())
    try:
        drain_seconds = whole_number("DRAIN_SECONDS", DRAIN_SECONDS, most=86_400)
        port = whole_number("AIP_HTTP_PORT", 7080, least=1, most=65_535)
        if port == METRICS_PORT:
            raise ValueError(f"AIP_HTTP_PORT: port {METRICS_PORT} is for the metrics")
        check_port("AIP_HTTP_PORT", port)
        store = by_name(model_store())
        archive = only_archive(store)
        settings = {
            "AIP_HTTP_PORT": str(port),
            "HF_HUB_OFFLINE": "1",
            "SERVING_STATE": str(STATE),
            "SERVING_METRICS_PORT": str(METRICS_PORT),
            "SERVING_FRONTEND_METRICS": management.address(STATE, management.METRICS_SOCKET),
            "MAX_REQUEST_SIZE": str(max_request_size(store / archive)),
            **cors_settings(os.environ.get(CORS_ORIGIN, "")),
        }
    except (ValueError, OSError, LookupError) as error:
        say(f"error: {error}", sys.stderr)
        return 2
    STATE.mkdir(mode=0o700, exist_ok=True)
    for leftover in STATE.iterdir():
        leftover.unlink()
    command = java_command(
        "java",
        config=HERE / "config.properties",
        log4j=HERE / "log4j2.xml",
        store=store,
        archive=archive,
        temporary=TEMPORARY,
    )
    server = subprocess.Popen(command, env=server_environment(os.environ) | settings)
    get = partial(management.get, management.address(STATE))
    watcher = Watcher(Frontend(port, archive.removesuffix(".mar"), get, STATE)).start()
    while server.poll() is None and not watcher.verdict:
        if stop.wait(0.2):
            drain(drain_seconds, server)
            end(server)
            return 0
    if server.returncode is None:
        server.kill()  # a stuck frontend does not stop in order
        server.wait()
        say(f"ended TorchServe: {watcher.verdict}", sys.stderr)
    else:
        say(f"TorchServe ended by itself, with code {server.returncode}", sys.stderr)
    return 1


def say(line: str, file: TextIO = sys.stdout) -> None:
    """Write a line to the log. A log that cannot be written does not keep us from stopping."""
    with suppress(OSError):
        os.write(file.fileno(), f"{line}\n".encode())


def whole_number(name: str, default: int, *, least: int = 0, most: int) -> int:
    """Read an environment variable that holds a whole number.

    Raises:
        ValueError: it holds another value, or the number is out of range.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(f"{name}: {text!r} is not a whole number from {least} to {most}")
    return int(text)


def check_port(name: str, port: int) -> None:
    """Make sure that TorchServe will be able to listen on a port.

    Raises:
        ValueError: the port is taken, or only root may listen on it.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(f"{name}: cannot listen on port {port}: {error.strerror}") from error


def model_store() -> Path:
    """Return the folder with the archive; fill it from AIP_STORAGE_URI if the image has none."""
    store = Path(os.environ.get("MODEL_STORE", "/models"))
    uri = os.environ.get("AIP_STORAGE_URI", "")
    if not uri or (store.is_dir() and any(store.iterdir())):
        return store
    from fetch import fetch  # imports a large library that an image with weights does not need

    target = TEMPORARY / "models"
    fetch(uri, target)
    return target


def by_name(store: Path) -> Path:
    """Return the store; if it is itself an archive, a store with a link to it under its name.

    `gcloud storage cp --recursive model_store/APP gs://bucket/new` makes such a folder.

    Raises:
        ValueError: the archive's manifest has no name.
    """
    manifest = store / "MAR-INF" / "MANIFEST.json"
    if not manifest.is_file():
        return store
    try:
        name = Path(json.loads(manifest.read_text())["model"]["modelName"]).name
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{manifest}: model.modelName cannot be read: {error!r}") from error
    target = TEMPORARY / "store"
    target.mkdir(exist_ok=True)
    for leftover in target.iterdir():  # from an earlier start of the same container
        leftover.unlink()
    (target / name).symlink_to(store.absolute())
    return target


def only_archive(store: Path) -> str:
    """Return the name of the only archive in the store.

    Raises:
        LookupError: there is none, or more than one.
    """
    names = sorted(path.name for path in store.iterdir()) if store.is_dir() else []
    if len(names) != 1:
        content = f"holds {', '.join(names)}" if names else "is empty"
        raise LookupError(
            f"{store} {content}, but should hold one archive: mount it, or set AIP_STORAGE_URI"
        )
    return names[0]


def drain(seconds: int, server: subprocess.Popen) -> None:
    """Let requests in flight finish; the handler rejects new ones with 503 (`handler/drain.py`)."""
    with suppress(OSError):  # a cleaner of /tmp may have removed the folder, or the disk is full
        STATE.mkdir(mode=0o700, exist_ok=True)
        (STATE / "draining").touch()
    say(f"stopping: requests in flight have {seconds} s")
    now = time.monotonic()
    deadline, last_busy = now + seconds, now
    while now < deadline and now - last_busy < QUIET_SECONDS and server.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if (STATE / "busy").exists():
            last_busy = now
    if now >= deadline:
        say("time is up; dropping the requests in flight")


def end(server: subprocess.Popen) -> None:
    """Stop Java, which stops its worker."""
    server.terminate()
    try:
        server.wait(JAVA_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    say("stopped")


if __name__ == "__main__":
    sys.exit(main())
