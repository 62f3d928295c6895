"""Start TorchServe, wait until a worker is ready, stop Java and all workers.

The container uses the same command (`deploy/torchserve/launch.py`) and the same settings
(`docker/config.properties`).
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import psutil

from deploy.common.environments import worker_python
from deploy.common.paths import BUILD, ROOT, UserError, shown
from deploy.common.process_guard import BoundProcess, dismiss_guard, start_guard
from deploy.common.waiting import wait_until
from deploy.torchserve import management
from deploy.torchserve.java import find_java
from deploy.torchserve.launch import (
    CORS_ORIGIN,
    cors_settings,
    engine_name,
    java_command,
    max_request_size,
    read_properties,
    server_environment,
)
from deploy.torchserve.watch import Frontend, State, Watcher
from handler.drain import VARIABLE
from handler.metrics import FRONTEND_VARIABLE, PORT_VARIABLE

PORT = 7080
_LOG4J = ROOT / "docker" / "log4j2.xml"
_SETTINGS = ROOT / "docker" / "config.properties"
_LOAD_FAILED = (
    "the model cannot be loaded",  # our handler's; the others are TorchServe's
    "Failed to load model",
    "Backend worker process died",
    "Load model failed",
)


class ServerError(UserError):
    """TorchServe did not start, or it ended; the message includes the end of its log."""


class Server:
    """One TorchServe process tree that serves one archive.

    Use it in a `with` block, or call `start()` and `stop()`. Predictions listen on `port`, metrics
    on `port` + 2. Management and the workers listen on sockets in a private folder.

    Args:
        archive: what `deploy.archive.build.build_archive` returned.
        port: the port of predictions, the only one that other machines may reach.
        host: the address to listen on; the default is this machine alone.
        settings: lines for config.properties that override ours.
        environment: additional environment variables for Java and the workers. CORS_ORIGIN is also
            read from this process's environment.
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
        self.log = BUILD / f"server-{port}.log"
        self._java: BoundProcess | None = None
        self._temporary: Path | None = None
        self._management = self._frontend_metrics = ""
        self._guard: subprocess.Popen | None = None
        self._started_in = 0.0

    @property
    def url(self) -> str:
        """The address of predictions."""
        return f"http://127.0.0.1:{self.port}/predictions/{self.name}"

    @property
    def openai_url(self) -> str:
        """The base URL for clients of OpenAI's API."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def management_address(self) -> str:
        """TorchServe's `management_address`; it begins with `unix:` if it is a socket.

        Raises:
            ServerError: the server is not started.
        """
        if not self.started:
            raise ServerError(f"the server on port {self.port} is not started")
        return self._management

    @property
    def metrics(self) -> str:
        """The address of Prometheus metrics."""
        return f"http://127.0.0.1:{self.port + 2}/metrics"

    @property
    def ports(self) -> tuple[int, int]:
        """The ports of predictions and metrics."""
        return self.port, self.port + 2

    def management_api(self, timeout: float = 5.0) -> httpx.Client:
        """Return a client of the management API, whose URLs begin with `/models`.

        Use it in a `with` block. The API listens on a socket that only this user can open.

        Raises:
            ServerError: the server is not started.
        """
        address = self.management_address
        if not address.startswith(management.UNIX):
            return httpx.Client(base_url=address, timeout=timeout)
        transport = httpx.HTTPTransport(uds=address.removeprefix(management.UNIX))
        return httpx.Client(transport=transport, base_url="http://management", timeout=timeout)

    @property
    def started(self) -> bool:
        """Whether there is a `process`, running or ended: from `start` until `stop`."""
        return self._java is not None

    @property
    def process(self) -> subprocess.Popen:
        """TorchServe's frontend, a Java process, which leads its own process group.

        Raises:
            ServerError: the server is not started.
        """
        if self._java is None:
            raise ServerError(f"the server on port {self.port} is not started")
        return self._java.process

    def start(self, timeout: float = 1200.0) -> "Server":
        """Start, and return when a worker is READY.

        Args:
            timeout: seconds to wait; most of the time goes into loading the model.

        Raises:
            ServerError: a port is taken, the model cannot be loaded, or the time is over.
        """
        self.check_ports()
        if not self.archive.exists():
            raise ServerError(
                f"{shown(self.archive)}: there is no such archive; run `make archive`"
            )
        java = find_java()
        BUILD.mkdir(exist_ok=True)
        try:
            # Short, because the path of a socket is limited to 107 characters.
            temporary = self._temporary = Path(tempfile.mkdtemp(prefix="ts-"))
            self._management = management.address(temporary)
            self._frontend_metrics = management.address(temporary, management.METRICS_SOCKET)
            self.log.write_bytes(b"")
            with self.log.open("ab") as log:  # what Java itself prints; the rest is log4j's
                self._java = BoundProcess(
                    self._command(java, temporary),
                    env=self._environment(),
                    cwd=temporary,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us; we stop Java in order
                )
            self._guard = start_guard(self.process.pid, temporary)
            began = time.monotonic()
            self._wait_until_ready(timeout)
            self._started_in = time.monotonic() - began
        except BaseException:
            self.stop()
            raise
        return self

    def check_ports(self) -> None:
        """Make sure both ports are free.

        Raises:
            ServerError: a port is taken; the message names the program that holds it.
        """
        for port in self.ports:
            if holder := port_holder(port):
                raise ServerError(
                    f"port {port} is taken by {holder}. A server needs two ports, here "
                    f"{self.port} and {self.port + 2}: stop that program, or set another PORT="
                )

    def ready(self) -> bool:
        """Whether a worker has loaded the model and answers.

        `/ping` does not show it: it answers 200 as soon as the port is open. Handlers other than
        ours do not know the probe, so for them a loaded model is enough.
        """
        if not any(worker["status"] == "READY" for worker in self.workers()):
            return False
        frontend = self._frontend()
        return not frontend.probed or frontend.check().state is State.SERVING

    def watch(self, **patience: float) -> str:
        """Wait until the server has ended or should be ended; return why.

        Args:
            patience: arguments of `Watcher`.
        """
        watcher = Watcher(self._frontend(), **{"started_in": self._started_in} | patience).start()
        while self.process.poll() is None and not watcher.verdict:
            time.sleep(0.2)
        if watcher.verdict:
            self.process.kill()  # a stuck frontend does not stop in order
        return watcher.verdict or f"TorchServe ended with code {self.process.returncode}"

    def workers(self) -> list[dict]:
        """The model's workers as the management API lists them; empty if it does not answer."""
        if not self.started:
            return []
        try:
            (description,) = management.get(self._management, f"/models/{self.name}", timeout=5)
            return description["workers"]
        except (OSError, ValueError, LookupError, TypeError):
            return []

    def stop(self, grace: float = 5.0) -> None:
        """Stop Java and every worker. Safe to call twice.

        Args:
            grace: seconds for a clean exit before the rest is killed.
        """
        if self._java is not None:
            process = self._java.process
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
            finally:  # the workers are in Java's process group, however Java ended
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with suppress(TimeoutError):  # after that, the ports are free again
                wait_until(lambda: not _group_exists(process.pid), timeout=5, interval=0.05)
            self._java.release()
            self._java = None
        if self._guard is not None:
            dismiss_guard(self._guard)
            self._guard = None
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def log_end(self, lines: int = 20) -> str:
        """Return the log's name and last lines, for an error message."""
        last = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"The end of {shown(self.log)}:", *last])

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _frontend(self) -> Frontend:
        get = partial(management.get, self.management_address)
        return Frontend(self.port, self.name, get, self._temporary or Path())

    def _command(self, java: Path, temporary: Path) -> list[str]:
        config = temporary / "config.properties"
        lines = [f"{key}={value}" for key, value in (self._properties() | self.settings).items()]
        config.write_text("\n".join(lines) + "\n")
        return java_command(
            java,
            config=config,
            log4j=_LOG4J,
            store=self.archive.parent.resolve(),
            archive=self.archive.name,
            temporary=temporary,
            python=self.worker_python(),
            log=self.log.absolute(),
        )

    def worker_python(self) -> Path:
        """Return the interpreter of the workers, which depends on the archive's engine.

        Raises:
            ServerError: the archive cannot be read.
            UserError: its engine is not installed.
        """
        try:
            return worker_python(engine_name(self.archive))
        except ValueError as error:
            raise ServerError(str(error)) from error

    def _properties(self) -> dict[str, str]:
        """The container's config.properties, with this server's addresses."""
        try:
            largest_body = max_request_size(self.archive)
        except ValueError as error:
            raise ServerError(str(error)) from error
        return read_properties(_SETTINGS) | {
            "inference_address": f"http://{self.host}:{self.port}",
            "management_address": self._management,
            "metrics_address": self._frontend_metrics,
            "max_request_size": str(largest_body),
        }

    def _environment(self) -> dict[str, str]:
        offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings = {
            "PYTHONUNBUFFERED": "1",
            VARIABLE: str(self._temporary),
            PORT_VARIABLE: str(self.port + 2),
            FRONTEND_VARIABLE: self._frontend_metrics,
        }
        variables = server_environment(os.environ) | offline | settings | self.environment
        try:
            return variables | cors_settings((os.environ | self.environment).get(CORS_ORIGIN, ""))
        except ValueError as error:
            raise ServerError(str(error)) from error

    def _wait_until_ready(self, timeout: float) -> None:
        try:
            wait_until(self._ready_unless_failed, timeout, interval=0.2)
        except TimeoutError:
            raise ServerError(
                f"no worker was ready within {timeout:g} s. {self.log_end()}"
            ) from None

    def _ready_unless_failed(self) -> bool:
        """`ready`; raise ServerError if TorchServe ended or could not load the model."""
        if self.ready():
            return True
        text = self.log.read_text(errors="replace")
        failed = any(sign in text for sign in _LOAD_FAILED)
        if failed:
            self._wait_for_complete_log()
        if self.process.poll() is not None:
            raise ServerError(f"TorchServe ended while starting. {self.log_end()}")
        if failed:
            raise ServerError(f"the worker could not load the model. {self.log_end(60)}")
        return False

    def _wait_for_complete_log(self) -> None:
        """Wait until nothing is written for a second: a traceback may be arriving."""
        sizes = [-1]

        def unchanged() -> bool:
            sizes.append(self.log.stat().st_size)
            return sizes[-1] == sizes[-2]

        with suppress(TimeoutError):
            wait_until(unchanged, timeout=5, interval=1)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def port_holder(port: int) -> str | None:
    """Return the program that listens on a local port, as "name (pid 1)"; None if there is none."""
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
            listening = connection.status == psutil.CONN_LISTEN and connection.laddr
            if listening and listening.port == port and connection.pid:
                with suppress(psutil.NoSuchProcess):
                    return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "a process of another user"
