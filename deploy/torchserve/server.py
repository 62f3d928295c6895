"""Start TorchServe, wait until a worker is ready, stop all of it again.

    python -m deploy.torchserve smollm2-135m                 # archive and serve, until Ctrl-C
    python -m deploy.torchserve smollm2-135m --quickstart    # one request, then stop

How it is started and set is shared with the container: `deploy/torchserve/launch.py` and
`docker/config.properties`.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from deploy.common.guard import dismiss, guard
from deploy.common.paths import BUILD, ROOT, UserError, shown
from deploy.torchserve.java import find_java
from deploy.torchserve.launch import java_command, read_properties

PORT = 7080
OMELETTE = {"instances": ["How to prepare a spanish omelette:"]}
"""The original project's request."""

_LOG4J = ROOT / "docker" / "log4j2.xml"
_SETTINGS = ROOT / "docker" / "config.properties"
_LOAD_FAILED = ("Failed to load model", "Backend worker process died", "Load model failed")


class ServerError(UserError):
    """TorchServe did not start, or died; the message ends with what it last wrote."""


class Server:
    """One TorchServe process tree serving one archive.

    Use it in a `with` block, or call `start()` and `stop()`. Ports: inference on `port`,
    management, metrics and gRPC on the four after it, workers' sockets in a private folder, so
    servers on ports that are ten apart do not meet.

    Args:
        archive: what `deploy.archive.build.build_archive` returned.
        port: the inference port; only this one may be reached from other machines.
        host: the address to listen on; the default is this machine alone.
        settings: further lines for config.properties, which win over ours.
        environment: further environment variables for Java and the workers.
    """

    def __init__(
        self,
        archive: Path,
        *,
        port: int = PORT,
        host: str = "127.0.0.1",
        settings: dict[str, str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.archive = Path(archive)
        self.name = self.archive.name.removesuffix(".mar")
        self.port, self.host = port, host
        self.settings = settings or {}
        self.environment = environment or {}
        self.process: subprocess.Popen | None = None
        self.log = BUILD / f"server-{port}.log"
        self._temporary: Path | None = None
        self._guard: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Where predictions are asked for."""
        return f"http://127.0.0.1:{self.port}/predictions/{self.name}"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.port + 1}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.port + 2}/metrics"

    @property
    def ports(self) -> range:
        return range(self.port, self.port + 5)

    def start(self, deadline: float = 1200.0) -> "Server":
        """Start and return when a worker is READY.

        Args:
            deadline: seconds to wait; loading the model is most of it.

        Raises:
            ServerError: a port is taken, the model cannot be loaded, or time is up.
        """
        self.check_ports()
        if not self.archive.exists():
            raise ServerError(
                f"{shown(self.archive)}: there is no such archive; run `make archive`"
            )
        java = find_java()
        BUILD.mkdir(exist_ok=True)
        try:
            # Short, because the path of a worker's socket may have 107 characters at most.
            self._temporary = Path(tempfile.mkdtemp(prefix="ts-"))
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    self._command(java),
                    env=self._environment(),
                    cwd=self._temporary,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us; we stop the rest in order
                )
            self._guard = guard(self.process.pid, self._temporary)
            self._wait_until_ready(time.monotonic() + deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def check_ports(self) -> None:
        """Make sure all five ports are free.

        Raises:
            ServerError: one is not; the message names its holder.
        """
        for port in self.ports:
            if holder := port_holder(port):
                raise ServerError(
                    f"port {port} is taken by {holder}. A server takes five, here {self.port} to "
                    f"{self.port + 4}: stop that program, or choose others with PORT="
                )

    def ready(self) -> bool:
        """Whether a worker has loaded the model.

        `/ping` cannot tell: it answers 200 as soon as the port is open.
        """
        return any(worker["status"] == "READY" for worker in self.workers())

    def workers(self) -> list[dict]:
        """The model's workers as the management API lists them; empty if it does not answer."""
        try:
            reply = httpx.get(f"{self.management}/models/{self.name}", timeout=5)
            return reply.json()[0].get("workers", [])
        except (httpx.HTTPError, ValueError, LookupError):
            return []

    def stop(self, grace: float = 5.0) -> None:
        """Stop Java and every worker. Safe to call twice.

        Args:
            grace: seconds for a clean exit before the rest is killed.
        """
        if self.process is not None:
            try:
                self.process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(grace)
            finally:  # whatever happened to Java: its workers are in its process group
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            _wait_for_end_of(self.process.pid)
            self.process = None
        if self._guard is not None:
            dismiss(self._guard)
            self._guard = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def log_tail(self, lines: int = 20) -> str:
        """The last lines the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def last_words(self, lines: int = 20) -> str:
        """The end of the log, with its name: what an error message should carry."""
        return f"The end of {shown(self.log)}:\n{self.log_tail(lines)}"

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self, java: Path) -> list[str]:
        config = self._temporary / "config.properties"
        lines = [f"{key}={value}" for key, value in (self._properties() | self.settings).items()]
        config.write_text("\n".join(lines) + "\n")
        return java_command(
            java,
            config=config,
            log4j=_LOG4J,
            store=self.archive.parent.resolve(),
            archive=self.archive.name,
            temporary=self._temporary,
        )

    def _properties(self) -> dict[str, str]:
        """The container's config.properties, with addresses of our own."""
        return read_properties(_SETTINGS) | {
            "inference_address": f"http://{self.host}:{self.port}",
            "management_address": f"http://127.0.0.1:{self.port + 1}",
            "metrics_address": f"http://127.0.0.1:{self.port + 2}",
            "grpc_inference_port": str(self.port + 3),
            "grpc_management_port": str(self.port + 4),
        }

    def _environment(self) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return os.environ | offline | {"PYTHONUNBUFFERED": "1"} | self.environment

    def _wait_until_ready(self, deadline: float) -> None:
        while not self.ready():
            text = self.log.read_text(errors="replace")
            failed = any(sign in text for sign in _LOAD_FAILED)
            if failed:
                self._wait_for_silence()
            if self.process.poll() is not None:
                raise ServerError(f"TorchServe ended while starting. {self.last_words()}")
            if failed:
                raise ServerError(f"the worker could not load the model. {self.last_words(60)}")
            if time.monotonic() > deadline:
                raise ServerError(f"no worker was ready in time. {self.last_words()}")
            time.sleep(0.2)

    def _wait_for_silence(self, seconds: float = 5.0) -> None:
        """Let the rest of a traceback arrive, and Java end if it will."""
        deadline, before = time.monotonic() + seconds, -1
        while (size := self.log.stat().st_size) != before and time.monotonic() < deadline:
            before = size
            time.sleep(1)


def _wait_for_end_of(group: int, seconds: float = 5.0) -> None:
    """Wait until no process of a killed group is left, so that its ports are free again."""
    deadline = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def port_holder(port: int) -> str | None:
    """Who listens on a local port, as "name (pid 1)"; None if nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            pass
        else:
            return None
    with suppress(psutil.AccessDenied):
        for connection in psutil.net_connections("tcp"):
            listening = connection.status == psutil.CONN_LISTEN
            if listening and connection.laddr.port == port and connection.pid:
                with suppress(psutil.NoSuchProcess):
                    return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "a process of another user"
