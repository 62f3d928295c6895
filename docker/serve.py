"""The container's entry: start TorchServe, drain it when the platform says stop, tell how it ended.

Environment, all of it optional:
    AIP_HTTP_PORT     where to listen (Vertex AI sets it)
    AIP_STORAGE_URI   gs://bucket/folder with the archive, for an image without weights (likewise)
    MODEL_STORE       where archives are, default /models
    DRAIN_SECONDS     how long requests in flight may take after SIGTERM, default 20

Exit codes: 0 after SIGTERM or SIGINT, 2 for a mistake in the environment, 1 if TorchServe ended by
itself, whatever its own code was: the platform should start the container again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

from launch import java_command

HERE = Path(__file__).parent
TEMPORARY = Path(os.environ.get("TMPDIR", "/tmp"))  # noqa: S108  the one place that is writable
STATE = TEMPORARY / "serving"
QUIET_SECONDS = 1.0
"""No request may have been in flight for so long before TorchServe is stopped: replies need time to
leave, and requests to get from the frontend to the worker."""


def main() -> int:
    """Run until told to stop, or until TorchServe ends; return the exit code."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        drain_seconds = whole_number("DRAIN_SECONDS", 20, most=86_400)
        if whole_number("AIP_HTTP_PORT", 7080, least=1, most=65535) in range(7081, 7085):
            raise ValueError("AIP_HTTP_PORT: 7081 to 7084 are taken, by management and metrics")
        store = by_name(model_store())
        archive = only_archive(store)
    except (ValueError, OSError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    STATE.mkdir(exist_ok=True)
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
    server = subprocess.Popen(command, env=os.environ | {"SERVING_STATE": str(STATE)})
    while server.poll() is None:
        if stop.wait(0.2):
            drain(drain_seconds, server)
            end(server)
            return 0
    print(f"TorchServe ended by itself, with code {server.returncode}", file=sys.stderr, flush=True)
    return 1


def whole_number(name: str, default: int, *, least: int = 0, most: int) -> int:
    """A variable of the environment, as a number.

    Raises:
        ValueError: it is none, or out of its range.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(f"{name}: {text!r} is no whole number from {least} to {most}")
    return int(text)


def model_store() -> Path:
    """The folder with the archive; filled from AIP_STORAGE_URI if the image has none."""
    store = Path(os.environ.get("MODEL_STORE", "/models"))
    uri = os.environ.get("AIP_STORAGE_URI", "")
    if not uri or (store.is_dir() and any(store.iterdir())):
        return store
    from fetch import fetch  # the library it needs is loaded by nobody else

    target = TEMPORARY / "models"
    fetch(uri, target)
    return target


def by_name(store: Path) -> Path:
    """The store; if it is itself an archive, another with the archive by its name in it.

    That is what `gcloud storage cp --recursive model_store/APP gs://bucket/new` makes, and it is
    as good: the manifest has the name.

    Raises:
        ValueError: the manifest has none.
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
    for leftover in target.iterdir():  # of a start before, in the same container
        leftover.unlink()
    (target / name).symlink_to(store.absolute())
    return target


def only_archive(store: Path) -> str:
    """The name of the one archive in the store.

    Raises:
        LookupError: there is none, or more than one.
    """
    found = sorted(path.name for path in store.iterdir()) if store.is_dir() else []
    if len(found) != 1:
        seen = f"holds {', '.join(found)}" if found else "is empty"
        raise LookupError(
            f"{store} {seen}, but should hold one archive: mount it, or set AIP_STORAGE_URI"
        )
    return found[0]


def drain(seconds: int, server: subprocess.Popen) -> None:
    """Let requests in flight finish; new ones are refused with 503 (`handler/drain.py`)."""
    (STATE / "draining").touch()
    print(f"stopping: requests in flight have {seconds} s", flush=True)
    now = time.monotonic()
    deadline, last_busy = now + seconds, now
    while now < deadline and now - last_busy < QUIET_SECONDS and server.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if (STATE / "busy").exists():
            last_busy = now
    if now >= deadline:
        print("time is up; requests are cut off", flush=True)


def end(server: subprocess.Popen) -> None:
    """Stop Java, which stops its worker."""
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    print("stopped", flush=True)


if __name__ == "__main__":
    sys.exit(main())
